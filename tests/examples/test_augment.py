"""examples/vggt/training/augment.py: points stay on their pixels, colours follow their formulas, seeds decide all."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.datasets import Sample, resize
from peft_attrsub.datasets.resizing import resize_intrinsics, resize_nearest
from tests.datasets.invariants import check_sample
from tests.datasets.world import farthest_from_surfaces, make_sample
from tests.examples.training_tools import on_path

on_path()
from training import augment as module  # noqa: E402
from training.augment import Augmentation, augment, blur, change_colours, change_geometry, turn_hue  # noqa: E402
from training.options import DataSettings  # noqa: E402

TARGETS = st.tuples(st.sampled_from([14, 28, 42, 56, 70]), st.sampled_from([14, 42, 56, 70]))


def numbered(height: int, width: int, centre: tuple[float, float], views: int = 2) -> Sample:
    """Depth of a pixel = 1 + its number, label = its number; red = its column, green = its row, over 100."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    number = (rows * width + columns).expand(views, height, width).clone()
    k = torch.tensor([[50.0, 0, centre[0]], [0, 45.0, centre[1]], [0, 0, 1]], dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)[:3]
    return Sample(
        name="numbered",
        frames=tuple(map(str, range(views))),
        images=torch.stack([columns / 100, rows / 100, 0 * rows]).float().expand(views, 3, height, width).clone(),
        depths=1 + number.float(),
        point_masks=number % 3 > 0,
        intrinsics=k.expand(views, 3, 3).clone(),
        extrinsics=eye.expand(views, 3, 4).clone(),
        labels=number,
    )


def source_pixel(sample: Sample, before: Sample, view: int, row: int, column: int) -> tuple[float, float]:
    """Where the ray of a pixel of the new view pierces the old view, as (row, column)."""
    new, old = sample.intrinsics[view].numpy(), before.intrinsics[view].numpy()
    x, y, _ = old @ np.linalg.inv(new) @ np.array([column, row, 1.0])
    return y, x


@settings(max_examples=40)
@given(st.integers(0, 10_000), TARGETS, st.floats(-6, 6), st.floats(-6, 6))
def test_every_pixel_comes_from_where_its_ray_points(seed: int, target: tuple[int, int], dx: float, dy: float) -> None:
    """The slow way: through both cameras, pixel by pixel. The margin is large enough that no border stays empty."""
    height, width = 37, 48
    before = numbered(height, width, (23.5 + dx, 18.0 + dy))
    after = change_geometry(before, target, Augmentation(), np.random.default_rng(seed))
    assert after.images.shape == (2, 3, *target) and after.depths.shape == (2, *target)
    assert after.labels is not None and before.labels is not None
    assert torch.equal(after.extrinsics, before.extrinsics)
    for view in range(2):
        for row in range(0, target[0], 3):
            for column in range(0, target[1], 3):
                y, x = source_pixel(after, before, view, row, column)
                label = int(after.labels[view, row, column])
                place = divmod(label, width)
                assert abs(place[0] - y) <= 0.5 + 1e-6 and abs(place[1] - x) <= 0.5 + 1e-6
                assert float(after.depths[view, row, column]) == 1 + label
                assert bool(after.point_masks[view, row, column]) == (label % 3 > 0)


@settings(max_examples=25)
@given(st.integers(0, 10_000), TARGETS, st.floats(-6, 6), st.floats(-6, 6))
def test_pictures_lie_where_the_cameras_say(seed: int, target: tuple[int, int], dx: float, dy: float) -> None:
    """A ramp stays a ramp when it is averaged, but at its ends: red gives the column, green the row."""
    before = numbered(37, 48, (23.5 + dx, 18.0 + dy), views=1)
    after = change_geometry(before, target, Augmentation(), np.random.default_rng(seed))
    row, column = target[0] // 2, target[1] // 2
    y, x = source_pixel(after, before, 0, row, column)
    assert float(after.images[0, 0, row, column]) * 100 == pytest.approx(x, abs=0.15)
    assert float(after.images[0, 1, row, column]) * 100 == pytest.approx(y, abs=0.15)


@given(st.integers(0, 10_000), TARGETS, st.floats(-9, 9), st.floats(-9, 9))
def test_the_principal_point_becomes_the_centre(seed: int, target: tuple[int, int], dx: float, dy: float) -> None:
    before = numbered(37, 48, (23.5 + dx, 18.0 + dy))
    after = change_geometry(before, target, Augmentation(), np.random.default_rng(seed))
    off = after.intrinsics[:, :2, 2] - torch.tensor([(target[1] - 1) / 2, (target[0] - 1) / 2])
    assert float(off.abs().max()) <= 0.5 + 1e-9


def test_points_stay_on_their_surfaces() -> None:
    """At three times the size each old pixel's centre is a new one's too, or nearly: points there are the same."""
    large = resize(make_sample(), (64 * 3, 69 * 3))
    rng = np.random.default_rng(3)
    for size in ((56, 70), (70, 42)):
        check_sample(augment(large, size, Augmentation(), rng), limit=0.02)
    # A block of 1 m seen at 3 m by 57 pixels a metre: half a pixel of rounding is a centimetre on the ground.
    after = change_geometry(make_sample(), (224, 224), Augmentation(), rng)
    assert farthest_from_surfaces(after) < 0.08
    shifted = replace(after, intrinsics=after.intrinsics + torch.tensor([[0, 0, 14.0], [0, 0, 0], [0, 0, 0]]))
    assert farthest_from_surfaces(shifted) > 0.08


def test_sizes_and_crops_follow_the_recipe() -> None:
    """The factor from old to new pixels shows in the focal lengths: f' / f."""
    before = replace(numbered(80, 80, (39.5, 39.5), views=1), labels=None)
    rng = np.random.default_rng(0)
    factors = np.array(
        [
            np.diag(change_geometry(before, (56, 70), Augmentation(), rng).intrinsics[0] / before.intrinsics[0])[:2]
            for _ in range(300)
        ]
    )
    # A crop of 80 % of the width: (70 + 4) / 64; the largest extra: 0.3 * 70 = 21 pixels more.
    assert factors.min() > 74 / 80 - 0.02 and factors.max() < (74 + 21) / 64 + 0.02
    assert factors.max() > 74 / 64 and np.abs(factors[:, 0] / factors[:, 1] - 1).max() < 0.02
    plain = np.array(
        np.diag(change_geometry(before, (56, 70), Augmentation.none(), rng).intrinsics[0] / before.intrinsics[0])
    )
    np.testing.assert_allclose(plain[:2], 70 / 80, rtol=1e-6)


def test_without_augmentation_nothing_changes_but_the_size() -> None:
    before = numbered(56, 70, (34.5, 27.5))
    after = augment(before, (56, 70), Augmentation.none(), np.random.default_rng(0))
    for key in ("images", "depths", "point_masks", "intrinsics", "extrinsics", "labels"):
        assert torch.equal(getattr(after, key), getattr(before, key)), key


def test_beyond_the_picture_is_nothing() -> None:
    """A view a third of whose target is beyond it, by hand: `size` is asked for that the window does not fill."""
    way = module._Way((0, 0, 2, 2), (2, 2), (-1, 1), (4, 3), torch.eye(3, dtype=torch.float64))
    assert way.cut(torch.tensor([[[1, 2], [3, 4]]])).tolist() == [[[0, 0, 0], [2, 0, 0], [4, 0, 0], [0, 0, 0]]]
    nothing = module._Way((0, 0, 2, 2), (2, 2), (5, 0), (2, 2), torch.eye(3, dtype=torch.float64))
    assert not nothing.cut(torch.ones(1, 2, 2)).any()


def test_depth_of_a_sensors_own_size() -> None:
    before = numbered(60, 90, (44.5, 29.5))
    own = replace(
        before,
        depths=resize_nearest(before.depths, (20, 30)),
        point_masks=resize_nearest(before.point_masks, (20, 30)),
        labels=None,
        intrinsics=resize_intrinsics(before.intrinsics, (60, 90), (20, 30)),
    )
    after = augment(own, (56, 70), Augmentation(), np.random.default_rng(1))
    assert after.depths.shape == (2, 56, 70)
    after.training()


def test_a_principal_point_outside_of_the_picture() -> None:
    with pytest.raises(ValueError, match=r"numbered: its principal point 50.5 lies outside of 48 pixels"):
        augment(numbered(37, 48, (50.0, 18.0)), (28, 28), Augmentation(), np.random.default_rng(0))


def test_hue_as_the_standard_library_turns_it() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(3, 6, 7, generator=draw)
    images[:, 0] = images[:1, 0]  # grey has no hue
    images[:, 1, 0], images[:, 1, 1] = 0.0, 1.0
    for turn in (-0.5, -0.1, 0.0, 0.07, 0.5):
        found = turn_hue(images, turn)
        for row in range(6):
            for column in range(7):
                h, s, v = colorsys.rgb_to_hsv(*images[:, row, column].tolist())
                expected = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
                assert found[:, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def only(**on: float) -> Augmentation:
    return replace(Augmentation.none(), **({"jitter": 1.0, "same_colors": 1.0} | on))


def test_brightness_contrast_saturation_and_grey() -> None:
    """Each alone: one factor within its range explains all pixels that were not cut."""
    images = 0.3 + 0.3 * torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    weights = np.array([0.299, 0.587, 0.114])
    x = images.numpy().astype(np.float64)
    luma = np.einsum("schw,c->shw", x, weights)[:, None]
    others = {"brightness": 0 * x, "contrast": luma.mean((2, 3), keepdims=True) + 0 * x, "saturation": luma + 0 * x}
    for kind, other in others.items():
        factors = []
        for seed in range(60):
            found = change_colours(images, only(**{kind: 0.5}), np.random.default_rng(seed)).numpy()
            factor = float(((found - other) * (x - other)).sum() / ((x - other) ** 2).sum())
            np.testing.assert_allclose(found, factor * x + (1 - factor) * other, atol=1e-5)
            factors.append(factor)
        assert 0.5 <= min(factors) < 0.65 and 1.35 < max(factors) <= 1.5, kind
    gray = change_colours(images, only(jitter=0.0, gray=1.0), np.random.default_rng(0))
    np.testing.assert_allclose(gray, luma.repeat(3, 1), atol=1e-6)


def test_colours_stay_in_their_range_and_shape() -> None:
    images = torch.rand(3, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    for seed in range(50):
        found = change_colours(images, Augmentation(blur=0.5), np.random.default_rng(seed))
        assert found.shape == images.shape and found.dtype == torch.float32
        assert float(found.min()) >= 0 and float(found.max()) <= 1


def test_views_change_alike_or_each_on_its_own() -> None:
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).expand(3, 3, 4, 4).contiguous()
    alike = changed = grey = 0
    for seed in range(400):
        found = change_colours(images, Augmentation(), np.random.default_rng(seed))
        alike += torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
        changed += not torch.equal(found[0], images[0])
        grey += torch.equal(found[0, 0], found[0, 2])
    assert alike / 400 == pytest.approx(0.7, abs=0.07)
    assert changed / 400 == pytest.approx(1 - 0.1 * 0.95, abs=0.05)
    assert 5 <= grey <= 40


def test_blur_is_a_weighted_mean() -> None:
    images = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    found = blur(images, 0.7)
    weights = np.array([[np.exp(-(i * i + j * j) / (2 * 0.7**2)) for j in range(-2, 3)] for i in range(-2, 3)])
    expected = (images[0, :, 2:7, 3:8].numpy() * weights / weights.sum()).sum((1, 2))
    np.testing.assert_allclose(found[0, :, 4, 5], expected, atol=1e-6)
    torch.testing.assert_close(blur(torch.full((1, 3, 6, 6), 0.4), 0.3), torch.full((1, 3, 6, 6), 0.4))
    with pytest.raises(ValueError, match="too small for a blur"):
        blur(torch.zeros(1, 3, 2, 9), 0.5)


def test_the_generator_decides_everything() -> None:
    sample = make_sample()
    state = torch.get_rng_state()
    first, same, other = (augment(sample, (42, 56), Augmentation(), np.random.default_rng(s)) for s in (1, 1, 2))
    for key in ("images", "depths", "point_masks", "intrinsics", "labels"):
        assert torch.equal(getattr(first, key), getattr(same, key)), key
    assert not torch.equal(first.intrinsics, other.intrinsics) and not torch.equal(first.images, other.images)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_settings_default_is_the_recipe() -> None:
    assert Augmentation.of(DataSettings()) == Augmentation()
    assert Augmentation.of(DataSettings(hue=0.2, same_colors=1.0)) == Augmentation(hue=0.2, same_colors=1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jitter": 1.1}, "jitter is 1.1, expected a probability"),
        ({"hue": 0.6}, "hue is 0.6"),
        ({"contrast": -0.1}, "contrast is -0.1"),
        ({"crop_min": 1.3}, "expected 0 < crop_min <= crop_max"),
        ({"crop_min": 0.0}, "expected 0 < crop_min <= crop_max"),
    ],
)
def test_numbers_that_do_not_fit(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Augmentation(**changes)
