"""Means over masked values without boolean indexing: shapes stay fixed, so nothing waits for the device.

Values where the mask is False must be finite (the callers put 0 or 1 there first); they change no result and get a
gradient of 0.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

#: No error counts for more than this.
LIMIT = 100.0
#: Trimming needs more values than this, and must leave more.
TRIM_FROM = 1000
#: With more values than MANY, the quantile is that of SAMPLE of them drawn at random.
MANY, SAMPLE = 100_000_000, 1_000_000


def bounded(x: Tensor) -> Tensor:
    """min(x, 100) of finite values; NaN of others, because a bound must not make an infinite error look harmless."""
    return torch.where(x.isfinite(), x.clamp(max=LIMIT), float("nan"))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """sum over mask of x / n, where n >= 1 counts it: an empty mask gives 0, connected to x."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def trimmed_mean(x: Tensor, mask: Tensor, quantile: float | None = 0.98) -> Tensor:
    """The mean of the n values of x under mask (same shape), without those from the quantile on.

    n <= 1000, or quantile None: the plain mean. Otherwise values are cut at 100, and those >= the quantile (the
    value of rank quantile * (n - 1) from 0, halves to even) are left out, if that leaves more than 1000. So where
    more than 2 % lie at the bound of 100, all of those are left out; NaN never is. With more than 1e8 values the
    quantile is estimated from 1e6 of them, and the mean is still over all (the recipe, as far as it is described,
    is silent here).
    """
    if quantile is None:
        return masked_mean(x, mask)
    many = mask.sum() > TRIM_FROM
    x = torch.where(many, bounded(x), x)
    kept = mask & ~(x >= _quantile(x.detach(), mask, quantile))
    return masked_mean(x, torch.where(many & (kept.sum() > TRIM_FROM), kept, mask))


def _quantile(x: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The value of rank quantile * (n - 1), rounded, of the n values under mask; n = 0: anything. Shape (1,)."""
    if x.numel() > MANY:
        x = x[mask]  # a synchronisation, at a size where it is nothing
        if x.numel() > MANY:
            x = x[torch.randint(x.numel(), (SAMPLE,), device=x.device)]
        mask = torch.ones_like(x, dtype=torch.bool)
    # A sort and not kthvalue: its rank would have to be known to the host, and on a GPU it is the slower one.
    ordered = torch.where(mask, x, float("inf")).flatten().sort().values
    # Integers: float32 cannot count the pixels of a batch.
    share = Fraction(quantile).limit_denominator(1_000_000)
    product = (mask.sum() - 1).clamp(min=0) * share.numerator
    rank, rest = product // share.denominator, 2 * (product % share.denominator)
    up = (rest > share.denominator) | ((rest == share.denominator) & (rank % 2 == 1))
    return ordered.gather(0, (rank + up)[None])
