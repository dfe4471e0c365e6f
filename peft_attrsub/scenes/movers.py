"""Things that move: composites of their own that glide along splines through the free space while the camera films.

What moves is drawn once per dataset, like all geometry; where it goes is drawn for every scene. A path has four
control points in a box of half-side SPAN times the extent, and is run through once over the views of a scene however
many there are: ways of 0.05 to 1 extent and steps of about 0.004 extent (3 cm) a view at 100 views, with up to half a
turn about an axis that stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import layout
from .cameras import Space
from .description import Camera, Matrix
from .draws import TAU, Array, Draw, cos_sin, dot, plain
from .recipes import AttributeRecipe
from .trajectories import glide_path

# Least and most things; least and largest half-sides and spans, shares of the extent.
COUNT, HALF, SPAN = (2, 4), (0.02, 0.04), (0.06, 0.22)
TRIES = 400


@dataclass(frozen=True)
class Mover:
    """box (6,): what holds it in the first view; solids: what it is made of, there; poses: per view, from there."""

    box: Array
    solids: list[layout.Primitive]
    poses: list[Matrix]


def movers(recipe: AttributeRecipe, index: int, views: list[Camera], space: Space, margin: float) -> list[Mover]:
    """The moving things of a scene: balls around them never come within `margin` of each other, of boxes and walls,
    and twice that of any camera. A thing without a free path in TRIES tries is left out; with none at all a
    ValueError."""
    kept, draw = recipe.base("movers", index), recipe.scene("paths", index)
    shape = layout.Plan({}, (2, 4), (1.0, 1.0, 1.0), 0.4, 0.0)
    eyes = np.array([camera.pose for camera in views])
    found: list[Mover] = []
    taken: list[tuple[Array, float]] = []
    for _ in range(kept.whole(*COUNT)):
        half = kept.array(*HALF, (3,)) * recipe.extent
        solids = layout.fill(kept, shape, np.concatenate([-half, half]), large=False)
        radius = float(np.sqrt(dot(half, half)))
        path = _path(draw, recipe, eyes, space, taken, radius, margin)
        if path is None:
            continue
        glide, places = path
        taken.append((places, radius))
        start = places[0]
        solids = [replace(solid, place=solid.place + start) for solid in solids]
        found.append(Mover(np.concatenate([start - half, start + half]), solids, glide))
    if not found:
        raise ValueError(f"nothing can move in a scene of extent={recipe.extent} m: give another seed or extent.")
    return found


def _path(
    draw: Draw,
    recipe: AttributeRecipe,
    eyes: Array,
    space: Space,
    taken: list[tuple[Array, float]],
    radius: float,
    margin: float,
) -> tuple[list[Matrix], Array] | None:
    """Transforms (views of 4 x 4) and the places (views, 3) of the middle of a thing, or None."""
    reach = np.minimum(0.6 * space.limit, 0.22 * recipe.extent if space.limit[0] == np.inf else np.inf)
    cameras = np.concatenate([eyes[:, :3, 3], eyes[:, :3, 3] + 0.06 * recipe.extent * eyes[:, :3, 2]])
    for number in range(TRIES):
        middle = draw.array(-reach, reach, (3,))
        # Ever shorter ways, ever less in view: where all else fails, a thing moves little, or aside.
        demand = 1.0 - number / TRIES
        span = draw.between(*SPAN) * recipe.extent * max(demand, 0.1)
        turn = draw.directions(1)[0] * draw.between(0.05, 0.5) * TAU
        offsets = draw.array(-span, span, (4, 3))
        if not space.free(middle[None], radius + margin)[0]:
            continue
        poses = glide_path(middle + offsets, turn, recipe.views)
        places = poses[:, :3, 3]
        if (
            _seen(eyes, places, recipe.fov[0]) >= 0.5 * demand
            and space.free(places, radius + margin).all()
            and _apart(places, cameras, radius + 2.0 * margin)
            and all((_gaps(places, other) >= radius + size + margin).all() for other, size in taken)
        ):
            return _from_first(poses), places
    return None


def _seen(eyes: Array, places: Array, fov: float) -> float:
    """The share of the views in which the middle is within the narrowest field of view, walls and boxes aside."""
    cos, sin = cos_sin(fov / 720.0)
    away = places - eyes[:, :3, 3]
    x, y, z = (dot(away, eyes[:, :3, axis]) for axis in range(3))
    wide = 0.9 * sin / cos * z
    return float(np.mean((np.abs(x) <= wide) & (np.abs(y) <= wide)))


def _gaps(a: Array, b: Array) -> Array:
    return np.sqrt(dot(a - b, a - b))


def _apart(places: Array, points: Array, distance: float) -> bool:
    return bool((_gaps(places[:, None], points[None]) >= distance).all())


def _from_first(poses: Array) -> list[Matrix]:
    """P_i P_0^-1, where P_0 does not turn: [R_i, c_i - R_i c_0]."""
    turns, places, start = poses[:, :3, :3], poses[:, :3, 3], poses[0, :3, 3]
    moved = poses.copy()
    moved[:, :3, 3] = places - np.stack([dot(turns[:, row], start) for row in range(3)], axis=1)
    rows: list[Matrix] = plain(moved)
    return rows
