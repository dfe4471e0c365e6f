"""Small dense linear algebra shared by mining and joining: R factors, leading SVD, signs, random bases."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

# Below this ratio of Cholesky pivots the Gram matrix has lost half of float64's digits.
_SAFE_PIVOT = 1e-5
# Down to this share of the largest a singular value read off a Gram matrix keeps six digits.
_SAFE_VALUE = 1e-5
# Blocks a symmetric product is cut into: those above the diagonal are left out, 3 of 8 of the work.
_BLOCKS = 4
_WORTH_CUTTING = 128


def thin_product(a: Tensor, x: Tensor) -> Tensor:
    """a x for x of few columns, as (x^T a^T)^T: BLAS then takes half the time, or a seventh."""
    return (x.T @ a.T).T


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a b^T. In float32 on a CPU by oneDNN, whose wider vectors take half of BLAS' time on some machines."""
    if into.dtype == torch.float32 and into.device.type == "cpu" and torch.backends.mkldnn.is_available():
        into += torch.nn.functional.linear(a.contiguous().to_mkldnn(), b.contiguous().to_mkldnn()).to_dense()
    else:
        into.addmm_(a, b.T)


def add_gram(into: Tensor, x: Tensor) -> None:
    """into += x^T x on and below the diagonal blocks; `mirrored` fills in the rest."""
    width = into.shape[0]
    size = width if width < _WORTH_CUTTING else -(-width // _BLOCKS)
    for i in range(0, width, size):
        rows = slice(i, min(i + size, width))
        below = into[rows, : rows.stop]
        below.addmm_(x[:, rows].T, x[:, : rows.stop])


def mirrored(x: Tensor) -> Tensor:
    """The symmetric matrix of which only the part on and below the diagonal is filled in."""
    return x.tril() + x.tril(-1).T


def gram(x: Tensor) -> Tensor:
    """x^T x."""
    found = x.new_zeros(x.shape[1], x.shape[1])
    add_gram(found, x)
    return mirrored(found)


def gram_eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of x, falling, and its right singular vectors, by the Gram matrix: half the time of an SVD.

    The values are right to 1e-8 of the largest, see `resolved`.
    """
    values, vectors = torch.linalg.eigh(gram(x))
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def resolved(values: Tensor) -> bool:
    """Whether even the smallest of these singular values, read off a Gram matrix, is right to six digits."""
    return bool(values[-1] > _SAFE_VALUE * values[0])


def product_norm(p: Tensor, q: Tensor) -> Tensor:
    """||p q^T||_F for thin p (n x r) and q (m x r), right to the last digits however p and q are conditioned."""
    _, left = torch.linalg.qr(p, mode="r")
    _, right = torch.linalg.qr(q, mode="r")
    return torch.linalg.matrix_norm(left @ right.T)


def cholesky_r(x: Tensor) -> Tensor | None:
    """Upper R with x^T x = R^T R from the float64 Gram matrix, or None when x is close to rank-deficient."""
    factor, info = torch.linalg.cholesky_ex(gram(x), upper=True)
    pivots = factor.diagonal()
    if int(info) != 0 or not bool(pivots.min() > _SAFE_PIVOT * pivots.max()):
        return None
    return factor


def fix_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of each column of u positive, so that equal inputs give equal bytes."""
    if u.shape[1] == 0:
        return u, v
    rows = u.abs().argmax(0, keepdim=True)
    signs = torch.sign(u.gather(0, rows))
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return u * signs, v * signs


def truncate(u: Tensor, s: Tensor, v: Tensor, dim: int, rtol: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `dim` triplets, without those that are numerically zero."""
    rank = int((s > rtol * s[0]).sum()) if s.numel() and bool(s[0] > 0) else 0
    d = min(dim, rank)
    return u[:, :d], s[:d], v[:, :d]


def principal_svd(weight: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets U (n x d), S (d), V (m x d) of a weight W (n x m), in float64 inside.

    Through the Gram matrix of the smaller side: exact for singular values above 1e-8 of the largest, and
    several times faster than a full SVD.
    """
    w = weight.detach().to(torch.float64)
    wide = w.shape[0] < w.shape[1]
    x = w.T if wide else w
    values, vectors = torch.linalg.eigh(x.T @ x)
    s = values.flip(0).clamp_min(0).sqrt()
    right = vectors.flip(1)
    rank = int((s > 1e-7 * s[0]).sum()) if bool(s[0] > 0) else 0
    d = min(dim, rank)
    right, s = right[:, :d], s[:d]
    # One QR repairs what division by small singular values costs in orthogonality.
    left, r = torch.linalg.qr(x @ right)
    left = left * torch.sign(r.diagonal())
    u, v = (right, left) if wide else (left, right)
    u, v = fix_signs(u, v)
    return u.float().contiguous(), s.float(), v.float().contiguous()


def random_orthonormal(rows: int, columns: int, seed: int, name: str) -> Tensor:
    """Orthonormal columns (rows x columns), uniform on the Stiefel manifold, the same on every machine.

    numpy's RandomState is frozen by NEP 19, torch's generators are not; `name` makes modules independent
    of the order in which they are drawn.
    """
    state = np.random.RandomState([seed % 2**32, zlib.crc32(name.encode())])
    gaussian = torch.from_numpy(state.standard_normal((rows, min(rows, columns))))
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(r.diagonal())).float().contiguous()
