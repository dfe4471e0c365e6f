"""A scale and a shift between two sets of numbers under the L1 norm: exact, or by Adam as published numbers were.

    min over s, t_1..t_C  of  F(s, t) = sum_i w_i sum_c | s p_ic + t_c - q_ic |

C = 1 for depth (s d + t), 3 for points that share one scale. F is convex and piecewise linear; unlike least squares,
what lies far away pulls no harder than what lies a little off.
Source: the alignments of Pi3, MonST3R and CUT3R (depth) and of MoGe (points); see `depth`.
"""

from __future__ import annotations

import numpy as np

#: Fewer values than these fit any line: the error would be zero and mean nothing.
MIN_VALUES = 3


def weighted_median(values: np.ndarray, weights: np.ndarray | None = None) -> int:
    """Index of the smallest of values (N,) at which the weights (N,) up to it reach half of their sum."""
    if weights is None:
        middle = (len(values) - 1) // 2
        return int(np.argpartition(values, middle)[middle])
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return int(order[min(int(np.searchsorted(total, total[-1] / 2)), len(order) - 1)])


def l1_error(p: np.ndarray, q: np.ndarray, weights: np.ndarray | None, scale: float, shift: np.ndarray) -> float:
    """F(scale, shift) for p, q (N, C), weights (N,) or None for ones, shift (C,)."""
    errors = np.abs(scale * p + shift - q).sum(1)
    return float(errors.sum() if weights is None else weights @ errors)


def start(p: np.ndarray, q: np.ndarray) -> float:
    """The scale that solvers begin with: median of the last column of q over that of p, or 1 where this is none."""
    with np.errstate(all="ignore"):
        scale = float(np.median(q[:, -1]) / np.median(p[:, -1]))
    return scale if np.isfinite(scale) and scale != 0 else 1.0


def irls(
    p: np.ndarray, q: np.ndarray, weights: np.ndarray | None = None, iterations: int = 50
) -> tuple[float, np.ndarray]:
    """The minimum of F: scale and shift (C,) for p, q (N, C) float64 and weights (N,) > 0.

    Iteratively reweighted least squares with weights w / max(|r|, eps) comes near it, and moves from corner to corner
    of the piecewise linear F then end in it (see `_to_corner`). Where all of p is one value the scale is free:
    it stays that of the medians, with the best shift. Nothing keeps the scale positive.
    """
    spread = np.ptp(p, axis=0).max()
    scale, shift = start(p, q), np.zeros(p.shape[1])
    if spread <= 1e-12 * np.abs(p).max():
        return scale, _medians(p, q, weights, scale)[0]
    ones = np.ones(len(p)) if weights is None else weights
    size = float(np.median(np.abs(q))) or float(np.abs(q).max()) or 1.0
    eps = 1e-7 * size  # far below what is measured, far above rounding
    for _ in range(iterations):
        before = scale, shift
        w = ones[:, None] / np.maximum(np.abs(scale * p + shift - q), eps)
        total = w.sum(0)
        mean_p, mean_q = (w * p).sum(0) / total, (w * q).sum(0) / total
        flat = w * (p - mean_p)
        square = float((flat * (p - mean_p)).sum())
        if not square > 0:
            break
        scale = float((flat * (q - mean_q)).sum()) / square
        shift = mean_q - scale * mean_p
        moved = abs(scale - before[0]) * spread + float(np.abs(shift - before[1] + (scale - before[0]) * mean_p).max())
        if moved < 1e-4 * size:  # the corners are near, and reached faster from one to the next
            break
    return _to_corner(p, q, weights, scale, shift)


def _medians(p: np.ndarray, q: np.ndarray, weights: np.ndarray | None, scale: float) -> tuple[np.ndarray, list[int]]:
    """The best shift (C,) for this scale, and in each coordinate the number of the value it passes through."""
    rest = q - scale * p
    anchors = [weighted_median(rest[:, c], weights) for c in range(p.shape[1])]
    return np.array([rest[row, c] for c, row in enumerate(anchors)]), anchors


def _pivot(
    p: np.ndarray, q: np.ndarray, weights: np.ndarray | None, anchors: list[int]
) -> tuple[float, tuple[int, int]] | None:
    """The best scale among shifts that pass through the anchors, t_c = q_ac - s p_ac, and the value that fixes it.

    Then F = sum w |p - p_a| |s - (q - q_a) / (p - p_a)|, whose minimum is a weighted median of ratios.
    """
    columns = np.arange(p.shape[1])
    dp, dq = p - p[anchors, columns], q - q[anchors, columns]
    rows, where = np.nonzero(dp)
    if not len(rows):
        return None
    dp, dq = dp[rows, where], dq[rows, where]
    best = weighted_median(dq / dp, np.abs(dp) if weights is None else np.abs(dp) * weights[rows])
    return float(dq[best] / dp[best]), (int(rows[best]), int(where[best]))


def _to_corner(
    p: np.ndarray, q: np.ndarray, weights: np.ndarray | None, scale: float, shift: np.ndarray, moves: int = 100
) -> tuple[float, np.ndarray]:
    """Down to the minimum: the best shift, the best scale through its anchors, the best one through the exchanged one.

    A minimum is a corner, where 1 + C values are met exactly, and these three are the edges that leave it. No move
    raises F; the first round without gain ends it.
    """
    columns = np.arange(p.shape[1])
    least = l1_error(p, q, weights, scale, shift)
    for _ in range(moves):
        now, anchors = scale, _medians(p, q, weights, scale)[1]
        for _ in range(2):
            found = _pivot(p, q, weights, anchors)
            if found is None:
                break
            now, (row, column) = found
            anchors[column] = row
        moved = q[anchors, columns] - now * p[anchors, columns]
        error = l1_error(p, q, weights, now, moved)
        if not error < least:
            break
        gain, least = least - error, error
        scale, shift = now, moved
        if gain < 1e-13 * least:
            break
    return scale, shift


def adam(
    p: np.ndarray, q: np.ndarray, rate: float, iterations: int = 1000, tolerance: float = 1e-6
) -> tuple[float, np.ndarray]:
    """Scale and shift (1,) after at most `iterations` steps of Adam (betas 0.9, 0.999) on F, for p, q (N, 1).

    From the ratio of medians and shift 0, ended where F changes by less than `tolerance`. It has not converged where
    the shift is larger than rate x iterations, which is what published numbers contain.
    """
    value = np.array([start(p, q), 0.0])
    first, second = np.zeros(2), np.zeros(2)
    x, y = p[:, 0], q[:, 0]
    before = np.inf
    for step in range(1, iterations + 1):
        rest = value[0] * x + value[1] - y
        error = float(np.abs(rest).sum())
        if abs(before - error) < tolerance:
            break
        before = error
        sign = np.sign(rest)
        gradient = np.array([sign @ x, sign.sum()])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return float(value[0]), value[1:].copy()


__all__ = ["MIN_VALUES", "adam", "irls", "l1_error", "weighted_median"]
