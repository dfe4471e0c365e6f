"""Where a core starts: at zero, or where the sources of its basis agree (their consensus).

The consensus update of attribute a is C_a = U_a S_a V_a^T, the leading triplets of its adapters' robust mean in their
own scale. The start is the core whose update is nearest to sum_a s_a C_a:

    M_0 = A^+ (sum_a s_a U_a S_a V_a^T) (B^+)^T ,   A^+ = A^T for orthonormal columns
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor

from ..basis import Basis, BasisError
from ..basis.joint import Stored
from .factors import Slices, assemble, disassemble

CONSENSUS = "consensus"
InitScale = float | dict[str, float] | None


@dataclass
class Share:
    """How much of a consensus a start holds: kept and total are sums of ||.||_F^2 over modules."""

    kept: float = 0.0
    total: float = 0.0

    @property
    def value(self) -> float:
        return self.kept / self.total if self.total > 0 else 1.0


@dataclass
class Start:
    """The start of all cores of an adapter, and how much of each attribute's consensus it holds."""

    basis: Basis
    whole: Basis
    kind: str
    scales: dict[str, float]
    shares: dict[str, Share] = field(default_factory=dict)

    def parts(self, module: str, a: Tensor, b: Tensor, slices: Slices, stored: dict[str, Stored]) -> dict[str, Tensor]:
        """attribute -> the core (D_A x D_B) of its consensus at scale 1, as far as a core of this kind holds it."""
        if self.kind in ("diagonal", "dials"):  # A holds U and B holds V S: the consensus is the identity
            return {name: _ones_in(a, b, slices[name]) for name in self.scales}
        found = {}
        left, right = _unit(a), _unit(b)
        for name in self.scales:
            u, s, v = (x.to(a.device).float() for x in stored[name])
            core = (left.unit.T @ u.T * s) @ (v @ right.unit)
            core = assemble(disassemble(core, slices, self.kind), slices, self.kind)
            self._count(module, name, core)
            found[name] = core * left.inverse[:, None] * right.inverse
        return found

    def core(self, module: str, a: Tensor, b: Tensor, slices: Slices, stored: dict[str, Stored]) -> Tensor:
        """M_0 (D_A x D_B)."""
        parts = self.parts(module, a, b, slices, stored)
        total = a.new_zeros(a.shape[1], b.shape[1], dtype=next(iter(parts.values())).dtype)
        for name, part in parts.items():
            total += self.scales[name] * part
        return total

    def _count(self, module: str, name: str, core: Tensor) -> None:
        share = self.shares.setdefault(name, Share())
        share.kept += float(core.square().sum())
        share.total += float(self.whole.singular_values(module, name).float().square().sum())


@dataclass(frozen=True)
class _Unit:
    """Columns of length 1, or 0; inverse: 1 / their length before."""

    unit: Tensor
    inverse: Tensor


def _unit(columns: Tensor) -> _Unit:
    columns = columns.float()
    lengths = columns.norm(dim=0)
    inverse = (1 / lengths).where(lengths > 0, 0)
    return _Unit(columns * inverse, inverse)


def _ones_in(a: Tensor, b: Tensor, block: tuple[slice, slice]) -> Tensor:
    core = a.new_zeros(a.shape[1], b.shape[1])
    core[block].diagonal().fill_(1)
    return core


def check_scale(value: Any, start: Any) -> None:
    """Raise ValueError for an `init_scale` that is not one, or that nothing reads."""
    if value is None:
        return
    if start != CONSENSUS:
        raise ValueError(f"init_scale={value!r} needs init_weights='consensus', got init_weights={start!r}.")
    numbers = list(value.values()) if isinstance(value, Mapping) else [value]
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and isfinite(x) for x in numbers):
        raise ValueError(f"init_scale must be a finite number, or a dict of them by attribute, got {value!r}.")


def scales_of(basis: Basis, init_scale: InitScale) -> dict[str, float]:
    """attribute -> factor of its consensus, for the attributes of a basis that have one.

    Default: 1 / their number, which starts at the mean of their consensus updates. Attributes that a dict does not
    name start at 0. Raises BasisError for an attribute that the basis lacks, and where none has a consensus.
    """
    agreed = [name for name in basis.attributes if basis.has_consensus(name)]
    if not agreed:
        kinds = ", ".join(f"{name!r} ({basis.kind(name)})" for name in basis.attributes)
        raise BasisError(
            f"init_weights='consensus' needs an attribute that was mined from adapters, and the basis has {kinds}: "
            "build one with build_basis, or leave init_weights=True to start at zero."
        )
    if not isinstance(init_scale, Mapping):
        return dict.fromkeys(agreed, 1 / len(agreed) if init_scale is None else float(init_scale))
    for name in init_scale:
        if name not in basis.attributes:
            raise BasisError(f"init_scale names the attribute {name!r}, the basis has {', '.join(basis.attributes)}.")
        if name not in agreed:
            raise BasisError(
                f"init_scale names the attribute {name!r}, which was not mined from adapters and so has no consensus; "
                f"those that have one: {', '.join(agreed)}."
            )
    return {name: float(init_scale.get(name, 0)) for name in agreed}
