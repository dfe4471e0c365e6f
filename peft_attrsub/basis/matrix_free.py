"""Leading singular triplets of a matrix given only by its products: block subspace iteration.

Each pass is one product with C and one with C^T, each followed by a QR; a Rayleigh-Ritz step reads the
triplets off. Successive calls start from the subspace found before: between two IRLS iterations C hardly
moves, so one or two passes do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
# Columns drawn anew at every start: a direction that the block lacks altogether would never be found.
_FRESH = 2


@dataclass
class Leading:
    """U (n x d), S (d), V (m x d); block (m x b) to start the next call from; whether the residual was reached."""

    u: Tensor
    s: Tensor
    v: Tensor
    block: Tensor
    converged: bool


def block_width(d: int, shape: tuple[int, ...]) -> int:
    """Columns iterated on for d triplets: the more beyond d, the fewer passes."""
    return min(*shape, d + max(10, d // 2))


def leading_svd(
    multiply: Product,
    multiply_t: Product,
    shape: tuple[int, ...],
    d: int,
    start: Tensor | None,
    device: torch.device,
    max_passes: int = 300,
    tol: float = 1e-8,
    dtype: torch.dtype = torch.float64,
) -> Leading:
    """The d leading singular triplets of C (n x m).

    Args:
        multiply: x (m x b) -> C x. multiply_t: x (n x b) -> C^T x. start: a block from an earlier call.
        tol: stop when every residual ||C v_j - s_j u_j|| and ||C^T u_j - s_j v_j|| is below tol * s_1.
    """
    d = min(d, *shape)
    width = block_width(d, shape)
    block = _start_block(start, shape[1], width, device, dtype)
    if start is not None:
        block, _ = torch.linalg.qr(block)
    image = multiply(block)
    u = s = v = image
    converged = False
    for _ in range(max_passes):
        y, _ = torch.linalg.qr(image)  # [n, b]
        block, r = torch.linalg.qr(multiply_t(y))  # [m, b], C^T y
        left, s, right_t = torch.linalg.svd(r.T)  # y^T C = r^T block^T
        u, v = y @ left, block @ right_t.T
        if width == min(shape) or not bool(s[0] > 0):
            converged = True
            break
        # C^T u - s v is 0 by construction; C v - s u is what is left to converge, and C v is the next pass' product.
        image = multiply(v)
        residual = image[:, :d] - u[:, :d] * s[:d]
        if bool(torch.linalg.vector_norm(residual, dim=0).max() <= tol * s[0]):
            converged = True
            break
    return Leading(u[:, :d], s[:d], v[:, :d], v, converged)


def _start_block(start: Tensor | None, m: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(m, width, dtype=torch.float64, generator=generator).to(device, dtype)
    if start is None:
        return fresh
    kept = start[:, : max(width - _FRESH, 0)].to(dtype)
    # Of the size of the unit columns beside them.
    return torch.cat([kept, fresh[:, : width - kept.shape[1]] / m**0.5], 1)
