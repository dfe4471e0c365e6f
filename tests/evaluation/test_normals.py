"""Normals of known surfaces, against a slow reference and against Open3D."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.evaluation.neighbours import build_tree
from peft_attrsub.evaluation.normals import estimate_normals


def slow_normal(points: np.ndarray, row: int, k: int) -> np.ndarray:
    """The k nearest by sorting all distances; the last right singular vector of what is left of their mean."""
    order = np.argsort(np.linalg.norm(points - points[row], axis=1), kind="stable")[:k]
    near = points[order] - points[order].mean(0)
    return np.linalg.svd(near)[2][-1]


def agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs((a * b).sum(-1))


@given(st.integers(0, 2**31), st.integers(4, 60), st.integers(3, 35))
@settings(max_examples=40, deadline=None)
def test_normals_are_the_slow_ones(seed: int, count: int, k: int) -> None:
    points = np.random.default_rng(seed).normal(size=(count, 3)) * [1, 0.7, 0.1]
    normals = estimate_normals(points, k, workers=1)
    assert normals.shape == (count, 3)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    expected = np.stack([slow_normal(points, row, k) for row in range(count)])
    np.testing.assert_allclose(agreement(normals, expected), 1, atol=1e-6)


def test_normals_are_those_of_open3d() -> None:
    o3d = pytest.importorskip("open3d")
    rng = np.random.default_rng(0)
    u, v = rng.uniform(-1, 1, (2, 20_000))
    points = np.stack([u, v, 0.3 * np.sin(3 * u) * np.cos(2 * v)], axis=1) + 0.003 * rng.normal(size=(20_000, 3))
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    cloud.estimate_normals()  # 30 nearest, its default
    np.testing.assert_allclose(agreement(estimate_normals(points), np.asarray(cloud.normals)), 1, atol=1e-6)


def test_a_plane_and_a_ball() -> None:
    rng = np.random.default_rng(1)
    normal = np.array([2.0, -1.0, 2.0]) / 3
    plane = rng.normal(size=(2000, 3)) * 5
    plane -= (plane @ normal)[:, None] * normal - 100 * normal
    np.testing.assert_allclose(agreement(estimate_normals(plane), normal), 1, atol=1e-9)
    ball = rng.normal(size=(20_000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    assert agreement(estimate_normals(ball), ball).min() > 0.99


def test_queries_choose_points_but_not_their_neighbours() -> None:
    points = np.random.default_rng(2).normal(size=(40_000, 3))
    rows = np.array([39_999, 0, 7, 7, 20_000])
    whole = estimate_normals(points)  # in more than one part
    np.testing.assert_array_equal(estimate_normals(points, queries=rows), whole[rows])
    np.testing.assert_array_equal(estimate_normals(points, queries=rows, tree=build_tree(points)), whole[rows])
    assert estimate_normals(points, queries=rows[:0]).shape == (0, 3)


def test_where_no_normal_is_certain_it_is_still_of_length_one() -> None:
    line = np.arange(50)[:, None] * np.array([1.0, 2.0, 3.0])
    normals = estimate_normals(line)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    np.testing.assert_allclose(normals @ [1, 2, 3], 0, atol=1e-6)
    for count in (1, 5):
        np.testing.assert_allclose(np.linalg.norm(estimate_normals(np.ones((count, 3))), axis=1), 1)


def test_normals_refuse_bad_arguments() -> None:
    points = np.random.default_rng(3).normal(size=(5, 3))
    with pytest.raises(ValueError, match=r"expected \(N, 3\)"):
        estimate_normals(points[:, :2])
    with pytest.raises(ValueError, match="k = 2"):
        estimate_normals(points, 2)
    for rows in ([5], [-1], [[0]], [0.5], [True, False, True, False, True]):
        with pytest.raises(ValueError, match="row numbers of 5 points"):
            estimate_normals(points, queries=rows)
