"""A small world whose every surface is known, for fixtures: the chequered floor and block of tests/scenes/tiny.py."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch

from peft_attrsub.datasets.sample import Sample
from peft_attrsub.scenes.description import Scene
from peft_attrsub.scenes.storage import extrinsic
from peft_attrsub.scenes.view import View
from peft_attrsub.vggt.cameras import unproject
from tests.scenes.tiny import BLOCK, TinyRecipe, TinyRenderer
from tests.scenes.tiny import sample as tiny_scene


def scene(views: int = 3, size: int = 64, index: int = 0) -> Scene:
    """Wider than high, so that no reader can mix up the two; its cameras look through the middle of 64 columns."""
    return replace(tiny_scene(TinyRecipe(views=views, size=size), index), width=size + 5)


@cache
def views(count: int = 3, size: int = 64, index: int = 0) -> tuple[View, ...]:
    renderer = TinyRenderer(scene(count, size, index))
    return tuple(renderer.render(view) for view in range(count))


def world_to_camera(scene: Scene, view: int) -> np.ndarray:
    """(4, 4), OpenCV axes."""
    return np.vstack([extrinsic(scene.cameras[view]), [0.0, 0.0, 0.0, 1.0]])


def distance_from_surfaces(points: np.ndarray) -> np.ndarray:
    """Of each point (..., 3) from the floor or the sides of the block, whichever is nearer."""
    floor = np.abs(points[..., 2])
    low, high = (np.array(corner) for corner in BLOCK)
    outside = np.maximum(np.maximum(low - points, points - high), 0)
    inside = np.minimum(points - low, high - points).min(-1)
    block = np.where(inside > 0, inside, np.linalg.norm(outside, axis=-1))
    distance: np.ndarray = np.minimum(floor, block)
    return distance


def farthest_from_surfaces(sample: Sample) -> float:
    """The largest distance of an unprojected valid pixel from what was rendered: half a pixel shows as centimetres."""
    assert sample.extrinsics is not None
    points = unproject(sample.depths.double(), sample.intrinsics, sample.extrinsics)
    return float(distance_from_surfaces(points[sample.point_masks].numpy()).max())


def make_sample(count: int = 3, size: int = 64) -> Sample:
    """What a faultless reader makes of the world."""
    given, pictures = scene(count, size), views(count, size)
    k = [[[c.fx, 0, c.cx - 0.5], [0, c.fy, c.cy - 0.5], [0, 0, 1]] for c in given.cameras]
    depths = torch.from_numpy(np.stack([view.depth for view in pictures]))
    return Sample(
        name="world",
        frames=tuple(str(index) for index in range(count)),
        images=torch.from_numpy(np.stack([view.rgb for view in pictures])).permute(0, 3, 1, 2).float() / 255,
        depths=depths,
        point_masks=depths > 0,
        intrinsics=torch.tensor(k, dtype=torch.float64),
        extrinsics=torch.from_numpy(np.stack([world_to_camera(given, index)[:3] for index in range(count)])),
        labels=torch.from_numpy(np.stack([view.ids for view in pictures]).astype(np.int64)),
    )
