"""The folded forward: base and update of a linear layer in one product, y = x (W + A M B^T)^T + bias.

Factored, a layer computes x W^T and three thin products more, x B M^T A^T. Folded, the small product A M B^T goes
into the weight first, and x meets the sum once. For the gradients,

    Q = x B (T x D_B),   P = g A (T x D_A),   dM = P^T Q,   dx = g (W + A M B^T),

so that Q is kept between the passes and x is not, as in the factored form; the sum of W and A M B^T is made again in
the backward pass rather than kept. Each pass may also stay factored and add the thin product onto the base's own
result in place: `forward_choice` says which one is cheaper. T tokens, W n x m, A n x D_A, B m x D_B, M D_A x D_B with
the scaling already in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def folded_linear(
    x: Tensor,
    core: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    transposed: bool = False,
    fold: tuple[bool, bool] = (True, True),
) -> Tensor:
    """x (W + A M B^T)^T + bias, differentiable in x and M: (..., m) -> (..., n).

    `weight` is W (n x m), or W^T (m x n) if `transposed`; `fold` says of the forward and the backward pass
    whether W + A M B^T is made there, or A M B^T applied in thin products. W, bias, A and B are frozen: gradients
    for them are not computed. Can be differentiated twice. Under autocast, and where W is narrower than float32,
    W + A M B^T is summed in float32 (or wider) and rounded once to the dtype of the product, which loses updates
    smaller than half a unit in W's last place; a pass that stays factored needs one dtype throughout.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    x = x.to(dtype)
    if not torch.is_grad_enabled() or not (x.requires_grad or core.requires_grad):
        q = None if fold[0] else x @ b
        return _apply(x, q, core, weight, bias, a, b, transposed, fold[0], dtype)
    # Outside of the Function, so that autograd knows how Q depends on x when dM is differentiated again.
    q = x @ b.to(dtype) if core.requires_grad or not fold[0] else None
    result: Tensor = _Folded.apply(x, q, core, weight, bias, a, b, transposed, fold, dtype)
    return result


def _sum(weight: Tensor, core: Tensor, a: Tensor, b: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """W + A M B^T (n x m), through the narrower side of M; a view of its transpose if W is stored so."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, core, b = a.to(wide), core.to(wide), b.to(wide)
    if core.shape[1] <= core.shape[0]:
        left, right = a @ core, b.T
    else:
        left, right = a, core @ b.T
    if transposed:
        return torch.addmm(weight.to(wide), right.T, left.T).T.to(dtype)
    return torch.addmm(weight.to(wide), left, right).to(dtype)


def _through_sum(
    g: Tensor, weight: Tensor, core: Tensor, a: Tensor, b: Tensor, transposed: bool, dtype: torch.dtype
) -> Tensor:
    """g (W + A M B^T): (T, n) -> (T, m)."""
    return g @ _sum(weight, core, a, b, transposed, dtype)


# The compiler would see that the forward pass makes the same sum, and keep n x m numbers per layer instead of making
# it again; behind an operator of its own it cannot.
_opaque = torch.library.custom_op("peft_attrsub::through_sum", _through_sum, mutates_args=())


@_opaque.register_fake
def _shape_through_sum(g: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    transposed = rest[3]
    return g.new_empty(g.shape[0], weight.shape[0 if transposed else 1])


def _apply(
    x: Tensor,
    q: Tensor | None,
    core: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    transposed: bool,
    fold: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The forward pass alone; q is read only where it stays factored."""
    with torch.autocast(x.device.type, enabled=False):
        bias = bias if bias is None else bias.to(dtype)
        if fold:
            return nn.functional.linear(x, _sum(weight, core, a, b, transposed, dtype), bias)
        assert q is not None
        y = nn.functional.linear(x.reshape(-1, x.shape[-1]), weight.T if transposed else weight, bias)
        y.addmm_(q.reshape(-1, q.shape[-1]), (a @ core).T)  # onto the base's own result: no T x n of its own
        return y.view(*x.shape[:-1], a.shape[0])


class _Folded(torch.autograd.Function):
    """dx takes in the way through Q as well, so Q itself gets no gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        q: Tensor | None,
        core: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        transposed: bool,
        fold: tuple[bool, bool],
        dtype: torch.dtype,
    ) -> Tensor:
        saved: Any = ctx
        saved.save_for_backward(q if core.requires_grad else None, core, weight, a, b)
        saved.transposed, saved.fold, saved.dtype = transposed, fold[1], dtype
        return _apply(x, q, core, weight, bias, a, b, transposed, fold[0], dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        q, core, weight, a, b = ctx.saved_tensors
        wants_x, wants_core = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        dx: Tensor | None = None
        dcore: Tensor | None = None
        p: Any = None
        with torch.autocast(g.device.type, enabled=False):
            rows = g.reshape(-1, g.shape[-1])  # T x n
            if wants_core or (wants_x and not ctx.fold):
                p = rows @ a.to(g.dtype)
            if wants_core:
                wide = core.dtype
                dcore = p.to(wide).T @ q.reshape(-1, q.shape[-1]).to(wide)
            if wants_x:
                if ctx.fold:
                    through = _opaque if torch.compiler.is_compiling() else _through_sum
                    dx = through(rows, weight, core, a, b, ctx.transposed, ctx.dtype)
                else:
                    dx = (rows @ (weight.T if ctx.transposed else weight)).addmm_(p, core @ b.T)
                dx = dx.view(*g.shape[:-1], b.shape[0])
        return dx, None, dcore, None, None, None, None, None, None, None
