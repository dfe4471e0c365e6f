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
# Smallest pivot that one round of Cholesky-QR in float32 is tried for.
_WELL_CONDITIONED = 0.05
# How far from orthonormal (root mean square of Q^T Q w - w) a result in float32 may be.
_OFF = 3e-6
# ||R^-1|| up to which Gram products in float64 say as much as Householder's reflections.
_GRAM_SAYS = 3e3
COLUMNS = ("orthonormal", "spectral")
#: One subspace as a basis stores it: Ut (d x n), S (d), Vt (d x m).
Stored = tuple[Tensor, Tensor, Tensor]


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


def join(
    factors: dict[str, Stored], columns: str = "orthonormal"
) -> tuple[Tensor, Tensor, dict[str, tuple[slice, slice]]]:
    """A (n x D_A), B (m x D_B) from the subspaces of several attributes, and each attribute's columns in both."""
    left = orthonormalise({name: ut.T for name, (ut, _, _) in factors.items()})
    right = orthonormalise({name: vt.T for name, (_, _, vt) in factors.items()})
    a, b = left.q, right.q
    if columns == "spectral":
        spectra = {name: s for name, (_, s, _) in factors.items()}
        a = a * spectral_weights(spectra, left.kept)
        b = b * spectral_weights(spectra, right.kept)
    return a, b, {name: (left.slices[name], right.slices[name]) for name in factors}


def scaled_columns(factors: dict[str, Stored]) -> tuple[Tensor, Tensor, dict[str, tuple[slice, slice]]]:
    """A = [U_1 | U_2 | ...] and B = [V_1 S_1 | V_2 S_2 | ...]: with a diagonal M, A M B^T is a sum of triplets."""
    slices, start = {}, 0
    for name, (_, s, _) in factors.items():
        slices[name] = (slice(start, start + len(s)),) * 2
        start += len(s)
    a = torch.cat([ut for ut, _, _ in factors.values()]).float().T.contiguous()
    b = torch.cat([vt.float() * s.float()[:, None] for _, s, vt in factors.values()]).T.contiguous()
    return a, b, slices


def orthonormalise(blocks: dict[str, Tensor]) -> Joined:
    """Rank-revealing Gram-Schmidt of [block_1 | block_2 | ...] (each n x d_i, unit columns), in order.

    R's diagonal is positive, which makes the result unique: the same on every machine up to rounding. Three ways,
    from fast to safe: Cholesky-QR in float32 where columns are far from dependent, in float64 where some are
    dropped, and Householder's where the kept ones are nearly dependent.
    """
    sizes = {name: block.shape[1] for name, block in blocks.items()}
    parts = [block.T.float() for block in blocks.values()]
    rows = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)  # D x n: as a basis stores them
    total, n = rows.shape
    keep = list(range(total))
    q = _cholesky_qr(rows, list(sizes.values())) if total <= n else None
    if q is None:
        keep, q = _skipping_qr(rows) or _householder_qr(rows)
    kept, start = {}, 0
    for name, size in sizes.items():
        kept[name] = [j - start for j in keep if start <= j < start + size]
        start += size
    return Joined(q.contiguous(), kept)


def _cholesky_qr(rows: Tensor, sizes: list[int]) -> Tensor | None:
    """Q (n x D) from matrix products only, or None where columns (here: rows) are close to dependent."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    for last in (False, True):
        r, info = torch.linalg.cholesky_ex(_gram(rows, ends), upper=True)
        if int(info) != 0 or (not last and bool((r.diagonal() < _WELL_CONDITIONED).any())):
            return None
        inverse = torch.linalg.solve_triangular(r, torch.eye(r.shape[0], device=r.device), upper=True)
        q = rows.new_empty(rows.shape[1], rows.shape[0])
        for start, end in zip([0, *ends], ends, strict=False):  # R^-1 is upper triangular: later blocks get zeros
            q[:, start:end] = rows[:end].T @ inverse[:end, start:end]
        if last or _orthonormal(q):
            return q
        rows = q.T.contiguous()
    raise AssertionError("the second round always returns")


def _gram(rows: Tensor, ends: list[int]) -> Tensor:
    """rows rows^T (D x D), of which only the upper blocks are filled: Cholesky reads no others."""
    gram = rows.new_zeros(rows.shape[0], rows.shape[0])
    for start, end in zip([0, *ends], ends, strict=False):
        gram[start:end, start:] = rows[start:end] @ rows[start:].T
    return gram


def _orthonormal(q: Tensor) -> bool:
    """Whether Q^T Q w = w for random signs w, which costs a reading of Q and no product of matrices."""
    generator = torch.Generator("cpu").manual_seed(0)
    probes = torch.randint(0, 2, (q.shape[1], 4), generator=generator, device="cpu").to(q) * 2 - 1
    return bool((q.T @ (q @ probes) - probes).square().mean().sqrt() < _OFF)


def _skipping_qr(rows: Tensor) -> tuple[list[int], Tensor] | None:
    """The rows that are kept and Q, by a Cholesky factor in float64 that passes over dependent rows; None where
    those that are kept are so near to dependent that squaring them in a Gram matrix would hide it."""
    wide = rows.double()
    gram = wide @ wide.T
    total, limit = gram.shape[0], rows.shape[1]
    factor, keep = torch.zeros_like(gram), list[int]()
    for j in range(total):
        k = len(keep)
        row = gram[j, j:] - factor[:k, j] @ factor[:k, j:]
        if k < limit and float(row[0]) > DROP_BELOW**2:
            factor[k, j:] = row / row[0].sqrt()
            keep.append(j)
    r = factor[: len(keep), keep]
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(keep), dtype=r.dtype, device=r.device), upper=True)
    if bool(torch.linalg.matrix_norm(inverse) > _GRAM_SAYS):
        return None
    return keep, (wide[keep].T @ inverse).float()


def _householder_qr(rows: Tensor) -> tuple[list[int], Tensor]:
    """The same from orthogonal transformations alone, column by column where they are nearly dependent."""
    columns = rows.T.double()
    keep = _independent(torch.linalg.qr(columns, mode="r").R, min(columns.shape))
    q, r = torch.linalg.qr(columns[:, keep])
    return keep, (q * torch.sign(r.diagonal())).float()


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
