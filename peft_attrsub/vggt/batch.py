"""Batches of scenes with their truth: what they hold, and their normalisation scene by scene.

A batch is a dict of tensors, B scenes of S views of H x W pixels:

    images       (B, S, 3, H, W)  in [0, 1]; not read here, but their size must be that of the depths
    depths       (B, S, H, W)     planar z
    extrinsics   (B, S, 3, 4)     camera from world, OpenCV axes
    intrinsics   (B, S, 3, 3)     pixels
    point_masks  (B, S, H, W)     bool: where depth and points are measured; made from the depths where missing
    world_points (B, S, H, W, 3)  in the frame of the extrinsics; made from depths and cameras where missing
    cam_points   (B, S, H, W, 3)  in the frame of each camera; optional, no loss reads them

Depths, translations and points share one unit, whichever. Values where point_masks is False are never read into a
result: they may be NaN. Other keys (ids, seq_name) are let through.
Source: VGGT (arXiv 2503.11651), section on training, and its released recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cameras import at_least_float32, relative_to_first, transform, unproject, valid_depth

#: Depths and points of the truth are cut at this many scene scales.
MAX_TARGET = 100.0
#: The scale of a scene is kept within these.
SCALE_RANGE = (1e-6, 1e6)

_SHAPES = {
    "images": "BS3HW",
    "depths": "BSHW",
    "extrinsics": "BS34",
    "intrinsics": "BS33",
    "point_masks": "BSHW",
    "world_points": "BSHW3",
    "cam_points": "BSHW3",
}
_REQUIRED = ("depths", "extrinsics", "intrinsics")


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the key whose tensor is missing or has a wrong shape or type."""
    missing = [key for key in _REQUIRED if key not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing[0]!r}; the losses need {', '.join(_REQUIRED)}.")
    if batch["depths"].dim() != 4:
        raise ValueError(
            f"depths has shape {tuple(batch['depths'].shape)}, expected (scenes, views, H, W); one scene is a batch "
            "of 1: add a dimension in front."
        )
    sizes = dict(zip("BSHW", batch["depths"].shape, strict=True))
    for key, letters in _SHAPES.items():
        expected = tuple(sizes[letter] if letter in sizes else int(letter) for letter in letters)
        if key in batch and tuple(batch[key].shape) != expected:
            raise ValueError(
                f"{key} has shape {tuple(batch[key].shape)}, expected {expected}, to fit depths of shape "
                f"{tuple(batch['depths'].shape)}."
            )
    if "point_masks" in batch and batch["point_masks"].dtype != torch.bool:
        raise ValueError(f"point_masks is {batch['point_masks'].dtype}, expected torch.bool: compare it with 0.")


def complete_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with point_masks and world_points, made from depths and cameras where it has none."""
    check_batch(batch)
    full = dict(batch)
    if "point_masks" not in full:
        full["point_masks"] = valid_depth(full["depths"])
    if "world_points" not in full:
        full["world_points"] = unproject(full["depths"], full["intrinsics"], full["extrinsics"])
    return full


def normalise_scene(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch in the frame of each scene's first camera and in units of its mean distance of valid points.

        E_i <- E_i inv(E_0) ,  X <- R_0 X + t_0 ,  s = sum |X| / (n + 1e-3) over the n valid pixels of all views,

    s kept within [1e-6, 1e6]; translations, depths, world_points and cam_points are divided by s, and all but the
    translations are then cut at +-100. A scene without a valid pixel has s = 1e-6: no loss uses such a scene.
    The result has one more key, scene_scale (B,), with s: what was divided out. It is a new dict of float32
    tensors (float64 where they were), and the given one is not changed. Twice is as good as once up to 1e-3 / n,
    unless something was cut. Predictions are not normalised: the model is to find the scale itself.
    """
    batch = complete_batch(batch)
    valid = batch["point_masks"]
    points = transform(batch["world_points"], batch["extrinsics"][:, :1])
    distance = torch.where(valid, torch.linalg.vector_norm(points, dim=-1), 0.0)
    scale = distance.sum((1, 2, 3)) / (valid.sum((1, 2, 3)).to(distance.dtype) + 1e-3)
    scale = scale.clamp(*SCALE_RANGE)

    def cut(x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return (x / scale.reshape(-1, *[1] * (x.dim() - 1))).clamp(-MAX_TARGET, MAX_TARGET)

    extrinsics = relative_to_first(batch["extrinsics"])
    translation = extrinsics[..., 3:] / scale[:, None, None, None]
    batch["extrinsics"] = torch.cat([extrinsics[..., :3], translation], -1)
    batch["depths"], batch["world_points"] = cut(batch["depths"]), cut(points)
    if "cam_points" in batch:
        batch["cam_points"] = cut(batch["cam_points"])
    batch["scene_scale"] = scale
    return batch


__all__ = ["check_batch", "complete_batch", "normalise_scene"]
