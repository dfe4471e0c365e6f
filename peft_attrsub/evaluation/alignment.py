"""Rigid and similarity alignment of point clouds: Umeyama where points correspond, ICP where they do not.

A similarity maps a point x to  s R x + t,  with s > 0, R a rotation (det R = +1) and t a translation.

Umeyama (1991), with correspondences (x_i, y_i), weights w_i of sum 1, means m_x and m_y:

    sum_i w_i (y_i - m_y)(x_i - m_x)^T = U D V^T ,   F = diag(1, 1, sign(det U det V)) ,   R = U F V^T ,
    s = tr(D F) / sum_i w_i |x_i - m_x|^2 ,   t = m_y - s R m_x .

F guards against reflections: of two mirrored clouds the best rotation is given, never the mirror.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .neighbours import Floats, build_tree, choose_rows, point_array

#: Rows taken at a time by sums over millions of points.
CHUNK = 1 << 17
#: Points whose spread is this small a part of their distance from the origin are in one place.
ONE_PLACE = 1e-12
#: How far R R^T of a similarity's rotation may be from I.
RIGID = 1e-6


@dataclass(frozen=True, eq=False)
class Similarity:
    """x -> scale * rotation @ x + translation. scale: float > 0; rotation (3, 3), translation (3,) float64.

    ValueError for a scale that is not positive and for a matrix that is not a rotation (R R^T = I, det R = +1, to
    1e-6): a reflection would pass for a perfect alignment of mirrored clouds.
    """

    scale: float
    rotation: Floats
    translation: Floats

    def __post_init__(self) -> None:
        rotation = np.asarray(self.rotation, np.float64)
        if rotation.shape != (3, 3) or np.shape(self.translation) != (3,) or not self.scale > 0:
            raise ValueError(
                f"a similarity was given scale {self.scale}, rotation {rotation.shape} and translation "
                f"{np.shape(self.translation)}: expected a scale greater than 0, (3, 3) and (3,)."
            )
        off = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
        if not off <= RIGID or np.linalg.det(rotation) < 0:
            raise ValueError(
                f"a similarity was given a matrix that is not a rotation (R R^T differs from I by {off:.2g}, its "
                f"determinant is {float(np.linalg.det(rotation)):.4g}): expected R R^T = I and det R = +1."
            )

    @classmethod
    def identity(cls) -> Similarity:
        """The similarity that moves nothing."""
        return cls(1.0, np.eye(3), np.zeros(3))

    def apply(self, points: ArrayLike) -> Floats:
        """Points (..., 3) moved, float64."""
        moved = np.asarray(points, dtype=np.float64) @ (self.scale * self.rotation).T
        moved += self.translation
        return moved

    def after(self, first: Similarity) -> Similarity:
        """Both in one: x -> self(first(x))."""
        return Similarity(self.scale * first.scale, self.rotation @ first.rotation, self.apply(first.translation))

    def inverse(self) -> Similarity:
        """The similarity that undoes this one: y -> R^T (y - t) / s."""
        return Similarity(1 / self.scale, self.rotation.T.copy(), -(self.rotation.T @ self.translation) / self.scale)

    def matrix(self) -> Floats:
        """(4, 4): [s R, t; 0, 1], for homogeneous columns."""
        out = np.eye(4)
        out[:3, :3] = self.scale * self.rotation
        out[:3, 3] = self.translation
        return out


@dataclass(frozen=True, eq=False)
class IcpResult:
    """What `icp` found.

    similarity: source -> target, of scale 1. fitness: share of the source points that have a target point within the
    threshold. rmse: root of the mean squared distance over those, 0 if there is none. iterations: updates made.
    """

    similarity: Similarity
    fitness: float
    rmse: float
    iterations: int


def umeyama(
    source: ArrayLike, target: ArrayLike, with_scale: bool = True, weights: ArrayLike | None = None
) -> Similarity:
    """The similarity that brings source (N, 3) onto target (N, 3), row to row, with the least squared error.

    with_scale: else s = 1 and only the rotation and the translation are sought. weights (N,): none below zero; equal
    if not given. Sums are float64 and taken in parts, so that millions of float32 points need little memory. On
    points in one line the rotation about that line is arbitrary.
    ValueError for other shapes, numbers that are not finite, weights without a sum, and points in one place if their
    scale is sought. Source: Umeyama, "Least-squares estimation of transformation parameters between two point
    patterns", PAMI 1991.
    """
    x, y = np.asarray(source), np.asarray(target)
    if x.shape != y.shape or x.ndim != 2 or x.shape[1] != 3 or not len(x):
        raise ValueError(
            f"umeyama was given points of shapes {x.shape} and {y.shape}, expected (N, 3) twice: row i of one is "
            "where row i of the other belongs."
        )
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(x),) or not np.isfinite(w).all() or w.min() < 0 or w.sum() <= 0:
        raise ValueError(
            f"weights of umeyama must be {len(x)} finite numbers, none below zero and not all of them zero."
        )
    w = w / w.sum()
    # About any origin near the cloud: sums about (0, 0, 0) would lose the digits of a small cloud far away.
    mean_x, mean_y = (x[0].astype(np.float64), y[0].astype(np.float64))
    shift_x, shift_y = np.zeros(3), np.zeros(3)
    for part in _parts(len(x)):
        shift_x += w[part] @ (x[part] - mean_x)
        shift_y += w[part] @ (y[part] - mean_y)
    mean_x, mean_y = mean_x + shift_x, mean_y + shift_y
    if not np.isfinite(mean_x).all() or not np.isfinite(mean_y).all():
        raise ValueError("umeyama was given points that are not finite: leave these pairs out first.")
    covariance, spread = np.zeros((3, 3)), 0.0
    for part in _parts(len(x)):
        from_mean = x[part] - mean_x
        weighted = w[part, None] * from_mean
        covariance += (y[part] - mean_y).T @ weighted
        spread += float((weighted * from_mean).sum())
    u, d, vt = np.linalg.svd(covariance)
    flip = np.array([1.0, 1.0, -1.0 if np.linalg.det(u) * np.linalg.det(vt) < 0 else 1.0])
    rotation = (u * flip) @ vt
    scale = 1.0
    if with_scale:
        if spread <= (ONE_PLACE * np.linalg.norm(mean_x)) ** 2 or float(d @ flip) <= 0:
            raise ValueError(
                "umeyama cannot find a scale: all points of the source or of the target are in one place."
            )
        scale = float(d @ flip) / spread
    return Similarity(scale, rotation, mean_y - scale * rotation @ mean_x)


def icp(
    source: ArrayLike,
    target: ArrayLike,
    threshold: float = 0.1,
    iterations: int = 30,
    relative: float = 1e-6,
    max_points: int | None = 200_000,
    seed: int = 0,
    tree: Any = None,
    workers: int = -1,
) -> IcpResult:
    """Rigid point-to-point ICP of source (N, 3) onto target (M, 3), from where they are, as Open3D's registration_icp.

    Each source point within threshold (in the unit of the points) of its nearest target point is paired with it; the
    pairs' best rotation and translation move the source; and so on, until fitness and rmse both change by less than
    relative (a plain difference, as Open3D's "relative_fitness" is) or after `iterations` updates.
    max_points: as many of the source points take part, spread evenly over the rows (None: all); the target is never
    thinned out. tree: `build_tree(target)`, if there is one already. workers: threads, -1 for one a core.
    Without any pair nothing moves, and fitness is 0. ValueError for other shapes, no points and bad limits.
    """
    points, goal = point_array(source, "source points"), point_array(target, "target points")
    if not len(points) or not len(goal):
        raise ValueError(f"icp was given {len(points)} source and {len(goal)} target points, expected some of both.")
    if not threshold > 0 or iterations < 0:
        raise ValueError(
            f"icp was given a threshold of {threshold} and {iterations} iterations: expected > 0 and >= 0."
        )
    tree = build_tree(goal) if tree is None else tree
    points = points[choose_rows(len(points), max_points, seed)]
    total, done = Similarity.identity(), 0
    paired, found, fitness, rmse = _pairs(points, tree, threshold, workers)
    while done < iterations:
        if len(found):
            update = umeyama(points[paired], goal[found], with_scale=False)
            total, points = update.after(total), update.apply(points)
        before = (fitness, rmse)
        paired, found, fitness, rmse = _pairs(points, tree, threshold, workers)
        done += 1
        if abs(before[0] - fitness) < relative and abs(before[1] - rmse) < relative:
            break
    return IcpResult(total, fitness, rmse, done)


def _pairs(points: Floats, tree: Any, threshold: float, workers: int) -> tuple[Any, Any, float, float]:
    """Which points have a neighbour within the threshold, which it is, how many have one, how far off they are."""
    distances, found = tree.query(points, distance_upper_bound=threshold, workers=workers)
    near = np.isfinite(distances)
    count = int(near.sum())
    rmse = float(np.sqrt(np.square(distances[near]).mean())) if count else 0.0
    return near, found[near], count / len(points), rmse


def _parts(total: int) -> Iterator[slice]:
    for start in range(0, total, CHUNK):
        yield slice(start, start + CHUNK)


__all__ = ["IcpResult", "Similarity", "icp", "umeyama"]
