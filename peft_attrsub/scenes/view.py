"""What both renderers share: the picture they give, its colour encoding, and the small interface they answer to.

Colour encoding: IEC 61966-2-1 (sRGB), Blender's "Standard" view without look, exposure or dithering.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from .description import Camera, Scene

# Flips camera axes between OpenCV (x right, y down, z forward) and Blender (x right, y up, z backward).
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class View:
    """One rendered picture.

    rgb: (H, W, 3) uint8, sRGB. depth: (H, W) float32, planar z in metres at the pixel centres, 0 where nothing is.
    ids: (H, W) uint16 object ids, 0 where nothing is.
    """

    rgb: np.ndarray
    depth: np.ndarray
    ids: np.ndarray


class NoDeviceError(ValueError):
    """The machine lacks the device that was asked for: no scene can be rendered, and trying again is in vain."""


class Renderer(Protocol):
    """A scene ready to be looked at: `render(index)` gives camera `index`'s view, `close` frees what it holds."""

    def render(self, index: int) -> View: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light, any shape, to uint8: 12.92 x up to 0.0031308, else 1.055 x^(1/2.4) - 0.055, rounded to 255ths."""
    x = np.clip(linear, 0.0, 1.0).astype(np.float32)
    low = x * np.float32(12.92)
    high = np.float32(1.055) * np.power(x, np.float32(1 / 2.4)) - np.float32(0.055)
    return (np.where(x <= 0.0031308, low, high) * 255 + 0.5).astype(np.uint8)


def decode_srgb(encoded: np.ndarray) -> np.ndarray:
    """The inverse of `encode_srgb`, up to its rounding: uint8 to linear float32 in [0, 1]."""
    x = np.asarray(encoded, np.float32) / np.float32(255)
    return np.where(x <= 0.04045, x / 12.92, np.power((x + 0.055) / 1.055, np.float32(2.4))).astype(np.float32)


def lamp_axes(direction: list[float]) -> np.ndarray:
    """Rotation (3, 3) of a lamp that shines along `direction`: its columns are x, y and -direction.

    An area lamp is a square along x and y, so both renderers must turn it by the same angle about its axis: y is the
    world's z (or the world's y, for a lamp that shines straight up or down) made orthogonal to the direction.
    """
    back = -np.asarray(direction, np.float64)
    length = float(np.linalg.norm(back))
    if not np.isfinite(length) or length == 0:
        raise ValueError(f"a lamp has the direction {direction}: give three numbers that are not all 0.")
    back = back / length
    up = np.array([0.0, 0.0, 1.0]) if abs(back[2]) < 0.999 else np.array([0.0, 1.0, 0.0])
    x = np.cross(up, back)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(back, x), back], axis=1)


def camera_at(scene: Scene, index: int) -> Camera:
    """Camera `index` of the scene; a ValueError where the scene has no such camera or its size is no picture."""
    if not 0 <= index < len(scene.cameras):
        raise ValueError(f"the scene has cameras 0 to {len(scene.cameras) - 1}, view {index} was asked for.")
    if min(scene.width, scene.height) < 1:
        raise ValueError(f"a view of {scene.width} x {scene.height} pixels was asked for: both must be 1 or more.")
    return scene.cameras[index]


def mesh_and_maps(scene: Scene, mesh: Any, maps: Any, texture_size: int) -> tuple[Any, Any]:
    """What a renderer was given, and `build_mesh(scene)` and `render_maps` of each material where it was not."""
    if mesh is None:
        from .meshes import build_mesh

        mesh = build_mesh(scene)
    if maps is None:
        from .textures import render_maps

        maps = [render_maps(material, texture_size) for material in scene.materials]
    return mesh, maps


def shell_ids(scene: Scene) -> set[int]:
    """Object ids of the rooms, which cast no shadow, so that suns reach inside."""
    return {shape.object_id for shape in scene.shapes if shape.kind == "room"}
