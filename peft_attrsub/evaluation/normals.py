"""Normals of a point cloud by principal components of each point's neighbours.

For the k nearest neighbours x_j of a point, the point itself among them, and their mean m:

    sum_j (x_j - m)(x_j - m)^T = V diag(l_1 <= l_2 <= l_3) V^T ,   normal = first column of V ,

the direction in which they spread the least. Which of its two sides is outside is not known: compare normals by
|n . n'|. As Open3D's estimate_normals with KDTreeSearchParamKNN(30), its default.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .neighbours import Floats, build_tree, point_array

#: Queries at a time: 30 neighbours each of float64 are 12 MB.
CHUNK = 1 << 14


def estimate_normals(
    points: ArrayLike, k: int = 30, queries: ArrayLike | None = None, tree: Any = None, workers: int = -1
) -> Floats:
    """Unit normals (Q, 3), float64, of unknown sign, at the rows `queries` (Q,) of points (N, 3), or at all.

    k: neighbours, the point included (all points, where there are fewer). Neighbours are sought among all points,
    whatever the queries are. tree: `build_tree(points)`, if there is one already. workers: threads, -1 for one a core.
    Where the neighbours lie in one line or place, the normal is some direction across it. ValueError for other shapes,
    k below 3 and rows that do not exist.
    """
    cloud = point_array(points, "points")
    rows = np.arange(len(cloud)) if queries is None else np.asarray(queries)
    if k < 3:
        raise ValueError(f"estimate_normals was given k = {k}: a plane needs 3 neighbours or more.")
    if rows.ndim != 1 or (len(rows) and not (rows.dtype.kind in "iu" and rows.min() >= 0 and rows.max() < len(cloud))):
        raise ValueError(f"queries must be row numbers of {len(cloud)} points, in one dimension.")
    out = np.empty((len(rows), 3))
    if not len(rows):
        return out
    tree = build_tree(cloud) if tree is None else tree
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        _, found = tree.query(cloud[rows[part]], k=min(k, len(cloud)), workers=workers)
        near = cloud[found.reshape(len(found), -1)]  # (q, k, 3)
        near -= near.mean(axis=1, keepdims=True)
        _, directions = np.linalg.eigh(near.transpose(0, 2, 1) @ near)  # eigenvalues ascend
        out[part] = directions[:, :, 0]
    return out


__all__ = ["estimate_normals"]
