"""How good a model is on sequences that it does not learn from: loss, depth and rotations.

Every sequence is seen at the same evenly spaced frames, unchanged but for its size, so that two evaluations differ by
the model alone. Rotations are compared relative to the first camera, as the angle of R_pred R_true^T in degrees.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_attrsub.datasets import MultiViewDataset, Sample, resize
from peft_attrsub.evaluation import SkippedError, depth_metrics
from peft_attrsub.vggt import VggtLoss, decode_pose, relative_to_first

from .panels import draw_panel


@dataclass(frozen=True)
class HeldOut:
    """Sequences by name, each shown as `views` frames, `width` pixels wide. patch: side of VGGT's patches."""

    dataset: MultiViewDataset
    names: tuple[str, ...]
    views: int
    width: int
    patch: int

    def sample(self, name: str) -> Sample:
        """One sequence at the size that the model sees."""
        known = self.dataset.default_frames(name)
        count = min(self.views, len(known))
        found = self.dataset.read(name, [known[index * len(known) // count] for index in range(count)])
        height, width = found.images.shape[-2:]
        rows = max(1, round(height * self.width / width / self.patch)) * self.patch
        return resize(found, (rows, self.width))


def hold_out(names: Sequence[str], share: float, limit: int) -> tuple[list[str], list[str]]:
    """(to learn from, held out): every n-th of the names is held out, n = 1 / share, at least one and at most limit.

    All names are learnt from where share is 0. ValueError where nothing would be left.
    """
    if not share:
        return list(names), []
    step = max(2, round(1 / share))
    held = list(names[step - 1 :: step])[:limit] or [names[-1]]
    left = [name for name in names if name not in set(held)]
    if not left:
        raise ValueError(
            f"there is one sequence, {names[0]!r}: nothing can be held out of it. Give --eval-data, or --eval-share 0."
        )
    return left, held


def rotation_errors(predicted: Tensor, truth: Tensor) -> Tensor:
    """Angles (S - 1,) in degrees between the rotations of extrinsics (S, 3, 4), relative to the first view of each."""
    a, b = (relative_to_first(one.double())[1:, :, :3] for one in (predicted, truth))
    apart = a @ b.transpose(-1, -2)
    # From sine and cosine: the arc cosine alone loses all digits near 0.
    skew = apart - apart.transpose(-1, -2)
    sine = torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]])
    cosine = apart.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
    return torch.rad2deg(torch.atan2(sine.norm(dim=0), cosine))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    held: HeldOut,
    loss: VggtLoss,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    panel: Path | None = None,
) -> dict[str, float]:
    """Sums over this process's share of the sequences: "loss", "abs_rel", "rotation", and how many each is of.

    `merged` makes means of the sums of all processes. panel: a PNG of the first sequence, which the first process
    draws. The model is put in eval mode and back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    sums = dict.fromkeys(("loss", "abs_rel", "rotation", "n_loss", "n_abs_rel", "n_rotation"), 0.0)
    try:
        for number, name in enumerate(held.names):
            if number % world != rank:
                continue
            sample = held.sample(name)
            found = _measure(model, sample, loss, device, panel if number == 0 else None)
            for key, value in found.items():
                if math.isfinite(value):
                    sums[key] += value
                    sums[f"n_{key}"] += 1
    finally:
        for module, training in modes:
            module.training = training
    return sums


def merged(sums: dict[str, float]) -> dict[str, float]:
    """The means; a number that no sequence gave is left out."""
    return {key: sums[key] / sums[f"n_{key}"] for key in ("loss", "abs_rel", "rotation") if sums[f"n_{key}"]}


def _measure(
    model: nn.Module, sample: Sample, loss: VggtLoss, device: torch.device, panel: Path | None
) -> dict[str, float]:
    keys = ("images", "depths", "point_masks", "extrinsics", "intrinsics")
    batch: dict[str, Any] = {key: sample.training()[key][None].to(device) for key in keys}
    output = model(pixel_values=batch["images"])
    found = {"loss": float(loss(output, batch).total)}
    depth = output.depth[0, ..., 0].double().cpu().numpy()
    truth, mask = sample.depths.double().numpy(), sample.point_masks.numpy()
    with contextlib.suppress(SkippedError):
        found["abs_rel"] = depth_metrics(depth, truth, mask, align="median").abs_rel
    if panel is not None:
        draw_panel(batch, output, panel, title=sample.name)
    if output.pose_enc is not None and len(sample) > 1 and sample.extrinsics is not None:
        size = (sample.depths.shape[-2], sample.depths.shape[-1])
        extrinsics, _ = decode_pose(output.pose_enc[0].double().cpu(), size)
        found["rotation"] = float(rotation_errors(extrinsics, sample.extrinsics).median())
    return found
