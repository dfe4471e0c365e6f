"""A stand-in for ClearPose: drawn glasses that refract, on a patterned table, in ClearPose's own layout on disk.

None of it is the real data: shapes, light and the errors of the depth camera are simple, numbers on it say nothing
about the real benchmark. It exercises every step from files to table, and its truth is exact: depth, labels, normals
and poses are those of the first surface that a ray meets, to the millimetre of the files.

    <root>/set3/scene8/000100-{color,depth,depth_true,label,normal_true}.png, metadata.mat

depth shows what lies behind the glass, with holes on 5 to 20 % of it; depth_true has the glass's own depth written
over it, so holes elsewhere stay. Frames are every hundredth, as in clearpose_downsample_100. `model/` is not written;
standin.json in each scene says how it was drawn.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_attrsub._extras import require
from peft_attrsub.scenes.pixels import encode_depth, encode_rgb
from peft_attrsub.scenes.storage import json_bytes, write_atomically
from peft_attrsub.scenes.view import encode_srgb
from peft_attrsub.vggt.cameras import to_image_corner, to_pixel_centers

from .glassware import KINDS, meridian
from .refraction import Box, Lathe, nearest, trace

SIZE = (480, 640)
SETTINGS, FORMAT = "standin.json", 1  # FORMAT counts up when the same seed draws another picture
FOCAL, CENTRE = 601.33, (334.67, 248.0)  # of ClearPose's pictures of that size
TABLE = 0.55  # half its width, in metres
SUN = np.array([0.4, -0.3, 0.87]) / np.linalg.norm([0.4, -0.3, 0.87])


@dataclass(frozen=True)
class Table:
    """One scene: what stands on the table, and its pattern (256, 256, 3), which repeats every `period` metres."""

    glasses: list[Lathe]
    boxes: list[Box]
    pattern: np.ndarray
    period: float

    def colour(self, which: np.ndarray, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Linear colour (N, 3) of points on boxes: pattern or paint, lit by one sun with shadows and a dim sky."""
        floor = (which == 1)[:, None]  # below the table, and coarser: it is seen from afar
        place = points[:, :2] / np.where(floor, 6 * self.period, self.period) * len(self.pattern)
        paint = _bilinear(self.pattern, place[:, 0], place[:, 1]) * np.where(floor, 0.5, 1.0)
        for number, box in enumerate(self.boxes):
            if box.label:
                own = which == number
                stripe = np.sin(points[own] @ np.array([0.0, 0.0, 240.0])) + np.sin(points[own, :2].sum(1) * 170)
                hue = np.array([(box.label * 0.37) % 1, (box.label * 0.61) % 1, (box.label * 0.83) % 1])
                paint[own] = (0.15 + 0.5 * hue) * (1 + 0.25 * np.tanh(3 * stripe))[:, None]
        towards = np.broadcast_to(SUN, points.shape)
        start = points + 1e-5 * normals
        dark = np.where(np.isfinite(nearest(self.boxes, start, towards)[0]), 0.25, 1.0)
        dim = np.where(np.isfinite(nearest(self.glasses, start, towards)[0]), 0.7, 1.0)
        lit = np.maximum((normals * SUN).sum(1), 0) * dark * dim
        return paint * (0.35 + 0.75 * lit)[:, None]


def _bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours of a picture that repeats, at any place in pixels."""
    left, low = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    across, up = (x - left)[:, None], (y - low)[:, None]
    height, width = image.shape[:2]

    def at(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return image[row % height, column % width]

    lower = at(low, left) * (1 - across) + at(low, left + 1) * across
    upper = at(low + 1, left) * (1 - across) + at(low + 1, left + 1) * across
    return lower * (1 - up) + upper * up


def sky(directions: np.ndarray) -> np.ndarray:
    """Linear colour (N, 3) of the surroundings: a bright ceiling with two windows, a dull ground."""
    up = directions[:, 2:]
    colour = np.where(up > 0, 0.35 + 0.35 * up, 0.3) * np.array([0.95, 1.0, 1.05])
    for window in ((0.7, 0.5, 0.5), (-0.8, 0.1, 0.6)):
        towards = directions @ (np.array(window) / np.linalg.norm(window))
        colour += 2.5 * np.exp((towards - 1) / 0.01)[:, None]
    return colour


def upright(x: float, y: float, z: float, yaw: float, over: bool = False) -> np.ndarray:
    """World from object: turned about z, and upside down if `over`."""
    c, s = np.cos(yaw), np.sin(yaw)
    pose = np.eye(4)
    pose[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([1.0, -1.0, -1.0] if over else [1.0] * 3)
    pose[:3, 3] = x, y, z
    return pose


def _noise(rng: np.random.Generator, size: int, power: float, squeeze: float = 1.0) -> np.ndarray:
    """(size, size) with the spectrum 1 / f^power, mean 0 and deviation 1, repeating; squeezed along one axis."""
    frequency = np.fft.fftfreq(size)
    f = np.hypot(frequency[:, None] * squeeze, frequency[None] / squeeze)
    f[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) / f**power).real
    return (field - field.mean()) / field.std()


def draw_table(rng: np.random.Generator) -> Table:
    """A table with 3 to 6 glasses and 1 to 2 opaque things, none of which touch."""
    grain = 0.5 + 0.18 * _noise(rng, 256, 1.0, rng.uniform(1.0, 4.0))
    first, second = rng.uniform(0.05, 0.35, 3), rng.uniform(0.35, 0.85, 3)
    u, v = np.meshgrid(np.arange(256), np.arange(256))
    tiles = [(u // 32 + v // 32) % 2, (u // 16) % 2, ((u - 128) ** 2 + (v - 128) ** 2 < 80**2), np.zeros_like(u)]
    mix = np.clip(0.7 * tiles[rng.integers(len(tiles))] + 0.6 * grain - 0.15, 0, 1)[..., None]
    pattern = np.clip(first * (1 - mix) + second * mix, 0.02, 0.9)
    glasses: list[Lathe] = []
    boxes = [
        Box(np.array([TABLE, TABLE, 0.02]), upright(0, 0, -0.02, 0)),
        Box(np.array([20.0, 20.0, 0.05]), upright(0, 0, -0.80, 0)),
    ]
    taken: list[tuple[float, float, float]] = []

    def place(radius: float) -> tuple[float, float] | None:
        for _ in range(200):
            r, a = 0.21 * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
            x, y = float(r * np.cos(a)), float(r * np.sin(a))
            if all(np.hypot(x - u, y - v) > radius + other + 0.005 for u, v, other in taken):
                taken.append((x, y, radius))
                return x, y
        return None

    for label in rng.choice(np.arange(1, 64), rng.integers(3, 7), replace=False):
        kind, scale = str(rng.choice(KINDS)), float(rng.uniform(0.9, 1.25))
        profile = meridian(kind, scale)
        over = kind in ("tumbler", "bowl") and rng.random() < 0.3
        if (spot := place(float(profile[:, 0].max()))) is not None:
            height = float(profile[:, 1].max()) if over else 0.0
            pose = upright(*spot, height + 5e-4, rng.uniform(0, 2 * np.pi), over)
            tint = rng.uniform(0.5, 12, 3)
            glasses.append(Lathe(profile, pose, int(label), float(rng.uniform(1.4, 1.6)), (tint[0], tint[1], tint[2])))
    for label in rng.choice(np.arange(200, 220), rng.integers(1, 3), replace=False):
        half = rng.uniform([0.02, 0.02, 0.02], [0.05, 0.04, 0.08])
        if (spot := place(float(np.hypot(half[0], half[1])))) is not None:
            boxes.append(Box(half, upright(*spot, half[2], rng.uniform(0, 2 * np.pi)), int(label)))
    return Table(glasses, boxes, pattern, float(rng.uniform(0.25, 0.6)))


def arc(rng: np.random.Generator, views: int) -> np.ndarray:
    """World from camera (views, 4, 4), OpenCV axes: a walk along a third of a circle around the table."""
    start, turn = rng.uniform(0, 2 * np.pi), rng.uniform(1.6, 2.4) * rng.choice([-1, 1])
    phases = rng.uniform(0, 2 * np.pi, 6)
    steps = np.linspace(0, 1, views)
    poses = np.tile(np.eye(4), (views, 1, 1))
    for pose, s in zip(poses, steps, strict=True):
        wave = np.sin(2 * np.pi * s * np.array([1, 2, 1, 2, 3, 2]) + phases)
        azimuth, elevation = start + turn * s, np.radians(40 + 8 * wave[0] + 2 * wave[1])
        away = 0.72 + 0.06 * wave[2]
        eye = away * np.array(
            [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
        )
        forward = np.array([0.02 * wave[3], 0.02 * wave[4], 0.05]) - eye
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.03 * wave[5], 0, 1.0])
        right /= np.linalg.norm(right)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
        pose[:3, 3] = eye
    return poses


def intrinsics(size: tuple[int, int]) -> np.ndarray:
    """K (3, 3) of pictures of (height, width): ClearPose's, scaled about the corner of the first pixel."""
    down, across = size[0] / SIZE[0], size[1] / SIZE[1]
    full = np.array([[FOCAL, 0, CENTRE[0]], [0, FOCAL, CENTRE[1]], [0, 0, 1]])
    return to_pixel_centers(np.diag([across, down, 1.0]) @ to_image_corner(full))


def render(
    table: Table, pose: np.ndarray, size: tuple[int, int], rng: np.random.Generator, supersample: int = 1
) -> dict[str, np.ndarray]:
    """One view. color (H, W, 3) uint8; depth, depth_true (H, W) float32 metres; label uint8; normal_true uint8.

    pose: world from camera. supersample: rays per pixel and axis, for colour alone.
    """
    rays = _rays(size, supersample) @ np.linalg.inv(intrinsics(size)).T
    lengths = np.linalg.norm(rays, axis=1, keepdims=True)
    origins = np.broadcast_to(pose[:3, 3], rays.shape)
    linear = trace(table.glasses, table.boxes, origins, (rays / lengths) @ pose[:3, :3].T, table.colour, sky)
    linear = linear.reshape(size[0], supersample, size[1], supersample, 3).mean((1, 3))
    color = encode_srgb(linear).astype(np.float64) + rng.normal(0, 1.5, (*size, 3))

    rays = _rays(size, 1) @ np.linalg.inv(intrinsics(size)).T
    lengths = np.linalg.norm(rays, axis=1)
    origins, directions = np.broadcast_to(pose[:3, 3], rays.shape), (rays / lengths[:, None]) @ pose[:3, :3].T
    front, n, which = nearest(table.glasses, origins, directions)
    back, m, box = nearest(table.boxes, origins, directions)
    glass = (front < back).reshape(size)
    labels = np.array([thing.label for thing in (*table.glasses, *table.boxes)])
    label = np.where(glass.ravel(), labels[which], labels[box + len(table.glasses)]).reshape(size)
    behind = np.where(np.isfinite(back), back / lengths, 0.0).reshape(size)
    exact = np.where(glass, (front / lengths).reshape(size), behind)

    measured = np.where(behind > 0, np.maximum(behind + rng.normal(0, 0.001, size), 0.001), 0.0)
    spots = _spots(rng, size)
    for region, share in ((glass, rng.uniform(0.05, 0.20)), (~glass, 0.01)):
        if region.any():
            measured[region & (spots > np.quantile(spots[region], 1 - share))] = 0.0
    normals = np.where(glass[..., None], n.reshape(*size, 3), m.reshape(*size, 3)) @ pose[:3, :3]
    normals[label == 0] = 0.0
    return {
        "color": np.clip(np.rint(color), 0, 255).astype(np.uint8),
        "depth": measured.astype(np.float32),
        "depth_true": np.where(label > 0, exact, measured).astype(np.float32),
        "label": label.astype(np.uint8),
        "normal_true": ((normals + 1) * 255 / 2).astype(np.uint8),
    }


def _rays(size: tuple[int, int], supersample: int) -> np.ndarray:
    """Pixel coordinates (N, 3), (u, v, 1), of the rays of a picture; without supersampling the pixel centres."""
    rows, columns = ((np.arange(n * supersample) + 0.5) / supersample - 0.5 for n in size)
    u, v = np.meshgrid(columns, rows)
    return np.stack([u.ravel(), v.ravel(), np.ones(u.size)], axis=1)


def _spots(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W) noise whose high parts are blots, as holes of a depth camera are."""
    field = _noise(rng, 128, 1.5)
    rows, columns = (np.linspace(0, 127, n) for n in size)
    x, y = np.meshgrid(columns, rows)
    return _bilinear(field[..., None], x.ravel(), y.ravel()).reshape(size)


def frame_record(table: Table, camera: np.ndarray, world: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """The struct of one frame in metadata.mat, fields in ClearPose's order.

    camera: table from camera (4, 4); world: world from table; bbox is (x_min, y_min, x_max, y_max), 0 where unseen.
    """
    things = [thing for thing in (*table.glasses, *table.boxes) if thing.label]
    back = np.linalg.inv(camera)
    poses = np.stack([(back @ thing.pose)[:3] for thing in things], axis=2)
    k = intrinsics((label.shape[0], label.shape[1]))
    seen = (k @ poses[:, 3, :]).T
    bbox = np.zeros((len(things), 4))
    for row, thing in zip(bbox, things, strict=True):
        v, u = np.nonzero(label == thing.label)
        if len(u):
            row[:] = u.min(), v.min(), u.max(), v.max()
    return {
        "cls_indexes": np.array([[thing.label] for thing in things]),
        "center": seen[:, :2] / seen[:, 2:],
        "factor_depth": np.array([[1000]]),
        "intrinsic_matrix": k,
        "poses": poses,
        "rotation_translation_matrix": (world @ camera)[:3],
        "bbox": bbox,
    }


def encode(kind: str, array: np.ndarray) -> bytes:
    """A picture of `render` as the bytes of its PNG."""
    if kind in ("color", "normal_true"):
        return encode_rgb(array)
    if kind in ("depth", "depth_true"):
        return encode_depth(array, "png")
    target = io.BytesIO()
    require("PIL.Image", "vggt", "writing pictures").fromarray(array).save(target, "PNG")
    return target.getvalue()


def write_scene(
    folder: Path,
    seed: int | Iterable[int],
    views: int = 12,
    size: tuple[int, int] = SIZE,
    supersample: int = 1,
    progress: Callable[[int], object] = lambda done: None,
    draw: Callable[[np.random.Generator, int], tuple[Table, np.ndarray]] | None = None,
) -> None:
    """Draw one scene and write it, whole or not at all; one that stands there already is left as it is.

    The unfinished scene is `.<name>.partial` beside the folder; what a killed run left there is taken up again, if it
    was drawn with the same settings. ValueError where the folder holds another scene. The world is the first camera,
    as tracking has it. progress(n) is called after n more views. draw: generator, views -> table and cameras (None:
    `draw_table` and `arc`); it is the caller's part to give other seeds to another one.
    """
    if views < 1 or min(size) < 8 or supersample < 1:
        raise ValueError(f"{views} views of {size[0]} x {size[1]} pixels: give 1 or more, of 8 x 8 or more.")
    key = [seed] if isinstance(seed, int) else list(seed)
    settings = {"format": FORMAT, "seed": key, "views": views, "size": list(size), "supersample": supersample}
    if folder.is_dir():
        if (found := _settings(folder)) != settings:
            raise ValueError(f"{folder} holds another scene ({found}), not {settings}: give another folder.")
        progress(views)
        return
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.is_dir() and _settings(partial) != settings:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(partial / SETTINGS, json_bytes(settings))
    rng = np.random.default_rng([*key, 0])
    table, cameras = (draw_table(rng), arc(rng, views)) if draw is None else draw(rng, views)
    record = {}
    for index, camera in enumerate(cameras):
        stem = f"{100 * index:06d}"
        label_file = partial / f"{stem}-label.png"  # written last
        if label_file.is_file():
            with require("PIL.Image", "vggt", "reading pictures").open(label_file) as picture:
                label = np.asarray(picture)
        else:
            pictures = render(table, camera, size, np.random.default_rng([*key, 1 + index]), supersample)
            for kind in ("color", "depth", "depth_true", "normal_true", "label"):
                write_atomically(partial / f"{stem}-{kind}.png", encode(kind, pictures[kind]))
            label = pictures["label"]
        record[stem] = frame_record(table, camera, np.linalg.inv(cameras[0]), label)
        progress(1)
    write_atomically(partial / "metadata.mat", encode_metadata(record))
    for unfinished in partial.glob(".*.tmp"):  # of a run that was killed while it wrote
        unfinished.unlink()
    os.replace(partial, folder)


def encode_metadata(record: dict[str, Any]) -> bytes:
    """The bytes of a metadata.mat: a struct per frame."""
    target = io.BytesIO()
    require("scipy.io", "eval", "writing metadata.mat").savemat(target, record, do_compression=True)
    return target.getvalue()


def _settings(folder: Path) -> Any:
    try:
        return json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError):
        return None


def scene_seed(name: str, seed: int = 0) -> tuple[int, int, int]:
    """The key of a scene "set3/scene8", so that a scene does not depend on which others are made: (seed, 3, 8)."""
    group, scene = name.split("/")
    return seed, int(group.removeprefix("set")), int(scene.removeprefix("scene"))


__all__ = ["SIZE", "Table", "arc", "draw_table", "render", "scene_seed", "write_scene"]
