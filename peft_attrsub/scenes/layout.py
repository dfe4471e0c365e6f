"""Where things stand: the room's size, boxes that do not meet, and the primitives that fill each of them.

Rooms follow MegaSynth's recipe: 17 to 30 units long, with boxes on the floor, on each other, on the walls and under
the roof, all scaled until the longest side is `extent`. The origin is the middle of the room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .draws import Array, Draw, direction, dot, plain, product, rotations
from .recipes import AttributeRecipe
from .trajectories import clear_of

KINDS = ("ellipsoid", "cube", "cylinder")
# Kinds of boxes in a room: the largest count, and when geometry is pushed.
ROOM_COUNTS = {"large": (5, 7), "small": (8, 14), "roof": (4, 6), "wall": (6, 9)}
OBJECT_COUNTS = {"stack": (6, 14)}
TRIES = 24


@dataclass(frozen=True)
class Plan:
    """How shapes are drawn. counts: of boxes by kind; primitives: least and most per box (a large box three more);
    weights: of ellipsoid, cube, cylinder; amplitude: largest of the height fields; bump: of the room's own."""

    counts: dict[str, int]
    primitives: tuple[int, int]
    weights: tuple[float, float, float]
    amplitude: float
    bump: float


@dataclass(frozen=True)
class Primitive:
    """One solid of a composite. linear (3, 3): semi-axes, turned and stretched; place (3,), metres."""

    kind: str
    linear: Array
    place: Array
    amplitude: float
    seed: int


def room_size(draw: Draw, recipe: AttributeRecipe) -> Array | None:
    """Sides x, y, z in metres, the longest `extent`; None for an object-centred scene."""
    raw = draw.array([17.0, 17.0, 10.0], [30.0, 30.0, 15.0], (3,))
    return raw * (recipe.extent / raw.max()) if recipe.layout == "room" else None


def plan(draw: Draw, layout: str, extreme: bool) -> Plan:
    """MegaSynth's counts, or with `extreme` anything from nearly bare and smooth to crowded and rugged."""
    counts = {}
    crowd = draw.between(0.2, 1.0)
    for kind, (usual, most) in (ROOM_COUNTS if layout == "room" else OBJECT_COUNTS).items():
        share = crowd * draw.between(0.7, 1.0)
        counts[kind] = int(share * (most + 1)) if extreme else draw.whole((usual + 1) // 2, usual)
    if not any(counts.values()):
        counts["large" if layout == "room" else "stack"] = 1
    if not extreme:
        return Plan(counts, (2, 5), (1.0, 1.0, 1.0), 0.6, draw.between(0.0, 0.01))
    least = draw.whole(1, 5)
    favour = draw.array(0.0, 1.0, (3,))
    favour = favour * favour * favour + 0.01
    weights = (float(favour[0]), float(favour[1]), float(favour[2]))
    return Plan(counts, (least, least + draw.whole(0, 3)), weights, draw.between(0.0, 0.9), draw.between(0.0, 0.02))


def boxes(draw: Draw, shape: Plan, room: Array | None, extent: float, keep: Array, margin: float) -> Array:
    """(B, 6) boxes of which no two meet and none comes within `margin` of the points `keep` (N, 3).

    A box that finds no place in TRIES tries is left out.
    """
    half = room / 2.0 if room is not None else np.full(3, extent / 8.0)
    unit = (extent / 30.0) if room is not None else (extent / 4.0) / 8.0
    placed: list[Array] = []
    for kind, count in shape.counts.items():
        for _ in range(count):
            for _ in range(TRIES):
                box = _candidate(draw, kind, half, unit, placed)
                others = np.array(placed).reshape(-1, 6)
                meets = np.all((box[:3] < others[:, 3:]) & (others[:, :3] < box[3:]), axis=1).any()
                outside = np.any(box[:3] < -half - 1e-9) or np.any(box[3:] > half + 1e-9)
                if not meets and not outside and clear_of(keep, box, margin).all():
                    placed.append(box)
                    break
    return np.array(placed).reshape(-1, 6)


def _candidate(draw: Draw, kind: str, half: Array, unit: float, placed: list[Array]) -> Array:
    """One box (6,) of its kind; `unit` metres are one of MegaSynth's units."""
    if kind == "large":
        size = draw.array(4.0, 8.0, (3,))
    elif kind == "small":
        size = draw.array(2.0, [4.0, 4.0, 6.0], (3,))
    elif kind == "stack":
        size = draw.array(2.0, 4.5, (3,))
    elif kind == "roof":
        size = draw.array(2.0, [5.0, 5.0, 4.0], (3,))
        if draw.chance(0.5):
            size[2] = draw.between(0.5, 3.0)
    else:
        size = draw.array(2.0, 5.0, (3,))
    side, on_top = draw.whole(0, 3), draw.chance(0.5)
    if kind == "wall":
        size[side // 2] = draw.between(0.5, 2.0) if draw.chance(0.5) else draw.between(1.0, 2.0)
    size = np.minimum(size * unit, 2.0 * half)
    low = draw.array(-half, half - size, (3,))
    if kind == "wall":
        axis = side // 2
        low[axis] = -half[axis] if side % 2 else half[axis] - size[axis]
    elif kind == "roof":
        low[2] = half[2] - size[2]
    elif kind in ("small", "stack") and on_top and placed:
        below = placed[draw.whole(0, len(placed) - 1)]
        low[:2] = draw.array(below[:2] - size[:2] / 2.0, below[3:5] - size[:2] / 2.0, (2,))
        low[2] = below[5]
    elif kind != "stack":
        low[2] = -half[2]
    elif placed:
        low[2] = -half[2] if draw.chance(0.5) else low[2]
    else:
        low[:2] = -size[:2] / 2.0
    return np.concatenate([low, low + size])


def fill(draw: Draw, shape: Plan, box: Array, large: bool) -> list[Primitive]:
    """A composite that fills `box`, height fields included, on at least two sides of every axis.

    The group is stretched as a whole: x -> S (x - m) + c. Its bounds are those of the primitives, each wider by the
    amplitude times its shortest column, which no displacement exceeds.
    """
    count = draw.whole(*shape.primitives) + (3 if large else 0)
    kinds = [draw.pick(shape.weights) for _ in range(count)]
    axes = draw.array(0.25, 2.0, (count, 3))
    linear = product(rotations(draw.array(0.0, 0.5, (count, 3))), axes[:, None, :] * np.eye(3))
    away = direction(draw.array(0.0, 1.0, (count,)), draw.array(-1.0, 1.0, (count,)))
    place = away * (draw.array(0.0, 0.5, (count,)) * 2.0 * axes.max(axis=1))[:, None]
    amplitude = draw.array(0.0, shape.amplitude, (count,))
    amplitude = np.where(draw.array(0.0, 1.0, (count,)) < 0.1, 0.0, amplitude)
    seeds = [draw.seed() for _ in range(count)]

    reach = _reach(kinds, linear) + (amplitude * _thinnest(linear))[:, None]
    low, high = (place - reach).min(axis=0), (place + reach).max(axis=0)
    stretch = (box[3:] - box[:3]) / (high - low)
    linear = stretch[:, None] * linear
    place = stretch * (place - (low + high) / 2.0)
    room = ((box[3:] - box[:3]) / 2.0 - np.abs(place) - _reach(kinds, linear)).min(axis=1)
    # Stretching widens the shortest column more than the space along some axis: the amplitude gives way, rounded down.
    amplitude = np.floor(np.clip(room / _thinnest(linear), 0.0, amplitude) * 1e4) / 1e4
    place = place + (box[:3] + box[3:]) / 2.0
    return [Primitive(KINDS[kinds[i]], linear[i], place[i], float(amplitude[i]), seeds[i]) for i in range(count)]


def _reach(kinds: list[int], linear: Array) -> Array:
    """Half the bounds (n, 3) of turned and stretched solids: |row| of a ball, sum of |entries| of a cube, between
    the two for a cylinder."""
    size = np.abs(linear)
    ball = np.sqrt(dot(linear, linear))
    cube = size[..., 0] + size[..., 1] + size[..., 2]
    cylinder = np.sqrt(size[..., 0] * size[..., 0] + size[..., 1] * size[..., 1]) + size[..., 2]
    return np.stack([ball, cube, cylinder])[kinds, np.arange(len(kinds))]


def _thinnest(linear: Array) -> Array:
    """The shortest column (n,): never shorter than the smallest semi-axis of the solid."""
    columns = np.swapaxes(linear, -1, -2)
    return np.sqrt(dot(columns, columns).min(axis=-1))


def affine(linear: Array, place: Array) -> list[list[float]]:
    """A pose [linear place; 0 1] as a description holds it."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = linear, place
    rows: list[list[float]] = plain(pose)
    return rows
