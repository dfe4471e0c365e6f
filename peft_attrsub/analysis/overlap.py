"""How much two subspaces overlap: the eigenvalues of the paper's disentanglement measure, beside chance.

With S (n x d) and S' (n x d'), the generalised eigenproblem (method.md section 4)

    [[S^T S, -S^T S'], [-S'^T S, S'^T S']] z = lambda [[S^T S, 0], [0, S'^T S']] z

has the eigenvalues 1 - cos(theta_i) and 1 + cos(theta_i) for the principal angles theta_i between the column
spaces, and 1 for every direction that the larger space has more. cos(theta_i) are the singular values of Q^T Q',
Q and Q' orthonormal bases of the spaces. The smallest eigenvalue is 0 where a direction is shared, 1 where the
spaces are orthogonal: it is the least |S x - S' x'|^2 / (|S x|^2 + |S' x'|^2).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from ..basis import BasisError

NULL_RULE = (
    "Random null: the same eigenvalues for two independent, uniformly random subspaces of the same sizes (mean and "
    "95 % band of seeded draws). In a space of n dimensions even random subspaces overlap: an eigenvalue means "
    "something only beside it."
)
PERMUTATION_RULE = (
    "Permutation null: the smallest eigenvalue of the same two attributes taken from different layers of the same "
    "kind (mean and 95 % band over seeded mismatches): overlap that it shows too is not due to the layer."
)
_RANK_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Null:
    """Mean and 95 % band of the eigenvalues 1 - cos(theta_i), i = 1 .. min(d, d'), rising."""

    mean: Tensor
    low: Tensor
    high: Tensor


def orthonormal(columns: Tensor, tolerance: float = 1e-12) -> Tensor:
    """Orthonormal basis (n x r) of the column space of `columns` (n x d), r its rank.

    Columns whose Gram matrix is within `tolerance` of the identity are returned as they are. The length of a column
    does not matter: a short one spans its direction as a long one does.
    """
    gram = columns.T @ columns
    if float((gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max()) < tolerance:
        return columns
    wide = columns.double()
    # By the largest entry first: squares of very long or very short columns leave the range of float64.
    wide = wide / wide.abs().amax(0).clamp_min(torch.finfo(wide.dtype).tiny)
    wide = nn.functional.normalize(wide, dim=0)
    u, s, _ = torch.linalg.svd(wide, full_matrices=False)
    return u[:, s > _RANK_TOLERANCE * s[0]].to(columns.dtype)


def cosines(q: Tensor, other: Tensor) -> Tensor:
    """cos(theta_i), falling, of orthonormal q (n x d) and other (n x d'): min(d, d') values in [0, 1]."""
    return torch.linalg.svdvals(q.T @ other).clamp(0, 1)


def eigenvalues(columns: Tensor, other: Tensor) -> Tensor:
    """All generalised eigenvalues (rank + rank'), rising, of the spans of two sets of columns (n x d, n x d').

    Raises BasisError when the columns do not live in the same space or one of them spans nothing.
    """
    if columns.dim() != 2 or other.dim() != 2 or columns.shape[0] != other.shape[0]:
        raise BasisError(
            f"subspaces of shapes {tuple(columns.shape)} and {tuple(other.shape)} cannot be compared: expected "
            "(n, d) and (n, d') with the same n."
        )
    if not columns.any() or not other.any():
        raise BasisError(
            "a subspace without directions (no columns, or all zero) overlaps with nothing: leave it out."
        )
    q, p = orthonormal(columns.double()), orthonormal(other.double())
    cos = cosines(q, p)
    ones = cos.new_ones(abs(q.shape[1] - p.shape[1]))
    return torch.cat([1 - cos, ones, 1 + cos.flip(0)])


def random_null(n: int, d: int, d_other: int, draws: int = 200, seed: int = 0) -> Null:
    """The eigenvalues 1 - cos(theta_i) of two uniformly random subspaces of dimensions d and d_other in R^n.

    Drawn without forming n-sized matrices: cos^2 are the eigenvalues of G^T G (G^T G + W)^-1 with G (d x d_other)
    standard normal and W ~ Wishart(n - d), drawn by Bartlett's decomposition. The same on every machine.
    """
    if not 0 < d <= n or not 0 < d_other <= n or draws < 1:
        raise BasisError(
            f"no subspaces of dimensions {d} and {d_other} exist in R^{n}, or draws={draws!r} is under 1."
        )
    mean, low, high = _drawn(n, max(d, d_other), min(d, d_other), draws, seed)
    return Null(mean.clone(), low.clone(), high.clone())


@lru_cache(maxsize=256)
def _drawn(n: int, large: int, small: int, draws: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    # numpy's RandomState is frozen (NEP 19); the name makes sizes independent of the order they are asked in.
    state = np.random.RandomState([seed % 2**32, zlib.crc32(f"{n} {large} {small}".encode())])
    shared = max(0, large + small - n)
    if shared:
        cos = _drawn_directly(state, n, large, small, draws)
    else:
        cos = _drawn_by_wishart(state, n, large, small, draws)
    values = 1 - np.sort(np.clip(cos, 0, 1), axis=1)[:, ::-1]
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return torch.from_numpy(values.mean(0)), torch.from_numpy(low), torch.from_numpy(high)


def _drawn_by_wishart(state: np.random.RandomState, n: int, large: int, small: int, draws: int) -> np.ndarray:
    top = state.standard_normal((draws, large, small))
    root = np.tril(state.standard_normal((draws, small, small)), -1)
    freedom = n - large - np.arange(small)
    root[:, range(small), range(small)] = np.sqrt(state.chisquare(freedom, (draws, small)))
    whole = np.linalg.cholesky(top.transpose(0, 2, 1) @ top + root @ root.transpose(0, 2, 1))
    return np.linalg.svd(np.linalg.solve(whole, top.transpose(0, 2, 1)), compute_uv=False)


def _drawn_directly(state: np.random.RandomState, n: int, large: int, small: int, draws: int) -> np.ndarray:
    """One space may be the first `large` coordinates; the other is spanned by a Gaussian matrix."""
    found = [np.linalg.qr(state.standard_normal((n, small)))[0][:large] for _ in range(draws)]
    return np.linalg.svd(np.stack(found), compute_uv=False)
