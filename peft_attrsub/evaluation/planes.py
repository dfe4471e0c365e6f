"""How far a flat print was bent into a face: what remains of a depth map when its best plane is taken away.

Points p_i of the masked pixels, in camera coordinates, have the least-squares plane n . (p - mean p) = 0, and heights
h_i = n . (p_i - mean p) over it:

    residual_rms = sqrt(mean h^2)      relief = P95(h) - P5(h)      width = P95(x) - P5(x)      ratio = relief / width

where x is the coordinate along the print, in the direction of the image's rows. The ratio of a print is 0, and it is
the same for every scale of the depth, so a prediction is measured as it is: a fitted shift of its depth would squeeze
the relief that this is to show.
Source: no metric of the paper; it measures the failure that its face benchmark is about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .skipping import SkippedError

#: Fewer points than these lie in a plane anyway.
MIN_POINTS = 4
#: The percentiles between which lie relief and width, so that a few wild pixels at an edge are no relief.
TAILS = (5.0, 95.0)


@dataclass(frozen=True)
class Plane:
    """The plane normal . p = offset; normal (3,) is of length 1 and points to the camera. rms: of the distances."""

    normal: np.ndarray
    offset: float
    rms: float

    def heights(self, points: np.ndarray) -> np.ndarray:
        """Signed distances (N,) of points (N, 3), positive on the camera's side."""
        return points @ self.normal - self.offset


@dataclass(frozen=True)
class Relief:
    """Lengths in the unit of the depth, as defined at the head of `planes`; normal (3,) in camera coordinates."""

    residual_rms: float
    relief: float
    width: float
    ratio: float
    normal: np.ndarray

    def row(self) -> dict[str, float]:
        """The numbers of a row of `tables`."""
        return {"plane_rms": self.residual_rms, "relief": self.relief, "relief_ratio": self.ratio}


def plane_fit(points: ArrayLike) -> Plane:
    """The least-squares plane of points (N, 3): through their mean, across the direction of least variance.

    SkippedError for fewer than 4 points, points that are not finite, or all in one place or on one line.
    """
    p = np.asarray(points, np.float64)
    if p.ndim != 2 or p.shape[1] != 3:
        raise ValueError(f"points have shape {p.shape}: expected (N, 3).")
    if len(p) < MIN_POINTS:
        raise SkippedError(f"fewer than {MIN_POINTS} points")
    if not np.isfinite(p).all():
        raise SkippedError("points not finite")
    middle = p.mean(0)
    flat = p - middle
    size = float(np.abs(flat).max())
    if size == 0:
        raise SkippedError("all points in one place")
    flat /= size  # squares of very small or large units would leave the range of numbers
    variances, axes = np.linalg.eigh(flat.T @ flat / len(p))
    if variances[1] <= 1e-12 * variances[2]:
        raise SkippedError("all points on one line")
    normal = axes[:, 0] if axes[:, 0] @ middle <= 0 else -axes[:, 0]
    rms = size * float(np.sqrt(np.mean((flat @ normal) ** 2)))
    return Plane(normal, float(normal @ middle), rms)


def relief(depth: ArrayLike, mask: ArrayLike, intrinsics: ArrayLike) -> Relief:
    """The relief of one depth map (H, W), planar z > 0, within mask (H, W) bool, seen by intrinsics (3, 3).

    Pixel centres are integers. SkippedError where the mask holds too few pixels or depths that are not finite.
    """
    z, valid, k = np.asarray(depth, np.float64), np.asarray(mask), np.asarray(intrinsics, np.float64)
    if z.ndim != 2 or valid.shape != z.shape or valid.dtype != np.bool_ or k.shape != (3, 3):
        raise ValueError(
            f"depth is {z.shape}, mask {valid.dtype} {valid.shape}, intrinsics {k.shape}: expected (H, W), "
            "bool (H, W) and (3, 3) of one view."
        )
    if not np.isfinite(z[valid]).all():
        raise SkippedError("depth not finite")
    v, u = np.nonzero(valid & (z > 0))
    d = z[v, u]
    points = np.stack([(u - k[0, 2]) / k[0, 0] * d, (v - k[1, 2]) / k[1, 1] * d, d], 1)
    plane = plane_fit(points)
    along = np.array([1.0, 0.0, 0.0]) - plane.normal[0] * plane.normal
    low, high = np.percentile(plane.heights(points), TAILS)
    left, right = np.percentile(points @ (along / np.linalg.norm(along)), TAILS) if along.any() else (0.0, 0.0)
    if not right > left:
        raise SkippedError("the mask has no width")
    return Relief(
        plane.rms, float(high - low), float(right - left), float((high - low) / (right - left)), plane.normal
    )


def sequence_relief(depths: ArrayLike, masks: ArrayLike, intrinsics: ArrayLike) -> Relief:
    """The view of median ratio among those of depths (S, H, W), masks (S, H, W), intrinsics (S, 3, 3).

    Each view is fitted in its own camera, so that errors of the poses do not count as relief. Views that cannot be
    measured are left out; SkippedError, with the reason of the first, if that is all of them.
    """
    found, reason = [], "no views"
    for view in zip(np.asarray(depths), np.asarray(masks), np.asarray(intrinsics), strict=True):
        try:
            found.append(relief(*view))
        except SkippedError as error:
            reason = error.reason if reason == "no views" else reason
    if not found:
        raise SkippedError(reason)
    return sorted(found, key=lambda one: one.ratio)[(len(found) - 1) // 2]


__all__ = ["Plane", "Relief", "plane_fit", "relief", "sequence_relief"]
