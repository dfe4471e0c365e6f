"""Paths of cameras against slow references, and the bounds they promise."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.scenes.draws import Draw, arcsine, cos_sin, rotations
from peft_attrsub.scenes.trajectories import (
    clear_of,
    clearance,
    look_at,
    micro_path,
    orbit_path,
    spline_path,
)

seeds = st.integers(0, 10**6)
few = settings(max_examples=30, deadline=None)


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Degrees between two poses: arcsin of the chord, sound near 0."""
    return math.degrees(2 * math.asin(min(1.0, np.linalg.norm(a[:3, :3] - b[:3, :3]) / math.sqrt(8))))


def assert_rigid(poses: list[np.ndarray]) -> None:
    for pose in poses:
        assert pose.shape == (4, 4)
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-8)
        assert np.linalg.det(pose[:3, :3]) > 0
        assert pose[3].tolist() == [0, 0, 0, 1]


def test_trigonometry_is_that_of_numpy():
    turns = np.linspace(-3, 3, 10001)
    cos, sin = cos_sin(turns)
    np.testing.assert_allclose(cos, np.cos(2 * np.pi * turns), atol=1e-14)
    np.testing.assert_allclose(sin, np.sin(2 * np.pi * turns), atol=1e-14)
    np.testing.assert_allclose(arcsine(np.linspace(0, 0.8, 101)), np.arcsin(np.linspace(0, 0.8, 101)), atol=1e-14)


def test_rotations_turn_about_x_then_y_then_z():
    turned = rotations(np.array([0.25, 0.0, 0.25]))  # y -> z, x stays; then x -> y, z stays
    np.testing.assert_allclose(turned, [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-15)


def test_look_at_known_answer():
    pose = look_at([0, -2, 1], [0, 5, 1])
    np.testing.assert_allclose(pose, [[1, 0, 0, 0], [0, 0, 1, -2], [0, -1, 0, 1], [0, 0, 0, 1]], atol=1e-15)


@few
@given(seeds)
def test_look_at_puts_the_target_in_the_middle_and_up_upwards(seed: int):
    rng = np.random.default_rng(seed)
    eye, target = rng.normal(size=(2, 7, 3))
    poses = look_at(eye, target)
    assert_rigid(list(poses))
    seen = np.linalg.inv(poses) @ np.concatenate([target, np.ones((7, 1))], axis=1)[..., None]
    np.testing.assert_allclose(seen[:, :2, 0], 0, atol=1e-9)
    np.testing.assert_allclose(seen[:, 2, 0], np.linalg.norm(target - eye, axis=1))
    assert np.all(poses[:, 2, 1] <= 0)  # y points down
    np.testing.assert_allclose(poses[:, 2, 0], 0, atol=1e-12)  # no roll


def test_look_at_straight_down_and_at_itself():
    pose = look_at([0, 0, 3], [0, 0, 0])
    assert_rigid([pose])
    np.testing.assert_allclose(pose[:3, 2], [0, 0, -1])
    with pytest.raises(ValueError, match="apart from the eye"):
        look_at([1, 2, 3], [1, 2, 3])


def slow_catmull_rom(p: np.ndarray, views: int) -> np.ndarray:
    """The pyramid of Barry and Goldman, one view at a time."""
    knots = [0.0]
    for a, b in pairwise(p):
        knots.append(knots[-1] + math.dist(a, b) ** 0.5)
    t = [2 * knots[0] - knots[1], *knots, 2 * knots[-1] - knots[-2]]
    q = [2 * p[0] - p[1], *p, 2 * p[-1] - p[-2]]
    found = []
    for x in np.linspace(0, knots[-1], views):
        i = max(k for k in range(len(p) - 1) if knots[k] <= x or k == 0)
        level, width = [q[i + k] for k in range(4)], 1
        for _ in range(3):
            ends = [(i + k, i + k + width) for k in range(len(level) - 1)]
            if width == 3:
                ends = [(i + 1, i + 2)]
            if width == 2:
                ends = [(i, i + 2), (i + 1, i + 3)]
            level = [
                ((t[b] - x) * level[k] + (x - t[a]) * level[k + 1]) / (t[b] - t[a]) for k, (a, b) in enumerate(ends)
            ]
            width += 1
        found.append(level[0])
    return np.array(found)


@few
@given(seeds, st.integers(2, 8), st.integers(2, 60))
def test_spline_against_one_view_at_a_time(seed: int, points: int, views: int):
    eyes = np.random.default_rng(seed).normal(size=(points, 3)) * 3
    poses = spline_path(eyes, [9.0, 9.0, 9.0], views)
    assert len(poses) == views
    assert_rigid(poses)
    np.testing.assert_allclose([pose[:3, 3] for pose in poses], slow_catmull_rom(eyes, views), atol=1e-7)
    for pose, eye in ((poses[0], eyes[0]), (poses[-1], eyes[-1])):
        np.testing.assert_allclose(pose, look_at(eye, [9.0, 9.0, 9.0]), atol=1e-8)


def test_spline_turns_evenly_between_two_points():
    poses = spline_path([[0, 0, 0], [1e-9, 0, 0]], [[1, 0, 0], [0, 1, 0]], 10)
    np.testing.assert_allclose([angle(a, b) for a, b in pairwise(poses)], 10.0, atol=1e-6)


@few
@given(seeds)
def test_more_gazes_keep_a_camera_on_what_it_circles(seed: int):
    eyes = np.random.default_rng(seed).normal(size=(6, 3))
    eyes *= 4 / np.linalg.norm(eyes, axis=1, keepdims=True)
    one, many = spline_path(eyes, [0, 0, 0.5], 61), spline_path(eyes, [0, 0, 0.5], 61, gazes=64)
    np.testing.assert_allclose([pose[:3, 3] for pose in one], [pose[:3, 3] for pose in many])
    away = [angle(pose, look_at(pose[:3, 3], [0, 0, 0.5])) for pose in many]
    assert np.median(away) < 0.2
    assert np.median([angle(pose, look_at(pose[:3, 3], [0, 0, 0.5])) for pose in one]) > np.median(away)


def test_spline_makes_half_turns_and_bears_points_that_coincide():
    poses = spline_path([[0, 0, 0], [0, 0, 0], [1, 0, 0]], [[1, 0, 0], [-1, 0, 0], [5, 0, 0]], 31)
    assert_rigid(poses)
    assert max(angle(a, b) for a, b in pairwise(poses[1:])) < 30
    still = spline_path([[1, 2, 3], [1, 2, 3]], [0, 0, 0], 5)
    np.testing.assert_allclose(still, np.stack([still[0]] * 5))


@few
@given(seeds, st.floats(1e-4, 0.01), st.floats(0.01, 1.0))
def test_micro_steps_stay_within_their_bounds_and_reach_them(seed: int, step: float, degrees: float):
    rng = np.random.default_rng(seed)
    start = look_at(rng.normal(size=3), [7, 7, 7])
    poses = micro_path(start, rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), 42, step, degrees)
    assert len(poses) == 42
    assert_rigid(poses)
    np.testing.assert_allclose(poses[0], start, atol=1e-8)
    pairs = list(pairwise(poses))
    steps = [float(np.linalg.norm(b[:3, 3] - a[:3, 3])) for a, b in pairs]
    turns = [angle(a, b) for a, b in pairs]
    assert 0.99 * step < max(steps) <= step + 2e-9
    assert 0.5 * degrees < max(turns) <= degrees + 1e-6


@pytest.mark.parametrize("views", [1, 4, 9])
def test_orbit_is_even_level_and_faces_the_centre(views: int):
    poses = orbit_path([1, 2, 3], 2.0, 30.0, views, azimuth=90.0)
    assert_rigid(poses)
    np.testing.assert_allclose(poses[0][:3, 3], [1, 2 + math.sqrt(3), 4], atol=1e-8)
    for number, pose in enumerate(poses):
        around = math.radians(90 + 360 * number / views)
        eye = np.array([1, 2, 3]) + 2 * np.array([0.75**0.5 * math.cos(around), 0.75**0.5 * math.sin(around), 0.5])
        np.testing.assert_allclose(pose, look_at(eye, [1, 2, 3]), atol=1e-8)


@few
@given(seeds, st.floats(0, 1))
def test_clearance_against_a_loop(seed: int, margin: float):
    rng = np.random.default_rng(seed)
    points, low = rng.uniform(-2, 2, (20, 3)), rng.uniform(-2, 1, (4, 3))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 1, (4, 3))], axis=1)
    for point, near, free in zip(points, clearance(points, boxes), clear_of(points, boxes, margin), strict=True):
        nearest = min(math.dist(point, np.clip(point, box[:3], box[3:])) for box in boxes)
        assert near == pytest.approx(nearest)
        assert free == (nearest > 0 and near >= margin)


def test_clear_of_the_inside_and_of_nothing():
    assert clear_of([[0.5, 0.5, 0.5], [2, 0, 0]], [[0, 0, 0, 1, 1, 1]]).tolist() == [False, True]
    assert clear_of([[0, 0, 0]], [], 5.0).tolist() == [True]


def test_wrong_paths_are_told_apart():
    with pytest.raises(ValueError, match="at least two"):
        spline_path([[0, 0, 0]], [1, 0, 0])
    with pytest.raises(ValueError, match="at least one"):
        spline_path([[0, 0, 0], [1, 0, 0]], [5, 0, 0], 0)
    with pytest.raises(ValueError, match="at least two"):
        micro_path(np.eye(4), [0, 0, 0], [[0, 0, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="above 0"):
        orbit_path([0, 0, 0], 0.0)


def test_draws_of_one_purpose_do_not_shift_another():
    assert Draw(1, 2, "a").between(0, 1) == Draw(1, 2, "a").between(0, 1)
    keys = [(1, 2, "a"), (2, 1, "a"), (1, 2, "b"), (1, 3, "a")]
    assert len({Draw(*key).between(0, 1) for key in keys}) == len(keys)
    draw = Draw(0, 0, "ends")
    assert {draw.whole(3, 5) for _ in range(200)} == {3, 4, 5}
    assert {draw.pick((0.0, 1.0, 0.0, 2.0)) for _ in range(200)} == {1, 3}
    assert all(2.0 <= draw.wide(2.0, 50.0) <= 50.0 for _ in range(200))
