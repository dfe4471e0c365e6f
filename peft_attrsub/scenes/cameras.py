"""Where the views of a scene are: near one place for a whole dataset, or all over the free space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .description import Camera
from .draws import TAU, Array, Draw, arcsine, cos_sin, direction, dot, plain
from .recipes import AttributeRecipe
from .trajectories import clear_of, look_at, micro_path, orbit_path, spline_path

ATTEMPTS = 12


@dataclass(frozen=True)
class Space:
    """Where cameras may be: within `limit` of the origin along x, y, z (inf: no walls), above `floor`, and off the
    boxes (B, 6). reach (3,): semi-axes of the ellipsoid on which a camera at distance 1 stands."""

    limit: Array
    floor: float
    boxes: Array
    reach: Array

    def free(self, points: Array, margin: float) -> np.ndarray:
        """Which of the points (N, 3) keep `margin` from boxes, walls and floor: (N,) bool."""
        inside = np.all(np.abs(points) <= self.limit - margin, axis=1) & (points[:, 2] >= self.floor + margin)
        return inside & clear_of(points, self.boxes, margin)


@dataclass(frozen=True)
class Sweep:
    """Ranges of control points. azimuth: turns; height: sine of the elevation; distance: share of the reach;
    aim: half-sides of the box of gaze targets, metres; points: how many; pace: micro steps, share of the bound."""

    azimuth: tuple[float, float]
    height: tuple[float, float]
    distance: tuple[float, float]
    aim: Array
    points: int
    pace: float = 0.75

    def eyes(self, draw: Draw, reach: Array, count: int) -> Array:
        """(count, 3) places, uniform by area on the zone of the sphere, then stretched to the reach."""
        ways = direction(draw.array(*self.azimuth, (count,)), draw.array(*self.height, (count,)))
        return ways * draw.array(*self.distance, (count, 1)) * reach


def space_of(recipe: AttributeRecipe, room: Array | None, bump: float, boxes: Array) -> Space:
    """The space of a room whose walls bulge by up to `bump` times its smallest half-side, or around objects."""
    if room is not None:
        limit = room / 2.0 - bump * room.min() / 2.0
        return Space(limit, -np.inf, boxes, limit)
    floor = -recipe.extent / 8.0 if recipe.floor else -np.inf
    return Space(np.full(3, np.inf), floor, boxes, np.full(3, recipe.extent / 2.0))


def narrow(draw: Draw, recipe: AttributeRecipe, aim: Array) -> Sweep:
    """A few degrees about one place, for datasets whose camera is not the matter; for "mixed" a wide arc."""
    mild = recipe.attribute == "mixed"
    azimuth, turn = draw.between(0.0, 1.0), draw.between(0.08, 0.2) if mild else draw.between(0.01, 0.015)
    height, rise = draw.between(0.1, 0.4), 0.15 if mild else 0.03
    distance = draw.between(0.72, 0.8) if recipe.layout == "room" else draw.between(0.6, 0.68)
    depth = 0.1 if mild else 0.02
    return Sweep(
        (azimuth - turn, azimuth + turn),
        (max(height - rise, 0.03), height + rise),
        (distance - depth, distance + depth),
        aim * (1.0 if mild else 0.15),
        draw.whole(4, 6),
    )


def broad(draw: Draw, recipe: AttributeRecipe, aim: Array) -> Sweep:
    """Azimuth and elevation uniform on the sphere; how near, how far and how many turns differ per dataset."""
    near = draw.between(0.5, 0.6) if recipe.layout == "room" else draw.between(0.5, 0.65)
    far = near + draw.between(0.15, 0.35)
    lowest = 0.05 if recipe.floor else -1.0
    return Sweep((0.0, 1.0), (lowest, 1.0), (near, far), aim * draw.between(0.3, 1.0), draw.whole(6, 12))


def path(draw: Draw, recipe: AttributeRecipe, sweep: Sweep, space: Space, margin: float) -> list[Array] | None:
    """Poses (views of 4 x 4) all of which keep `margin`, or None where ATTEMPTS found none."""
    for _ in range(ATTEMPTS * (4 if recipe.trajectory == "orbit" else 1)):
        if recipe.trajectory == "spline":
            eyes = _stations(draw, sweep, space, margin)
            if len(eyes) < min(4, sweep.points):
                continue
            targets = draw.array(-sweep.aim, sweep.aim, (len(eyes), 3))
            poses = spline_path(eyes, targets, recipe.views, gazes=8)
        elif recipe.trajectory == "orbit":
            poses = _orbit(draw, recipe, sweep, space)
        else:
            start = look_at(sweep.eyes(draw, space.reach, 1)[0], draw.array(-sweep.aim, sweep.aim, (3,)))
            shifts, turns = draw.array(-1.0, 1.0, (2, 5, 3))
            poses = micro_path(start, shifts, turns, recipe.views, 0.01 * sweep.pace, sweep.pace)
        if space.free(np.stack(poses)[:, :3, 3], margin).all():
            return poses
    return None


def _stations(draw: Draw, sweep: Sweep, space: Space, margin: float) -> Array:
    """Up to sweep.points free places (K, 3), each seen from the one before it along a free straight line."""
    tries, along = 40, np.linspace(0.0, 1.0, 12)[:, None]
    stations: list[Array] = []
    for _ in range(sweep.points):
        found = sweep.eyes(draw, space.reach, tries)
        start = stations[-1] if stations else found[:, None, :]
        line = start + along * (found[:, None, :] - start)  # (tries, 12, 3)
        # The spline leaves the straight line a little.
        free = space.free(line.reshape(-1, 3), 1.3 * margin).reshape(tries, -1).all(axis=1)
        if not free.any():
            break
        stations.append(found[int(free.argmax())])
    return np.array(stations).reshape(-1, 3)


def _orbit(draw: Draw, recipe: AttributeRecipe, sweep: Sweep, space: Space) -> list[Array]:
    """A level circle around the vertical axis, looking at one point near the middle; as wide as the shorter side."""
    reach = np.array([space.reach[:2].min(), space.reach[:2].min(), space.reach[2]])
    turn = draw.between(*sweep.azimuth)
    middle = np.array([0.0, 0.0, 0.3 * draw.between(-sweep.aim[2], sweep.aim[2])])
    away = direction(turn, draw.between(*sweep.height)) * draw.between(*sweep.distance) * reach - middle
    distance = np.sqrt(dot(away, away))
    # e = arcsin(s) by its half, whose sine sqrt((1 - cos e) / 2) never nears 1.
    sine = float(away[2] / distance)
    half = arcsine(np.sqrt((1.0 - np.sqrt(1.0 - sine * sine)) / 2.0))
    elevation = float(np.copysign(2.0 * half * 360.0 / TAU, sine))
    return orbit_path(middle, float(distance), elevation, recipe.views, 360.0 * turn)


def lens(fov: float, size: int) -> tuple[float, float]:
    """Focal length and middle in pixels of a square picture: f = size / (2 tan(fov / 2))."""
    cos, sin = cos_sin(fov / 720.0)
    return round(float(size / 2.0 * cos / sin), 9), size / 2.0


def cameras(poses: list[Array], fov: float, size: int) -> list[Camera]:
    """One field of view for all views of a scene, degrees."""
    focal, middle = lens(fov, size)
    return [Camera(plain(pose), focal, focal, middle, middle) for pose in poses]
