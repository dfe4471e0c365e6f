"""Random height fields: smooth, bounded, and zero where a surface patch ends.

h(u, v) = g(f(u, v)),  f = sum_kl W_k(v) C_kl W_l(u),  g(f) = 2 f / sqrt(1 + 3 f^2)

W: cubic B-spline weights (they are >= 0 and sum to 1, so |f| <= max |C|), clamped at the ends or closed to a ring;
C: controls uniform in [-1, 1], with two rings of zeros where the patch is open, so that the field leaves the border
with slope 0: the normals there are those of the flat patch, and a pole is no spike. g spreads the values over
[-1, 1]: a spline alone seldom leaves the middle of its controls' range.
"""

from __future__ import annotations

from functools import lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

CONTROLS = 5  # random controls along an open side; twice as many around a closed one
Field = NDArray[np.float64]


def height_fields(seed: int, count: int, rows: int, cols: int, closed: bool = False) -> Field:
    """`count` fields on a grid: (count, rows + 1, cols + 1) float64, |h| <= 1.

    seed: 0 or more; the same seed gives the same controls at every grid size. rows, cols: segments along v and u.
    closed: the field runs around in u (first column = last column). It is 0 with slope 0 at v = 0 and v = 1 in any
    case, and at u = 0 and u = 1 where it is not closed. Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"the seed of a height field is {seed}: give a whole number, 0 or more.")
    rng = np.random.Generator(np.random.PCG64([seed, crc32(b"height field")]))
    around = 2 * CONTROLS if closed else CONTROLS
    controls = 2.0 * rng.random((count, CONTROLS, around)) - 1.0
    controls = np.pad(controls, ((0, 0), (2, 2), (0, 0) if closed else (2, 2)))
    along_u = spline_weights(cols, controls.shape[2], closed)  # (cols + 1, L)
    along_v = spline_weights(rows, controls.shape[1], False)  # (rows + 1, K)
    # Sums are written out, not left to a matrix product: its order of adding differs between machines.
    bands = np.zeros((count, controls.shape[1], cols + 1))
    for control in range(controls.shape[2]):
        bands += controls[:, :, control, None] * along_u[:, control]
    field = np.zeros((count, rows + 1, cols + 1))
    for control in range(controls.shape[1]):
        field += along_v[:, control, None] * bands[:, control, None, :]
    field[:, [0, -1], :] = 0.0
    if not closed:
        field[:, :, [0, -1]] = 0.0
    spread: Field = 2.0 * field / np.sqrt(1.0 + 3.0 * field * field)
    return spread


@lru_cache(maxsize=32)
def spline_weights(segments: int, controls: int, closed: bool) -> Field:
    """Cubic B-spline weights at t = 0, 1 / segments, ..., 1: (segments + 1, controls), each row sums to 1.

    Clamped: the first row is (1, 0, ..., 0) and the last one (0, ..., 0, 1). Closed: the last row is the first.
    The array is shared and read-only.
    """
    weights = (_ring if closed else _clamped)(np.arange(segments + 1) / segments, controls)
    if closed:
        weights[-1] = weights[0]
    weights.flags.writeable = False
    return weights


def _ring(where: Field, controls: int) -> Field:
    span = np.floor(where * controls).astype(np.int64)
    x = where * controls - span
    four = ((1 - x) ** 3, 3 * x**3 - 6 * x**2 + 4, -3 * x**3 + 3 * x**2 + 3 * x + 1, x**3)
    weights = np.zeros((len(where), controls))
    for step, values in enumerate(four):
        weights[np.arange(len(where)), (span + step - 1) % controls] += values / 6.0
    return weights


def _clamped(where: Field, controls: int) -> Field:
    """Cox-de Boor: N_i,p = (t - t_i) / (t_i+p - t_i) N_i,p-1 + (t_i+p+1 - t) / (t_i+p+1 - t_i+1) N_i+1,p-1."""
    spans = controls - 3
    knots = np.concatenate([np.zeros(3), np.arange(spans + 1), np.full(3, spans)])
    t = (where * spans)[:, None]
    inside = np.minimum(np.floor(t), spans - 1)  # t = 1 belongs to the last span
    basis = ((knots[:-1] == inside) & (knots[1:] > inside)).astype(np.float64)
    for degree in range(1, 4):
        n = basis.shape[1] - 1
        low, high = knots[:n], knots[degree + 1 : degree + 1 + n]
        rise = np.where(knots[degree : degree + n] > low, knots[degree : degree + n] - low, 1.0)
        fall = np.where(high > knots[1 : n + 1], high - knots[1 : n + 1], 1.0)
        basis = (t - low) / rise * basis[:, :-1] + (high - t) / fall * basis[:, 1:]
    return basis
