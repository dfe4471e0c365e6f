"""Planes and reliefs of known shape, and what has none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.evaluation.planes import plane_fit, relief, sequence_relief
from peft_attrsub.evaluation.skipping import SkippedError

SIZE = 65
K = np.array([[100.0, 0, 32], [0, 100.0, 32], [0, 0, 1]])


def tilted(degrees: float, distance: float = 2.0) -> np.ndarray:
    """Depth (65, 65) of a plane that passes (0, 0, distance), turned about the y axis."""
    u, v = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    x = (u - 32) / 100
    return distance / (1 - np.tan(np.radians(degrees)) * x) + 0 * v


def unproject(depth: np.ndarray) -> np.ndarray:
    v, u = np.indices(depth.shape)
    return np.stack([(u - 32) / 100 * depth, (v - 32) / 100 * depth, depth], -1).reshape(-1, 3)


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_plane_fit_agrees_with_the_singular_vectors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(50, 3)) @ np.diag([3, 2, 0.1]) @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + [0, 0, 9]
    plane = plane_fit(points)
    flat = points - points.mean(0)
    _, singular, axes = np.linalg.svd(flat)
    assert abs(plane.normal @ axes[2]) == pytest.approx(1)
    assert plane.rms == pytest.approx(singular[2] / np.sqrt(50))
    np.testing.assert_allclose(plane.heights(points), flat @ plane.normal, atol=1e-9)
    assert plane.normal @ points.mean(0) < 0  # to the camera


@pytest.mark.parametrize("degrees", [0, 5, -30])
def test_a_print_has_no_relief_however_it_is_tilted(degrees: float) -> None:
    result = relief(tilted(degrees), np.ones((SIZE, SIZE), bool), K)
    assert result.residual_rms < 1e-12 and result.relief < 1e-12 and result.ratio < 1e-12
    angle = np.radians(degrees)
    np.testing.assert_allclose(result.normal, [np.sin(angle), 0, -np.cos(angle)], atol=1e-9)


def test_a_dent_of_known_height_and_its_arithmetic() -> None:
    """Two flat levels 0.1 apart, half of the pixels each: rms 0.05, relief 0.1, width 0.9 of the extent."""
    depth = np.full((SIZE, SIZE), 2.0)
    checks = (np.indices(depth.shape).sum(0) % 2).astype(bool)
    depth[checks] += 0.1
    result = relief(depth, np.ones_like(checks), K)
    assert result.residual_rms == pytest.approx(0.05, rel=0.01)
    assert result.relief == pytest.approx(0.1, rel=0.01)
    assert result.width == pytest.approx(0.9 * 64 / 100 * 2.05, rel=0.03)
    assert result.ratio == pytest.approx(result.relief / result.width)
    assert result.row() == {
        "plane_rms": result.residual_rms,
        "relief": result.relief,
        "relief_ratio": result.ratio,
    }


@given(st.floats(1e-3, 1e3))
@settings(max_examples=20)
def test_the_ratio_does_not_depend_on_the_scale(scale: float) -> None:
    depth = tilted(10) - 0.1 * np.exp(-(((np.indices((SIZE, SIZE)) - 32) / 12) ** 2).sum(0))
    mask = np.ones(depth.shape, bool)
    one, other = relief(depth, mask, K), relief(scale * depth, mask, K)
    assert one.ratio > 0.01 and other.ratio == pytest.approx(one.ratio, rel=1e-9)
    assert other.relief == pytest.approx(scale * one.relief, rel=1e-9)


def test_a_few_wild_pixels_are_no_relief() -> None:
    depth, rng = tilted(5), np.random.default_rng(0)
    wild = np.where(rng.random(depth.shape) < 0.02, depth + 0.01 * rng.normal(size=depth.shape), depth)
    assert relief(wild, np.ones(depth.shape, bool), K).relief < 1e-3


def test_only_the_mask_counts() -> None:
    depth = tilted(5)
    mask = np.zeros(depth.shape, bool)
    mask[10:50, 10:50] = True
    depth[~mask] = np.nan
    depth[20, 20] = 0  # nothing there
    assert relief(depth, mask, K).relief < 1e-12


def test_a_sequence_is_its_median_view_and_views_without_pixels_are_left_out() -> None:
    bump = np.exp(-(((np.indices((SIZE, SIZE)) - 32) / 12) ** 2).sum(0))
    depths = np.stack([tilted(0) - height * bump for height in (0.0, 0.1, 0.3, 0.2)])
    masks = np.ones(depths.shape, bool)
    masks[3] = False
    intrinsics = np.tile(K, (4, 1, 1))
    assert sequence_relief(depths, masks, intrinsics).ratio == relief(depths[1], masks[1], K).ratio
    with pytest.raises(SkippedError, match="fewer than 4 points"):
        sequence_relief(depths, np.zeros_like(masks), intrinsics)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (np.zeros((0, 3)), "fewer than 4 points"),
        (np.eye(3), "fewer than 4 points"),
        (np.ones((9, 3)), "all points in one place"),
        (np.outer(np.arange(9.0), [1, 2, 3]), "all points on one line"),
        (np.full((9, 3), np.nan), "points not finite"),
    ],
)
def test_points_that_span_no_plane_are_skipped_by_name(points: np.ndarray, reason: str) -> None:
    with pytest.raises(SkippedError) as caught:
        plane_fit(points)
    assert caught.value.reason == reason


def test_depth_that_is_not_finite_is_skipped_and_wrong_shapes_are_refused() -> None:
    depth, mask = tilted(0), np.ones((SIZE, SIZE), bool)
    depth[3, 3] = np.nan
    with pytest.raises(SkippedError, match="depth not finite"):
        relief(depth, mask, K)
    with pytest.raises(ValueError, match="expected \\(H, W\\)"):
        relief(depth[None], mask[None], K)
    with pytest.raises(ValueError, match="expected \\(N, 3\\)"):
        plane_fit(depth)
