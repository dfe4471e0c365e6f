"""Umeyama against Horn's quaternions, ICP against every distance there is and against Open3D."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.evaluation.alignment import Similarity, icp, umeyama
from peft_attrsub.evaluation.neighbours import choose_rows

SEEDS = st.integers(0, 2**31)


def rotation(rng: np.random.Generator, degrees: float = 180.0) -> np.ndarray:
    """By Rodrigues' formula, by up to so many degrees about a random axis."""
    axis = rng.normal(size=3)
    axis /= np.linalg.norm(axis)
    angle = np.radians(rng.uniform(0, degrees))
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def moving(rng: np.random.Generator) -> Similarity:
    return Similarity(rng.uniform(0.01, 100), rotation(rng), rng.normal(size=3) * 10)


def horn(x: np.ndarray, y: np.ndarray, w: np.ndarray, with_scale: bool) -> np.ndarray:
    """Horn (1987): the rotation is the unit quaternion that the largest eigenvalue of a 4 x 4 matrix belongs to."""
    w = w / w.sum()
    from_x, from_y = x - w @ x, y - w @ y
    m = (w[:, None] * from_x).T @ from_y
    n = np.empty((4, 4))
    n[0, 0] = np.trace(m)
    n[0, 1:] = n[1:, 0] = [m[1, 2] - m[2, 1], m[2, 0] - m[0, 2], m[0, 1] - m[1, 0]]
    n[1:, 1:] = m + m.T - np.trace(m) * np.eye(3)
    a, b, c, d = np.linalg.eigh(n)[1][:, -1]
    r = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a - b * b + c * c - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a - b * b - c * c + d * d],
        ]
    )
    scale = (w @ (from_y * (from_x @ r.T)).sum(1)) / (w @ (from_x**2).sum(1)) if with_scale else 1.0
    out = np.eye(4)
    out[:3, :3] = scale * r
    out[:3, 3] = w @ y - scale * r @ (w @ x)
    return out


@given(SEEDS, st.integers(4, 40), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_umeyama_is_horns_answer(seed: int, count: int, with_scale: bool, mirrored: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3)) * [1, 0.5, 0.2]
    y = moving(rng).apply(x * [1, 1, -1] if mirrored else x) + 0.01 * rng.normal(size=(count, 3))
    w = rng.uniform(0.1, 2, count)
    found = umeyama(x, y, with_scale, w)
    expected = horn(x, y, w, with_scale)
    np.testing.assert_allclose(found.matrix(), expected, atol=1e-6 * np.abs(expected).max())
    # A reflection would fit a mirrored cloud better; it is never given.
    assert np.linalg.det(found.rotation) == pytest.approx(1)
    assert found.scale > 0


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_umeyama_finds_the_similarity_that_was_applied(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = moving(rng)
    x = rng.normal(size=(50, 3)) + rng.normal(size=3) * 5
    y = truth.apply(x)
    found = umeyama(x, y)
    np.testing.assert_allclose(found.matrix(), truth.matrix(), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.inverse().apply(y), x, atol=1e-8)
    np.testing.assert_allclose(found.inverse().after(found).matrix(), np.eye(4), atol=1e-8)
    # What has no weight does not count.
    y[::5] = rng.normal(size=3)
    w = np.ones(50)
    w[::5] = 0
    np.testing.assert_allclose(umeyama(x, y, weights=w).matrix(), truth.matrix(), rtol=1e-8, atol=1e-8)


def test_weights_are_repetitions() -> None:
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(9, 3)), rng.normal(size=(9, 3)), np.arange(1, 10)
    repeated = umeyama(np.repeat(x, w, axis=0), np.repeat(y, w, axis=0))
    np.testing.assert_allclose(umeyama(x, y, weights=w).matrix(), repeated.matrix(), atol=1e-12)


def test_sums_in_parts_keep_the_digits_of_a_small_cloud_far_away() -> None:
    rng = np.random.default_rng(1)
    x = (rng.integers(0, 64, (300_000, 3)) / 64 + 1000).astype(np.float32)  # exact in float32
    truth = Similarity(0.5, rotation(rng), np.array([3.0, 4.0, 5.0]))
    found = umeyama(x, truth.apply(x))
    np.testing.assert_allclose(found.rotation, truth.rotation, atol=1e-11)
    assert found.scale == pytest.approx(0.5, abs=1e-11)


def test_similarities_combine_as_their_matrices_do() -> None:
    rng = np.random.default_rng(2)
    first, second = moving(rng), moving(rng)
    np.testing.assert_allclose(second.after(first).matrix(), second.matrix() @ first.matrix(), atol=1e-10)
    points = rng.normal(size=(2, 5, 3))
    expected = [[first.scale * first.rotation @ p + first.translation for p in row] for row in points]
    np.testing.assert_allclose(first.apply(points), expected, atol=1e-10)
    np.testing.assert_array_equal(Similarity.identity().matrix(), np.eye(4))


def test_umeyama_refuses_what_has_no_answer() -> None:
    x = np.random.default_rng(3).normal(size=(5, 3))
    for source, target, weights, words in (
        (x, x[:4], None, "row i"),
        (x[:, :2], x[:, :2], None, r"\(N, 3\)"),
        (x[:0], x[:0], None, r"\(N, 3\)"),
        (x, x, np.zeros(5), "weights"),
        (x, x, -np.ones(5), "weights"),
        (x, x, np.ones(4), "weights"),
        (np.full((5, 3), 7.3), x, None, "one place"),
        (x, np.full((5, 3), 7.3), None, "one place"),
        (np.where(np.eye(5, 3) > 0, np.nan, x), x, None, "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            umeyama(source, target, weights=weights)
    # Without a scale, one place is as good as another.
    moved = umeyama(np.zeros((5, 3)), np.ones((5, 3)), with_scale=False)
    np.testing.assert_allclose(moved.apply(np.zeros(3)), np.ones(3))


def surface(rng: np.random.Generator, count: int) -> np.ndarray:
    """A bumpy sheet, which does not slide along itself."""
    u, v = rng.uniform(-1, 1, (2, count))
    return np.stack([u, v, 0.3 * np.sin(3 * u) * np.cos(2 * v) + 0.1 * u * v], axis=1)


def pair(seed: int, count: int, degrees: float = 3.0, shift: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = surface(rng, count)
    step = Similarity(1.0, rotation(rng, degrees), rng.uniform(-shift, shift, 3))
    return step.apply(surface(rng, count)) + 0.003 * rng.normal(size=(count, 3)), target


def slow_icp(x: np.ndarray, y: np.ndarray, threshold: float, iterations: int) -> tuple[np.ndarray, float, float, int]:
    """Every distance of every round, and Horn's rotations."""

    def look(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
        apart = np.linalg.norm(points[:, None] - y[None], axis=2)
        best = apart.argmin(1)
        near = apart.min(1) < threshold
        rmse = np.sqrt((apart.min(1)[near] ** 2).mean()) if near.any() else 0.0
        return near, best, near.mean(), rmse

    total = np.eye(4)
    near, best, fitness, rmse = look(x)
    for number in range(1, iterations + 1):
        if near.any():
            update = horn(x[near], y[best[near]], np.ones(near.sum()), with_scale=False)
            total = update @ total
            x = x @ update[:3, :3].T + update[:3, 3]
        old = fitness, rmse
        near, best, fitness, rmse = look(x)
        if abs(fitness - old[0]) < 1e-6 and abs(rmse - old[1]) < 1e-6:
            return total, fitness, rmse, number
    return total, fitness, rmse, iterations


@given(SEEDS, st.sampled_from([0.05, 0.1, 0.5]), st.integers(0, 30))
@settings(max_examples=25, deadline=None)
def test_icp_is_the_slow_one(seed: int, threshold: float, iterations: int) -> None:
    source, target = pair(seed, 150)
    found = icp(source, target, threshold, iterations, workers=1)
    matrix, fitness, rmse, rounds = slow_icp(source, target, threshold, iterations)
    np.testing.assert_allclose(found.similarity.matrix(), matrix, atol=1e-9)
    assert (found.fitness, found.rmse) == pytest.approx((fitness, rmse), abs=1e-9)
    assert found.iterations == rounds
    assert found.similarity.scale == 1


@pytest.mark.parametrize("threshold", [0.02, 0.1])
def test_icp_is_that_of_open3d(threshold: float) -> None:
    o3d = pytest.importorskip("open3d")
    source, target = pair(4, 20_000)
    clouds = [o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points)) for points in (source, target)]
    registration = o3d.pipelines.registration
    theirs = registration.registration_icp(
        *clouds, threshold, np.eye(4), registration.TransformationEstimationPointToPoint()
    )
    ours = icp(source, target, threshold)
    np.testing.assert_allclose(ours.similarity.matrix(), theirs.transformation, atol=1e-6)
    assert (ours.fitness, ours.rmse) == pytest.approx((theirs.fitness, theirs.inlier_rmse), abs=1e-6)


def test_icp_brings_points_back_to_where_they_were_taken() -> None:
    rng = np.random.default_rng(5)
    target = surface(rng, 4000)
    step = Similarity(1.0, rotation(rng, 0.5), np.array([0.002, -0.003, 0.001]))
    found = icp(step.apply(target[::3]), target, 0.1, iterations=100)
    np.testing.assert_allclose(found.similarity.matrix(), step.inverse().matrix(), atol=1e-9)
    assert found.fitness == 1
    assert found.rmse < 1e-9


def test_only_the_source_of_icp_is_thinned_out() -> None:
    source, target = pair(6, 20_000)
    full, some = icp(source, target, max_points=None), icp(source, target, max_points=5000, seed=1)
    again = icp(source, target, max_points=5000, seed=1)
    np.testing.assert_array_equal(some.similarity.matrix(), again.similarity.matrix())
    np.testing.assert_allclose(some.similarity.matrix(), full.similarity.matrix(), atol=2e-3)
    # A thinned target would put every neighbour further away: spacing doubles where a quarter is left.
    assert some.rmse == pytest.approx(full.rmse, rel=0.05)
    assert icp(source[::4], target[::4]).rmse > 1.3 * full.rmse


def test_icp_without_a_pair_moves_nothing() -> None:
    found = icp(np.zeros((4, 3)), np.ones((4, 3)), threshold=0.1)
    np.testing.assert_array_equal(found.similarity.matrix(), np.eye(4))
    assert (found.fitness, found.rmse, found.iterations) == (0, 0, 1)


def test_icp_refuses_bad_arguments() -> None:
    points = np.random.default_rng(7).normal(size=(5, 3))
    with pytest.raises(ValueError, match=r"expected \(N, 3\)"):
        icp(points[:, :2], points)
    with pytest.raises(ValueError, match="0 target points"):
        icp(points, points[:0])
    with pytest.raises(ValueError, match="threshold"):
        icp(points, points, threshold=0)
    with pytest.raises(ValueError, match="1 or more"):
        icp(points, points, max_points=0)


@given(st.integers(1, 500), st.integers(1, 500), SEEDS)
@settings(max_examples=50, deadline=None)
def test_chosen_rows_are_one_of_each_equal_part(total: int, wanted: int, seed: int) -> None:
    rows = choose_rows(total, wanted, seed)
    assert len(rows) == min(total, wanted)
    if wanted < total:
        edges = [part * total // wanted for part in range(wanted + 1)]
        assert all(low <= row < high for low, row, high in zip(edges[:-1], rows, edges[1:], strict=True))
    else:
        assert rows.tolist() == list(range(total))
