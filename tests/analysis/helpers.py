"""Adapters whose mean C is known by arithmetic, bases with planted overlap, and the rules written down slowly."""

from __future__ import annotations

import itertools
import math
import statistics

import torch

from peft_attrsub import Basis
from tests.basis.helpers import SHAPES, orthonormal, refactored


def planted(n, m, rows, seed=0, module="blocks.0.fc"):
    """One adapter per row {direction: strength}: dW = sum_j strength_j u_j v_j^T.

    u_j and v_j are orthonormal and the same for all adapters, so that C at the first iteration has the mean
    strength of every direction for a singular value.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 1 + max(j for row in rows for j in row)
    u, v = orthonormal(n, size, generator), orthonormal(m, size, generator)
    adapters = []
    for row in rows:
        index, strength = list(row), torch.tensor(list(row.values()), dtype=torch.float64)
        # Other factors for every adapter: equal rows are then no copies.
        adapters.append(refactored({module: (u[:, index] * strength, v[:, index].T)}, len(adapters)))
    return adapters


def mean_strengths(rows):
    """The singular values of C that `planted` makes, falling."""
    every = {j for row in rows for j in row}
    return sorted((sum(row.get(j, 0.0) for row in rows) / len(rows) for j in every), reverse=True)


def spanning(u, v, s=None):
    """(U, S, V) in float32 for `Basis.from_factors`."""
    return u.float(), torch.ones(u.shape[1]) if s is None else s, v.float()


def layered_basis(layers, shared, n=60, m=50, d=4, seed=0, name="blocks.{}.fc"):
    """Two attributes over `layers` modules; in each, their first directions are the same.

    shared: "everywhere" (one direction for all layers), "by layer" (another in each), or "nowhere".
    """
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in (n, m)]
    factors = {"texture": {}, "geometry": {}}
    for i in range(layers):
        own = [torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in (n, m)]
        first = {"everywhere": common, "by layer": own}.get(shared)
        for row in factors.values():
            sides = []
            for j, size in enumerate((n, m)):
                columns = torch.randn(size, d, generator=generator, dtype=torch.float64)
                if first is not None:
                    columns[:, :1] = first[j]
                sides.append(torch.linalg.qr(columns).Q)
            row[name.format(i)] = spanning(*sides)
    return Basis.from_factors(factors)


def drops_slowly(values, rank):
    """(index, factor) of every drop, from the rule as the report states it; loops only.

    A fall by 3 or more over h = ceil(rank / 8) values, at least four times the median fall in logarithms; falls
    that touch are one; at its steepest step; 2 h values (at least 4) below it; values count as 1e-6 of the largest
    at least, and falls that reach that are not typical. A drop to there counts only if it is alone.
    """
    values = [float(v) for v in values]
    if not values or values[0] <= 0:
        return []
    h = max(1, math.ceil(rank / 8))
    logs = [math.log(max(v, 1e-6 * values[0])) for v in values]
    falls = [logs[j] - logs[j + h] for j in range(len(logs) - h)]
    if not falls:
        return []
    typical = [fall for fall, end in zip(falls, values[h:], strict=True) if end > 1e-6 * values[0]]
    least = max(math.log(3), 4 * (statistics.median(typical) if typical else 0))
    drops, j = [], 0
    while j < len(falls):
        if falls[j] < least:
            j += 1
            continue
        first = j
        while j < len(falls) and falls[j] >= least:
            j += 1
        last = j - 1 + h  # the last value that the touching falls reach
        steps = {i: logs[i] - logs[i + 1] for i in range(first, last)}
        steepest = max(steps, key=lambda i: (steps[i], -i))
        above = steepest + 1
        if len(values) - above >= max(2 * h, 4):
            drops.append((above, math.exp(logs[first] - logs[last])))
    # One per steepest step, with the larger of the falls that share it.
    single = [(above, max(f for a, f in drops if a == above)) for above in dict(drops)]
    return [(above, factor) for above, factor in single if values[above] > 1e-6 * values[0]] or single


def near_a_threshold(values, rank, margin=1e-9):
    """Whether rounding may decide if a fall is large enough."""
    values = [float(v) for v in values]
    if not values or values[0] <= 0:
        return False
    h = max(1, math.ceil(rank / 8))
    logs = [math.log(max(v, 1e-6 * values[0])) for v in values]
    falls = [logs[j] - logs[j + h] for j in range(len(logs) - h)]
    if not falls:
        return False
    typical = [fall for fall, end in zip(falls, values[h:], strict=True) if end > 1e-6 * values[0]]
    least = max(math.log(3), 4 * (statistics.median(typical) if typical else 0))
    steps = sorted(logs[j] - logs[j + 1] for j in range(len(logs) - 1))
    tied = any(0 < b - a < margin for a, b in itertools.pairwise(steps))
    return tied or any(abs(fall - least) < margin for fall in falls)


def given_factors():
    """A basis in memory, without records; its two attributes have five and two directions."""
    g = torch.Generator().manual_seed(0)
    return Basis.from_factors({
        a: {m: spanning(orthonormal(n, d, g), orthonormal(k, d, g)) for m, (n, k) in SHAPES.items()}
        for a, d in (("wide", 5), ("narrow", 2))
    })  # fmt: skip
