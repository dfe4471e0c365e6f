"""The strength of an adapter at run time: y = W x + factor * scaling * A M B^T x, with the calls of stock LoRA.

diffusers' `set_adapters(names, weights)` and `cross_attention_kwargs={"scale": ...}` come in through these methods.
"""

from __future__ import annotations

from typing import NamedTuple


class _Step(NamedTuple):
    factor: float
    before: float
    after: float


class Scales:
    """A layer's factors per adapter. `scaling` is what every forward path, merging and export multiply by."""

    scaling: dict[str, float]
    active_adapters: list[str]
    merged_adapters: list[str]

    def __init__(self) -> None:
        #: adapter -> the scaling that its config asks for.
        self.initial_scaling: dict[str, float] = {}
        #: adapter -> what scale_layer did and unscale_layer has not undone yet.
        self.scale_steps: dict[str, list[_Step]] = {}

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the configured scaling of `adapter` by `scale`, whatever it was before; 1 restores it exactly.

        A layer without this adapter stays as it is. Raises ValueError while the adapter is merged.
        """
        if adapter in self.scaling:
            self._rescale(adapter, scale * self.initial_scaling[adapter])
            self.scale_steps.pop(adapter, None)

    def scale_layer(self, scale: float) -> None:
        """Multiply the current scaling of the active adapters by `scale`. Raises ValueError while one is merged."""
        for adapter in self._scaled_by(scale):
            before = self.scaling[adapter]
            self._rescale(adapter, before * scale)
            self.scale_steps.setdefault(adapter, []).append(_Step(scale, before, before * scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo scale_layer(scale) for the active adapters; None: go back to the configured scaling.

        Undoing the latest scale_layer restores the very same number, also after scale 0; any other `scale` divides.
        Raises ValueError while an active adapter is merged, and for a division by 0.
        """
        for adapter in self._scaled_by(scale):
            steps = self.scale_steps.get(adapter, [])
            if scale is None:
                self._rescale(adapter, self.initial_scaling[adapter])
                steps.clear()
            elif steps and steps[-1].factor == scale and steps[-1].after == self.scaling[adapter]:
                self._rescale(adapter, steps.pop().before)
            elif scale == 0:
                raise ValueError(
                    f"adapter {adapter!r} was not scaled by 0 last, so scale 0 cannot be undone: "
                    "call unscale_layer() to go back to the configured scaling."
                )
            else:
                self._rescale(adapter, self.scaling[adapter] / scale)

    def _scaled_by(self, scale: float | None) -> list[str]:
        # Checked for all before the first is changed. A factor of 1 changes nothing, so it is fine while merged.
        found = [] if scale == 1 else [a for a in self.active_adapters if a in self.scaling]
        for adapter in found:
            self._check_unmerged(adapter)
        return found

    def _rescale(self, adapter: str, value: float) -> None:
        if value != self.scaling[adapter]:
            self._check_unmerged(adapter)
            self.scaling[adapter] = value

    def _check_unmerged(self, adapter: str) -> None:
        if adapter in self.merged_adapters:
            raise ValueError(
                f"adapter {adapter!r} is merged into the base weight, so its scale cannot change: "
                "call unmerge_adapter() first."
            )
