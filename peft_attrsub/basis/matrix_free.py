"""Leading singular triplets of a matrix given only by its products: block subspace iteration.

Each pass is one product with C and one with C^T, each followed by a QR; a Rayleigh-Ritz step reads the
triplets off. Successive calls start from the subspace found before: between two IRLS iterations C hardly
moves, so a few passes do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def leading_svd(
    multiply: Product,
    multiply_t: Product,
    shape: tuple[int, ...],
    d: int,
    start: Tensor | None,
    device: torch.device,
    max_passes: int = 300,
    tol: float = 1e-9,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U (n x d), S (d), V (m x d) of C (n x m), and the block (m x b) to start the next call from.

    Args:
        multiply: x (m x b) -> C x. multiply_t: x (n x b) -> C^T x. start: a block from an earlier call.
        tol: stop when the residual ||C^T u_j - s_j v_j|| of the leading d is below tol * s_1.
    """
    n, m = shape
    d = min(d, n, m)
    width = min(n, m, d + max(10, d // 2))
    block = _start_block(start, m, width, device)
    u = s = v = torch.empty(0)
    previous = torch.empty(0)
    for _ in range(max_passes):
        y, _ = torch.linalg.qr(multiply(block))  # [n, b]
        z = multiply_t(y)  # [m, b], C^T y
        block, r = torch.linalg.qr(z)
        left, s, right_t = torch.linalg.svd(r.T)  # y^T C = r^T block^T
        u, v = y @ left, block @ right_t.T
        if width == min(n, m) or not bool(s[0] > 0):
            break
        # z = C^T y, so C^T u - s v costs no further product; after one pass it is 0 by construction, and
        # C v - s u is what is left to converge.
        change = (s[:d] - previous[:d]).abs().max() if previous.numel() else s[0]
        if bool(change <= tol * s[0]):
            residual = multiply(v[:, :d]) - u[:, :d] * s[:d]
            if bool(torch.linalg.vector_norm(residual, dim=0).max() <= max(tol, 1e-7) * s[0]):
                break
        previous = s
    return u[:, :d], s[:d], v[:, :d], block


def _start_block(start: Tensor | None, m: int, width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(m, width, dtype=torch.float64, generator=generator).to(device)
    if start is None:
        return fresh
    kept = start[:, :width]
    return torch.cat([kept, fresh[:, : width - kept.shape[1]]], 1)
