"""The optics and shapes of the drawn glasses, against arithmetic and slow, obvious references."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "vggt"))
from standins import glasses, refraction
from standins.glassware import KINDS, meridian

sys.path.pop(0)

IDENTITY = np.eye(4)


def unit(vectors: Any) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def plate(thickness: float, absorption: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> refraction.Lathe:
    """A disc of glass, 1 m in radius, with its top at z = 0."""
    outline = np.array([(0, -thickness), (1, -thickness), (1, 0), (0, 0)])
    return refraction.Lathe(outline, IDENTITY, 1, 1.5, absorption)


def is_inside(solid: refraction.Lathe, points: np.ndarray) -> np.ndarray:
    """Of points (..., 3) of the world: even-odd rule for the polygon in the half plane r >= 0, closed on the axis."""
    local = (points - solid.pose[:3, 3]) @ solid.pose[:3, :3]
    r, z = np.hypot(local[..., 0], local[..., 1]), local[..., 2]
    inside = np.zeros(r.shape, bool)
    corners = solid.meridian
    for (r0, z0), (r1, z1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if z0 != z1:
            inside ^= ((z0 > z) != (z1 > z)) & (r < r0 + (z - z0) / (z1 - z0) * (r1 - r0))
    return inside


@pytest.mark.parametrize("kind", KINDS)
def test_glass_is_a_closed_solid(kind: str) -> None:
    profile = meridian(kind)
    (r0, z0), (r1, z1) = profile[:-1].T, profile[1:].T
    assert profile[0, 0] == profile[-1, 0] == 0 and (profile[:, 0] >= 0).all() and profile[:, 1].min() >= 0
    assert 0.05 < profile[:, 1].max() < 0.25
    # By Pappus, cone by cone: positive where the outside is gone up and the inside down.
    volume = np.pi / 3 * ((r0**2 + r0 * r1 + r1**2) * (z1 - z0)).sum()
    assert 1e-6 < volume < 5e-4
    # No wall goes through another one: an edge meets only its neighbours.
    for i in range(len(r0)):
        for j in range(i + 2, len(r0)):
            a, b, c, d = profile[i], profile[i + 1], profile[j], profile[j + 1]
            sides = [np.sign((q - p)[0] * (s - p)[1] - (q - p)[1] * (s - p)[0]) for p, q, s in
                     ((a, b, c), (a, b, d), (c, d, a), (c, d, b))]  # fmt: skip
            assert not (sides[0] * sides[1] < 0 and sides[2] * sides[3] < 0), (kind, i, j)


def test_unknown_glass() -> None:
    with pytest.raises(ValueError, match="no glass 'mug'"):
        meridian("mug")


@pytest.mark.parametrize("kind", KINDS)
def test_first_hit_is_where_a_march_along_the_ray_enters(kind: str) -> None:
    """Reference: step along the ray, ask of every point whether it is inside the turned polygon."""
    rng = np.random.default_rng(len(kind))
    pose = glasses.upright(0.03, -0.02, 0.3, 0.7, over=True)
    solid = refraction.Lathe(meridian(kind), pose, 1)
    target = (pose @ [0, 0, 0.05, 1])[:3] + rng.uniform(-0.05, 0.05, (40, 3))
    origins = target + 0.3 * unit(rng.standard_normal((40, 3)))
    directions = unit(target - origins)
    found, normals = solid.hit(origins, directions)
    ways = np.arange(0, 0.6, 1e-3)
    for origin, direction, t, normal in zip(origins, directions, found, normals, strict=True):
        met = is_inside(solid, origin + ways[:, None] * direction)
        if met.any():  # a march can step over a thin wall, but never enters before the first one
            assert t <= ways[met.argmax()] + 1e-9
        if np.isfinite(t):
            around = origin + (t + np.array([[-1e-7], [1e-7]])) * direction
            assert is_inside(solid, around).tolist() == [False, True]
            assert not met[ways < t - 1e-7].any()
            assert np.linalg.norm(normal) == pytest.approx(1) and normal @ direction < 0
    assert np.isfinite(found).sum() > 10


def test_a_ball_is_nearly_a_sphere() -> None:
    solid = refraction.Lathe(meridian("ball"), IDENTITY, 1)
    rng = np.random.default_rng(0)
    origins = np.array([0, 0, 0.032]) + 0.3 * unit(rng.standard_normal((200, 3)))
    directions = unit([0, 0, 0.032] - origins + rng.uniform(-0.012, 0.012, (200, 3)))
    away = origins - [0, 0, 0.032]
    b = (away * directions).sum(1)
    exact = -b - np.sqrt(b**2 - (away**2).sum(1) + 0.032**2)
    np.testing.assert_allclose(solid.hit(origins, directions)[0], exact, atol=6e-4)


def test_box_is_hit_on_its_faces() -> None:
    box = refraction.Box(np.array([0.1, 0.2, 0.3]), glasses.upright(1.0, 0.0, 0.0, np.pi / 2))
    origins = np.array([[0.0, 0, 0], [1, 0, 2], [1, -3, 0.1], [0, 0, 0], [0, 0, 0.31]])
    directions = unit([[1.0, 0, 0], [0, 0, -1], [0, 1, 0], [-1, 0, 0], [1, 0, 0]])
    distance, normal = box.hit(origins, directions)
    np.testing.assert_allclose(distance, [0.8, 1.7, 2.9, np.inf, np.inf])
    np.testing.assert_allclose(normal[:3], [[-1, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-9)


@given(st.floats(0, 1.55), st.sampled_from([1 / 1.5, 1.5, 1 / 1.33, 1.6]))
def test_light_bends_by_snell_and_splits_by_fresnel(angle: float, ratio: float) -> None:
    direction = np.array([[np.sin(angle), 0, -np.cos(angle)]])
    bent, mirrored, share = refraction.refract(direction, np.array([[0.0, 0, 1]]), np.array([ratio]))
    np.testing.assert_allclose(mirrored, direction * [[1, 1, -1]], atol=1e-12)
    sine = ratio * np.sin(angle)
    if sine >= 1:
        assert share[0] == 1
        return
    below = np.arcsin(sine)
    np.testing.assert_allclose(bent, [[np.sin(below), 0, -np.cos(below)]], atol=1e-6)
    if angle > 1e-3:  # Fresnel, as the books have it
        across = (np.sin(angle - below) / np.sin(angle + below)) ** 2
        along = (np.tan(angle - below) / np.tan(angle + below)) ** 2
        assert share[0] == pytest.approx((across + along) / 2, abs=1e-6)
    else:
        assert share[0] == pytest.approx(((ratio - 1) / (ratio + 1)) ** 2, abs=1e-4)


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.8, 1.2])
def test_a_plate_shifts_a_ray_and_weakens_it(angle: float) -> None:
    """Through a plate of thickness h light goes on in its direction, shifted by h tan(i') instead of h tan(i)."""
    thickness, absorption = 0.02, (5.0, 1.0, 0.0)
    table = refraction.Box(np.array([5.0, 5.0, 0.5]), glasses.upright(0, 0, -0.6, 0))  # its top at z = -0.1
    places = []

    def shade(which: np.ndarray, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        places.append(points)
        return np.ones((len(points), 3))

    origin = np.array([[0.0, 0.0, 0.1]])
    direction = np.array([[np.sin(angle), 0, -np.cos(angle)]])
    black = np.zeros_like
    color = refraction.trace([plate(thickness, absorption)], [table], origin, direction, shade, black)
    below = np.arcsin(np.sin(angle) / 1.5)
    expected = (0.2 - thickness) * np.tan(angle) + thickness * np.tan(below)
    np.testing.assert_allclose(places, [[[expected, 0, -0.1]]], atol=1e-5)
    shares = refraction.refract(direction, np.array([[0.0, 0, 1]]), np.array([1 / 1.5]))[2]
    through = np.exp(-np.array(absorption) * thickness / np.cos(below))
    np.testing.assert_allclose(color[0], (1 - shares[0]) ** 2 * through, rtol=1e-5)


def test_no_light_is_made() -> None:
    """In surroundings that are white everywhere, clear glass is at most white: what it loses is mirrored inside."""
    rng = np.random.default_rng(0)
    for kind in KINDS:
        solid = refraction.Lathe(meridian(kind), IDENTITY, 1, 1.5, (0.0, 0.0, 0.0))
        origins = 0.4 * unit(rng.standard_normal((300, 3)))
        target = np.array([0, 0, 0.05])
        directions = unit(target + rng.uniform(-0.05, 0.05, (300, 3)) - origins)
        color = refraction.trace([solid], [], origins, directions, lambda *_: np.empty(0), np.ones_like)
        assert color.max() < 1 + 1e-9 and np.median(color) > 0.8


def reach(thing: Any) -> float:
    """Radius of the circle on the table that it stays in."""
    if isinstance(thing, refraction.Lathe):
        return float(thing.meridian[:, 0].max())
    return float(np.hypot(thing.half[0], thing.half[1]))


def test_table_is_full_and_nothing_touches() -> None:
    for seed in range(8):
        table = glasses.draw_table(np.random.default_rng(seed))
        things = [*table.glasses, *(box for box in table.boxes if box.label)]
        assert 3 <= len(table.glasses) <= 6
        labels = [thing.label for thing in things]
        assert len(set(labels)) == len(labels)
        assert all(1 <= glass.label <= 63 and 1.4 <= glass.ior <= 1.6 for glass in table.glasses)
        assert any(box.label >= 200 for box in table.boxes)
        for i, a in enumerate(things):
            for b in things[i + 1 :]:
                assert np.linalg.norm(a.pose[:2, 3] - b.pose[:2, 3]) > reach(a) + reach(b)


def test_cameras_walk_around_the_table() -> None:
    poses = glasses.arc(np.random.default_rng(1), 12)
    for pose in poses:
        np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-12)
        assert np.linalg.det(pose[:3, :3]) > 0 and pose[2, 3] > 0.2
        middle = np.linalg.inv(pose) @ [0, 0, 0.05, 1]
        assert middle[2] > 0.5 and abs(middle[:2]).max() < 0.05  # the table is before it
        assert pose[2, 1] < -0.5  # y is down
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    assert steps.min() > 0.02 and steps.max() < 0.3
