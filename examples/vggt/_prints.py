"""A printed face on a flat card in a room, and a camera that trembles in front of it: scenes of the face benchmark.

The protocol (VGGT subspaces, arXiv 2604.10095, and its release): the scene lies within [-1, 1]^3; the camera starts
0.30 from the middle of the print along its normal, tilted by theta and phi of -5, 0, 5 degrees; then it walks at
random through 10 control points, each at most 0.01 and 1 degree from the one before it, joined by a natural cubic
spline (places) and by slerp (rotations), of which 42 samples are the frames. Field of view 45 to 70 degrees.

The print is 0.20 to 0.24 high, so that all of it is seen. A relief in the place of the flat print is the live face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_attrsub.scenes.description import Camera, Light, Material, Scene, Shape
from peft_attrsub.scenes.meshes import Mesh, build_mesh
from peft_attrsub.scenes.textures import Maps, render_maps
from peft_attrsub.scenes.trajectories import look_at
from peft_attrsub.scenes.view import View, decode_srgb

TILTS = (-5.0, 0.0, 5.0)  # degrees
DISTANCE = 0.30
FRAMES, CONTROLS = 42, 10
STEP, TURN = 0.01, 1.0  # between control points: scene units, degrees
FOV = (45.0, 70.0)
ROOM, CARD, FIRST_THING = 1, 2, 3  # object ids
#: Squares along a side of a relief.
GRID = 160
PATTERNS = ("noise", "voronoi", "wave", "brick", "checker", "stripes")


@dataclass(frozen=True)
class Print:
    """What is on the card. image (H, W, 3) uint8 sRGB. maps: folder of PBR maps in its place. mask (h, w) bool, of any
    size, laid over the whole card: the pixels that count, None for all. height (h, w): relief as a share of the
    card's width, None for a flat one."""

    image: np.ndarray
    maps: str | None = None
    mask: np.ndarray | None = None
    height: np.ndarray | None = None


@dataclass(frozen=True)
class PrintScene:
    """What a renderer needs, and where the card is: pose (4, 4) to the world, x along its width, y up, z out of its
    front; size (width, height)."""

    scene: Scene
    mesh: Mesh
    maps: list[Maps]
    pose: np.ndarray
    size: tuple[float, float]

    def mask(self, index: int, view: View, on_card: np.ndarray | None) -> np.ndarray:
        """(H, W) bool: where view `index` shows the card, and there on_card (h, w), the mask laid over it."""
        seen = view.ids == CARD
        if on_card is None:
            return seen
        camera = self.scene.cameras[index]
        rows, columns = np.nonzero(seen)
        z = view.depth[rows, columns].astype(np.float64)
        x, y = (columns + 0.5 - camera.cx) / camera.fx * z, (rows + 0.5 - camera.cy) / camera.fy * z
        to_card = np.linalg.inv(self.pose) @ np.asarray(camera.pose)
        across, up = (to_card[:2] @ np.stack([x, y, z, np.ones_like(z)])) / np.array(self.size)[:, None] + 0.5
        height, width = on_card.shape
        column = np.clip((across * width).astype(int), 0, width - 1)
        row = np.clip(((1 - up) * height).astype(int), 0, height - 1)
        out = np.zeros_like(seen)
        out[rows, columns] = on_card[row, column]
        return out


def tremble(start: np.ndarray, rng: np.random.Generator, frames: int = FRAMES) -> list[np.ndarray]:
    """Poses (4, 4) to the world beside `start`, the first of them: the protocol's micro-baseline, see above."""
    ways = rng.normal(size=(2, CONTROLS - 1, 3))
    ways /= np.linalg.norm(ways, axis=-1, keepdims=True)
    steps = ways[0] * rng.uniform(0, STEP, (CONTROLS - 1, 1))
    turns = ways[1] * np.radians(rng.uniform(0, TURN, (CONTROLS - 1, 1)))
    places = start[:3, 3] + np.concatenate([np.zeros((1, 3)), np.cumsum(steps, axis=0)])
    rotations = [start[:3, :3]]
    for turn in turns:
        rotations.append(rotations[-1] @ _rotation(turn))
    times = np.linspace(0, CONTROLS - 1, frames)
    segments = np.minimum(times.astype(int), CONTROLS - 2)
    along = natural_spline(places, times)
    poses = []
    for time, segment, place in zip(times, segments, along, strict=True):
        pose = np.eye(4)
        # R exp(s w) for s in [0, 1] is slerp from R to R exp(w).
        pose[:3, :3] = rotations[segment] @ _rotation((time - segment) * turns[segment])
        pose[:3, 3] = place
        poses.append(pose)
    return poses


def natural_spline(points: np.ndarray, times: np.ndarray) -> np.ndarray:
    """(T, 3) at times in [0, K - 1] of the cubic spline through points (K, 3) at 0, ..., K - 1.

    Second derivatives m solve m_{k-1} + 4 m_k + m_{k+1} = 6 (p_{k-1} - 2 p_k + p_{k+1}), and are 0 at both ends.
    """
    count = len(points)
    matrix = np.eye(count)
    curve = np.zeros_like(points)
    for k in range(1, count - 1):
        matrix[k, k - 1 : k + 2] = 1, 4, 1
        curve[k] = 6 * (points[k - 1] - 2 * points[k] + points[k + 1])
    bend = np.linalg.solve(matrix, curve)
    k = np.minimum(times.astype(int), count - 2)
    b = (times - k)[:, None]
    a = 1 - b
    straight = a * points[k] + b * points[k + 1]
    return np.asarray(straight + ((a**3 - a) * bend[k] + (b**3 - b) * bend[k + 1]) / 6)


def print_scene(
    one: Print,
    seed: Sequence[int],
    tilt: tuple[float, float],
    size: tuple[int, int],
    *,
    frames: int = FRAMES,
    fov: tuple[float, float] = FOV,
    texture_size: int = 1024,
) -> PrintScene:
    """The scene with this seed, whose room and card are those of seed[:-1]: the last number is that of the view.

    tilt: theta, phi in degrees. size: (width, height) of the pictures. fov: the field of view of their longer side is
    drawn between these, degrees.
    """
    rng = np.random.default_rng([*seed[:-1], 0xCA2D])
    rows, columns = one.image.shape[:2]
    long = rng.uniform(0.20, 0.24)
    card_size = (long * min(1.0, columns / rows), long * min(1.0, rows / columns))
    azimuth, rise = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(-8, 8))
    out = np.array([np.cos(azimuth) * np.cos(rise), np.sin(azimuth) * np.cos(rise), np.sin(rise)])
    centre = rng.uniform(-1, 1, 3) * [0.25, 0.25, 0.15] - 0.2 * out
    right = np.cross([0.0, 0, 1], out)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(out, right), out, centre], axis=1)
    materials, shapes = _room(rng, centre, out)
    moving = np.random.default_rng([*seed, 0x3A7])
    theta, phi = np.radians(tilt)
    turned = _rotation(theta * pose[:3, 1]) @ _rotation(phi * pose[:3, 0]) @ out
    start = look_at(centre + DISTANCE * turned, centre, pose[:3, 1])
    width, height = size
    focal = max(size) / 2 / np.tan(np.radians(moving.uniform(*fov)) / 2)
    cameras = [
        Camera(pose_.tolist(), float(focal), float(focal), width / 2, height / 2)
        for pose_ in tremble(start, moving, frames)
    ]
    paper = Material("plain" if one.maps is None else "maps", [[0.5] * 3], 1.0, 0.75, maps=one.maps)
    scene = Scene(
        recipe="print",
        dataset_seed=int(seed[0]),
        index=int(seed[-1]),
        width=width,
        height=height,
        materials=[*materials, paper],
        shapes=shapes,
        lights=_lights(rng, centre, out),
        cameras=cameras,
        size=[2.0, 2.0, 1.6],
    )
    maps = [render_maps(material, 256) for material in materials]
    maps.append(_card_maps(one, texture_size))
    card = _card_mesh(pose, card_size, one.height, len(materials), texture_size)
    return PrintScene(scene, together(build_mesh(scene), card), maps, pose, card_size)


def _room(rng: np.random.Generator, centre: np.ndarray, out: np.ndarray) -> tuple[list[Material], list[Shape]]:
    """A box with different walls, and things that keep away from the card and from where cameras are."""
    materials = [
        Material(
            pattern=str(rng.choice(PATTERNS)),
            colours=rng.uniform(0.1, 0.85, (3, 3)).tolist(),
            scale=float(rng.uniform(2, 6)),
            roughness=float(rng.uniform(0.3, 0.9)),
            bump=float(rng.uniform(0, 0.6)),
            seed=int(rng.integers(1 << 30)),
        )
        for _ in range(8)
    ]
    walls = np.diag([1.0, 1.0, 0.8, 1.0])
    shapes = [Shape("room", walls.tolist(), rng.integers(0, 8, 6).tolist(), ROOM, resolution=2)]
    for _ in range(60):
        kind, reach = str(rng.choice(["cube", "ellipsoid", "cylinder"])), rng.uniform(0.08, 0.26, 3)
        place = rng.uniform(-1, 1, 3) * ([1.0, 1.0, 0.8] - reach)
        nearest = centre + np.clip((place - centre) @ out, 0, 0.45) * out
        if len(shapes) < 9 and np.linalg.norm(place - nearest) > 0.12 + float(np.linalg.norm(reach)):
            pose = np.eye(4)
            pose[:3, :3] = _rotation([0, 0, rng.uniform(0, 6)]) * reach
            pose[:3, 3] = place
            patches = {"cube": 6, "ellipsoid": 1, "cylinder": 3}[kind]
            number = FIRST_THING + len(shapes) - 1
            amplitude = float(rng.uniform(0, 0.25)) if kind == "ellipsoid" else 0.0
            material = [int(rng.integers(8))] * patches
            shapes.append(Shape(kind, pose.tolist(), material, number, amplitude, int(rng.integers(1 << 30)), 24))
    return materials, shapes


def _lights(rng: np.random.Generator, centre: np.ndarray, out: np.ndarray) -> list[Light]:
    """A lamp under the ceiling and a weaker one aside of the camera, so that the print is well lit."""
    high = np.array([*(centre + 0.5 * out + rng.uniform(-0.25, 0.25, 3))[:2], 0.78])
    aside = centre + 0.7 * out + 0.3 * np.cross([0.0, 0, 1], out) * rng.choice([-1, 1])
    lamps = ((high, 8.0, 0.5), (np.clip(aside, -0.75, 0.75), 3.5, 0.25))
    return [
        Light(
            "area",
            (1 + rng.uniform(-0.08, 0.08, 3)).tolist(),
            float(power * rng.uniform(0.8, 1.25)),
            direction=(centre - place).tolist(),
            position=place.tolist(),
            size=side,
        )
        for place, power, side in lamps
    ]


def _card_maps(one: Print, size: int) -> Maps:
    """The print as a square of `size` pixels, whatever its proportions; row 0 at the bottom."""
    if one.maps is not None:
        return render_maps(Material("maps", [], 1.0, 0.75, maps=one.maps, bump=1.0), size)
    from PIL import Image

    square = Image.fromarray(one.image).resize((size, size), Image.Resampling.BICUBIC)
    albedo = decode_srgb(np.asarray(square)[::-1])
    flat = np.zeros((size, size, 3), np.float32)
    flat[..., 2] = 1
    plain = np.zeros((size, size), np.float32)
    return Maps(albedo, plain + np.float32(0.75), plain, flat)


def _card_mesh(
    pose: np.ndarray, size: tuple[float, float], height: np.ndarray | None, material: int, texels: int
) -> Mesh:
    """A rectangle, or with a height (h, w) a relief of GRID x GRID squares, seen from its front."""
    count = 1 if height is None else GRID
    side = np.arange(count + 1) / count
    u, v = (part.ravel() for part in np.meshgrid(side, side))
    z, slopes = np.zeros(len(u)), np.zeros((2, len(u)))
    if height is not None:
        lift = size[0] * _sampled(height, side)  # (GRID + 1, GRID + 1), row 0 at the bottom
        z = lift.ravel()
        slopes = np.stack([np.gradient(lift, size[axis] / count, axis=1 - axis).ravel() for axis in (0, 1)])
    local = np.stack([(u - 0.5) * size[0], (v - 0.5) * size[1], z], axis=1)
    normals = np.stack([-slopes[0], -slopes[1], np.ones(len(u))], axis=1)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    corner = (np.arange(count)[:, None] * (count + 1) + np.arange(count)).ravel()
    a, b, c, d = corner, corner + 1, corner + count + 2, corner + count + 1
    triangles = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    # Half a texel off the border: textures repeat, and the other side must not shine through.
    inset = 0.5 / texels
    uv = np.stack([u, v], axis=1) * (1 - 2 * inset) + inset
    return Mesh(
        (local @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32),
        triangles.astype(np.int32),
        uv.astype(np.float32),
        (normals @ pose[:3, :3].T).astype(np.float32),
        np.full(len(triangles), material, np.int32),
        np.full(len(triangles), CARD, np.int32),
    )


def _sampled(height: np.ndarray, side: np.ndarray) -> np.ndarray:
    """`height` (h, w), whose row 0 is the top, at the places `side` in [0, 1] from the bottom and from the left."""
    rows, columns = height.shape
    row, column = (np.clip(part * n - 0.5, 0, n - 1) for part, n in ((1 - side, rows), (side, columns)))
    r, c = np.minimum(row.astype(int), rows - 2), np.minimum(column.astype(int), columns - 2)
    y, x = (row - r)[:, None], (column - c)[None]
    top = height[np.ix_(r, c)] * (1 - x) + height[np.ix_(r, c + 1)] * x
    bottom = height[np.ix_(r + 1, c)] * (1 - x) + height[np.ix_(r + 1, c + 1)] * x
    return np.asarray(top * (1 - y) + bottom * y)


def together(*parts: Mesh) -> Mesh:
    """All parts as one mesh."""
    starts = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    joined: dict[str, Any] = {
        key: np.concatenate([getattr(part, key) for part in parts])
        for key in ("vertices", "uv", "normals", "material", "object_id")
    }
    triangles = np.concatenate([part.triangles + start for part, start in zip(parts, starts, strict=True)])
    return Mesh(triangles=triangles.astype(np.int32), **joined)


def _rotation(vector: Any) -> np.ndarray:
    """(3, 3) of a rotation vector in radians: I + sin(a) K + (1 - cos(a)) K^2 (Rodrigues)."""
    x, y, z = np.asarray(vector, np.float64)
    angle = float(np.sqrt(x * x + y * y + z * z))
    if angle == 0:
        return np.eye(3)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) / angle
    return np.asarray(np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k))


__all__ = [
    "CARD",
    "DISTANCE",
    "FRAMES",
    "TILTS",
    "Print",
    "PrintScene",
    "natural_spline",
    "print_scene",
    "together",
    "tremble",
]
