"""Small scenes with known answers, for the tests of both renderers: a mesh of quads and spheres, maps by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from peft_attrsub.scenes.description import Camera, Light, Material, Scene, Shape


@dataclass
class Mesh:
    vertices: np.ndarray
    triangles: np.ndarray
    uv: np.ndarray
    normals: np.ndarray
    material: np.ndarray
    object_id: np.ndarray


@dataclass
class Maps:
    albedo: np.ndarray
    roughness: np.ndarray
    metallic: np.ndarray
    normal: np.ndarray


def flat_maps(colour: list[float], roughness: float = 1.0, metallic: float = 0.0, side: int = 8) -> Maps:
    albedo = np.empty((side, side, 3), np.float32)
    albedo[:] = colour
    normal = np.zeros((side, side, 3), np.float32)
    normal[..., 2] = 1
    return Maps(
        albedo, np.full((side, side), roughness, np.float32), np.full((side, side), metallic, np.float32), normal
    )


def quad(corner: list[float], along_u: list[float], along_v: list[float], number: int, material: int = 0) -> Mesh:
    """A parallelogram with u, v in [0, 1] and the normal u x v."""
    o, u, v = (np.asarray(x, np.float32) for x in (corner, along_u, along_v))
    normal = np.cross(u, v) / np.linalg.norm(np.cross(u, v))
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    points = o + uv[:, :1] * u + uv[:, 1:] * v
    triangles = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    two = np.ones(2, np.int32)
    return Mesh(points, triangles, uv, np.tile(normal.astype(np.float32), (4, 1)), two * material, two * number)


def ball(centre: list[float], radius: float, number: int, material: int = 0, rings: int = 96) -> Mesh:
    around, up = np.meshgrid(np.linspace(0, 1, 2 * rings + 1), np.linspace(0, 1, rings + 1))
    around, up = around.ravel(), up.ravel()
    a, b = 2 * np.pi * around, np.pi * (up - 0.5)
    normal = np.stack([np.cos(a) * np.cos(b), np.sin(a) * np.cos(b), np.sin(b)], 1)
    row = 2 * rings + 1
    first = (np.arange(rings)[:, None] * row + np.arange(2 * rings)).ravel()
    triangles = np.concatenate(
        [np.stack([first, first + 1, first + row + 1], 1), np.stack([first, first + row + 1, first + row], 1)]
    )
    points = np.asarray(centre) + radius * normal
    ones = np.ones(len(triangles), np.int32)
    uv = np.stack([around, up], 1).astype(np.float32)
    return Mesh(
        points.astype(np.float32),
        triangles.astype(np.int32),
        uv,
        normal.astype(np.float32),
        ones * material,
        ones * number,
    )


def join(*parts: Mesh) -> Mesh:
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    return Mesh(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.triangles + start for part, start in zip(parts, starts, strict=True)]).astype(np.int32),
        np.concatenate([part.uv for part in parts]),
        np.concatenate([part.normals for part in parts]),
        np.concatenate([part.material for part in parts]),
        np.concatenate([part.object_id for part in parts]),
    )


def look(eye: list[float], target: list[float]) -> list[list[float]]:
    """Camera to world, OpenCV axes, level."""
    ahead = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross(ahead, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(ahead, right), ahead], axis=1)
    pose[:3, 3] = eye
    matrix: list[list[float]] = pose.tolist()
    return matrix


def scene(
    pose: list[list[float]],
    lights: list[Light] | None = None,
    size: tuple[int, int] = (48, 32),
    focal: tuple[float, float] = (40.0, 40.0),
    centre: tuple[float, float] | None = None,
    materials: int = 1,
    background: float = 0.0,
) -> Scene:
    """A scene of `materials` materials and one camera; the mesh and the maps are given to the renderer."""
    width, height = size
    cx, cy = centre or (width / 2, height / 2)
    return Scene(
        recipe="test",
        dataset_seed=1,
        index=2,
        width=width,
        height=height,
        materials=[Material("plain", [[0.5, 0.5, 0.5]], scale=1.0)] * materials,
        shapes=[Shape("ellipsoid", np.eye(4).tolist(), [0], 1)],
        lights=lights or [],
        cameras=[Camera(pose, *focal, cx, cy)],
        background=[background] * 3,
    )


def in_a_room(one: Scene, number: int) -> Scene:
    """The same scene, with the object `number` a room's shell."""
    return replace(one, shapes=[Shape("room", np.eye(4).tolist(), [0] * 6, number)])


def camera_rays(one: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and directions (H, W, 3) through the pixel centres, planar depth 1, in float64, one by one."""
    camera = one.cameras[0]
    pose = np.asarray(camera.pose)
    directions = np.empty((one.height, one.width, 3))
    for row in range(one.height):
        for column in range(one.width):
            local = [(column + 0.5 - camera.cx) / camera.fx, (row + 0.5 - camera.cy) / camera.fy, 1.0]
            directions[row, column] = pose[:3, :3] @ local
    return pose[:3, 3], directions


def plane_depth(one: Scene, height: float) -> np.ndarray:
    """Planar depth (H, W) of the plane z = height; infinite where it is not in front."""
    origin, directions = camera_rays(one)
    with np.errstate(divide="ignore"):
        depth: np.ndarray = (height - origin[2]) / directions[..., 2]
    return np.where(depth > 0, depth, np.inf)


def ball_depth(one: Scene, centre: list[float], radius: float) -> np.ndarray:
    """Planar depth (H, W) of a ball, infinite beside it."""
    origin, directions = camera_rays(one)
    offset = origin - centre
    a = (directions**2).sum(-1)
    b = 2 * directions @ offset
    inside = b * b - 4 * a * (offset @ offset - radius**2)
    depth: np.ndarray = (-b - np.sqrt(np.maximum(inside, 0))) / (2 * a)
    return np.where(inside > 0, depth, np.inf)


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Of sRGB pictures (..., 3), as encoded."""
    grey: np.ndarray = rgb.astype(np.float64) @ [0.2126, 0.7152, 0.0722]
    return grey


def arrow_maps(side: int = 64) -> Maps:
    """Four colours: red at low u and low v, green at high u and low v, blue at low u and high v, white at the rest."""
    maps = flat_maps([1.0, 1.0, 1.0], side=side)
    half = side // 2
    maps.albedo[:half, :half] = [1, 0, 0]
    maps.albedo[:half, half:] = [0, 1, 0]
    maps.albedo[half:, :half] = [0, 0, 1]
    return maps


# What both renderers are tried on: a wide floor, and a sun from straight above.
FLOOR = quad([-20, -20, 0], [40, 0, 0], [0, 40, 0], number=7)
DOWN = Light("sun", [1.0, 1.0, 1.0], 2.0, direction=[0.0, 0.0, -1.0])
