"""Where a layer's A and B come from: a saved basis, or the layer's own weight ("psv"), or a seed."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._machine import release_memory
from ..basis import Basis, BasisError
from ..basis.ahead import ReadAhead
from ..basis.joint import Stored, join, scaled_columns, spectral_weights
from ..basis.layout import ModuleLayout
from ..basis.linalg import principal_svd
from ..basis.naming import natural_key, nearest, some
from ..basis.weights import random_factors
from .config import SCALED, AttrSubspaceConfig
from .factors import Bases, Slices, read_widths, slices_of
from .fingerprint import Fingerprint, hashed
from .names import ModuleNames
from .start import CONSENSUS, Start, scales_of

if TYPE_CHECKING:
    from .adapted import AdaptedLayer


class BasisProvider:
    """Makes A and B for one adapter, module by module; nothing is held beyond the open basis."""

    def __init__(self, config: AttrSubspaceConfig) -> None:
        self._config = config
        #: attribute -> columns of A and B that earlier attributes span already, over all modules made so far.
        self.dropped: dict[str, list[int]] = {}
        #: The basis as it was saved, and the attributes and dims of it that are used.
        self.whole: Basis | None = None
        #: How the modules of the model are called in the basis (see `find_names`); all methods here take those names.
        self.names = ModuleNames(nn.Module())
        self._basis: Basis | None = None
        if not config.generated and config.basis is not None and not config.basis_in_adapter:
            self.whole = config.open_basis()
            self._basis = self.whole.select(config.attributes, config.dim)
        #: What the cores start at; None: zero.
        self.start: Start | None = None
        if config.init_weights == CONSENSUS and self._basis is not None and self.whole is not None:
            scales = scales_of(self._basis, config.init_scale)
            self.start = Start(self._basis, self.whole, config.core, scales)
        self._read_before = self._total_read
        self._ahead: ReadAhead[dict[str, Stored]] | None = None

    def find_names(self, model: nn.Module) -> None:
        """Find the modules of the basis, or of the saved adapter, in a model; the config keeps what was found.

        Raises BasisError where module_prefixes of a new adapter leads nowhere, and where the model has no module of
        an adapter that stores its basis.
        """
        config = self._config
        # An adapter that stores its basis tells the widths of it, by module.
        stored = (config.basis_widths or {}) if config.basis_in_adapter else {}
        known = stored if self.whole is None else self.whole.modules
        names = ModuleNames(model, known, config.module_prefixes)
        if config.basis_digest is None and not stored:
            names.check_given()
        if names.prefixes and config.module_prefixes is None:
            config.module_prefixes = dict(names.prefixes)
        config.names = self.names = names
        if stored and names.known.isdisjoint(map(names.of, names.own)):
            absent = some(sorted(stored, key=natural_key))
            raise BasisError(
                f"the adapter is for modules that the model does not have ({absent}), so it was trained in another "
                f"model or another wrapping.{names.hint}"
            )
        if names.hint and config.missing == "intersect":
            warnings.warn(
                "missing='intersect' leaves out modules of the basis that the model may have under other names."
                f"{names.hint}",
                stacklevel=2,
            )

    @property
    def bytes_read(self) -> int:
        """Bytes of the basis that left the disk for this adapter."""
        return self._total_read - self._read_before

    @property
    def _total_read(self) -> int:
        return 0 if self._basis is None else self._basis.bytes_read

    def plan(self, modules: Iterable[str]) -> None:
        """Say which modules `make` will be asked for, in order: the next one is read while one is computed."""
        self.close()
        if self._basis is not None:
            self._ahead = ReadAhead(self._basis.stored, modules)

    def close(self) -> None:
        """End reading ahead; the provider still works without."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    @property
    def basis(self) -> Basis | None:
        return self._basis

    @cached_property
    def modules(self) -> list[str]:
        """Modules that the basis covers with at least one direction."""
        if self._basis is None:
            return []
        basis = self._basis
        return [m for m in basis.modules if any(basis.dim(m, a) for a in basis.attributes)]

    def covers(self, module: str) -> bool:
        return self._basis is None or module in self._covered

    @cached_property
    def _covered(self) -> frozenset[str]:
        return frozenset(self.modules)

    def check_covers(self, module: str, layout: ModuleLayout) -> None:
        """Raise a sentence if the basis lacks the module or has it in another shape."""
        basis = self._basis
        if basis is None:
            return
        if not self.covers(module):
            if module in basis.modules:
                raise BasisError(
                    f"the basis holds no direction for module {module!r} (its dimension is 0): "
                    "leave it out of target_modules or set missing='intersect'."
                )
            near = some(nearest(module, self.modules)) or "none"
            raise BasisError(
                f"the basis has no module {module!r}, which target_modules asks for; nearest in the basis: {near}. "
                "Change target_modules, or set missing='intersect' to leave such modules as they are."
                f"{self.names.hint}"
            )
        known = basis.layout(module)
        if known.shape != layout.shape or known.kind != layout.kind:
            raise BasisError(
                f"module {module!r} is a {layout.kind} of shape {layout.shape} in the model, but a {known.kind} of "
                f"shape {known.shape} in the basis: the basis was mined for another model."
            )

    def key(self, module: str) -> str:
        """Equal for adapters that share A and B of this module."""
        fingerprint = self.fingerprint(module)
        return f"{fingerprint.basis}:{fingerprint.columns}"

    def fingerprint(self, module: str, made: tuple[Tensor, Tensor] | None = None) -> Fingerprint:
        """Of the basis and its columns in this module; `made`: A and B, which tell more where they are computed."""
        config = self._config
        if self._basis is not None:
            basis = self._basis
            dims = [(a, basis.dim(module, a)) for a in basis.attributes]
            pointer = config.basis_pointer()
            name = ", ".join(pointer) if isinstance(pointer, list) else pointer or "a basis in memory"
            return Fingerprint.of(str(config.basis_digest), [config.basis_columns, dims], name)
        what: list[object] = [config.basis, config.generated_dim, config.seed if config.basis == "random" else 0]
        if config.basis == "psv" and made is not None:
            # The same words give another basis in another model.
            what += [hashlib.sha256(x.detach().cpu().float().numpy().tobytes()).hexdigest() for x in made]
        return Fingerprint.of(hashed(what), [config.basis_columns], str(config.basis))

    def _count_dropped(self, module: str, slices: Slices) -> None:
        assert self._basis is not None
        for attribute, pair in slices.items():
            lost = [self._basis.dim(module, attribute) - (s.stop - s.start) for s in pair]
            held = self.dropped.setdefault(attribute, [0, 0])
            self.dropped[attribute] = [x + y for x, y in zip(held, lost, strict=True)]

    def started(self, module: str, bases: Bases) -> Bases:
        """The same bases, which another adapter has brought, with the start of this one."""
        if self.start is None or self._basis is None:
            return bases
        stored = self._basis.stored(module)
        return replace(bases, start=self.start.core(module, bases.a, bases.b, bases.slices, stored))

    def make(self, module: str, layout: ModuleLayout, weight: Tensor | None) -> Bases:
        """A and B for a module; `weight` (n x m) is needed for "psv" only."""
        config = self._config
        if self._basis is not None:
            read = self._basis.stored if self._ahead is None else self._ahead.get
            stored = read(module)
            if config.basis_columns == SCALED:
                a, b, slices = scaled_columns(stored)
            else:
                a, b, slices = join(stored, config.columns)
                self._count_dropped(module, slices)
            start = None if self.start is None else self.start.core(module, a, b, slices, stored)
            release_memory()
            return Bases(a, b, slices, self.key(module), self.fingerprint(module), start)
        if config.basis == "random":
            u, s, v = random_factors(layout, config.generated_dim, config.seed, module)
        else:
            assert weight is not None
            u, s, v = principal_svd(weight, config.generated_dim)
            u, s, v = u.to(weight.device), s.to(weight.device), v.to(weight.device)
        if config.basis_columns == SCALED:
            v = v * s
        elif config.columns == "spectral":
            columns = list(range(s.shape[0]))
            factor = spectral_weights({"": s}, {"": columns})
            u, v = u * factor, v * factor
        d = s.shape[0]
        slices = {str(config.basis): (slice(0, d), slice(0, d))}
        return Bases(u, v, slices, self.key(module), self.fingerprint(module, (u, v)))


class LatentBases:
    """A and B of one module that come with the weights of an adapter; if those never come, they are made here."""

    def __init__(self, config: AttrSubspaceConfig, module: str) -> None:
        self._config = config
        self._module = module

    def empty(self, layout: ModuleLayout, adapter: str) -> Bases:
        """Zeros in the shapes that the config tells; with no columns at all for configs of older adapters."""
        names = self._config.attributes or [""]
        widths = (self._config.basis_widths or {}).get(self._module)
        try:
            blocks = [[0, 0] for _ in names] if widths is None else read_widths(str(widths))
        except ValueError:
            blocks = []
        if len(blocks) != len(names):
            raise BasisError(
                f"basis_widths[{self._module!r}] of the config is {widths!r}, expected a pair of widths such as 16x16 "
                f"for each of {', '.join(names)}: the adapter_config.json is damaged."
            )
        slices = slices_of(names, blocks)
        n, m = layout.shape
        a = torch.zeros(n, sum(rows for rows, _ in blocks))
        b = torch.zeros(m, sum(columns for _, columns in blocks))
        return Bases(a, b, slices, f"latent:{adapter}")

    def make(self, adapter: str, layer: AdaptedLayer) -> Bases:
        """A and B as the config describes them. Raises BasisError where they were in the adapter's file alone."""
        config = copy.copy(self._config)
        config.basis_in_adapter = False
        way = (
            "load its weights with PeftModel.from_pretrained or load_adapter, or make a new config with the basis to "
            "start from."
        )
        if config.basis is None:
            raise BasisError(
                f"adapter {adapter!r} stores its basis in its own weights, and they have not been loaded: {way}"
            )
        provider = BasisProvider(config)
        weight = layer.weight_for_basis(self._module) if config.basis == "psv" else None
        made = provider.make(self._module, layer.layout, weight)
        if made.slices != layer.slices[adapter]:
            raise BasisError(
                f"adapter {adapter!r} stores its basis in its own weights, which have not been loaded, and the basis "
                f"{provider.fingerprint(self._module)} has other widths in module {self._module!r} than they: {way}"
            )
        return made
