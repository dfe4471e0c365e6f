"""Batches for pre-training: a few views of each scene near each other on its path, mildly changed in colour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_attrsub.vggt.cameras import to_pixel_centers

from .scenes import Shards

#: Farther pixels than this many metres would outweigh a scene; a room is 8 m long.
FAR = 30.0


def choose_views(total: int, views: int, reach: float, rng: np.random.Generator) -> np.ndarray:
    """`views` different numbers below `total` in random order, out of a window of the path.

    reach in [0, 1]: 0 takes a window of just `views` neighbours, 1 the whole path.
    """
    window = views + round(reach * (total - views))
    start = rng.integers(total - window + 1)
    return start + rng.permutation(window)[:views]


def make_batch(rows: list[np.ndarray], chosen: list[np.ndarray]) -> dict[str, Tensor]:
    """Rows of the cache and views of each to the tensors that the losses know (see peft_attrsub.vggt.batch)."""
    images = np.stack([row["images"][views] for row, views in zip(rows, chosen, strict=True)])
    depths = np.stack([row["depths"][views] for row, views in zip(rows, chosen, strict=True)]).astype(np.float32)
    poses = np.stack([row["poses"][views] for row, views in zip(rows, chosen, strict=True)])
    focal = torch.from_numpy(np.stack([row["focal"] for row in rows]))
    size = depths.shape[-1]
    intrinsics = torch.zeros(*poses.shape[:2], 3, 3)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal[:, None]
    intrinsics[..., 0, 2] = intrinsics[..., 1, 2] = size / 2  # from the image's corner
    intrinsics[..., 2, 2] = 1
    intrinsics = to_pixel_centers(intrinsics)
    depths = torch.from_numpy(depths)
    return {
        "images": torch.from_numpy(images).permute(0, 1, 4, 2, 3).float() / 255,
        "depths": depths,
        "extrinsics": torch.from_numpy(poses),
        "intrinsics": intrinsics,
        "point_masks": (depths > 0) & (depths < FAR),
    }


def change_colours(images: Tensor, rng: np.random.Generator) -> Tensor:
    """(B, S, 3, H, W) in [0, 1] with channels mixed, brightness and contrast, one way for all views of a scene.

    x <- clip((x P) g + o): P permutes the channels, g (3,) in U(0.7, 1.3), o in U(-0.1, 0.1).
    """
    b = images.shape[0]
    order = torch.from_numpy(np.stack([rng.permutation(3) for _ in range(b)]))
    gain = torch.from_numpy(rng.uniform(0.7, 1.3, (b, 1, 3, 1, 1)).astype(np.float32))
    offset = torch.from_numpy(rng.uniform(-0.1, 0.1, (b, 1, 1, 1, 1)).astype(np.float32))
    mixed = torch.stack([image[:, channels] for image, channels in zip(images, order, strict=True)])
    return mixed.mul_(gain).add_(offset).clamp_(0, 1)


def mirror(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All views as in a mirror: pictures left to right, E <- F E F with F = diag(-1, 1, 1, 1).

    The principal point has to be the middle, as it is in the cache.
    """
    turned = batch["extrinsics"].clone()
    turned[..., 0, 1:] *= -1
    turned[..., 1:, 0] *= -1
    maps = {key: batch[key].flip(-1) for key in ("images", "depths", "point_masks")}
    return batch | maps | {"extrinsics": turned}


def training_batch(shards: Shards, scenes: int, views: int, reach: float, seed: int, step: int) -> dict[str, Any]:
    """The batch of one step: `scenes` of the cache at random; the same seed and step give the same batch."""
    rng = np.random.default_rng([seed, step])
    rows = [shards[int(index)] for index in rng.choice(len(shards), scenes, replace=len(shards) < scenes)]
    chosen = [choose_views(shards.scenes.views, views, reach, rng) for _ in rows]
    batch = make_batch(rows, chosen)
    batch["images"] = change_colours(batch["images"], rng)
    return mirror(batch) if rng.random() < 0.5 else batch


def heldout_batches(shards: Shards, views: int, batch: int = 16) -> Iterator[dict[str, Any]]:
    """Every scene once, `views` views drawn over the whole path by a generator of the scene's number."""
    for first in range(0, len(shards), batch):
        numbers = range(first, min(first + batch, len(shards)))
        chosen = [choose_views(shards.scenes.views, views, 1.0, np.random.default_rng(number)) for number in numbers]
        yield make_batch([shards[number] for number in numbers], chosen)
