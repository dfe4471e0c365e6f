"""The contract itself: what is no sample is refused, and the batch that training gets is the one the losses read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.datasets.invariants import check_sample, reprojection_error
from tests.datasets.world import farthest_from_surfaces, make_sample

SAMPLE = make_sample()


def test_the_world_of_these_tests_is_consistent() -> None:
    check_sample(SAMPLE)
    assert farthest_from_surfaces(SAMPLE) < 1e-5


def wrong_pose() -> torch.Tensor:
    """World from camera in the place of camera from world: the mistake that readers make most."""
    assert SAMPLE.extrinsics is not None
    rotation = SAMPLE.extrinsics[..., :3].transpose(-1, -2)
    return torch.cat([rotation, -rotation @ SAMPLE.extrinsics[..., 3:]], -1)


def flipped_axes() -> torch.Tensor:
    """Camera axes of OpenGL."""
    assert SAMPLE.extrinsics is not None
    return torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)) @ SAMPLE.extrinsics


def test_wrong_cameras_are_caught() -> None:
    """If they were not, every reader's test would be worth nothing.

    The reprojection alone does not see axes of OpenGL here: the cameras go round the world's axis, and what is turned
    upside down and put behind them is almost the same from all of them. The distance from the surfaces sees it.
    """
    inverted = replace(SAMPLE, extrinsics=wrong_pose())
    assert reprojection_error(inverted, 0, 1) > 4 * reprojection_error(SAMPLE, 0, 1)
    with pytest.raises(AssertionError):
        check_sample(inverted)
    assert farthest_from_surfaces(inverted) > 1
    assert farthest_from_surfaces(replace(SAMPLE, extrinsics=flipped_axes())) > 1
    corners = SAMPLE.intrinsics.clone()
    corners[:, :2, 2] += 0.5
    assert farthest_from_surfaces(replace(SAMPLE, intrinsics=corners)) > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": SAMPLE.images.double()}, "images is torch.float64"),
        ({"images": SAMPLE.images[:2]}, r"images is torch.float32 \(2, 3, 64, 69\), expected torch.float32 \(3, 3, "),
        ({"images": SAMPLE.images.permute(0, 2, 3, 1)}, "images is"),
        ({"depths": SAMPLE.depths[:2]}, "depths is"),
        ({"depths": SAMPLE.depths.double()}, "depths is torch.float64"),
        ({"point_masks": SAMPLE.point_masks.float()}, "point_masks is torch.float32"),
        ({"point_masks": SAMPLE.point_masks[:, :-1]}, "point_masks is torch.bool"),
        ({"intrinsics": SAMPLE.intrinsics.float()}, "intrinsics is torch.float32"),
        ({"extrinsics": torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)}, r"expected torch.float64 \(3, 3, 4\)"),
        ({"labels": torch.zeros(3, 64, 69)}, "labels is torch.float32"),
        ({"depths": SAMPLE.depths - 9}, "negative or not finite"),
        ({"depths": SAMPLE.depths * float("nan")}, "negative or not finite"),
        ({"depths": SAMPLE.depths + float("inf")}, "negative or not finite"),
        ({"depths": SAMPLE.depths * 0}, "true where there is no depth"),
        ({"point_masks": torch.ones_like(SAMPLE.point_masks)}, "true where there is no depth"),
        ({"extrinsics": 1.001 * make_sample().extrinsics}, "no rotation and translation"),  # type: ignore[operator]
        ({"extrinsics": -make_sample().extrinsics}, "no rotation and translation"),  # type: ignore[operator]
        ({"extrinsics": torch.full((3, 3, 4), torch.nan, dtype=torch.float64)}, "no rotation and translation"),
    ],
)
def test_what_is_no_sample_is_refused(change: dict[str, Any], words: str) -> None:
    assert not bool(SAMPLE.point_masks.all())
    with pytest.raises(ValueError, match=f"world: .*{words}"):
        replace(SAMPLE, **change)


def test_what_may_be_missing() -> None:
    bare = replace(SAMPLE, extrinsics=None, labels=None)
    check_sample(bare)
    assert len(bare) == 3 and bare.extrinsics is None
    with pytest.raises(ValueError, match="world has no poses: it can be evaluated on its depth"):
        bare.training()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_chosen_views(chosen: list[int]) -> None:
    part = SAMPLE.views(chosen)
    assert len(part) == len(chosen) and part.frames == tuple(str(index) for index in chosen)
    for key in ("images", "depths", "point_masks", "intrinsics", "extrinsics", "labels"):
        for place, index in enumerate(chosen):
            assert torch.equal(getattr(part, key)[place], getattr(SAMPLE, key)[index]), key
    assert replace(SAMPLE, labels=None).views(chosen).labels is None


def test_training_batches() -> None:
    two = torch.utils.data.default_collate([SAMPLE.training(), replace(SAMPLE, name="other").training()])
    assert two.pop("seq_name") == ["world", "other"]
    assert {key: (tuple(value.shape), value.dtype) for key, value in two.items()} == {
        "images": ((2, 3, 3, 64, 69), torch.float32),
        "depths": ((2, 3, 64, 69), torch.float32),
        "point_masks": ((2, 3, 64, 69), torch.bool),
        "extrinsics": ((2, 3, 3, 4), torch.float32),
        "intrinsics": ((2, 3, 3, 3), torch.float32),
    }
    np.testing.assert_array_equal(two["depths"][1], SAMPLE.depths)
    small = replace(SAMPLE, depths=SAMPLE.depths[:, ::2], point_masks=SAMPLE.point_masks[:, ::2], labels=None)
    with pytest.raises(ValueError, match=r"images are \(64, 69\) and depth maps \(32, 69\) pixels: resize"):
        small.training()
