"""Nearest neighbours among millions of points, and which of them are asked about.

Only the side that asks may be thinned out: every k-th query against all of a cloud estimates the mean distance to that
cloud without bias, while a thinned cloud moves every nearest neighbour away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._extras import require

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def point_array(points: ArrayLike, name: str) -> Floats:
    """Points (N, 3) as contiguous float64; ValueError for another shape."""
    array = np.ascontiguousarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{name} are of shape {array.shape}, expected (N, 3): one point in each row.")
    return array


def build_tree(points: ArrayLike) -> Any:
    """scipy's cKDTree of points (N, 3)."""
    return require("scipy.spatial", "eval", "measuring points").cKDTree(point_array(points, "points"))


def choose_rows(total: int, wanted: int | None, seed: int = 0) -> Indices:
    """`wanted` of the rows 0..total-1 in their order, one at random out of each of as many equal parts; None: all.

    Rows are pixels of views: equal parts cover all of the picture, and random places in them cannot fall into step
    with the columns of an image.
    """
    if wanted is None or wanted >= total:
        return np.arange(total, dtype=np.int64)
    if wanted < 1:
        raise ValueError(f"{wanted} points were asked for: expected 1 or more, or None for all.")
    bounds = np.arange(wanted + 1, dtype=np.int64) * total // wanted
    return np.random.default_rng(seed).integers(bounds[:-1], bounds[1:])


__all__ = ["build_tree", "choose_rows", "point_array"]
