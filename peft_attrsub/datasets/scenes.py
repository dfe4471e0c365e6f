"""The datasets of synthetic scenes that `peft_attrsub.scenes` generates.

Their cameras count from the image's corner, the center of the first pixel being (1/2, 1/2): the reader gives them
with integers at pixel centers (`to_pixel_centers`). Depth is planar z in metres.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from ..scenes import storage
from ..scenes.dataset import DATASET, Dataset, scene_name
from ..scenes.description import Scene
from ..scenes.posed import moving_ids
from ..vggt.cameras import to_pixel_centers
from .base import MultiViewDataset
from .sample import Sample


class SceneDataset(MultiViewDataset):
    """Finished scenes of one generated dataset, or of all of those that lie in a folder.

    A scene of a dataset that is the root itself is called "scene_00003"; of one below it, "texture_00/scene_00003".
    Scenes that are not finished are left out. `labels` are the ids of the objects. The unit is metres.
    """

    layout = f"expected a folder with {DATASET} and scene_00000/ ..., or a folder of such folders."

    def _find(self) -> list[str]:
        found = []
        for folder in _datasets(self.root):
            dataset = Dataset.open(folder)
            stem = folder.relative_to(self.root)
            found += [(stem / scene_name(index)).as_posix() for index in dataset.finished()]
        return found

    def folder(self, name: str) -> Path:
        """Where a scene lies."""
        return self.root / name

    def frames(self, name: str) -> list[str]:
        return [f"{index:05d}" for index in range(storage.read_manifest(self.folder(name))["views"])]

    def moving(self, name: str) -> list[int]:
        """Object ids that the scene's description moves."""
        text = (self.folder(name) / storage.DESCRIPTION).read_text(encoding="utf-8")
        return moving_ids(Scene.from_json(text))

    def _read(self, name: str, frames: list[str]) -> Sample:
        scene = storage.read_scene(self.folder(name), [int(frame) for frame in frames])
        depths = torch.from_numpy(scene["depth"])
        return Sample(
            name=name,
            frames=tuple(frames),
            images=torch.from_numpy(scene["images"]).permute(0, 3, 1, 2).contiguous().float() / 255,
            depths=depths,
            point_masks=depths > 0,
            intrinsics=to_pixel_centers(torch.from_numpy(scene["intrinsic"])),
            extrinsics=torch.from_numpy(scene["extrinsic"]),
            labels=torch.from_numpy(scene["ids"].astype(np.int64)),
            unit="m",
        )


def _datasets(root: Path) -> list[Path]:
    """The folders at or under `root` that hold a dataset, sorted; nothing below one is looked at."""
    found = []
    for folder, below, files in os.walk(root):
        if DATASET in files:
            found.append(Path(folder))
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
    return sorted(found)


__all__ = ["SceneDataset"]
