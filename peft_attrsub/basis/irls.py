"""The shared subspace of k low-rank updates, robustly: factored iteratively reweighted least squares.

    minimise over A, B of rank d:   sum_i || A B^T - dW_i ||_F^alpha ,     dW_i = P_i Q_i^T      (paper, section 3.2)

In turn, from w_i = 1:
    C = sum_i w_i dW_i / sum_i w_i ,   C = U S V^T ,   L = U_d S_d V_d^T
    w_i = 1 / (eps^2 + ||L - dW_i||_F^2)^((2 - alpha) / 2)
Norms are measured in units of the median ||dW_i||_F: scaling all adapters changes no weight. There is no
centring. The smoothed objective sum_i (eps^2 + ||L - dW_i||^2)^(alpha/2) never increases.

No n x m matrix is formed. With P = [P_1 .. P_k] (n x R) = X R_p and Q = [Q_1 .. Q_k] (m x R) = Y R_q (X, Y
orthonormal), everything happens exactly in R x R: C = X (R_p diag(w) R_q^T) Y^T. When R exceeds min(n, m)
that is no longer small, and `matrix_free` takes over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .linalg import cholesky_r, fix_signs, truncate
from .matrix_free import leading_svd

# Up to this stacked rank a full SVD of the core costs less than finding its leading part.
_FULL_SVD = 256

# Rows of the larger side worked on at a time, so that C is never whole.
_SLAB = 512

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

    first, last: singular values of C at the first and the last iteration (all R of them, or the leading
    ones where the core is not formed). weights (k): final, mean 1. residuals (k): ||L - dW_i|| / ||dW_i||.
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
        dim: number of directions, or a rule that maps C's first spectrum to one.
        settings: alpha, eps, max_iter, tol.
    """
    return _reweight(_problem(left, right), dim, settings or IrlsSettings())


def first_spectrum(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Singular values of the plain mean C = sum_i dW_i / k, before any reweighting."""
    problem = _problem(left, right)
    return problem.spectrum(torch.full_like(problem.norms, 1 / len(left)))


def _problem(left: list[Tensor], right: list[Tensor]) -> _Core | _Operator:
    stacked = sum(p.shape[1] for p in left)
    small = stacked <= min(left[0].shape[0], right[0].shape[0])
    return _Core(left, right) if small else _Operator(left, right)


def _reweight(problem: _Core | _Operator, dim: Dimension, settings: IrlsSettings) -> SharedSubspace:
    norms = problem.norms  # [k]
    k, positive = norms.numel(), norms[norms > 0]
    if not positive.numel():
        return _empty(problem, k)
    unit = positive.median()
    weights = torch.ones_like(norms)
    first = problem.spectrum(weights / k)
    d = dim(first) if callable(dim) else dim
    best: tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor] | None = None
    objective: list[float] = []
    for _ in range(settings.max_iter):
        triplet = problem.leading(weights / weights.sum(), d)
        residuals = problem.residuals(*triplet)
        smoothed = settings.eps**2 + (residuals / unit) ** 2
        value = float(smoothed.pow(settings.alpha / 2).sum())
        if objective and value > objective[-1]:
            # Only rounding can raise it: the step before is the answer.
            break
        best = (triplet, residuals, weights)
        objective.append(value)
        weights = smoothed.pow((settings.alpha - 2) / 2)
        if value == 0 or (len(objective) > 1 and objective[-2] - value <= settings.tol * objective[-2]):
            break
    assert best is not None
    (u, s, v), residuals, used = best
    last = problem.spectrum(used / used.sum())
    energy = problem.energy(u, v) / norms.clamp_min(torch.finfo(norms.dtype).tiny) ** 2
    smoothed = settings.eps**2 + (residuals / unit) ** 2
    final = smoothed.pow((settings.alpha - 2) / 2)
    u, s, v = truncate(u, s, v, d)
    u, v = fix_signs(*problem.expand(u, v))
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


def _empty(problem: _Core | _Operator, k: int) -> SharedSubspace:
    """Every update is zero in this module: a subspace without directions."""
    zero = torch.zeros(0, dtype=torch.float64, device=problem.norms.device)
    n, m = problem.shape
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


def _slices(factors: list[Tensor]) -> list[slice]:
    ends = torch.tensor([f.shape[1] for f in factors]).cumsum(0).tolist()
    return [slice(end - f.shape[1], end) for f, end in zip(factors, ends, strict=True)]


def _reduce(stacked: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R (R x R) of stacked = X R, and the map from core coordinates c to X c."""
    r = cholesky_r(stacked)
    if r is not None:
        return r, lambda c: stacked @ torch.linalg.solve_triangular(r, c, upper=True)
    q, r = torch.linalg.qr(stacked)
    return r, lambda c: q @ c


class _Core:
    """The R x R form: exact, and small while the stacked rank is below min(n, m)."""

    def __init__(self, left: list[Tensor], right: list[Tensor]) -> None:
        p = torch.cat([x.double() for x in left], 1)
        q = torch.cat([x.double() for x in right], 1)
        self.shape = (p.shape[0], q.shape[0])
        self._slices = _slices(left)
        self._rp, self._expand_u = _reduce(p)
        self._rq, self._expand_v = _reduce(q)
        self._columns = torch.tensor([x.shape[1] for x in left], device=p.device)
        self._start: Tensor | None = None
        self._svd: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = None
        self.norms = torch.stack([torch.linalg.matrix_norm(self._rp[:, s] @ self._rq[:, s].T) for s in self._slices])

    def _mean(self, weights: Tensor) -> Tensor:
        return (self._rp * weights.repeat_interleave(self._columns)) @ self._rq.T  # [R, R]

    def _full(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._svd is None or not torch.equal(self._svd[0], weights):
            u, s, vh = torch.linalg.svd(self._mean(weights))
            self._svd = (weights.clone(), (u, s, vh.T))
        return self._svd[1]

    def spectrum(self, weights: Tensor) -> Tensor:
        if self._rp.shape[0] <= _FULL_SVD:
            return self._full(weights)[1]
        return torch.linalg.svdvals(self._mean(weights))

    def leading(self, weights: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._rp.shape[0] <= _FULL_SVD:
            u, s, v = self._full(weights)
        else:
            mean = self._mean(weights)
            u, s, v, self._start = leading_svd(
                lambda x: mean @ x, lambda x: mean.T @ x, mean.shape, max(d, 1), self._start, mean.device
            )
        return u[:, :d], s[:d], v[:, :d]

    def residuals(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        shared = (u * s) @ v.T  # [R, R]
        # One adapter at a time: k matrices of R x R would be the largest thing in memory.
        norms = [torch.linalg.matrix_norm(shared - self._rp[:, i] @ self._rq[:, i].T) for i in self._slices]
        return torch.stack(norms)

    def energy(self, u: Tensor, v: Tensor) -> Tensor:
        x, y = u.T @ self._rp, v.T @ self._rq  # [d, R]
        return torch.stack([(x[:, i] @ y[:, i].T).square().sum() for i in self._slices])

    def expand(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._expand_u(u), self._expand_v(v)


class _Operator:
    """The matrix-free form C x = P (w * (Q^T x)) for a stacked rank above min(n, m)."""

    def __init__(self, left: list[Tensor], right: list[Tensor]) -> None:
        self._p = torch.cat([x.double() for x in left], 1)  # [n, R]
        self._q = torch.cat([x.double() for x in right], 1)  # [m, R]
        self.shape = (self._p.shape[0], self._q.shape[0])
        self._slices = _slices(left)
        self._columns = torch.tensor([x.shape[1] for x in left], device=self._p.device)
        self._start: Tensor | None = None
        squares = [((self._p[:, i].T @ self._p[:, i]) * (self._q[:, i].T @ self._q[:, i])).sum() for i in self._slices]
        self.norms = torch.stack(squares).clamp_min(0).sqrt()

    def _solve(self, weights: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
        w = weights.repeat_interleave(self._columns)[:, None]
        u, s, v, self._start = leading_svd(
            lambda x: self._p @ (w * (self._q.T @ x)),
            lambda x: self._q @ (w * (self._p.T @ x)),
            self.shape,
            d,
            self._start,
            self._p.device,
        )
        return u, s, v

    def spectrum(self, weights: Tensor) -> Tensor:
        """All min(n, m) singular values, from the Gram matrix of the smaller side, summed in slabs."""
        small, large = (self._p, self._q) if self.shape[0] <= self.shape[1] else (self._q, self._p)
        weighted = small * weights.repeat_interleave(self._columns)
        gram = weighted.new_zeros(small.shape[0], small.shape[0])
        for rows in large.split(_SLAB):
            slab = weighted @ rows.T
            gram.addmm_(slab, slab.T)
        return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()

    def leading(self, weights: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = self._solve(weights, max(d, 1))
        return u[:, :d], s[:d], v[:, :d]

    def residuals(self, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        inner = (s[:, None] * (u.T @ self._p) * (v.T @ self._q)).sum(0)  # [R]
        cross = torch.stack([inner[i].sum() for i in self._slices])
        return (self.norms**2 - 2 * cross + s.square().sum()).clamp_min(0).sqrt()

    def energy(self, u: Tensor, v: Tensor) -> Tensor:
        x, y = u.T @ self._p, v.T @ self._q
        return torch.stack([(x[:, i] @ y[:, i].T).square().sum() for i in self._slices])

    def expand(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return u, v
