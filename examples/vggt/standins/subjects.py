"""What stands in the rooms of `stages`: people from THuman's and 2K2K's stand-ins, and prints of drawn portraits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .stages import Subject

#: Heights in metres: of adults, of children, of prints; of the lower edge of a print above the floor.
ADULT, CHILD, PRINT, RISE = (1.5, 1.9), (0.9, 1.35), (0.8, 1.3), (0.5, 1.0)
#: Pixels along a side of a texture: pictures are small.
TEXTURE = 128


def person(mesh: Any, height: tuple[float, float], turn: float, rng: np.random.Generator) -> Subject:
    """A person of `load_mesh`, as tall as is drawn between these; turn: as in `datasets.meshes.place`."""
    from _humans import maps_of, scene_mesh

    from peft_attrsub.datasets.meshes import bake_colors, place

    upright, _ = place(mesh, "auto", float(rng.uniform(*height)), turn)
    limit = TEXTURE if upright.colors is None else None
    baked = bake_colors(upright)
    body = scene_mesh(baked)
    vertices = body.vertices - np.array([0, 0, body.vertices[:, 2].min()], np.float32)
    # Arms may reach over what stands beside.
    radius = float(np.quantile(np.linalg.norm(vertices[:, :2], axis=1), 0.9))
    return Subject(replace(body, vertices=vertices), maps_of(baked.texture, limit), radius)


def people(meshes: Path, find: Any) -> list[Any]:
    """All people below a folder, in the order of their names. find: of `datasets.meshes`."""
    from peft_attrsub.datasets.meshes import load_mesh

    found: Mapping[str, Path] = find(meshes)
    return [load_mesh(found[name], grey=True) for name in sorted(found)]


def portrait(seed: int, rng: np.random.Generator) -> Subject:
    """A card with a drawn face on its front and one colour on its back, upright above the floor."""
    from _humans import maps_of
    from standins.portraits import draw_portrait

    from peft_attrsub.scenes.meshes import Mesh

    image = draw_portrait(seed).image
    height = float(rng.uniform(*PRINT))
    half = height * image.shape[1] / image.shape[0] / 2
    corners = np.array([[0, -half, 0], [0, half, 0], [0, half, height], [0, -half, height]], np.float32)
    front = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    over = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    normal = np.tile(np.float32([1, 0, 0]), (4, 1))
    mesh = Mesh(
        np.concatenate([corners, corners]),
        np.concatenate([front, front[:, ::-1] + 4]),
        np.concatenate([over, np.full_like(over, 0.02)]),
        np.concatenate([normal, -normal]),
        np.zeros(4, np.int32),
        np.ones(4, np.int32),
    )
    return Subject(mesh, maps_of(image, TEXTURE), half, float(rng.uniform(*RISE)))
