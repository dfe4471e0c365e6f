"""Figures whose pixels are known, colour maps that rise evenly, and point clouds that others open."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_attrsub.evaluation.colors import color_map, paint
from peft_attrsub.evaluation.pictures import GAP, TEXT, error_colors, error_figure, save_points

pillow = pytest.importorskip("PIL.Image")


def lightness(colors: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB bytes, a measure other than the one that the maps are made with."""
    c = colors / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


@pytest.mark.parametrize("name", ["depth", "error"])
def test_lightness_rises_evenly(name: str) -> None:
    light = lightness(color_map(name))
    assert light[0] < 25 and light[-1] > 85
    steps = np.diff(light[::16])
    assert steps.min() > 0.5 * steps.mean() and steps.max() < 1.6 * steps.mean()
    with pytest.raises(ValueError, match="no colour map"):
        color_map("jet")


def test_values_are_painted_from_first_to_last_colour_and_nan_grey() -> None:
    colors = color_map("depth")
    painted = paint(np.array([[-5.0, 1.0], [3.0, np.nan], [99.0, 2.0]]), 1.0, 3.0, "depth")
    np.testing.assert_array_equal(painted[:, 0], colors[[0, 255, 255]])
    np.testing.assert_array_equal(painted[:, 1], [colors[0], [128, 128, 128], colors[128]])
    np.testing.assert_array_equal(paint(np.array([2.0]), 2.0, 2.0, "depth"), colors[:1])  # no range at all


def test_error_colors_end_at_vmax() -> None:
    colors = error_colors([0.0, 0.5, 1.0, 7.0, np.nan, np.inf], 1.0)
    np.testing.assert_array_equal(colors[[2, 3, 5]], np.tile(color_map("error")[-1], (3, 1)))
    np.testing.assert_array_equal(colors[4], [128, 128, 128])
    assert colors.dtype == np.uint8 and colors.shape == (6, 3)
    with pytest.raises(ValueError, match="vmax"):
        error_colors([1.0], 0.0)


def figure_input(views: int = 3) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    images = torch.full((views, 3, 8, 16), 0.25)
    truth = np.linspace(1, 3, 8 * 16).reshape(1, 8, 16).repeat(views, 0)
    mask = np.ones(truth.shape, bool)
    mask[:, :, :4] = False
    return images, truth * 1.1, truth, mask


def test_the_figure_shows_image_prediction_truth_and_error(tmp_path: Path) -> None:
    images, pred, truth, mask = figure_input()
    path = error_figure(images, pred, truth, mask, tmp_path / "new" / "figure.png", vmax=0.2, width=64, max_views=2)
    sheet = np.asarray(pillow.open(path))
    assert sheet.shape[1] == 4 * 64 + 5 * GAP and sheet.shape[2] == 3
    top = TEXT + GAP
    cells = [sheet[top : top + 32, GAP + i * (64 + GAP) :][:, :64] for i in range(4)]
    np.testing.assert_array_equal(cells[0], np.full((32, 64, 3), 64))
    for cell in cells[1:]:
        np.testing.assert_array_equal(cell[:, :16], np.full((32, 16, 3), 128))  # outside of the mask
    low, high = np.percentile(truth[mask], (2, 98))
    for cell, values in ((cells[1], pred), (cells[2], truth)):
        expected = paint(values[0], low, high, "depth").repeat(4, 0).repeat(4, 1)
        np.testing.assert_array_equal(cell[:, 16:], expected[:, 16:])
    tenth = np.tile(error_colors([0.1], 0.2), (32, 48, 1))  # in the middle of two colours, so either
    np.testing.assert_allclose(cells[3][:, 16:].astype(int), tenth, atol=1)
    # two of three views: the first and the last
    second = sheet[top + 32 + GAP : top + 64 + GAP, GAP : GAP + 64]
    np.testing.assert_array_equal(second, cells[0])
    assert sheet.shape[0] < top + 3 * (32 + GAP) + 60
    # something is written above and below
    assert (sheet[:top] < 100).any() and (sheet[-TEXT:] < 100).any()


def test_a_figure_of_nothing_valid_or_not_finite_is_still_a_figure(tmp_path: Path) -> None:
    images, pred, truth, mask = figure_input(1)
    for name, d, valid in (("none", pred, np.zeros_like(mask)), ("nan", np.full_like(pred, np.nan), mask)):
        path = error_figure(images, d, truth, valid, tmp_path / f"{name}.png", width=32, title="a title")
        assert pillow.open(path).size == (4 * 32 + 5 * GAP, 2 * TEXT + GAP + 16 + GAP + 14 + TEXT + GAP)


def test_maps_may_be_of_another_size_than_the_images(tmp_path: Path) -> None:
    _, pred, truth, mask = figure_input()
    error_figure(torch.rand(3, 3, 50, 70), pred, truth, mask, tmp_path / "figure.png")
    with pytest.raises(ValueError, match="three of one shape"):
        error_figure(torch.rand(3, 3, 50, 70), pred, truth[:, :4], mask, tmp_path / "figure.png")
    with pytest.raises(ValueError, match="2 images, 3 depth maps"):
        error_figure(torch.rand(2, 3, 50, 70), pred, truth, mask, tmp_path / "figure.png")


def test_without_pillow_a_sentence_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"drawing pictures needs Pillow.*peft-attrsub\[eval\]"):
        error_figure(*figure_input(), tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_points_are_read_back_by_another_library(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    rng = np.random.default_rng(0)
    points, colors = rng.normal(size=(50, 3)).astype(np.float32), rng.integers(0, 256, (50, 3), dtype=np.uint8)
    cloud = trimesh.load(save_points(tmp_path / "cloud.ply", points, colors))
    np.testing.assert_array_equal(np.asarray(cloud.vertices, np.float32), points)
    np.testing.assert_array_equal(np.asarray(cloud.colors)[:, :3], colors)
    plain = trimesh.load(save_points(tmp_path / "plain.ply", torch.from_numpy(points)))
    np.testing.assert_array_equal(np.asarray(plain.vertices, np.float32), points)


def test_points_by_hand_without_those_that_are_not_finite(tmp_path: Path) -> None:
    points = np.array([[1.0, 2, 3], [np.nan, 0, 0], [0, 1e300, 0], [4, 5, 6]])
    colors = np.array([[1.0, 0, 0.5], [1, 1, 1], [1, 1, 1], [np.nan, 2, -1]])
    data = save_points(tmp_path / "cloud.ply", points, colors).read_bytes()
    head, body = data.split(b"end_header\n")
    assert b"element vertex 2\n" in head and b"property uchar red\n" in head
    record = np.frombuffer(body, dtype=[("p", "<f4", 3), ("c", "u1", 3)])
    np.testing.assert_array_equal(record["p"], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(record["c"], [[255, 0, 128], [0, 255, 0]])
    for wrong in (points[:, :2], points[None]):
        with pytest.raises(ValueError, match="expected \\(N, 3\\)"):
            save_points(tmp_path / "cloud.ply", wrong)
    with pytest.raises(ValueError, match="colors have shape"):
        save_points(tmp_path / "cloud.ply", points, colors[:2])
