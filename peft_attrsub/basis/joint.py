"""One pair of frozen bases A, B from several attributes (paper, section 3.4; method.md section 5).

Columns are taken attribute by attribute, strongest first, and orthonormalised in that order; a direction
that earlier columns already span is dropped. Column blocks keep their attribute.

    orthonormal:  A^T A = I
    spectral:     the same directions, column j weighted by sqrt(S_j / max S): the paper's A = U S^(1/2)
                  after orthonormalisation, free of the adapters' overall scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import BasisError

# A unit column whose residual is shorter than this (0.06 degrees off the span) is not a new direction.
DROP_BELOW = 1e-3
# Above this smallest pivot two float32 rounds of Cholesky-QR are as orthogonal as Householder's.
_WELL_CONDITIONED = 0.05
COLUMNS = ("orthonormal", "spectral")


@dataclass(frozen=True)
class Joined:
    """q (n x D): the columns; kept: for each attribute the indices of its columns that are in q."""

    q: Tensor
    kept: dict[str, list[int]]

    @property
    def slices(self) -> dict[str, slice]:
        ends, start = {}, 0
        for name, columns in self.kept.items():
            ends[name] = slice(start, start + len(columns))
            start += len(columns)
        return ends


def orthonormalise(blocks: dict[str, Tensor]) -> Joined:
    """Rank-revealing Gram-Schmidt of [block_1 | block_2 | ...] (each n x d_i, unit columns), in order.

    R's diagonal is positive, which makes the result unique: the same on every machine up to rounding.
    """
    sizes = {name: block.shape[1] for name, block in blocks.items()}
    stacked = torch.cat([block.float() for block in blocks.values()], 1)
    n, total = stacked.shape
    q = _cholesky_qr(stacked) if total <= n else None
    keep = list(range(total))
    if q is None:
        r = torch.linalg.qr(stacked.double(), mode="r").R
        keep = _independent(r, min(n, total))
        q, r = torch.linalg.qr(stacked[:, keep].double())
        q = (q * torch.sign(r.diagonal())).float()
    kept, start = {}, 0
    for name, size in sizes.items():
        kept[name] = [j - start for j in keep if start <= j < start + size]
        start += size
    return Joined(q.contiguous(), kept)


def _cholesky_qr(x: Tensor) -> Tensor | None:
    """Two rounds of Cholesky-QR (matrix products only), or None where columns are close to dependent."""
    if x.shape[1] == 0:
        return x
    for last in (False, True):
        r, info = torch.linalg.cholesky_ex(x.T @ x, upper=True)
        if int(info) != 0 or (not last and bool(r.diagonal().min() < _WELL_CONDITIONED)):
            return None
        x = torch.linalg.solve_triangular(r, x, upper=True, left=False)
    return x


def _independent(r: Tensor, limit: int) -> list[int]:
    """Columns of the triangular factor that are no combination of earlier kept ones."""
    keep: list[int] = []
    basis = r.new_zeros(r.shape[0], 0)
    for j in range(r.shape[1]):
        if len(keep) == limit:
            break
        column = r[:, j]
        for _ in range(2):  # twice is enough
            column = column - basis @ (basis.T @ column)
        length = torch.linalg.vector_norm(column)
        if bool(length > DROP_BELOW):
            keep.append(j)
            basis = torch.cat([basis, (column / length)[:, None]], 1)
    return keep


def spectral_weights(spectra: dict[str, Tensor], kept: dict[str, list[int]]) -> Tensor:
    """sqrt(S_j / max S) for the kept columns, in their order (D)."""
    top = max((float(s.max()) for s in spectra.values() if s.numel()), default=0.0)
    parts = [spectra[name].float()[columns] for name, columns in kept.items()]
    values = torch.cat(parts) if parts else torch.zeros(0)
    return (values / top).sqrt() if top > 0 else values


def check_columns(columns: str) -> None:
    if columns not in COLUMNS:
        raise BasisError(f"columns={columns!r} is unknown: use 'orthonormal' or 'spectral'.")
