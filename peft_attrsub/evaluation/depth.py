"""Depth maps against the truth, after one of the alignments that the words "joint scale and 3D translation" allow.

Over the valid pixels, with d the aligned prediction and z the truth:

    AbsRel = mean |d - z| / z          delta = share of pixels with max(d / z, z / d) < 1.25

Both are shares, not percent. align:
    "release"  per frame: s z + t is fitted to the prediction (L1), and takes the place of z above, so that errors are
               in the prediction's unit. What the authors' published code does. Adam's rate is 1e-3.
    "video"    one (s, t) for the sequence: s d + t is fitted to z (L1). Pi3, MonST3R, CUT3R. Adam's rate is 1e-4.
    "moge"     one scale and one shift in x, y, z for the sequence: points s p + t are fitted to the true points q
               (L1 over coordinates, weighted 1/z), each in the axes of its own camera; then their z is compared. MoGe.
    "median"   one scale for the sequence, median(z) / median(d).      "none"  as it is.
scope = "frame" or "sequence" overrides what one fit covers; the result says which it was.

Outliers in what is fitted to (the prediction in "release", the truth in "video" and "moge") do not move a fit, however
large. The other side enters as the abscissa, where L1 forgives wrong values within the range of the right ones; an
outlier far beyond it is a lever. So "video" flattens what is nearly flat: where errors of the prediction are larger
than the range of the truth, as on a print, s is drawn to 0 and AbsRel looks better than "release" makes it.

The sign of s is free in "release", "video" and "moge", as it is in the published code: nothing there bounds it. A fit
with s < 0 exchanges near and far: depth is inverted, and AbsRel may be small all the same. `DepthMetrics.inverted` is
the share of the frames with such a fit, and tables report it. "median" has s > 0.
Source: paper section 4 (AbsRel, delta 1.25); the alignments are of the works named above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .skipping import SkippedError
from .solvers import MIN_VALUES, adam, irls

#: The bound of delta.
RATIO = 1.25
#: A depth below this share of its frame's median is divided by that share instead.
FLOOR = 1e-3
#: What one fit covers, if nobody says otherwise.
SCOPES = {"release": "frame", "video": "sequence", "moge": "sequence", "median": "sequence", "none": "sequence"}
ADAM_RATES = {"release": 1e-3, "video": 1e-4}
#: MoGe fits on a map of 64 x 64.
MOGE_PIXELS = 64 * 64


@dataclass(frozen=True)
class FrameDepth:
    """One frame: its number in the sequence, AbsRel, delta (shares), valid pixels."""

    frame: int
    abs_rel: float
    delta: float
    pixels: int


@dataclass(frozen=True)
class DepthMetrics:
    """AbsRel and delta over all valid pixels of a sequence, and how they came about.

    frames: how many counted; frames_skipped: how many had fewer than 3 valid pixels. parameters: of each fit in
    order, (s, t), (s, tx, ty, tz) for "moge", (s,) for "median", nothing for "none". inverted: share of the frames
    that counted whose fit has s < 0, which means inverted depth.
    """

    abs_rel: float
    delta: float
    pixels: int
    frames: int
    frames_skipped: int
    per_frame: tuple[FrameDepth, ...]
    align: str
    scope: str
    solver: str
    parameters: tuple[tuple[float, ...], ...]

    @property
    def inverted(self) -> float:
        negative = [fit[0] < 0 for fit in self.parameters if fit]
        return sum(negative) / len(negative) if negative else 0.0

    def compared(self, pred: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """d and z (S, H, W) float64 as they were compared, for pictures: nan in frames that were left out.

        For "release" z is the truth mapped to the prediction's unit, for the others d is mapped to the truth's.
        """
        d, z = (np.array(values, np.float64) for values in (pred, truth))
        mapped = z if self.align == "release" else d
        seen = [one.frame for one in self.per_frame]
        for order, frame in enumerate(seen):
            parameters = self.parameters[order if self.scope == "frame" else 0]
            mapped[frame] = apply_alignment(mapped[frame], parameters)
        mapped[sorted(set(range(len(mapped))) - set(seen))] = np.nan
        return d, z

    def row(self) -> dict[str, Any]:
        """The numbers of a row of `tables`."""
        return {
            "abs_rel": self.abs_rel,
            "delta": self.delta,
            "depth_pixels": self.pixels,
            "depth_frames": self.frames,
            "depth_frames_skipped": self.frames_skipped,
            "depth_inverted": self.inverted,
        }


@dataclass(frozen=True)
class _Frame:
    """The valid pixels of a frame: prediction, truth (N,), and their points (N, 3) where an alignment needs them."""

    number: int
    pred: np.ndarray
    truth: np.ndarray
    pred_points: np.ndarray | None = None
    true_points: np.ndarray | None = None


def depth_metrics(
    pred: ArrayLike,
    truth: ArrayLike,
    mask: ArrayLike,
    *,
    align: str = "release",
    solver: str = "irls",
    scope: str | None = None,
    intrinsics: ArrayLike | None = None,
    pred_intrinsics: ArrayLike | None = None,
    fit_pixels: int | None = None,
    seed: int = 0,
) -> DepthMetrics:
    """AbsRel and delta of pred (S, H, W) against truth (S, H, W) where mask (S, H, W) and truth > 0 (see above).

    solver: "irls" finds the minimum of the L1 objective; "adam" repeats the 1000 steps of published code ("release"
    and "video" alone), for parity with numbers that contain its missing convergence.
    intrinsics (S, 3, 3) with integer pixel centers, for "moge"; pred_intrinsics where the model has its own.
    fit_pixels: a fit looks at no more than so many random pixels of each frame (from seed); None is all of them,
    and 4096 for "moge", as there. Metrics are over all pixels in any case.

    A prediction that is not positive after alignment fails delta. A divisor below 1e-3 of its frame's median is
    raised to that. A frame with fewer than 3 valid pixels is left out and counted.
    SkippedError where nothing can be measured: no valid pixels, too few, a prediction or truth that is not finite.
    """
    _check_names(align, solver, scope)
    if fit_pixels is not None and fit_pixels < MIN_VALUES:
        raise ValueError(f"fit_pixels is {fit_pixels}: expected at least {MIN_VALUES}, or None.")
    d, z, valid = np.asarray(pred, np.float64), np.asarray(truth, np.float64), np.asarray(mask)
    if d.ndim != 3 or d.shape != z.shape or valid.shape != z.shape:
        raise ValueError(
            f"pred is {d.shape}, truth {z.shape} and mask {valid.shape}: expected one shape (frames, height, width); "
            "resizing.resize_prediction brings a prediction to the size of the truth."
        )
    if valid.dtype != np.bool_:
        raise ValueError(f"mask is {valid.dtype}: expected bool, true where the truth is valid.")
    cameras: tuple[np.ndarray, np.ndarray] | None = None
    if align == "moge":
        true_k = _check_intrinsics("intrinsics", intrinsics, len(z))
        own = true_k if pred_intrinsics is None else _check_intrinsics("pred_intrinsics", pred_intrinsics, len(z))
        cameras = own, true_k
    frames = _valid_frames(d, z, valid, cameras)
    scope = scope or SCOPES[align]
    groups = [[frame] for frame in frames] if scope == "frame" else [frames]
    count = fit_pixels or (MOGE_PIXELS if align == "moge" else None)
    rng = np.random.default_rng(seed)

    results, parameters = [], []
    for group in groups:
        fitted = ALIGNMENTS[align]([_some(frame, count, rng) for frame in group], solver)
        parameters.append(fitted)
        results += [_measure(frame, align, fitted) for frame in group]
    pixels = np.array([result.pixels for result in results])
    return DepthMetrics(
        abs_rel=float(pixels @ [result.abs_rel for result in results] / pixels.sum()),
        delta=float(pixels @ [result.delta for result in results] / pixels.sum()),
        pixels=int(pixels.sum()),
        frames=len(results),
        frames_skipped=len(z) - len(results),
        per_frame=tuple(results),
        align=align,
        scope=scope,
        solver=solver,
        parameters=tuple(parameters),
    )


def _check_names(align: str, solver: str, scope: str | None) -> None:
    if align not in SCOPES:
        raise ValueError(f"align is {align!r}: expected one of {', '.join(SCOPES)}.")
    if solver not in ("irls", "adam"):
        raise ValueError(f"solver is {solver!r}: expected irls or adam.")
    if solver == "adam" and align not in ADAM_RATES:
        raise ValueError(f"solver='adam' repeats published code, and for align={align!r} there is none: use irls.")
    if scope not in (None, "frame", "sequence"):
        raise ValueError(f"scope is {scope!r}: expected frame or sequence, or None for the alignment's own.")


def _check_intrinsics(name: str, value: ArrayLike | None, views: int) -> np.ndarray:
    if value is None:
        raise ValueError("align='moge' fits points: give the intrinsics (frames, 3, 3) of the depth maps.")
    k = np.asarray(value, np.float64)
    if k.shape != (views, 3, 3):
        raise ValueError(f"{name} has shape {k.shape}: expected {(views, 3, 3)}, one matrix a frame.")
    return k


def _valid_frames(
    pred: np.ndarray, truth: np.ndarray, mask: np.ndarray, cameras: tuple[np.ndarray, np.ndarray] | None
) -> list[_Frame]:
    """The frames with at least 3 valid pixels; SkippedError where there is none or a number is not finite."""
    frames, seen = [], 0
    for number in range(len(truth)):
        if not np.isfinite(truth[number][mask[number]]).all():
            raise SkippedError("truth not finite")
        valid = mask[number] & (truth[number] > 0)
        pixels = int(valid.sum())
        seen += pixels
        if pixels < MIN_VALUES:
            continue
        d, z = pred[number][valid], truth[number][valid]
        if not np.isfinite(d).all():
            raise SkippedError("prediction not finite")
        if cameras is None:
            frames.append(_Frame(number, d, z))
        else:
            rays = [_rays(k[number], valid) for k in cameras]
            frames.append(_Frame(number, d, z, rays[0] * d[:, None], rays[1] * z[:, None]))
    if not frames:
        raise SkippedError("no valid pixels" if seen == 0 else "fewer than 3 valid pixels")
    return frames


def _rays(k: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """((u - cx) / fx, (v - cy) / fy, 1) of the valid pixels, (N, 3)."""
    v, u = np.nonzero(valid)
    return np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(len(u))], 1)


def _some(frame: _Frame, count: int | None, rng: np.random.Generator) -> _Frame:
    """The frame with no more than `count` of its pixels."""
    if count is None or len(frame.pred) <= count:
        return frame
    chosen = rng.choice(len(frame.pred), max(count, MIN_VALUES), replace=False)
    p, q = frame.pred_points, frame.true_points
    return _Frame(
        frame.number,
        frame.pred[chosen],
        frame.truth[chosen],
        None if p is None else p[chosen],
        None if q is None else q[chosen],
    )


def _stack(frames: list[_Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth (N,) of the frames together."""
    return np.concatenate([frame.pred for frame in frames]), np.concatenate([frame.truth for frame in frames])


def _solve_line(x: np.ndarray, y: np.ndarray, align: str, solver: str) -> tuple[float, ...]:
    """(s, t) of s x + t -> y."""
    p, q = x[:, None], y[:, None]
    scale, shift = irls(p, q) if solver == "irls" else adam(p, q, ADAM_RATES[align])
    return scale, float(shift[0])


def _align_release(frames: list[_Frame], solver: str) -> tuple[float, ...]:
    pred, truth = _stack(frames)
    return _solve_line(truth, pred, "release", solver)


def _align_video(frames: list[_Frame], solver: str) -> tuple[float, ...]:
    pred, truth = _stack(frames)
    return _solve_line(pred, truth, "video", solver)


def _align_moge(frames: list[_Frame], solver: str) -> tuple[float, ...]:
    p = np.concatenate([frame.pred_points for frame in frames if frame.pred_points is not None])
    q = np.concatenate([frame.true_points for frame in frames if frame.true_points is not None])
    scale, shift = irls(p, q, 1 / q[:, 2])
    return scale, *map(float, shift)


def _align_median(frames: list[_Frame], solver: str) -> tuple[float, ...]:
    pred, truth = _stack(frames)
    middle = float(np.median(pred))
    if not middle > 0:
        raise SkippedError("prediction not positive")
    return (float(np.median(truth)) / middle,)


def _align_none(frames: list[_Frame], solver: str) -> tuple[float, ...]:
    return ()


ALIGNMENTS: dict[str, Callable[[list[_Frame], str], tuple[float, ...]]] = {
    "release": _align_release,
    "video": _align_video,
    "moge": _align_moge,
    "median": _align_median,
    "none": _align_none,
}


def apply_alignment(values: ArrayLike, parameters: tuple[float, ...]) -> np.ndarray:
    """Depth values of any shape under one of `DepthMetrics.parameters`: s d + t (the z of t for "moge").

    For "release" the values are the truth, which becomes comparable with the prediction; for the others the
    prediction.
    """
    depth = np.asarray(values, np.float64)
    if not parameters:
        return depth
    return parameters[0] * depth + (parameters[-1] if len(parameters) > 1 else 0.0)


def _measure(frame: _Frame, align: str, parameters: tuple[float, ...]) -> FrameDepth:
    if align == "release":
        d, z = frame.pred, apply_alignment(frame.truth, parameters)
    else:
        d, z = apply_alignment(frame.pred, parameters), frame.truth
    middle = float(np.median(z))
    if not middle > 0:
        raise SkippedError("aligned depth not positive")
    floor = FLOOR * middle
    below = np.maximum(z, floor)
    ratio = np.maximum(d / below, z / np.maximum(d, floor))
    good = (ratio < RATIO) & (d > 0) & (z > 0)
    return FrameDepth(frame.number, float(np.mean(np.abs(d - z) / below)), float(good.mean()), len(z))


__all__ = ["DepthMetrics", "FrameDepth", "apply_alignment", "depth_metrics"]
