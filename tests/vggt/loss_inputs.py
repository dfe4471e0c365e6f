"""Scenes with their truth, predictions near it, and the comparison of a loss with the loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_attrsub.vggt import VggtOutput, cameras
from peft_attrsub.vggt.batch import normalise_scene
from peft_attrsub.vggt.losses import VggtLosses

from . import loss_reference as reference
from .test_cameras import random_extrinsics, random_intrinsics

NAMES = [f"camera_{x}" for x in ("T", "R", "FoV")] + [
    f"{x}_{y}" for x in ("depth", "point") for y in ("conf", "reg", "grad")
]
Batch = dict[str, Any]


def make_batch(
    scenes: int = 2, views: int = 3, height: int = 12, width: int = 14, share: float = 0.8, seed: int = 0
) -> Batch:
    """Random cameras and depths in float64; `share` of the pixels valid, and NaN at all the others."""
    generator = torch.Generator().manual_seed(seed)
    depths = torch.rand(scenes, views, height, width, generator=generator, dtype=torch.float64) * 3 + 1
    valid = torch.rand(depths.shape, generator=generator) < share
    batch = {
        "images": torch.rand(scenes, views, 3, height, width, generator=generator),
        "depths": depths.masked_fill(~valid, math.nan),
        "extrinsics": random_extrinsics(scenes, views, seed=seed),
        "intrinsics": random_intrinsics(scenes, views, seed=seed),
        "point_masks": valid,
        "seq_name": "a name",
    }
    batch["cam_points"] = cameras.unproject(batch["depths"], batch["intrinsics"])
    batch["world_points"] = cameras.unproject(batch["depths"], batch["intrinsics"], batch["extrinsics"])
    return batch


def make_output(batch: Batch, seed: int = 0, noise: float = 0.3, points: bool = True) -> VggtOutput:
    """Predictions near the truth of the batch, float64 leaves that ask for gradients."""
    generator = torch.Generator().manual_seed(seed + 100)

    def near(x: Tensor) -> Tensor:
        x = x.nan_to_num(1.0)
        return (x + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)).requires_grad_()

    def confidence(x: Tensor) -> Tensor:
        return (1 + torch.rand(x.shape, generator=generator, dtype=x.dtype) * 3).requires_grad_()

    truth = normalise_scene(batch)
    pose = cameras.encode_pose(truth["extrinsics"], truth["intrinsics"], tuple(batch["depths"].shape[-2:]))
    output = VggtOutput(pose_enc_list=tuple(near(pose) for _ in range(4)))
    output.pose_enc = output.pose_enc_list[-1]
    output.depth, output.depth_conf = near(truth["depths"][..., None]), confidence(truth["depths"])
    if points:
        output.world_points, output.world_points_conf = near(truth["world_points"]), confidence(truth["depths"])
    return output


def leaves(output: VggtOutput) -> list[Tensor]:
    single = (output.depth, output.depth_conf, output.world_points, output.world_points_conf)
    return [*output.pose_enc_list, *(x for x in single if x is not None)]


def arrays(batch: Batch) -> dict[str, Any]:
    return {key: value.numpy() for key, value in batch.items() if isinstance(value, Tensor)}


def by_loops(output: VggtOutput, batch: Batch) -> dict[str, float]:
    truth = reference.normalised(arrays(batch))
    terms = reference.camera_terms([x.detach().numpy() for x in output.pose_enc_list], truth)
    depth = (x.detach().numpy() for x in (output.depth, output.depth_conf))
    terms |= reference.dense_terms("depth", *depth, truth["depths"][..., None], truth["point_masks"])
    if output.world_points is not None:
        points = (x.detach().numpy() for x in (output.world_points, output.world_points_conf))
        terms |= reference.dense_terms("point", *points, truth["world_points"], truth["point_masks"])
    return terms


def assert_is_reference(found: VggtLosses, output: VggtOutput, batch: Batch, tolerance: float = 1e-10) -> None:
    expected = by_loops(output, batch)
    assert list(found.terms) == list(expected)
    for name, value in expected.items():
        assert found.terms[name].item() == pytest.approx(value, rel=tolerance, abs=tolerance), name
    assert found.total.item() == pytest.approx(reference.total(expected), rel=tolerance, abs=tolerance)


def assert_finite_gradients(loss: Tensor, *inputs: Tensor) -> None:
    for gradient in torch.autograd.grad(loss, inputs):
        assert gradient.isfinite().all()
