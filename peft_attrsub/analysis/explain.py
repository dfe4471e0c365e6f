"""Which attribute explains an adapter: the share of its update that lies inside the basis.

    share of attribute a   ||U_a^T dW V_a||_F^2 / ||dW||_F^2
    jointly                ||A^T dW B||_F^2 / ||dW||_F^2          (A, B the orthonormal union; paper, section 3.4)

An update without any relation to the basis has d_out d_in / (n m) of its energy there, on average.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ..basis import Basis, BasisError, LoraAdapter
from ..basis.joint import DROP_BELOW
from ..basis.naming import natural_key
from ..basis.sources import check_fits
from ..basis.views import Dim

CAPTURED_RULE = (
    "Captured energy is the share of the squared Frobenius norm of an update that lies inside the subspace. An update "
    "unrelated to the basis has d_out d_in / (n m) of it there: the expected share. Shares of attributes overlap, so "
    "they need not add up to the joint one."
)


@dataclass(frozen=True)
class Share:
    """share of ||dW||^2 inside a subspace, and the share expected of an unrelated update."""

    share: float
    expected: float


@dataclass(frozen=True)
class CapturedModule:
    """norm: ||dW||_F^2 of the module; joint and by attribute: what lies inside."""

    module: str
    norm: float
    joint: Share
    attributes: dict[str, Share]


@dataclass(frozen=True)
class Captured:
    """How much of an adapter lies inside a basis.

    joint, attributes: over the adapter's whole ||dW||^2, modules that the basis lacks included. modules: one by
    one, those whose update is not zero. missing: modules that the basis lacks, or whose LoRA is no single matrix
    (grouped convolutions; these are in no share). source_of: attributes of the basis that were mined from it.
    """

    adapter: str
    joint: Share
    attributes: dict[str, Share]
    modules: list[CapturedModule]
    missing: list[str]
    source_of: list[str] = field(default_factory=list)


def captured_energy(
    adapter: str | os.PathLike[str],
    basis: Basis | str | os.PathLike[str],
    attributes: Sequence[str] | None = None,
    dim: Dim = None,
) -> Captured:
    """The share of a saved LoRA's ||dW||_F^2 inside the basis, per module and attribute.

    Args:
        adapter: folder, Hub id or .safetensors of a LoRA. basis: a Basis, folder or Hub id.
        attributes, dim: the part of the basis to use, as in AttrSubspaceConfig.

    Raises:
        BasisError: when the two have no module in common, or one in different shapes.
    """
    whole = basis if isinstance(basis, Basis) else Basis.from_pretrained(basis)
    part = whole.select(attributes, dim)
    lora = LoraAdapter(adapter)
    check_fits(lora, part, "intersect")
    found, missing, lost = [], list(lora.unusable), 0.0
    with lora:
        for module in lora.modules:
            left, right = (x.double() for x in lora.read(module))  # [n, r], [m, r]
            norm = float(((left.T @ left) * (right.T @ right)).sum())
            if module not in part.modules:
                missing.append(module)
                lost += norm
            elif norm > 0:
                found.append(_in_module(part, module, left, right, norm))
    if not found:
        raise BasisError(f"every update of {lora.source!r} in the basis' modules is zero: it was never trained.")
    total = lost + sum(one.norm for one in found)
    joint = _mean([(one.norm, one.joint) for one in found], total)
    by_name = {a: _mean([(one.norm, one.attributes[a]) for one in found], total) for a in part.attributes}
    digest = lora.sha256()
    source_of = [a.name for a in whole.config.attributes if any(source.sha256 == digest for source in a.sources)]
    return Captured(lora.public_name, joint, by_name, found, sorted(missing, key=natural_key), source_of)


def _mean(shares: Sequence[tuple[float, Share]], total: float) -> Share:
    """Over modules, weighted by ||dW||^2; `total` counts what no module holds too."""
    return Share(
        sum(norm * one.share for norm, one in shares) / total,
        sum(norm * one.expected for norm, one in shares) / total,
    )


def _in_module(basis: Basis, module: str, left: Tensor, right: Tensor, norm: float) -> CapturedModule:
    """Shares of dW = left right^T (n x r, m x r) in one module."""
    factors = {a: basis.factors(module, a) for a in basis.attributes}
    sizes = [s.shape[0] for _, s, _ in factors.values()]
    ends = list(accumulate(sizes))
    blocks = {a: slice(end - size, end) for a, size, end in zip(factors, sizes, ends, strict=True)}
    outer = _Side(torch.cat([u for u, _, _ in factors.values()], 1).double(), left)
    inner = _Side(torch.cat([v for _, _, v in factors.values()], 1).double(), right)
    layout = basis.layout(module)

    def share(columns: slice) -> Share:
        a, b = outer.inside(columns), inner.inside(columns)  # [d_out, r], [d_in, r]
        kept = float(((a.T @ a) * (b.T @ b)).sum())
        return Share(min(1.0, kept / norm), a.shape[0] * b.shape[0] / (layout.n * layout.m))

    shares = {a: share(columns) for a, columns in blocks.items()}
    return CapturedModule(module, norm, share(slice(0, sum(sizes))), shares)


class _Side:
    """One side of a module: the columns (n x D) of all attributes beside an update's factor (n x r).

    An orthonormal basis of some columns C is C E, E from the eigenvectors of C^T C: it need not be formed.
    """

    def __init__(self, columns: Tensor, factor: Tensor) -> None:
        self.gram = columns.T @ columns
        self.product = columns.T @ factor

    def inside(self, columns: slice) -> Tensor:
        """Coordinates (rank x r) of the factor in an orthonormal basis of these columns."""
        values, vectors = torch.linalg.eigh(self.gram[columns, columns])
        kept = values > DROP_BELOW**2
        return (vectors[:, kept] / values[kept].sqrt()).T @ self.product[columns]
