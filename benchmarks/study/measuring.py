"""A model on a set of sequences, in the benchmarks' own columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch

from .settings import Study
from .training import pixels

#: Column -> whether less is better.
COLUMNS = {"acc": True, "comp": True, "nc": False, "abs_rel": True, "delta": False, "rotation": True}
ICP = 0.1  # threshold of the benchmarks' protocol


def evaluate(model: Any, dataset: Any, study: Study) -> dict[str, Any]:
    """Means over the sequences of a set, and the rows they are of.

    acc, comp, nc: after a similarity and ICP, in the benchmark's own unit, as its protocol has it. abs_rel, delta:
    with one scale per sequence; with the release's alignment too where there are no poses. rotation: median angle
    between predicted and true rotations to the first view, in degrees.
    """
    from peft_attrsub.evaluation.skipping import SkippedError

    rows, skipped = {}, {}
    for name in dataset.names:
        try:
            rows[name] = measure(model, dataset.read(name), study)
        except SkippedError as error:
            skipped[name] = error.reason
    return {"mean": means(list(rows.values())), "rows": rows, "skipped": skipped}


class OtherPictures:
    """A set in which every sequence comes with the pictures of the next one: what a model is worth that looks at none.

    A benchmark on which this costs nothing has one answer for all pictures, and says nothing of a method.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.names = dataset, list(dataset.names)

    def read(self, name: str) -> Any:
        sample = self.dataset.read(name)
        other = self.dataset.read(self.names[(self.names.index(name) + 1) % len(self.names)])
        if other.images.shape != sample.images.shape:
            raise ValueError(f"pictures of {name} have another size than the next ones: they cannot be exchanged.")
        return replace(sample, images=other.images)


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of each column over the rows that have a finite number there; None where none has."""
    found = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        good = [row[key] for row in rows if key in row and math.isfinite(row[key])]
        found[key] = round(fmean(good), 7) if good else None
    return found


def measure(model: Any, sample: Any, study: Study) -> dict[str, float]:
    """One sequence through the model, at the study's size and precision."""
    from _measure import How, run_model
    from training.heldout import rotation_errors

    from peft_attrsub.evaluation import depth_metrics, point_metrics
    from peft_attrsub.evaluation.skipping import SkippedError
    from peft_attrsub.vggt import relative_to_first, unproject

    if not bool(sample.point_masks.any()):
        raise SkippedError("no valid pixels")
    height, width = sample.images.shape[-2:]
    size = pixels(study, model.config) * width / max(height, width)
    patch = model.config.patch_size
    how = How(
        metrics="points",
        transparent=False,
        align="sim3+icp",
        icp_threshold=ICP,
        depth_align="median",
        depth_solver="irls",
        depth_scope=None,
        max_queries=study.queries,
        exact=False,
        image_size=max(1, round(size / patch)) * patch,
        dtype=study.precision,
        seed=0,
        workers=1,
    )
    found = run_model(model, sample, how)
    if not np.isfinite(found.depth).all() or not np.isfinite(found.extrinsics).all():
        raise SkippedError("prediction is not finite")
    depths, mask = sample.depths.numpy(), sample.point_masks.numpy()
    scaled = depth_metrics(found.depth, depths, mask, align="median")
    row = {"abs_rel": scaled.abs_rel, "delta": scaled.delta}
    if sample.extrinsics is None:
        release = depth_metrics(found.depth, depths, mask, align="release")
        return row | {"release_abs_rel": release.abs_rel, "release_delta": release.delta}
    truth = unproject(sample.depths.double(), sample.intrinsics, relative_to_first(sample.extrinsics)).numpy()[mask]
    points = point_metrics(
        found.points()[mask],
        truth,
        align="sim3+icp",
        icp_threshold=ICP,
        max_queries=study.queries,
        icp_points=study.queries,
        workers=1,
    )
    angles = rotation_errors(torch.from_numpy(found.extrinsics), sample.extrinsics)
    return row | {
        "acc": points.acc,
        "comp": points.comp,
        "nc": points.nc,
        "rotation": float(angles.median()) if len(angles) else float("nan"),
    }


def score(mean: dict[str, float | None]) -> float:
    """What a learning rate is chosen by: (Acc + Comp) / 2 on validation; infinite where there is nothing to compare.

    Acc alone is small for a prediction that collapses to a spot.
    """
    acc, comp = mean.get("acc"), mean.get("comp")
    return math.inf if acc is None or comp is None else (acc + comp) / 2
