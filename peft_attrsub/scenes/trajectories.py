"""Where a camera goes: poses to the world in OpenCV axes (x right, y down, z ahead), in a world whose z is up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .draws import TAU, Array, arcsine, cos_sin, cross, direction, dot, plain, product, unit


def look_at(eye: Any, target: Any, up: Any = (0.0, 0.0, 1.0)) -> Array:
    """Poses at `eye` that look at `target`: z = unit(target - eye), x = unit(z × up), y = z × x.

    Shapes: eye, target, up (..., 3) -> (..., 4, 4). Straight along `up` the x axis is chosen for it.
    Raises ValueError where eye and target coincide.
    """
    eye, target, up = (np.asarray(part, dtype=np.float64) for part in (eye, target, up))
    eye, target, up = np.broadcast_arrays(eye, target, up)
    ahead = unit(target - eye)
    if not np.all(dot(ahead, ahead) > 0.5):
        raise ValueError("a camera cannot look at the place where it stands: give a target apart from the eye.")
    right = cross(ahead, up)
    along = dot(right, right) < 1e-12
    spare = np.where((np.abs(ahead[..., :1]) < 0.9), [1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    right = unit(np.where(along[..., None], cross(ahead, spare), right))
    pose = np.zeros((*eye.shape[:-1], 4, 4))
    pose[..., :3, :] = np.stack([right, cross(ahead, right), ahead, eye], axis=-1)
    pose[..., 3, 3] = 1.0
    return pose


def clearance(points: Any, boxes: Any) -> Array:
    """Distance of each point to the nearest box, 0 inside one, inf without boxes.

    Shapes: points (N, 3), boxes (B, 6) as (x0, y0, z0, x1, y1, z1) -> (N,). Units: those of the points.
    """
    points = np.asarray(points, dtype=np.float64).reshape(-1, 1, 3)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
    if not len(boxes):
        return np.full(len(points), np.inf)
    apart = np.maximum(0.0, np.maximum(boxes[:, :3] - points, points - boxes[:, 3:]))  # (N, B, 3)
    return np.sqrt(dot(apart, apart).min(axis=1))


def clear_of(points: Any, boxes: Any, margin: float = 0.0) -> np.ndarray:
    """Which points are outside every box and at least `margin` away from it: (N, 3) and (B, 6) -> (N,) bool."""
    away = clearance(points, boxes)
    return (away > 0.0) & (away >= margin)


def spline_path(eyes: Any, targets: Any, views: int = 100, gazes: int = 1) -> list[Array]:
    """Poses from the first control point to the last: centripetal Catmull-Rom for the place, slerp for the gaze.

    The knots are t_{i+1} = t_i + |P_{i+1} - P_i|^(1/2), and the views evenly spaced in t. At a control point the
    camera looks at its target exactly; with `gazes` > 1 also at gazes - 1 places between two control points, at the
    target between theirs: far control points would otherwise let the camera look past what it circles.

    Shapes: eyes (K, 3), targets (K, 3) or (3,), K >= 2 -> `views` poses (4, 4). Raises ValueError on other shapes.
    """
    eyes = _points(eyes, "control points of a spline")
    targets = np.broadcast_to(np.asarray(targets, dtype=np.float64), eyes.shape)
    times, segment, share = _knots(eyes, views)
    stops = np.arange((len(eyes) - 1) * gazes + 1)
    start = np.minimum(stops // gazes, len(eyes) - 2)
    along = stops / gazes - start
    aims = targets[start] + along[:, None] * (targets[start + 1] - targets[start])
    controls = look_at(_catmull_rom(eyes, times, start, along), aims)
    part = np.minimum((share * gazes).astype(np.int64), gazes - 1)
    gaze = _slerp(_quaternions(controls[:, :3, :3]), segment * gazes + part, share * gazes - part)
    poses = np.zeros((views, 4, 4))
    poses[:, :3, :3], poses[:, :3, 3], poses[:, 3, 3] = _matrices(gaze), _catmull_rom(eyes, times, segment, share), 1.0
    return _rounded(poses)


def glide_path(points: Any, turn: Any, views: int = 100) -> Array:
    """Poses (views, 4, 4) of a thing on the spline of `spline_path` through `points`, turning steadily.

    View i has the rotation exp(i / (views - 1) * turn), so the first is not turned. Shapes: points (K, 3), K >= 2;
    turn (3,): a rotation vector, radians. Not rounded. Raises ValueError on other shapes.
    """
    points = _points(points, "control points of a spline")
    share = np.arange(views) / max(views - 1, 1)
    poses = np.zeros((views, 4, 4))
    poses[:, :3, 3], poses[:, 3, 3] = _catmull_rom(points, *_knots(points, views)), 1.0
    poses[:, :3, :3] = _exponential(share[:, None] * np.asarray(turn, dtype=np.float64).reshape(1, 3))
    return poses


def micro_path(
    start: Any, shifts: Any, turns: Any, views: int = 42, step: float = 0.01, degrees: float = 1.0
) -> list[Array]:
    """Poses beside `start`, each at most `step` and `degrees` from the one before it.

    Both offsets follow Catmull-Rom splines through the control points, scaled until their longest step is the bound:
    R_i = R exp(w_i), p_i = p + v_i, and the angle between exp(w_i) and exp(w_j) is at most |w_i - w_j|.

    Shapes: start (4, 4); shifts, turns (K, 3), K >= 2, of any length -> `views` poses (4, 4). step: scene units.
    """
    start = np.asarray(start, dtype=np.float64)
    offsets = []
    for control, bound in ((shifts, step), (turns, degrees * TAU / 360.0)):
        control = _points(control, "offsets of a micro-baseline")
        path = _catmull_rom(control, *_knots(control, views))
        path = path - path[0]
        moves = np.diff(path, axis=0)
        longest = float(np.sqrt(dot(moves, moves)).max(initial=0.0))
        # A little under the bound: the poses are rounded afterwards.
        offsets.append(path * ((bound * (1.0 - 1e-5)) / longest if longest > 0.0 else 0.0))
    poses = np.zeros((views, 4, 4))
    poses[:, :3, :3] = product(start[:3, :3], _exponential(offsets[1]))
    poses[:, :3, 3], poses[:, 3, 3] = start[:3, 3] + offsets[0], 1.0
    return _rounded(poses)


def orbit_path(
    centre: Any, distance: float, elevation: float = 0.0, views: int = 100, azimuth: float = 0.0
) -> list[Array]:
    """Poses at `views` even azimuths around `centre`, looking at it.

    eye_i = centre + distance (cos e cos a_i, cos e sin a_i, sin e), a_i = azimuth + 360 i / views; all in degrees.
    Shapes: centre (3,) -> `views` poses (4, 4).
    """
    if not (distance > 0.0 and views > 0):
        raise ValueError(f"an orbit of {views} views at distance {distance} is none: give both above 0.")
    centre = np.asarray(centre, dtype=np.float64)
    height = cos_sin(elevation / 360.0)[1]
    ways = direction(azimuth / 360.0 + np.arange(views) / views, np.full(views, height))
    return _rounded(look_at(centre + distance * ways, centre))


def _points(values: Any, what: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 3 or len(array) < 2:
        raise ValueError(f"{what} of shape {array.shape} were given: give (K, 3) of at least two.")
    return array


def _rounded(poses: Array) -> list[Array]:
    return [np.asarray(pose) for pose in plain(poses)]


def _knots(points: Array, views: int) -> tuple[Array, np.ndarray, Array]:
    """Knot times (K,), and of every view its segment (V,) and its share of it (V,) in [0, 1]."""
    if views < 1:
        raise ValueError(f"a path of {views} views was asked for: ask for at least one.")
    moves = np.diff(points, axis=0)
    steps = np.sqrt(np.sqrt(dot(moves, moves)))
    # Points that coincide would leave an interval of no length, over which the spline divides.
    times = np.concatenate([[0.0], np.cumsum(np.maximum(steps, 1e-6 * max(float(steps.max()), 1e-6)))])
    at = np.arange(views) * (times[-1] / max(views - 1, 1))
    segment = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(points) - 2)
    return times, segment, np.clip((at - times[segment]) / (times[segment + 1] - times[segment]), 0.0, 1.0)


def _catmull_rom(points: Array, times: Array, segment: np.ndarray, share: Array) -> Array:
    """(K, 3) at the views' times: the pyramid of Barry and Goldman; at the ends the outer point is mirrored."""
    places = np.concatenate([[2.0 * points[0] - points[1]], points, [2.0 * points[-1] - points[-2]]])
    knots = np.concatenate([[2.0 * times[0] - times[1]], times, [2.0 * times[-1] - times[-2]]])
    at = (times[segment] + share * (times[segment + 1] - times[segment]))[:, None]
    level = [places[segment + k] for k in range(4)]
    knot = [knots[segment + k][:, None] for k in range(4)]

    def mix(a: Array, b: Array, left: Array, right: Array) -> Array:
        return ((right - at) * a + (at - left) * b) / (right - left)

    one = [mix(level[k], level[k + 1], knot[k], knot[k + 1]) for k in range(3)]
    two = [mix(one[k], one[k + 1], knot[k], knot[k + 2]) for k in range(2)]
    return mix(two[0], two[1], knot[1], knot[2])


def _quaternions(rotation: Array) -> Array:
    """(N, 3, 3) to (N, 4) as (w, x, y, z): the longest row of 4 q qᵀ, so that no half turn divides by nothing."""
    (a, b, c), (d, e, f), (g, h, i) = np.moveaxis(rotation, 0, -1)
    rows: Sequence[Sequence[Array]] = (
        (1 + a + e + i, h - f, c - g, d - b),
        (h - f, 1 + a - e - i, b + d, c + g),
        (c - g, b + d, 1 - a + e - i, f + h),
        (d - b, c + g, f + h, 1 - a - e + i),
    )
    outer = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)  # (N, 4, 4)
    longest = np.diagonal(outer, axis1=-2, axis2=-1).argmax(axis=-1)
    return _unit4(outer[np.arange(len(outer)), longest])


def _unit4(q: Array) -> Array:
    return q / np.sqrt(_dot4(q, q))[..., None]


def _dot4(p: Array, q: Array) -> Array:
    return dot(p, q) + p[..., 3] * q[..., 3]


def _slerp(q: Array, segment: np.ndarray, share: Array) -> Array:
    """(K, 4) to (V, 4): the shorter way, at even speed over each segment."""
    start, end = q[segment], q[segment + 1]
    end = np.where(_dot4(start, end)[:, None] < 0.0, -end, end)
    angle = 2.0 * arcsine(0.5 * np.sqrt(_dot4(end - start, end - start)))
    near = angle < 1e-6
    whole = np.where(near, 1.0, cos_sin(angle / TAU)[1])
    before, after = (cos_sin(part * angle / TAU)[1] / whole for part in (1.0 - share, share))
    before, after = np.where(near, 1.0 - share, before), np.where(near, share, after)
    return _unit4(before[:, None] * start + after[:, None] * end)


def _matrices(q: Array) -> Array:
    """(V, 4) unit quaternions to (V, 3, 3)."""
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows: Sequence[Sequence[Array]] = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _exponential(vector: Array) -> Array:
    """(V, 3) rotation vectors in radians to (V, 3, 3), by way of half the angle."""
    angle = np.sqrt(dot(vector, vector))
    cos, sin = cos_sin(0.5 * angle / TAU)
    return _matrices(np.concatenate([cos[:, None], sin[:, None] * unit(vector)], axis=1))
