"""Other sizes: a point still falls on its pixel, and every value is the one that the slow way gives."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.datasets.resizing import crop, resize, resize_images, resize_intrinsics, resize_nearest
from peft_attrsub.vggt.cameras import project
from tests.datasets.world import farthest_from_surfaces, make_sample

SIDE = st.integers(1, 40)
SIZE = st.tuples(SIDE, SIDE)


def nearest(old: int, new: int) -> list[int]:
    """Of each new pixel the old one whose square holds its centre, in whole numbers; on an edge, the later one."""
    return [int(Fraction(2 * index + 1, 2) * old / new) for index in range(new)]


@given(SIZE, SIZE)
def test_nearest_pixels(old: tuple[int, int], new: tuple[int, int]) -> None:
    values = torch.arange(2 * old[0] * old[1]).reshape(2, *old)
    found = resize_nearest(values, new)
    rows, columns = nearest(old[0], new[0]), nearest(old[1], new[1])
    expected = [[[int(view[row, column]) for column in columns] for row in rows] for view in values]
    assert found.tolist() == expected and found.dtype == values.dtype


@given(SIZE, SIZE, st.floats(-3, 3), st.floats(-3, 3))
def test_a_point_keeps_its_place_in_the_picture(
    old: tuple[int, int], new: tuple[int, int], x: float, y: float
) -> None:
    """Measured from the corner of the first pixel, as a share of the width and the height."""
    k = torch.tensor([[[31.0, 0, 11.3], [0, 29.0, 7.1], [0, 0, 1]]], dtype=torch.float64)
    point = torch.tensor([[x, y, 1.7]], dtype=torch.float64)
    before, _ = project(point, k)
    after, _ = project(point, resize_intrinsics(k, old, new))
    for axis, (a, b) in enumerate(((old[1], new[1]), (old[0], new[0]))):
        assert (float(after[0, axis]) + 0.5) / b == pytest.approx((float(before[0, axis]) + 0.5) / a, abs=1e-9)


@pytest.mark.parametrize("size", [(64 * 3, 69 * 3), (64, 69 * 5), (64 * 3, 69)])
def test_a_larger_sample_keeps_its_points(size: tuple[int, int]) -> None:
    """At odd factors each old pixel's centre is a new pixel's centre too: there the point is the same one."""
    sample = make_sample()
    large = resize(sample, size)
    down, across = size[0] // 64, size[1] // 69
    part = (..., slice(down // 2, None, down), slice(across // 2, None, across))
    assert torch.equal(large.depths[part], sample.depths) and torch.equal(large.point_masks[part], sample.point_masks)
    assert large.labels is not None and sample.labels is not None and torch.equal(large.labels[part], sample.labels)
    centres = torch.zeros_like(large.point_masks)
    centres[part] = True
    only = replace(large, point_masks=large.point_masks & centres)
    assert farthest_from_surfaces(only) < 1e-5


def test_a_smaller_sample_keeps_its_points() -> None:
    sample = crop(make_sample(), 1, 0, (63, 69))
    small = resize(sample, (21, 23))
    assert torch.equal(small.depths, sample.depths[:, 1::3, 1::3])
    assert farthest_from_surfaces(small) < 1e-5
    assert small.images.shape == (3, 3, 21, 23) and small.frames == sample.frames


def test_nothing_changes_at_the_same_size() -> None:
    sample = make_sample()
    same = resize(sample, (64, 69))
    for key in ("images", "depths", "point_masks", "intrinsics", "extrinsics", "labels"):
        assert torch.equal(getattr(same, key), getattr(sample, key)), key


def test_depth_of_a_sensors_own_size_follows_the_pictures() -> None:
    """Maps at a third of the pictures' size, to a size that is neither."""
    sample = crop(make_sample(), 0, 0, (63, 69))
    assert sample.labels is not None
    own = replace(
        sample,
        depths=sample.depths[:, 1::3, 1::3],
        point_masks=sample.point_masks[:, 1::3, 1::3],
        labels=sample.labels[:, 1::3, 1::3],
        intrinsics=resize_intrinsics(sample.intrinsics, (63, 69), (21, 23)),
    )
    assert farthest_from_surfaces(own) < 1e-5
    both = resize(own, (63, 69))
    torch.testing.assert_close(both.intrinsics, sample.intrinsics)
    assert torch.equal(both.images, sample.images) and both.depths.shape == (3, 63, 69)
    both.training()
    with pytest.raises(ValueError, match="depth maps are not of the size of its images: resize it before a crop"):
        crop(own, 0, 0, (3, 3))


def test_pictures_are_averaged() -> None:
    rng = np.random.default_rng(0)
    flat = torch.from_numpy(rng.random((2, 3, 1, 1), np.float32)).expand(2, 3, 32, 48).contiguous()
    torch.testing.assert_close(resize_images(flat, (8, 9)), flat[..., :8, :9], atol=1e-5, rtol=0)
    checks = (torch.arange(32)[:, None] + torch.arange(48)) % 2
    small = resize_images(checks.float().expand(1, 3, 32, 48), (8, 12))
    assert float((small - 0.5).abs().max()) < 0.1  # without averaging it would be 0 or 1
    steps = torch.zeros(1, 3, 16, 16)
    steps[..., 8:] = 1
    large = resize_images(steps, (64, 64))
    assert float(large.min()) >= 0 and float(large.max()) <= 1  # bicubic alone goes beyond
    ramp = (torch.arange(60.0) + 0.5).expand(1, 3, 60, 60) / 60
    middle = resize_images(ramp, (20, 20))[..., 3:-3]
    torch.testing.assert_close(middle[0, 0, 0], (torch.arange(20.0) + 0.5)[3:-3] / 20, atol=1e-4, rtol=0)


@settings(max_examples=50)
@given(st.data())
def test_crops(data: st.DataObject) -> None:
    sample = make_sample()
    top, left = data.draw(st.integers(0, 63)), data.draw(st.integers(0, 68))
    size = data.draw(st.tuples(st.integers(1, 64 - top), st.integers(1, 69 - left)))
    part = crop(sample, top, left, size)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    for key in ("images", "depths", "point_masks", "labels"):
        assert torch.equal(getattr(part, key), getattr(sample, key)[..., rows, columns]), key
    if bool(part.point_masks.any()):
        assert farthest_from_surfaces(part) < 1e-5


@pytest.mark.parametrize(
    ("top", "left", "size"),
    [(-1, 0, (3, 3)), (0, -1, (3, 3)), (0, 0, (65, 3)), (60, 0, (5, 3)), (0, 67, (3, 3)), (0, 0, (0, 3))],
)
def test_a_crop_outside_of_the_picture(top: int, left: int, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"world: a crop of .* lies not in 64 x 69"):
        crop(make_sample(), top, left, size)
