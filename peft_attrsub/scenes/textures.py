"""A material's picture maps: procedural, or read from a folder of PBR maps.

A map is ONE repetition of the pattern, and repeats without a seam: a renderer samples it at scale * (u, v) mod 1,
scale being the material's. Pixel (row, col) lies at u = (col + 0.5) / S, v = (row + 0.5) / S: row 0 is at v = 0, as
in Blender's image buffers. Normals are in tangent space: x along u, y along v (OpenGL's convention).
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from .description import PATTERNS, Material
from .maps import FoundMaps, find_maps, read_maps
from .patterns import PROCEDURAL

__all__ = ["FoundMaps", "Maps", "find_maps", "normals_from_height", "render_maps"]

Pixels = NDArray[np.float32]


class Maps(NamedTuple):
    """albedo (S, S, 3) linear RGB, roughness (S, S), metallic (S, S), all in [0, 1]; normal (S, S, 3) unit vectors
    in tangent space, (0, 0, 1) where the surface is flat. All float32."""

    albedo: Pixels
    roughness: Pixels
    metallic: Pixels
    normal: Pixels


def render_maps(material: Material, size: int = 512) -> Maps:
    """One tile of the material, size x size pixels. The same material gives the same bytes.

    Procedural: roughness is the material's, up to 25 % more in the depths of the pattern and as much less on its
    heights; metallic is the material's; normals come from the pattern's height times `bump`. Pattern "maps":
    roughness, metallic and normal maps as stored, with the material's own numbers where there is none; `bump` scales
    the slope of the normals (1: as stored, 0: flat).

    Raises ValueError for an unknown pattern, colours that are not rows of three numbers in [0, 1] or too few
    ("plain" and "maps": one and none, else two), a roughness or metallic outside [0, 1], a negative seed or bump,
    and a size below 4; OSError where a maps folder has no albedo that can be read.
    """
    _check(material, size)
    if material.pattern == "maps":
        assert material.maps is not None
        found = read_maps(material.maps, size)
        normal = found.normal
        if normal is None and found.height is not None:
            normal = normals_from_height(found.height, material.bump)
        elif normal is not None:
            slope = np.float32(material.bump) * normal[..., :2] / normal[..., 2:]
            normal = _from_slope(slope[..., 0], slope[..., 1])
        return Maps(
            found.albedo,
            _full(size, material.roughness) if found.roughness is None else found.roughness,
            _full(size, material.metallic) if found.metallic is None else found.metallic,
            _from_slope(_full(size, 0.0), _full(size, 0.0)) if normal is None else normal,
        )
    rng = np.random.Generator(np.random.PCG64([material.seed, crc32(material.pattern.encode())]))
    tile = PROCEDURAL[material.pattern](rng, size, np.array(material.colours, dtype=np.float32))
    uneven = np.float32(material.roughness) * (np.float32(1.25) - np.float32(0.5) * tile.height)
    return Maps(
        np.clip(tile.albedo, np.float32(0), np.float32(1)).astype(np.float32, copy=False),
        np.clip(uneven, np.float32(0), np.float32(1)),
        _full(size, material.metallic),
        normals_from_height(tile.height, material.bump),
    )


def normals_from_height(height: Pixels, bump: float) -> Pixels:
    """Unit normals (S, S, 3) of a tile of heights (S, S): (-s dh/du, -s dh/dv, 1) normalised, s = bump / 8.

    u and v are 1 across the tile, differences are central and run around it. s: with bump 1 a height of 1 stands for
    an eighth of the tile, a rough stone.
    """
    slope = np.float32(bump / 8.0 * len(height) / 2.0)
    padded = np.pad(height, 1, mode="wrap")
    down_u = padded[1:-1, :-2] - padded[1:-1, 2:]
    down_v = padded[:-2, 1:-1] - padded[2:, 1:-1]
    return _from_slope(slope * down_u, slope * down_v)


def _from_slope(x: Pixels, y: Pixels) -> Pixels:
    one = np.float32(1)
    length = np.sqrt(x * x + y * y + one)
    return np.stack([x / length, y / length, one / length], axis=-1)


def _full(size: int, value: float) -> Pixels:
    return np.full((size, size), value, np.float32)


def _check(material: Material, size: int) -> None:
    name = f'the material with pattern "{material.pattern}" and seed {material.seed}'
    if material.pattern not in PATTERNS:
        raise ValueError(f"{name}: unknown pattern; known are {', '.join(PATTERNS)}.")
    if size < 4:
        raise ValueError(f"{name}: asked for at {size} pixels; give 4 or more.")
    colours = np.array(material.colours if material.colours else np.zeros((0, 3)), dtype=np.float64)
    if colours.ndim != 2 or colours.shape[1] != 3 or not ((colours >= 0) & (colours <= 1)).all():
        raise ValueError(f"{name}: its colours are not rows of three numbers in [0, 1]: {material.colours}.")
    needed = {"maps": 0, "plain": 1}.get(material.pattern, 2)
    if len(colours) < needed:
        raise ValueError(f"{name}: has {len(colours)} colours, needs {needed} or more.")
    for what, value in (("roughness", material.roughness), ("metallic", material.metallic)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: its {what} is {value}; give a number in [0, 1].")
    if material.seed < 0 or not 0 <= material.bump < float("inf"):
        raise ValueError(f"{name}: has the bump {material.bump}; seed and bump are finite and 0 or more.")
    if material.pattern == "maps" and not material.maps:
        raise ValueError(f"{name}: names no folder of maps; set `maps`, or take a procedural pattern.")
