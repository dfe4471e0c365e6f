"""A picture of what the model sees now: input, predicted depth, truth and error of one scene of a batch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peft_attrsub.evaluation import error_figure
from peft_attrsub.vggt import VggtOutput
from peft_attrsub.vggt.batch import normalise_scene


@torch.no_grad()
def draw_panel(
    batch: Mapping[str, Any],
    output: VggtOutput,
    path: str | os.PathLike[str],
    *,
    scene: int = 0,
    max_views: int = 4,
    title: str = "",
) -> Path:
    """A PNG with a line per view of one scene: image, predicted depth d, truth z, relative error |d - z| / z.

    batch: as the losses read it, with images (B, S, 3, H, W). z is the truth as the losses see it, in units of the
    scene's scale, and d is compared as it is, so that a wrong scale shows as an error. The title says the mean of
    |d - z| / z and the factor median(z) / median(d), both over the valid pixels.

    Raises:
        ValueError: the model has no depth head, or the batch no such scene.
    """
    if output.depth is None:
        raise ValueError("the output has no depth to draw: give the model a depth head.")
    if not 0 <= scene < len(output.depth):
        raise ValueError(f"scene {scene} was asked for, and the batch has {len(output.depth)}: count from 0.")
    truth = normalise_scene({key: value[scene : scene + 1] for key, value in _read(batch).items()})
    found = output.depth[scene, ..., 0].detach().float().cpu()  # [S, H, W]
    depth, mask = truth["depths"][0].float().cpu(), truth["point_masks"][0].cpu()
    valid = mask & (depth > 0)
    if bool(valid.any()):
        d, z = found[valid], depth[valid]
        factor = float(z.median() / d.median())
        title = f"{title}  AbsRel {100 * float(((d - z).abs() / z).mean()):.1f} %, scale x {factor:.3g}".strip()
    images = batch["images"][scene].detach().float().cpu().numpy()
    return error_figure(images, found.numpy(), depth.numpy(), mask.numpy(), path, max_views=max_views, title=title)


def _read(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a batch that have scenes, without names and the like."""
    keys = ("depths", "extrinsics", "intrinsics", "point_masks")
    return {key: batch[key].detach() for key in keys if key in batch}


__all__ = ["draw_panel"]
