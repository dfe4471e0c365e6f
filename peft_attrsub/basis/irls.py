"""The shared subspace of k low-rank updates, robustly: factored iteratively reweighted least squares.

    minimise over A, B of rank d:   sum_i || A B^T - dW_i ||_F^alpha ,     dW_i = P_i Q_i^T      (paper, section 3.2)

In turn, from w_i = 1:
    C = sum_i w_i dW_i / sum_i w_i ,   C = U S V^T ,   L = U_d S_d V_d^T
    w_i = 1 / (eps^2 + ||L - dW_i||_F^2)^((2 - alpha) / 2)
Norms are measured in units of the median ||dW_i||_F: scaling all adapters changes no weight. There is no
centring. The smoothed objective sum_i (eps^2 + ||L - dW_i||^2)^(alpha/2) never increases.

No n x m matrix is formed. With P = [P_1 .. P_k] (n x R) = X R_p and Q = [Q_1 .. Q_k] (m x R) = Y R_q (X, Y
orthonormal), everything happens exactly in R x R: C = X (R_p diag(w) R_q^T) Y^T. When R exceeds min(n, m)
that is no longer small, and C is used through its products alone. `forms` holds both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .forms import Form, Triplet, Updates, form_of, stack_updates
from .linalg import fix_signs, truncate

Dimension = int | Callable[[Tensor], int]


@dataclass(frozen=True)
class IrlsSettings:
    """alpha in (0, 2]; eps relative to the adapters' median norm; tol on the objective's relative change."""

    alpha: float = 1.0
    eps: float = 1e-6
    max_iter: int = 50
    tol: float = 1e-6


@dataclass
class SharedSubspace:
    """U (n x d), S (d), V (m x d) of the last C; the rest says how it came about.

    first, last: all min(n, m, R) singular values of C at the first and the last iteration. weights (k): final,
    mean 1. residuals (k): ||L - dW_i|| / ||dW_i||.
    energy (k): ||U^T dW_i V||^2 / ||dW_i||^2. objective: one value an iteration.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    first: Tensor
    last: Tensor
    weights: Tensor
    residuals: Tensor
    energy: Tensor
    objective: list[float]

    @property
    def iterations(self) -> int:
        return len(self.objective)

    def cast(self, dtype: torch.dtype) -> SharedSubspace:
        """The same on the CPU in `dtype`."""
        tensors: dict[str, Any] = {k: v.to("cpu", dtype) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def shared_subspace(
    left: list[Tensor], right: list[Tensor], dim: Dimension, settings: IrlsSettings | None = None
) -> SharedSubspace:
    """Robust rank-`dim` subspace of the updates dW_i = left[i] @ right[i].T.

    Args:
        left: k tensors P_i (n x r_i), the scaling already in them. right: k tensors Q_i (m x r_i).
        dim: number of directions, or a rule that maps C's final spectrum to one.
        settings: alpha, eps, max_iter, tol.
    """
    return mine_updates(_stack(left, right), dim, settings or IrlsSettings())


def mine_updates(updates: Updates, dim: Dimension, settings: IrlsSettings) -> SharedSubspace:
    """`shared_subspace` of updates that are stacked already."""
    form = form_of(updates)
    if not callable(dim):
        return _reweight(form, dim, settings)
    if not form.norms.any():
        return _empty(form, form.norms.numel())
    # The rule reads the C whose outliers are muted; how much they are depends on the dim: to and fro until it holds.
    tried: dict[int, SharedSubspace] = {}
    d = dim(form.spectrum(torch.full_like(form.norms, 1 / form.norms.numel())))
    while d not in tried:
        tried[d] = _reweight(form, d, settings)
        d = dim(tried[d].last)
    return tried[d]


def last_spectrum(updates: Updates, dim: int, settings: IrlsSettings) -> Tensor:
    """Singular values of the weighted mean C after the last iteration, with a subspace of `dim` directions."""
    return mine_updates(updates, dim, settings).last


def _stack(left: list[Tensor], right: list[Tensor]) -> Updates:
    shape = left[0].shape[0], right[0].shape[0]
    return stack_updates(zip(left, right, strict=True), shape, [p.shape[1] for p in left], left[0].device)


def _reweight(form: Form, d: int, settings: IrlsSettings) -> SharedSubspace:
    norms = form.norms  # [k]
    k, positive = norms.numel(), norms[norms > 0]
    if not positive.numel():
        return _empty(form, k)
    unit = positive.median()
    weights = torch.ones_like(norms)
    first = form.spectrum(weights / k)
    best: tuple[Triplet, tuple[Tensor, Tensor], Tensor, Tensor] | None = None
    objective: list[float] = []
    for _ in range(settings.max_iter):
        triplet = form.leading(weights / weights.sum(), d)
        projected = form.project(triplet[0], triplet[2])
        residuals = form.residuals(triplet, *projected)
        smoothed = settings.eps**2 + (residuals / unit) ** 2
        value = float(smoothed.pow(settings.alpha / 2).sum())
        if objective and value > objective[-1]:
            # Only rounding can raise it: the step before is the answer.
            break
        best = (triplet, projected, residuals, weights)
        objective.append(value)
        weights = smoothed.pow((settings.alpha - 2) / 2)
        if value == 0 or (len(objective) > 1 and objective[-2] - value <= settings.tol * objective[-2]):
            break
    assert best is not None
    (u, s, v), projected, residuals, used = best
    last = form.spectrum(used / used.sum())
    energy = form.energy(*projected) / norms.clamp_min(torch.finfo(norms.dtype).tiny) ** 2
    smoothed = settings.eps**2 + (residuals / unit) ** 2
    final = smoothed.pow((settings.alpha - 2) / 2)
    u, s, v = truncate(u, s, v, d)
    u, v = fix_signs(*form.expand(u, v))
    return SharedSubspace(
        u=u,
        s=s,
        v=v,
        first=first,
        last=last,
        weights=final / final.mean(),
        # Of an update that is zero, nothing is explained.
        residuals=torch.where(norms > 0, residuals / norms, torch.ones_like(norms)),
        energy=torch.where(norms > 0, energy, torch.zeros_like(energy)).clamp(0, 1),
        objective=objective,
    )


def _empty(form: Form, k: int) -> SharedSubspace:
    """Every update is zero in this module: a subspace without directions."""
    zero = torch.zeros(0, dtype=torch.float64, device=form.norms.device)
    n, m = form.shape
    return SharedSubspace(
        u=zero.reshape(n, 0),
        s=zero,
        v=zero.reshape(m, 0),
        first=zero,
        last=zero,
        weights=torch.ones(k, dtype=torch.float64),
        residuals=torch.zeros(k, dtype=torch.float64),
        energy=torch.zeros(k, dtype=torch.float64),
        objective=[0.0],
    )
