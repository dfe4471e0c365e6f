"""Batches: normalisation of the truth scene by scene, and what is made where a key is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from peft_attrsub.vggt import cameras
from peft_attrsub.vggt.batch import complete_batch, normalise_scene
from peft_attrsub.vggt.losses import VggtLoss

from . import loss_reference as reference
from .loss_inputs import (
    arrays,
    make_batch,
    make_output,
)
from .test_cameras import random_extrinsics


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_normalise_scene_is_that_of_the_loops(share: float) -> None:
    batch = make_batch(share=share)
    before = {key: value.clone() for key, value in batch.items() if isinstance(value, Tensor)}
    found, expected = normalise_scene(batch), reference.normalised(arrays(batch))
    assert found["seq_name"] == "a name" and found.keys() == {*batch, "scene_scale"}
    for key, value in expected.items():
        np.testing.assert_allclose(found[key].numpy(), value, rtol=1e-10, atol=1e-9, err_msg=key)
    for key, value in before.items():
        assert torch.equal(batch[key].nan_to_num(), value.nan_to_num()), f"{key} of the caller was changed"


def test_normalise_scene_has_a_first_camera_at_the_origin_and_a_mean_distance_of_one() -> None:
    found = normalise_scene(make_batch())
    assert torch.allclose(found["extrinsics"][:, 0], torch.eye(3, 4, dtype=torch.float64), atol=1e-12)
    for points, valid in zip(found["world_points"], found["point_masks"], strict=True):
        assert points[valid].norm(dim=-1).mean().item() == pytest.approx(1, abs=1e-4)


def test_normalise_scene_keeps_points_depths_and_cameras_in_agreement() -> None:
    batch = make_batch(share=1.0)
    found = normalise_scene(batch)
    points = cameras.unproject(found["depths"], found["intrinsics"], found["extrinsics"])
    assert torch.allclose(points, found["world_points"], atol=1e-10)
    assert torch.allclose(cameras.unproject(found["depths"], found["intrinsics"]), found["cam_points"], atol=1e-10)
    # Neither the world frame nor the unit of a data set matters.
    moved, world = dict(batch), random_extrinsics(seed=8)
    e = batch["extrinsics"]
    turned = e[..., :3] @ world[:, :3]
    moved["extrinsics"] = torch.cat([turned, e[..., :3] @ world[:, 3:] + e[..., 3:]], -1)
    moved["extrinsics"][..., 3] *= 7
    moved["depths"] = batch["depths"] * 7
    del moved["world_points"], moved["cam_points"]
    again = normalise_scene(moved)
    for key in ("extrinsics", "depths", "world_points"):
        assert torch.allclose(again[key], found[key], atol=1e-4), key
    assert torch.allclose(again["scene_scale"], 7 * found["scene_scale"], rtol=1e-4)


def test_normalise_scene_cuts_far_points_at_a_hundred() -> None:
    batch = make_batch(1, 1, 20, 20, share=1.0)
    batch["depths"][0, 0, 3, 4] = 1e4
    del batch["world_points"], batch["cam_points"]
    found = normalise_scene(batch)
    assert found["depths"].max() == 100 and found["world_points"].abs().max() == 100
    assert found["scene_scale"] < 100


@pytest.mark.parametrize(("unit", "scale"), [(1e-9, 1e-6), (1e9, 1e6)])
def test_the_scale_of_a_scene_has_limits(unit: float, scale: float) -> None:
    batch = make_batch(share=1.0)
    batch["depths"] *= unit
    batch["extrinsics"][..., 3] *= unit
    del batch["world_points"]
    assert normalise_scene(batch)["scene_scale"].tolist() == pytest.approx([scale, scale])


def test_normalising_twice_is_as_good_as_once() -> None:
    batch = make_batch()
    once = normalise_scene(batch)
    output = make_output(batch)
    expected = VggtLoss()(output, batch).total.item()
    assert VggtLoss(normalise=False)(output, once).total.item() == pytest.approx(expected, rel=1e-12)
    assert VggtLoss()(output, once).total.item() == pytest.approx(expected, rel=1e-4)


def test_masks_and_points_are_made_from_the_depths_where_missing() -> None:
    batch = make_batch()
    bare = {key: batch[key] for key in ("depths", "extrinsics", "intrinsics")}
    bare["depths"] = batch["depths"].clone()
    bare["depths"][0, 0, 0, :3] = torch.tensor([0.0, -1.0, math.inf], dtype=torch.float64)
    full = complete_batch(bare)
    expected = batch["point_masks"].clone()
    expected[0, 0, 0, :3] = False
    assert torch.equal(full["point_masks"], expected) and "point_masks" not in bare
    assert torch.allclose(full["world_points"][expected], batch["world_points"][expected])
    output = make_output(batch)
    batch["point_masks"] = expected
    assert VggtLoss()(output, bare).total.item() == pytest.approx(VggtLoss()(output, batch).total.item())
