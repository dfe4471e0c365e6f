"""One sequence through the model, and into a row of numbers and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from peft_attrsub.datasets import Sample
from peft_attrsub.datasets.resizing import resize_images
from peft_attrsub.evaluation import (
    PointMetrics,
    SkippedError,
    depth_metrics,
    error_colors,
    error_figure,
    point_metrics,
    resize_prediction,
    save_points,
    sequence_relief,
)
from peft_attrsub.evaluation.points import Align
from peft_attrsub.vggt import VggtModel, decode_pose, relative_to_first, to_pixel_centers, unproject
from peft_attrsub.vggt.prediction import predict


@dataclass(frozen=True)
class How:
    """Everything but the model that decides the numbers; goes into the settings of a run."""

    metrics: str  # "points" or "depth"
    transparent: bool  # whether labels 1 to 63 are glass, to be measured apart
    align: Align  # of points; with metrics "depth" it is not read
    icp_threshold: float
    depth_align: str
    depth_solver: str
    depth_scope: str | None
    max_queries: int | None
    exact: bool
    image_size: int
    dtype: str
    seed: int
    workers: int  # threads of a nearest neighbour search; changes no number


@dataclass(frozen=True)
class Prediction:
    """At the size of the truth: depth (S, h, w), intrinsics (S, 3, 3) and extrinsics (S, 3, 4), float64 arrays.

    Intrinsics have integers at pixel centers, as the truth's. The resized depth agrees with them: its pixel u of W
    lies at (u + 1/2) W'/W - 1/2 of the W' pixels of the model, the middle of one image at that of the other.
    """

    depth: np.ndarray
    intrinsics: np.ndarray
    extrinsics: np.ndarray

    def points(self) -> np.ndarray:
        depth, k, e = (torch.from_numpy(x) for x in (self.depth, self.intrinsics, self.extrinsics))
        return unproject(depth, k, e).numpy()


def run_model(model: VggtModel, sample: Sample, how: How) -> Prediction:
    """The release's way: images of width image_size and a height in whole patches, depth resized to the truth's
    size (bilinear for points, bicubic for depth alone) and the pose encoding decoded at that size,
    with integers at pixel centers as the truth has them."""
    patch, (height, width) = model.config.patch_size, sample.images.shape[-2:]
    size = (max(1, round(height * how.image_size / width / patch)) * patch, how.image_size)
    found = predict(model, resize_images(sample.images, size), dtype=how.dtype)
    target = (sample.depths.shape[-2], sample.depths.shape[-1])
    mode = "bilinear" if how.metrics == "points" else "bicubic"
    assert found.depth is not None
    depth = resize_prediction(found.depth.cpu().double(), target, mode)
    extrinsics, intrinsics = decode_pose(found.pose_enc.cpu().double(), target)
    return Prediction(depth.numpy(), to_pixel_centers(intrinsics).numpy(), extrinsics.numpy())


def measure(sample: Sample, prediction: Prediction, how: How, pictures: Path | None = None) -> dict[str, Any]:
    """Metrics of one sequence; SkippedError where there is nothing to measure. pictures: folder for PNG and PLY."""
    if not bool(sample.point_masks.any()):
        raise SkippedError("no valid pixels")
    if how.metrics == "depth":
        return _depth(sample, prediction, how, pictures)
    return _points(sample, prediction, how, pictures)


def _points(sample: Sample, prediction: Prediction, how: How, pictures: Path | None) -> dict[str, Any]:
    if sample.extrinsics is None:
        raise SkippedError("no poses")
    mask = sample.point_masks.numpy()
    # Both in the frame of the first camera, which alignments without a rotation rest on.
    cameras = relative_to_first(sample.extrinsics)
    truth = unproject(sample.depths.double(), sample.intrinsics, cameras).numpy()
    found = prediction.points()
    metrics = point_metrics(
        found[mask],
        truth[mask],
        align=how.align,
        icp_threshold=how.icp_threshold,
        max_queries=how.max_queries,
        exact=how.exact,
        seed=how.seed,
        workers=how.workers,
    )
    row = _numbers(metrics) | {"points": metrics.points, "queries": metrics.queries}
    row["scale"] = metrics.similarity.scale
    if metrics.icp_fitness is not None:
        row |= {"icp_fitness": metrics.icp_fitness, "icp_rmse": metrics.icp_rmse}
    if how.transparent and sample.labels is not None:
        row |= _transparent(sample, metrics.aligned(found), truth, how)
    row |= _relief(sample, prediction)
    if pictures is not None:
        _draw_points(sample, prediction, metrics, found, truth, pictures)
    return row


def _numbers(metrics: PointMetrics, prefix: str = "") -> dict[str, float]:
    keys = ("acc", "comp", "nc", "acc_median", "comp_median", "nc_pred", "nc_truth")
    return {prefix + key: getattr(metrics, key) for key in keys}


def _transparent(sample: Sample, aligned: np.ndarray, truth: np.ndarray, how: How) -> dict[str, float]:
    """The same numbers of transparent objects alone, as the whole image is aligned; nothing where none is seen."""
    from peft_attrsub.datasets.clearpose import transparent

    glass = transparent(sample).numpy()
    try:
        part = point_metrics(
            aligned[glass],
            truth[glass],
            align="none",
            max_queries=how.max_queries,
            exact=how.exact,
            seed=how.seed,
            workers=how.workers,
        )
    except SkippedError:
        return {}
    return _numbers(part, "transparent_") | {"transparent_points": part.points}


def _depth(sample: Sample, prediction: Prediction, how: How, pictures: Path | None) -> dict[str, Any]:
    depths, mask = sample.depths.numpy(), sample.point_masks.numpy()
    metrics = depth_metrics(
        prediction.depth,
        depths,
        mask,
        align=how.depth_align,
        solver=how.depth_solver,
        scope=how.depth_scope,
        intrinsics=sample.intrinsics.numpy(),
        pred_intrinsics=prediction.intrinsics,
        seed=how.seed,
    )
    if pictures is not None:
        d, z = metrics.compared(prediction.depth, depths)
        error_figure(sample.images, d, z, mask & np.isfinite(d) & np.isfinite(z), _file(pictures, sample, ".png"))
    # Alignments with a shift let a constant depth fit anything; one scale for all frames does not.
    scaled = depth_metrics(prediction.depth, depths, mask, align="median").row()
    more = {"scale_" + key: scaled[key] for key in ("abs_rel", "delta")}
    return metrics.row() | more | _relief(sample, prediction)


def _relief(sample: Sample, prediction: Prediction) -> dict[str, float]:
    """How far prediction and truth rise from a plane: 0 for a flat print. Of the raw depth: a shift squeezes it."""
    row = {}
    depths, masks = sample.depths.numpy(), sample.point_masks.numpy()
    for prefix, depth, intrinsics in (
        ("", prediction.depth, prediction.intrinsics),
        ("true_", depths.astype(np.float64), sample.intrinsics.numpy()),
    ):
        try:
            found = sequence_relief(depth, masks, intrinsics)
        except SkippedError:
            continue
        row |= {prefix + "relief_ratio": found.ratio}
    return row


def _draw_points(
    sample: Sample, prediction: Prediction, metrics: PointMetrics, found: np.ndarray, truth: np.ndarray, folder: Path
) -> None:
    mask, depths = sample.point_masks.numpy(), sample.depths.numpy()
    scaled = prediction.depth * metrics.similarity.scale
    error_figure(sample.images, scaled, depths, mask, _file(folder, sample, ".png"))
    aligned = metrics.aligned(found[mask])
    # Of the same pixel: what is drawn is each point's own error, not the distance to whatever is nearest.
    away = np.linalg.norm(aligned - truth[mask], axis=-1)
    reach = max(float(np.percentile(away, 95)), 1e-12)
    save_points(_file(folder, sample, "-prediction.ply"), aligned, error_colors(away, reach))
    colours = resize_images(sample.images, (mask.shape[1], mask.shape[2])).permute(0, 2, 3, 1).numpy()[mask]
    save_points(_file(folder, sample, "-truth.ply"), truth[mask], colours)


def _file(folder: Path, sample: Sample, suffix: str) -> Path:
    return folder / (quote(sample.name, safe=" ,=+()") + suffix)
