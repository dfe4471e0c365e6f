"""Accuracy, completeness and normal consistency of predicted points against true ones.

With P the aligned prediction, G the truth, g(p) the nearest point of G to p and p(g) the nearest of P to g:

    Acc = mean_P |p - g(p)| ,   Comp = mean_G |g - p(g)| ,
    NC  = (mean_P |n_p . n_g(p)| + mean_G |n_g . n_p(g)|) / 2 .

Distances are in the unit of the truth and not squared; normals are those of `normals.py`, of each cloud by itself.
Before: a similarity from all pairs of pixels (Umeyama), then rigid ICP; that is the release's protocol, our default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from .alignment import ONE_PLACE, Similarity, icp, umeyama
from .neighbours import Floats, Indices, build_tree, choose_rows, point_array
from .normals import estimate_normals
from .skipping import SkippedError

Align = Literal["sim3+icp", "sim3", "scale", "median", "none"]
#: Queries of each direction by default.
MAX_QUERIES = 500_000


@dataclass(frozen=True, eq=False)
class PointMetrics:
    """What `point_metrics` measured. Distances are in the unit of the truth, NC in [0, 1] (0.5: normals at random).

    acc, comp: means; acc_median, comp_median: medians. nc: mean of nc_pred and nc_truth. points: pairs that were
    given; queries: how many points of each side were asked about (all: exact). align: the name of the alignment;
    icp_threshold, icp_fitness, icp_rmse: None without ICP. similarity: the whole alignment, prediction -> truth.
    """

    acc: float
    acc_median: float
    comp: float
    comp_median: float
    nc: float
    nc_pred: float
    nc_truth: float
    points: int
    queries: int
    align: str
    icp_threshold: float | None
    icp_fitness: float | None
    icp_rmse: float | None
    similarity: Similarity

    def aligned(self, pred: ArrayLike) -> Floats:
        """Predicted points (..., 3), in the frame of the truth: what was compared, for pictures."""
        return self.similarity.apply(pred)


def point_metrics(
    pred: ArrayLike,
    truth: ArrayLike,
    *,
    align: Align = "sim3+icp",
    icp_threshold: float = 0.1,
    max_queries: int | None = MAX_QUERIES,
    icp_points: int | None = 200_000,
    neighbours: int = 30,
    exact: bool = False,
    seed: int = 0,
    workers: int = -1,
) -> PointMetrics:
    """Acc, Comp and NC of pred (N, 3) against truth (N, 3), of which row i is the same pixel of the same view.

    align, from the prediction to the truth:
      "sim3+icp"  similarity by Umeyama over all rows, then rigid ICP with icp_threshold (unit of the truth): the
                  release's, after Pi3's evaluation
      "sim3"      the similarity alone: VGGT's paper
      "scale"     s = sum p.g / sum p.p, the least squares scale about the origin. Both clouds must be in the frame of
                  the same camera, as in the next two
      "median"    s (p - med P) + med G by coordinate, s = med |g - med G| / med |p - med P|: in the manner of DUSt3R
      "none"      as they are

    Only the points that ask are thinned out, evenly over the rows: at most max_queries of each side look for their
    nearest neighbour among all points of the other, and at most icp_points of the prediction take part in ICP. Normals
    always see all points. exact=True: all of them ask. seed: of that choice. neighbours: of a normal. workers: threads
    of the searches, -1 for one a core (1 where several processes share the machine).

    SkippedError, with a reason for tables, where there is nothing to measure: fewer than three points, a prediction or
    a truth that is not finite or all in one place, no positive scale. ValueError for other arguments.
    Source: paper, section 4 and supplement; definitions of the release's evaluation.
    """
    if align not in get_args(Align):
        raise ValueError(f"align is {align!r}, expected one of {', '.join(get_args(Align))}.")
    moving, target = point_array(pred, "predicted points"), point_array(truth, "true points")
    if moving.shape != target.shape:
        raise ValueError(
            f"{len(moving)} predicted and {len(target)} true points were given: row i of both must be the same pixel."
        )
    _check(moving, target)
    if exact:
        max_queries = icp_points = None
    count = len(moving)
    tree = build_tree(target)
    similarity, found = _starting(moving, target, align), None
    if align == "sim3+icp":
        found = icp(
            similarity.apply(moving),
            target,
            icp_threshold,
            max_points=icp_points,
            seed=seed,
            tree=tree,
            workers=workers,
        )
        similarity = found.similarity.after(similarity)
    moving = similarity.apply(moving)
    moving_tree = build_tree(moving)
    rows = choose_rows(count, max_queries, seed)
    acc, nearest_true = tree.query(moving[rows], workers=workers)
    comp, nearest_pred = moving_tree.query(target[rows], workers=workers)
    normals_pred = _Normals(moving, moving_tree, rows, nearest_pred, neighbours, workers)
    normals_true = _Normals(target, tree, rows, nearest_true, neighbours, workers)
    nc_pred = _agreement(normals_pred.at(rows), normals_true.at(nearest_true))
    nc_truth = _agreement(normals_true.at(rows), normals_pred.at(nearest_pred))
    return PointMetrics(
        acc=float(acc.mean()),
        acc_median=float(np.median(acc)),
        comp=float(comp.mean()),
        comp_median=float(np.median(comp)),
        nc=(nc_pred + nc_truth) / 2,
        nc_pred=nc_pred,
        nc_truth=nc_truth,
        points=count,
        queries=len(rows),
        align=align,
        icp_threshold=None if found is None else icp_threshold,
        icp_fitness=None if found is None else found.fitness,
        icp_rmse=None if found is None else found.rmse,
        similarity=similarity,
    )


class _Normals:
    """Normals of the points of a cloud that ask or are somebody's nearest, each estimated once."""

    def __init__(self, cloud: Floats, tree: Any, asking: Indices, nearest: Indices, k: int, workers: int) -> None:
        self.rows = np.union1d(asking, nearest)
        self.normals = estimate_normals(cloud, k, self.rows, tree, workers)

    def at(self, rows: Indices) -> Floats:
        return self.normals[np.searchsorted(self.rows, rows)]


def _agreement(a: Floats, b: Floats) -> float:
    """Mean of |a . b| over rows."""
    return float(np.abs(np.einsum("qi,qi->q", a, b)).mean())


def _check(pred: Floats, truth: Floats) -> None:
    """SkippedError where nothing can be measured."""
    if len(truth) < 3:
        raise SkippedError("no valid pixels" if not len(truth) else "fewer than 3 valid pixels")
    for points, name in ((pred, "prediction"), (truth, "truth")):
        if not np.isfinite(points).all():
            raise SkippedError(f"{name} is not finite")
        if np.ptp(points, axis=0).max() <= ONE_PLACE * np.abs(points[0]).max():
            raise SkippedError(f"{name} is all in one place")


def _starting(pred: Floats, truth: Floats, align: Align) -> Similarity:
    """The alignment before ICP."""
    if align in ("sim3", "sim3+icp"):
        try:
            return umeyama(pred, truth)
        except ValueError as error:
            raise SkippedError("no similarity between prediction and truth") from error
    scale, shift = 1.0, np.zeros(3)
    if align == "scale":
        scale = float(np.vdot(pred, truth) / np.vdot(pred, pred))
    elif align == "median":
        centres = [np.median(points, axis=0) for points in (pred, truth)]
        spreads = [
            float(np.median(np.linalg.norm(points - centre, axis=1)))
            for points, centre in zip((pred, truth), centres, strict=True)
        ]
        scale = spreads[1] / spreads[0] if spreads[0] > 0 else 0.0
        shift = centres[1] - scale * centres[0]
    if not scale > 0:
        raise SkippedError("no positive scale between prediction and truth")
    return Similarity(scale, np.eye(3), shift)


__all__ = ["Align", "PointMetrics", "point_metrics"]
