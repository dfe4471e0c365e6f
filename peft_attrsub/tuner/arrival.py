"""What weights that arrive at a layer say about their basis, and whether they belong there."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from ..basis import BasisError
from .adapted import AdaptedLayer
from .fingerprint import Fingerprint


@dataclass(frozen=True)
class Arrival:
    """The tensors of one core in a state dict; None: not in it. sizes: of older adapter files."""

    core: Tensor | None
    fingerprint: Tensor | None
    a: Tensor | None
    b: Tensor | None
    sizes: Tensor | None

    @property
    def brings_basis(self) -> bool:
        return self.a is not None and self.b is not None


def check_arrival(arrival: Arrival, layer: AdaptedLayer, adapter: str, module: str) -> bool:
    """Whether a state dict holds a core for this layer; it has to belong to the basis of the layer's adapter.

    Raises BasisError for a core that was trained in another basis, for a basis that arrives at an adapter that points
    to one, and for a core without its basis where the layer does not hold that. Warns where nothing can be checked.
    """
    if arrival.core is None and arrival.a is None and arrival.b is None:
        return False
    came = None if arrival.fingerprint is None else Fingerprint.read(arrival.fingerprint)
    held = layer.fingerprint(adapter)
    own = "a basis that has not been loaded" if held is None else f"the basis {held}"
    whose = "weights" if came is None else f"weights trained in the basis {came}"
    there = f"module {module!r} of adapter {adapter!r}"
    ways = "load them under another adapter name, or make the adapter with the config that was saved with them."
    if not layer.attrsub_A.stores(adapter):
        if arrival.a is not None or arrival.b is not None:
            raise BasisError(f"{whose} bring their own basis to {there}, which points to {own}: {ways}")
    elif arrival.brings_basis:
        if arrival.core is None:
            raise BasisError(f"a basis for {there} comes without the core that was trained in it: load both.")
        return True
    elif arrival.a is not None or arrival.b is not None:
        raise BasisError(f"{whose} for {there} hold only one of attrsub_A and attrsub_B: the file is damaged.")
    elif adapter in layer.latent or (came is not None and held is None):
        raise BasisError(f"{whose} for {there} come without their basis, which is not in the model: {ways}")
    if came is None or held is None:
        warnings.warn(
            f"weights for adapter {adapter!r} do not say in which basis they were trained, so it cannot be checked "
            f"that it was {own}; save the adapter again to record it.",
            stacklevel=3,
        )
    elif came.basis != held.basis:
        raise BasisError(f"{whose} do not fit {there}, which stands on the basis {held}: {ways}")
    elif came.columns != held.columns:
        raise BasisError(
            f"{whose} do not fit {there}: it uses other attributes, dims or column rule of that basis than they were "
            f"trained with; {ways}"
        )
    return True
