"""The k updates of a module, in the two forms IRLS works on: a small core, or products with the stacked factors.

Stacked, P = [P_1 .. P_k] (n x R) and Q = [Q_1 .. Q_k] (m x R), dW_i = P_i Q_i^T, C = P diag(w) Q^T. In both forms
the updates are pairs of blocks of two matrices `left` (a x R) and `right` (b x R): R_p and R_q of P = X R_p and
Q = Y R_q in the core form, P and Q themselves in the other. Everything is float64, but for one spectrum: see
`Operator`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import add_gram, add_product, cholesky_r, gram_eigh, mirrored, product_norm, resolved, thin_product
from .matrix_free import block_width, leading_svd

Triplet = tuple[Tensor, Tensor, Tensor]

# Up to this stacked rank eigenvectors of the whole core cost less than finding the leading ones from nothing.
_WHOLE = 256
# Passes after which the iteration on a core has cost more than an SVD of it: below `_WHOLE`, and above.
_PATIENCE = (8, 60)
# A squared norm found by subtracting squares keeps twelve digits down to this share of them.
_CANCELS = 1e-4
# Residual, relative to s_1, up to which C in its own precision is iterated on, and passes for it.
_ROUGH, _ROUGH_PASSES = 1e-4, 50
# Residual, relative to s_1, of triplets by P and Q: values are right to 1e-14 then, and U and V are kept in float32.
_FINE = 1e-7
# Columns of the larger side, or of the stacked rank, that are converted to another precision at a time.
_SLAB, _WIDE_SLAB = 512, 800


@dataclass
class Updates:
    """P (n x R) and Q (m x R) in float64, who owns which columns, and whether they were stored in <= 32 bits."""

    p: Tensor
    q: Tensor
    slices: list[slice]
    narrow: bool


def stack_updates(
    pairs: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int], ranks: Sequence[int], device: torch.device
) -> Updates:
    """P and Q from the pairs (P_i [n, r_i], Q_i [m, r_i]), each used and let go before the next is asked for."""
    ends = torch.tensor(list(ranks)).cumsum(0).tolist()
    slices = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
    n, m = shape
    p = torch.empty(n, ends[-1], dtype=torch.float64)
    # Its columns are rows of lora_A: kept in that order, both sides are written as they come.
    q = torch.empty(ends[-1], m, dtype=torch.float64)
    narrow = True
    for where, (left, right) in zip(slices, pairs, strict=True):
        p[:, where] = left
        q[where] = right.T
        narrow = narrow and left.dtype != torch.float64 and right.dtype != torch.float64
    return Updates(p.to(device), q.to(device).T, slices, narrow)


def form_of(updates: Updates) -> Form:
    """The core form while the stacked rank is at most min(n, m), else the matrix-free one."""
    n, m = updates.p.shape[0], updates.q.shape[0]
    return Core(updates) if updates.p.shape[1] <= min(n, m) else Operator(updates)


class Form(ABC):
    """What both forms share: norms and inner products of the updates, in terms of left and right."""

    def __init__(self, updates: Updates, left: Tensor, right: Tensor) -> None:
        self.shape = (updates.p.shape[0], updates.q.shape[0])
        self.left, self.right, self.slices = left, right, updates.slices
        self.columns = torch.tensor([s.stop - s.start for s in self.slices], device=left.device)
        self._start: Tensor | None = None
        squares, sizes = [], []
        for i in self.slices:
            p, q = left[:, i].T @ left[:, i], right[:, i].T @ right[:, i]
            squares.append((p * q).sum())
            sizes.append(p.trace() * q.trace())
        square, size = torch.stack(squares), torch.stack(sizes)
        norms = square.clamp_min(0).sqrt()
        #: (k) adapters whose factors cancel in their product: for them squares are not subtracted.
        self.cancels = square < _CANCELS * size
        for i in self.cancels.nonzero().flatten().tolist():
            norms[i] = product_norm(left[:, self.slices[i]], right[:, self.slices[i]])
        self.norms = norms
        self.balanced = not bool(self.cancels.any())

    def spread(self, weights: Tensor) -> Tensor:
        """One weight per adapter (k) -> one per column of left and right (R)."""
        return weights.repeat_interleave(self.columns)

    @abstractmethod
    def spectrum(self, weights: Tensor) -> Tensor:
        """All singular values of C."""

    @abstractmethod
    def leading(self, weights: Tensor, d: int) -> Triplet:
        """The d leading singular triplets of C, in the coordinates of left and right."""

    @abstractmethod
    def expand(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Singular vectors of C in the coordinates of the layer, n x d and m x d."""

    def project(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """U^T left and V^T right (d x R): all that residuals and energies need."""
        return u.T @ self.left, v.T @ self.right

    def residuals(self, triplet: Triplet, x: Tensor, y: Tensor) -> Tensor:
        """||U S V^T - dW_i||_F (k), with x, y = project(U, V)."""
        u, s, v = triplet
        inner = (s[:, None] * x * y).sum(0)  # [R]
        cross = torch.stack([inner[i].sum() for i in self.slices])
        whole = self.norms.square() + s.square().sum()
        square = whole - 2 * cross
        found = square.clamp_min(0).sqrt()
        # Where little is left of what was subtracted, the difference itself: [P_i, -U S] [Q_i, V]^T.
        for i in (self.cancels | (square <= _CANCELS * whole)).nonzero().flatten().tolist():
            p = torch.cat([self.left[:, self.slices[i]], -(u * s)], 1)
            q = torch.cat([self.right[:, self.slices[i]], v], 1)
            found[i] = product_norm(p, q)
        return found

    def energy(self, x: Tensor, y: Tensor) -> Tensor:
        """||U^T dW_i V||_F^2 (k), with x, y = project(U, V)."""
        return torch.stack([(x[:, i] @ y[:, i].T).square().sum() for i in self.slices])


def _reduce(stacked: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """R (R x R) of stacked = X R, and the map from core coordinates c to X c."""
    r = cholesky_r(stacked)
    if r is not None:
        return r, lambda c: thin_product(stacked, torch.linalg.solve_triangular(r, c, upper=True))
    q, r = torch.linalg.qr(stacked)
    return r, lambda c: thin_product(q, c)


class Core(Form):
    """The R x R form: exact, and small while the stacked rank is below min(n, m)."""

    def __init__(self, updates: Updates) -> None:
        rp, self._expand_u = _reduce(updates.p)
        rq, self._expand_v = _reduce(updates.q)
        super().__init__(updates, rp, rq)
        self._slow = False
        self._whole: tuple[Tensor, Triplet] | None = None

    def _mean(self, weights: Tensor) -> Tensor:
        return (self.left * self.spread(weights)) @ self.right.T  # [R, R]

    def _svd(self, weights: Tensor) -> Triplet:
        if self._whole is None or not torch.equal(self._whole[0], weights):
            u, s, vh = torch.linalg.svd(self._mean(weights))
            self._whole = weights.clone(), (u, s, vh.T)
        return self._whole[1]

    def _known(self, weights: Tensor) -> bool:
        return self._whole is not None and torch.equal(self._whole[0], weights)

    def spectrum(self, weights: Tensor) -> Tensor:
        if self._known(weights):
            return self._svd(weights)[1]
        mean = self._mean(weights)
        if self._start is None and mean.shape[0] <= _WHOLE:
            # The first spectrum pays for the vectors too: the iteration then starts where it ends.
            values, vectors = gram_eigh(mean)
            if resolved(values):
                self._start = vectors
                return values
            self._slow = True
            return self._svd(weights)[1]
        return torch.linalg.svdvals(mean)

    def leading(self, weights: Tensor, d: int) -> Triplet:
        rank = self.left.shape[1]
        if not self._slow and not self._known(weights) and 2 * block_width(d, (rank, rank)) <= rank:
            mean = self._mean(weights)
            found = leading_svd(
                lambda x: mean @ x,
                lambda x: mean.T @ x,
                mean.shape,
                max(d, 1),
                self._start,
                mean.device,
                _PATIENCE[rank > _WHOLE],
            )
            self._start = found.block
            if found.converged:
                return found.u[:, :d], found.s[:d], found.v[:, :d]
            # Singular values too close together: they will be so at the next weights.
            self._slow = True
        u, s, v = self._svd(weights)
        return u[:, :d], s[:d], v[:, :d]

    def expand(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._expand_u(u), self._expand_v(v)


class Operator(Form):
    """The matrix-free form C x = P (w * (Q^T x)) for a stacked rank above min(n, m).

    Only for a spectrum C is formed, which then takes less memory than P and Q: in float32 where these were stored
    so and do not cancel. Rounding errors of its entries are independent of each other, so that they move a singular
    value by less than 1e-8 of the largest, no more than the Gram matrix does that the spectrum is read off.
    """

    def __init__(self, updates: Updates) -> None:
        super().__init__(updates, updates.p, updates.q)
        self._narrow = updates.narrow and self.balanced
        self._formed: Tensor | None = None

    def _mean(self, weights: Tensor) -> Tensor:
        """C (n x m)."""
        dtype = torch.float32 if self._narrow else torch.float64
        mean = torch.zeros(self.shape, dtype=dtype, device=self.left.device)
        w = self.spread(weights)
        for i in range(0, w.numel(), _WIDE_SLAB):
            part = slice(i, i + _WIDE_SLAB)
            add_product(mean, (self.left[:, part] * w[part]).to(dtype), self.right[:, part].to(dtype))
        return mean

    def spectrum(self, weights: Tensor) -> Tensor:
        """All min(n, m) singular values, from the Gram matrix of the smaller side, summed in slabs."""
        mean = self._mean(weights)
        if self._start is None:
            self._formed = mean
        tall = mean if self.shape[0] >= self.shape[1] else mean.T
        side = tall.shape[1]
        found = torch.zeros(side, side, dtype=torch.float64, device=mean.device)
        for rows in tall.split(_SLAB):
            add_gram(found, rows.to(torch.float64))
        return torch.linalg.eigvalsh(mirrored(found)).flip(0).clamp_min(0).sqrt()

    def leading(self, weights: Tensor, d: int) -> Triplet:
        size, device = max(d, 1), self.left.device
        if self._formed is not None:
            # Roughly, on the matrix that the first spectrum was read off: a pass costs a fraction of one by P and Q.
            c, self._formed = self._formed, None
            rough = leading_svd(
                lambda x: thin_product(c, x),
                lambda x: thin_product(c.T, x),
                self.shape,
                size,
                None,
                device,
                _ROUGH_PASSES,
                _ROUGH,
                c.dtype,
            )
            self._start = rough.block
        w = self.spread(weights)[:, None]
        found = leading_svd(
            lambda x: thin_product(self.left, w * thin_product(self.right.T, x)),
            lambda x: thin_product(self.right, w * thin_product(self.left.T, x)),
            self.shape,
            size,
            self._start,
            device,
            tol=_FINE,
        )
        self._start = found.block
        return found.u[:, :d], found.s[:d], found.v[:, :d]

    def expand(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return u, v
