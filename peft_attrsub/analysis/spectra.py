"""Spectra of C: where they drop, which of the paper's patterns that makes, how many directions it suggests.

C = sum_i w_i dW_i / sum_i w_i is the weighted mean of an attribute's updates, its singular values are
s_1 >= s_2 >= ... (paper, section 3.3; method.md section 3 for the patterns). The weights are the final ones: the paper
shows the plain mean of the first iteration, in which an adapter that the mining mutes still has its full say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, log

import torch
from torch import Tensor

# Singular values under this share of the largest are rounding, not spectrum.
_FLOOR = 1e-6
_LEAST_FACTOR = 3.0
_TIMES_TYPICAL = 4.0
_ENERGY_SHARE = 0.9

DROP_RULE = (
    "A drop is a fall of the singular values by a factor of 3 or more over h = ceil(rank / 8) consecutive values "
    "that is at least four times (in logarithms) the typical, median fall over h values of the same spectrum. Falls "
    "that touch, or have their steepest step in common, count as one; a drop is placed at its steepest step, and must "
    "have 2 h values (at least 4) below it (the last values of any square matrix fall off). Values under 1e-6 of the "
    "largest count as 1e-6, and falls that reach there do not count as typical; a drop to them counts only where "
    "there is no other."
)
PATTERN_RULE = (
    "At-rank: one drop, within h of the adapters' rank. Beyond-rank: one drop, further on. Two-step: two drops or "
    "more. None: no drop. Below-rank (not in the paper): one drop before the rank, so that the adapters share fewer "
    "directions than each of them has."
)
SUGGESTED_RULE = (
    "The suggested dim keeps everything above the steepest drop; without a drop it is the smallest that holds 90 % "
    "of the sum of squared singular values of C."
)
PATTERNS = ("at-rank", "beyond-rank", "two-step", "below-rank", "none")


@dataclass(frozen=True)
class Drop:
    """index: how many singular values stand above the drop. factor: by how much the values fall over it."""

    index: int
    factor: float


def window(rank: int) -> int:
    """h = ceil(rank / 8): over how many values a drop may stretch, and how near the rank is "at" it."""
    return max(1, ceil(rank / 8))


def find_drops(values: Tensor, rank: int) -> list[Drop]:
    """Sharp drops of a spectrum `values` (R, falling) of adapters of rank `rank`, in order of their index.

    With h = ceil(rank / 8) and G_j = ln s_j - ln s_(j+h), there is a drop where G_j >= max(ln 3, 4 median G) and
    at least max(2 h, 4) values stand below it.
    """
    logs, h = _logs(values), window(rank)
    if logs.shape[0] <= h:
        return []
    falls = logs[:-h] - logs[h:]
    # On the floor nothing falls, and what falls onto it is no typical step of the spectrum.
    inside = falls[values[h:].double() > _FLOOR * float(values[0])]
    typical = float(inside.quantile(0.5)) if inside.numel() else 0.0
    least = max(log(_LEAST_FACTOR), _TIMES_TYPICAL * typical)
    steps = logs[:-1] - logs[1:]
    found: dict[int, float] = {}
    for start, stop in _runs((falls >= least).tolist()):
        # The falls G_start .. G_(stop-1) reach from value `start` to value `stop - 1 + h`.
        at = start + int(steps[start : stop - 1 + h].argmax())
        if at + 1 <= logs.shape[0] - max(2 * h, 4):
            # Two runs may share their steepest step.
            found[at + 1] = max(found.get(at + 1, 0.0), exp(float(logs[start] - logs[stop - 1 + h])))
    floor = _FLOOR * float(values[0])
    inside_the_spectrum = [index for index in found if float(values[index]) > floor]
    # The fall to rounding is the end of the spectrum: a drop of its own only where nothing above it falls.
    kept = inside_the_spectrum or list(found)
    return [Drop(index, found[index]) for index in kept]


def largest_fall(values: Tensor, rank: int) -> float:
    """Largest factor by which the values fall over h of them, drop or not (1 for a spectrum of one value)."""
    logs, h = _logs(values), window(rank)
    h = min(h, logs.shape[0] - 1)
    return exp(float((logs[:-h] - logs[h:]).max())) if h > 0 else 1.0


def pattern(drops: Sequence[Drop], rank: int) -> str:
    """One of PATTERNS (method.md section 3; "below-rank" is ours)."""
    if len(drops) != 1:
        return "two-step" if drops else "none"
    index, h = drops[0].index, window(rank)
    return "beyond-rank" if index > rank + h else "below-rank" if index < rank - h else "at-rank"


def suggest_dim(values: Tensor, drops: Sequence[Drop]) -> int:
    """Number of directions above the steepest drop; without one, the fewest with 90 % of sum s^2 (at least 1)."""
    if drops:
        return max(drops, key=lambda drop: drop.factor).index
    shares = energy_shares(values)
    return int((shares < _ENERGY_SHARE * (1 - 1e-12)).sum()) + 1


def energy_shares(values: Tensor) -> Tensor:
    """sum_(i<=d) s_i^2 / sum_i s_i^2 for d = 1 .. R (float64); zeros for a spectrum of zeros."""
    squares = values.double().square()
    total = squares.sum()
    return squares.cumsum(0) / total if float(total) > 0 else squares


def _logs(values: Tensor) -> Tensor:
    if values.numel() == 0 or float(values[0]) <= 0:
        return torch.zeros(0, dtype=torch.float64)
    return values.double().clamp_min(_FLOOR * float(values[0])).log()


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, stop) of every run of True."""
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
