"""Tables with glasses, seen from cameras that differ from scene to scene, in ClearPose's layout.

The stand-in's own walk around the table is the same in every scene, and so are, to a scale, the depths: a model that
looks at no picture is nearly as good. Here height, distance, slant and aim of the camera are each scene's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

#: Of a path of cameras: elevation and how far it is turned, degrees; distance, metres; of the other domain, lower.
ELEVATION, LOW, TURN, ROLL, AWAY = (25.0, 65.0), (12.0, 25.0), (30.0, 60.0), 40.0, (0.5, 1.0)


def draw_table(rng: np.random.Generator, views: int) -> tuple[Any, np.ndarray]:
    """A table of the stand-in, and cameras of its own."""
    from standins import glasses

    return glasses.draw_table(rng), path(rng, views, ELEVATION)


def draw_other(rng: np.random.Generator, views: int) -> tuple[Any, np.ndarray]:
    """Of another domain: striped or spotted, with taller and narrower glasses of lower index, and low cameras."""
    from standins import glasses

    table = glasses.draw_table(rng)
    standing = [_taller(one) for one in table.glasses]
    table = replace(table, glasses=standing, pattern=_other_pattern(rng), period=0.5 * table.period)
    return table, path(rng, views, LOW)


def path(rng: np.random.Generator, views: int, elevation: tuple[float, float]) -> np.ndarray:
    """World from camera (views, 4, 4), OpenCV axes: an arc around a point on the table, held at one slant."""
    from standins.stages import slant

    from peft_attrsub.scenes.trajectories import look_at

    start, turn = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(*TURN)) * rng.choice([-1, 1])
    rise, dip = np.radians(rng.uniform(*elevation)), np.radians(rng.uniform(-7, 7))
    away, nearer, roll = rng.uniform(*AWAY), rng.uniform(-0.15, 0.15), rng.uniform(-ROLL, ROLL)
    aim = np.array([*rng.uniform(-0.12, 0.12, 2), 0.05])
    along = np.linspace(0, 1, views)
    angle, height = start + turn * along, rise + dip * (along - 0.5)
    outward = np.stack([np.cos(angle) * np.cos(height), np.sin(angle) * np.cos(height), np.sin(height)], axis=1)
    eyes = aim * [1, 1, 0] + (away * (1 + nearer * (along - 0.5)))[:, None] * outward
    return np.asarray(look_at(eyes, aim) @ slant(roll))


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
