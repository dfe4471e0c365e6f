"""Tables with glasses, seen from cameras that differ from scene to scene, in ClearPose's layout.

The stand-in's own walk around the table is the same in every scene, and so are, to a scale, the depths: a model that
looks at no picture is nearly as good. Here height, distance, slant and aim of the camera are each scene's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

#: Of a path of cameras: elevation and how far it is turned, degrees; distance, metres; of the other domain, lower.
ELEVATION, LOW, TURN, ROLL, AWAY = (25.0, 65.0), (12.0, 25.0), (30.0, 60.0), 40.0, (0.5, 1.0)


def write_table(folder: Path, key: Sequence[int], views: int, pixels: tuple[int, int], other: bool) -> None:
    """One scene, whole or not at all. pixels: (height, width). other: of another domain, with a striped or spotted
    table, taller and narrower glasses of lower index, and low cameras."""
    from standins import glasses as g

    from peft_attrsub.scenes.storage import write_atomically

    if folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rng = np.random.default_rng([*key, 0])
    table = g.draw_table(rng)
    if other:
        glasses = [_taller(one) for one in table.glasses]
        table = replace(table, glasses=glasses, pattern=_other_pattern(rng), period=0.5 * table.period)
    cameras = path(rng, views, LOW if other else ELEVATION)
    record = {}
    for number, camera in enumerate(cameras):
        stem, found = f"{100 * number:06d}", g.render(table, camera, pixels, np.random.default_rng([*key, 1 + number]))
        for kind, picture in found.items():
            write_atomically(partial / f"{stem}-{kind}.png", g.encode(kind, picture))
        record[stem] = g.frame_record(table, camera, np.linalg.inv(cameras[0]), found["label"])
    write_atomically(partial / "metadata.mat", g.encode_metadata(record))
    os.replace(partial, folder)


def path(rng: np.random.Generator, views: int, elevation: tuple[float, float]) -> np.ndarray:
    """World from camera (views, 4, 4), OpenCV axes: an arc around a point on the table, held at one slant."""
    start, turn = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(*TURN)) * rng.choice([-1, 1])
    rise, dip = np.radians(rng.uniform(*elevation)), np.radians(rng.uniform(-7, 7))
    away, nearer, roll = rng.uniform(*AWAY), rng.uniform(-0.15, 0.15), np.radians(rng.uniform(-ROLL, ROLL))
    aim = np.array([*rng.uniform(-0.12, 0.12, 2), 0.05])
    c, s = np.cos(roll), np.sin(roll)
    poses = np.tile(np.eye(4), (views, 1, 1))
    for pose, along in zip(poses, np.linspace(0, 1, views), strict=True):
        angle, height, distance = start + turn * along, rise + dip * (along - 0.5), away * (1 + nearer * (along - 0.5))
        outward = [np.cos(angle) * np.cos(height), np.sin(angle) * np.cos(height), np.sin(height)]
        eye = aim * [1, 1, 0] + distance * np.array(outward)
        forward = (aim - eye) / np.linalg.norm(aim - eye)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        down = np.cross(forward, right)
        pose[:3, :3] = np.stack([c * right + s * down, c * down - s * right, forward], axis=1)
        pose[:3, 3] = eye
    return poses


def _taller(glass: Any) -> Any:
    """The same glass at 1.35 of its height and 0.85 of its width, so that none touch, and of a lower index."""
    pose = glass.pose.copy()
    if pose[2, 2] < 0:  # it stands upside down, at its own height
        pose[2, 3] *= 1.35
    return replace(glass, meridian=glass.meridian * [0.85, 1.35], pose=pose, ior=1.0 + 0.7 * (glass.ior - 1.0))


def _other_pattern(rng: np.random.Generator) -> np.ndarray:
    """(256, 256, 3) linear: stripes or spots in two strong colours, without the wood's grain."""
    u, v = np.meshgrid(np.arange(256), np.arange(256))
    spots = (u % 64 - 32) ** 2 + (v % 64 - 32) ** 2 < 20**2
    mix = (spots if rng.random() < 0.5 else (u + v) // 16 % 2 == 0)[..., None]
    first, second = rng.uniform(0.02, 0.25, 3), rng.uniform(0.5, 0.9, 3)
    return np.where(mix, first, second)
