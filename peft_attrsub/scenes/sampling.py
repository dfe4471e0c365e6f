"""A scene from a recipe and an index, by numpy alone.

What the dataset keeps comes from its own streams, and leaves room for what it varies: boxes keep clear of the camera
path of the dataset, a camera that roams keeps clear of the boxes. Textures and lamps that would show nothing are drawn
again, from the same stream (`contrast`). The same recipe, index and texture names give the
same bytes on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import contrast, lamps, layout, surfaces
from .cameras import Space, broad, cameras, narrow, path, space_of
from .description import Camera, Material, Scene, Shape
from .draws import Array, Draw
from .movers import movers
from .recipes import AttributeRecipe

__all__ = ["AttributeRecipe", "sample_scene"]

# Shares of the extent: cameras keep MARGIN from boxes and walls, and the path of a dataset shifts by up to SHIFT.
MARGIN, SHIFT = 0.04, 0.004
# Surfaces of 2 R^2 triangles per shape of resolution R.
SURFACES = {"ellipsoid": 2, "cube": 6, "cylinder": 4, "room": 6, "floor": 1}
PATCHES = {"ellipsoid": 1, "cube": 6, "cylinder": 3, "room": 6, "floor": 1}


def sample_scene(recipe: AttributeRecipe, index: int, textures: list[str] | None = None) -> Scene:
    """Scene number `index` of the dataset. Lengths in metres; floats rounded to 9 decimals or fewer.

    textures: folders of PBR maps, in an order that is part of the recipe; without any, patterns are made.
    Raises ValueError for an index below 0 or an empty list of textures.
    """
    if not 0 <= index < 2**32:
        raise ValueError(f"scene {index} was asked for: give an index from 0 to 2^32 - 1.")
    if textures is not None and not textures:
        raise ValueError("an empty list of textures was given: give folders of maps, or None for made patterns.")
    room = layout.room_size(recipe.base("room", index), recipe)
    shape = layout.plan(
        recipe.scene("plan", index) if recipe.varies("geometry") else recipe.base("plan", index),
        recipe.layout,
        extreme=recipe.varies("geometry"),
    )
    home = _home(recipe, index, room)
    bulbs = _bulbs(recipe.base("bulbs", index), room, recipe.extent)
    boxes, solids = _solids(recipe, index, shape, room, home, bulbs)
    space = space_of(recipe, room, shape.bump, np.concatenate([boxes, bulbs]))
    lit = _lamps(recipe, index, room, space.boxes)
    palette = _palette(recipe, index, textures)
    views = _cameras(recipe, index, home, space)
    moving = movers(recipe, index, views, space, MARGIN / 4.0 * recipe.extent) if recipe.varies("motion") else []
    first = len(solids) + (1 if room is not None or recipe.floor else 0) + 1
    solids = solids + [mover.solids for mover in moving]
    shapes, materials = _shapes(recipe, index, shape, room, solids, bulbs, palette, lit)
    return Scene(
        recipe=recipe.attribute,
        dataset_seed=recipe.seed,
        index=index,
        width=recipe.size,
        height=recipe.size,
        materials=materials,
        shapes=shapes,
        lights=lit.lights,
        cameras=views,
        background=lit.background,
        size=None if room is None else _list(room),
        boxes=[_list(box) for box in (*boxes, *(mover.box for mover in moving), *bulbs)],
        motion=[
            {str(number): mover.poses[view] for number, mover in enumerate(moving, start=first)}
            for view in range(len(views) if moving else 0)
        ],
    )


def _list(values: Array) -> list[float]:
    return [float(f"{value:.9f}") + 0.0 for value in values]


def _aim(recipe: AttributeRecipe, room: Array | None) -> Array:
    """Half-sides of the box of gaze targets: an eighth of the room, or of the cube of objects a quarter."""
    return room / 8.0 if room is not None else np.full(3, recipe.extent / 32.0)


def _home(recipe: AttributeRecipe, index: int, room: Array | None) -> list[Array]:
    """The path of a dataset, drawn before there is a box; in the widest room that height fields leave."""
    draw = recipe.base("home", index)
    space = space_of(recipe, room, 0.02, np.zeros((0, 6)))
    if room is None:
        cube = np.full(3, recipe.extent / 8.0)
        space = Space(space.limit, space.floor, np.concatenate([-cube, cube])[None], space.reach)
    for _ in range(20):  # a narrow sweep in an empty room: the first draw nearly always does
        found = path(draw, recipe, narrow(draw, recipe, _aim(recipe, room)), space, (MARGIN + SHIFT) * recipe.extent)
        if found is not None:
            return found
    raise ValueError(f"no camera path fits into a scene of extent={recipe.extent} m: give it more room.")


def _bulbs(draw: Draw, room: Array | None, extent: float) -> Array:
    """(N, 6) boxes of the glowing balls of a room, none to two, in corners under its roof."""
    if room is None or not draw.chance(0.5):
        return np.zeros((0, 6))
    radius = 0.012 * extent
    places = []
    for corner in range(draw.whole(1, 2)):
        side = 1.0 if corner else -1.0
        places.append(room / 2.0 * [side, draw.between(-0.9, 0.9), 0.9] - [side * 3.0 * radius, 0.0, radius])
    return np.array([np.concatenate([place - radius, place + radius]) for place in places])


def _solids(
    recipe: AttributeRecipe, index: int, shape: layout.Plan, room: Array | None, home: list[Array], bulbs: Array
) -> tuple[Array, list[list[layout.Primitive]]]:
    """Boxes (B, 6) and what fills each. Where geometry is kept, boxes shrink by up to 1 % from scene to scene."""
    varies = recipe.varies("geometry")
    draw = recipe.scene("boxes", index) if varies else recipe.base("boxes", index)
    poses = np.stack(home)
    eyes = poses[:, :3, 3]
    # Nothing right in front of the lens either.
    ahead = eyes + 0.12 * recipe.extent * poses[:, :3, 2]
    keep = np.concatenate([eyes, ahead, (bulbs[:, :3] + bulbs[:, 3:]) / 2.0])
    boxes = layout.boxes(draw, shape, room, recipe.extent, keep, (MARGIN + SHIFT) * recipe.extent)
    large = (boxes[:, 3:] - boxes[:, :3]).min(axis=1) > 0.12 * recipe.extent
    if not varies:
        middle, half = (boxes[:, :3] + boxes[:, 3:]) / 2.0, (boxes[:, 3:] - boxes[:, :3]) / 2.0
        half = half * recipe.scene("shrink", index).array(0.99, 1.0, (len(boxes), 3))
        boxes = np.concatenate([middle - half, middle + half], axis=1)
    draw = recipe.scene("solids", index) if varies else recipe.base("solids", index)
    return boxes, [layout.fill(draw, shape, box, bool(big)) for box, big in zip(boxes, large, strict=True)]


def _lamps(recipe: AttributeRecipe, index: int, room: Array | None, boxes: Array) -> lamps.Lamps:
    if recipe.varies("lighting"):
        draw = recipe.scene("lamps", index)
        lit = lamps.wild(draw, room, recipe.extent, boxes)
        for _ in range(contrast.TRIES if recipe.sampling > 1 else 0):
            if contrast.shows_light(lit, room):
                break
            lit = lamps.wild(draw, room, recipe.extent, boxes)
        return lit
    kept = lamps.usual(recipe.base("lamps", index), room, recipe.extent)
    return lamps.nearly(recipe.scene("lamps", index), kept)


def _palette(recipe: AttributeRecipe, index: int, textures: list[str] | None) -> list[Material]:
    if recipe.varies("texture"):
        draw = recipe.scene("palette", index)
        palette = surfaces.wild_palette(draw, textures)
        for _ in range(contrast.TRIES if recipe.sampling > 1 else 0):
            if contrast.shows_palette(palette):
                break
            palette = surfaces.wild_palette(draw, textures)
        return palette
    draw = recipe.scene("palette", index)
    return [surfaces.nearly(draw, kept) for kept in surfaces.palette(recipe.base("palette", index), textures)]


def _shapes(
    recipe: AttributeRecipe,
    index: int,
    shape: layout.Plan,
    room: Array | None,
    solids: list[list[layout.Primitive]],
    bulbs: Array,
    palette: list[Material],
    lit: lamps.Lamps,
) -> tuple[list[Shape], list[Material]]:
    """Room or floor first, then the objects in the order of their boxes, then the bulbs; one object id for each."""
    draw = recipe.scene("slots", index) if recipe.varies("texture") else recipe.base("slots", index)
    bumps = recipe.scene("walls", index) if recipe.varies("geometry") else recipe.base("walls", index)
    materials = list(palette)
    whole: list[dict[str, Any]] = []
    if room is not None:
        whole.append({"kind": "room", "pose": layout.affine(np.diag(room / 2.0), np.zeros(3))})
    elif recipe.floor:
        wide = np.diag([recipe.extent, recipe.extent, 1.0])
        whole.append({"kind": "floor", "pose": layout.affine(wide, np.array([0.0, 0.0, -recipe.extent / 8.0]))})
    for part in whole:
        flat = {"floor": 0.0, "room": round(shape.bump, 6)}[part["kind"]]
        part |= {"object_id": 1, "amplitude": flat, "seed": bumps.seed()}
    for number, group in enumerate(solids, start=len(whole) + 1):
        for solid in group:
            pose = layout.affine(solid.linear, solid.place)
            part = {"kind": solid.kind, "pose": pose, "object_id": number, "amplitude": solid.amplitude}
            whole.append(part | {"seed": solid.seed})
    for part in whole:
        faces = 1 if draw.chance(0.5) and part["kind"] != "room" else PATCHES[part["kind"]]
        chosen = [draw.whole(0, len(palette) - 1) for _ in range(faces)]
        part["materials"] = chosen * (PATCHES[part["kind"]] // faces)
    resolution = math.isqrt(recipe.triangles // (2 * sum(SURFACES[part["kind"]] for part in whole)))
    resolution = max(6, min(96, resolution))
    first = max((part["object_id"] for part in whole), default=0) + 1
    for number, box in enumerate(bulbs, start=first):
        pose = layout.affine(np.diag((box[3:] - box[:3]) / 2.0), (box[3:] + box[:3]) / 2.0)
        whole.append({"kind": "ellipsoid", "pose": pose, "object_id": number, "materials": [len(materials)]})
    if len(bulbs):
        materials.append(Material("plain", [lit.tint, lit.tint], scale=1.0, emission=lit.glow))
    return [Shape(**part, resolution=resolution) for part in whole], materials


def _cameras(recipe: AttributeRecipe, index: int, home: list[Array], space: Space) -> list[Camera]:
    """The path of the dataset a little aside, or where the camera varies one of the scene's own."""
    fov = recipe.base("lens", index).between(*recipe.fov)
    draw = recipe.scene("camera", index)
    if recipe.varies("camera"):
        aim = _aim(recipe, None if space.limit[0] == np.inf else 2.0 * space.limit)
        found = path(draw, recipe, broad(recipe.base("camera", index), recipe, aim), space, MARGIN * recipe.extent)
        # Boxes were kept away from the dataset's own path: it is free where no other was found.
        return cameras(found or home, draw.between(*recipe.fov), recipe.size)
    fov = min(max(fov * draw.between(0.995, 1.005), recipe.fov[0]), recipe.fov[1])
    shift = draw.array(-1.0, 1.0, (3,)) * (SHIFT * recipe.extent / 2.0)
    moved = np.stack(home)
    moved[:, :3, 3] += shift
    return cameras(list(moved), fov, recipe.size)
