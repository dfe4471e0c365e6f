"""Where a layer's A and B come from: a saved basis, or the layer's own weight ("psv"), or a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property

from torch import Tensor

from .._machine import release_memory
from ..basis import Basis, BasisError
from ..basis.ahead import ReadAhead
from ..basis.joint import Stored, join, spectral_weights
from ..basis.layout import ModuleLayout
from ..basis.linalg import principal_svd
from ..basis.naming import nearest, some
from ..basis.weights import random_factors
from .config import AttrSubspaceConfig
from .factors import Bases, Slices


class BasisProvider:
    """Makes A and B for one adapter, module by module; nothing is held beyond the open basis."""

    def __init__(self, config: AttrSubspaceConfig) -> None:
        self._config = config
        #: attribute -> columns of A and B that earlier attributes span already, over all modules made so far.
        self.dropped: dict[str, list[int]] = {}
        #: The basis as it was saved, and the attributes and dims of it that are used.
        self.whole: Basis | None = None
        self._basis: Basis | None = None
        if not config.generated and config.basis is not None and not config.basis_in_adapter:
            self.whole = config.open_basis()
            self._basis = self.whole.select(config.attributes, config.dim)
        self._read_before = self._total_read
        self._ahead: ReadAhead[dict[str, Stored]] | None = None

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
                    "leave it out of target_modules or set missing='skip'."
                )
            near = some(nearest(module, self.modules)) or "none"
            raise BasisError(
                f"the basis has no module {module!r}, which target_modules asks for; nearest in the basis: {near}. "
                "Change target_modules, or set missing='skip' to leave such modules as they are."
            )
        known = basis.layout(module)
        if known.shape != layout.shape or known.kind != layout.kind:
            raise BasisError(
                f"module {module!r} is a {layout.kind} of shape {layout.shape} in the model, but a {known.kind} of "
                f"shape {known.shape} in the basis: the basis was mined for another model."
            )

    def key(self, module: str) -> str:
        """Equal for adapters that share A and B of this module."""
        config = self._config
        what: list[object] = [config.columns]
        if self._basis is not None:
            basis = self._basis
            what += [config.basis_digest, *((a, basis.dim(module, a)) for a in basis.attributes)]
        else:
            what += [config.basis, config.generated_dim, config.seed if config.basis == "random" else 0]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    def _count_dropped(self, module: str, slices: Slices) -> None:
        assert self._basis is not None
        for attribute, pair in slices.items():
            lost = [self._basis.dim(module, attribute) - (s.stop - s.start) for s in pair]
            held = self.dropped.setdefault(attribute, [0, 0])
            self.dropped[attribute] = [x + y for x, y in zip(held, lost, strict=True)]

    def make(self, module: str, layout: ModuleLayout, weight: Tensor | None) -> Bases:
        """A and B for a module; `weight` (n x m) is needed for "psv" only."""
        config = self._config
        if self._basis is not None:
            read = self._basis.stored if self._ahead is None else self._ahead.get
            a, b, slices = join(read(module), config.columns)
            self._count_dropped(module, slices)
            release_memory()
            return Bases(a, b, slices, self.key(module))
        if config.basis == "random":
            u, s, v = random_factors(layout, config.generated_dim, config.seed, module)
        else:
            assert weight is not None
            u, s, v = principal_svd(weight, config.generated_dim)
            u, s, v = u.to(weight.device), s.to(weight.device), v.to(weight.device)
        if config.columns == "spectral":
            columns = list(range(s.shape[0]))
            factor = spectral_weights({"": s}, {"": columns})
            u, v = u * factor, v * factor
        d = s.shape[0]
        return Bases(u, v, {str(config.basis): (slice(0, d), slice(0, d))}, self.key(module))
