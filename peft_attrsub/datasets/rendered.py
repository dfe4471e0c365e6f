"""Rendered test sets in the layout of the paper's release: synthetic faces, and clothed humans (THuman2.1, 2K2K).

    faces    <root>/<scene>/<view>/renderings/00000007_rgba.png   name "<scene>|<view>"
    humans   <root>/<id>/renderings/007_rgba.png                  name "<id>"

and beside each picture `*_depth.exr` (or .npy, planar z), for faces `*_mask.npy`; beside `renderings` the cameras,
`opencv_cameras.json`. `writing.RenderedWriter` writes the same.

Cameras in that file count from the image's corner, so that cx = w / 2 is the middle of the image: the reader gives
them with integers at pixel centers (`to_pixel_centers`, see `sample`). Its rotations may carry the scale of the
scene: each column is divided by its norm. The background of Blender's depth, 1e10, becomes 0.
Source: release of arXiv 2604.10095.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..vggt.cameras import to_pixel_centers
from .base import Frames, MultiViewDataset
from .pictures import read_colour, read_depth, read_mask
from .resizing import resize_intrinsics
from .sample import Sample
from .writing import CAMERAS

#: Depths between these are measured; Blender's background is 1e10.
NEAREST, FARTHEST = 1e-4, 1e9


@dataclass(frozen=True)
class _Frame:
    """prefix: of the frame's files. size: (height, width) that K (3, 3), in the file's coordinates, is for."""

    prefix: str
    size: tuple[int, int]
    intrinsic: np.ndarray
    extrinsic: np.ndarray


class RenderedDataset(MultiViewDataset):
    """Rendered sequences; which of the two layouts it is shows in the folders.

    views: how many frames `dataset[i]` gives, evenly from the first, k n // views of n frames: the release's 7 of 42
    for faces (0, 6, ..., 36) and 8 of 96 for humans (0, 12, ..., 84). None: all of them.
    masks: True for face masks that must be there, False to count every pixel with a depth, None to take those that
    there are. unit: of the depths, for people.
    """

    layout = (
        f"expected <scene>/<view>/{CAMERAS} (faces) or <id>/{CAMERAS} (humans), with the pictures in renderings/ "
        "beside it."
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        sequences: Mapping[str, Frames] | str | os.PathLike[str] | None = None,
        *,
        views: int | None = None,
        masks: bool | None = None,
        unit: str = "scene",
    ) -> None:
        if views is not None and views < 1:
            raise ValueError(f"{views} views of each sequence were asked for: give 1 or more, or None for all.")
        self.views, self.masks, self.unit = views, masks, unit
        self._cameras: dict[str, dict[str, _Frame]] = {}
        super().__init__(root, sequences)

    def _find(self) -> list[str]:
        found = [path.parent.relative_to(self.root).parts for path in self.root.glob(f"*/{CAMERAS}")]
        found += [path.parent.relative_to(self.root).parts for path in self.root.glob(f"*/*/{CAMERAS}")]
        return ["|".join(parts) for parts in sorted(found) if not any(part.startswith(".") for part in parts)]

    def folder(self, name: str) -> Path:
        """Where a sequence lies."""
        return self.root.joinpath(*name.split("|"))

    def frames(self, name: str) -> list[str]:
        return list(self._frames(name))

    def default_frames(self, name: str) -> list[str]:
        known = self.frames(name)
        count = len(known) if self.views is None else min(self.views, len(known))
        return [known[index * len(known) // count] for index in range(count)]

    def _frames(self, name: str) -> dict[str, _Frame]:
        if name not in self._cameras:
            self._cameras[name] = _read_cameras(self.folder(name))
        return self._cameras[name]

    def _read(self, name: str, frames: list[str]) -> Sample:
        images, depths, masks, intrinsics, extrinsics = [], [], [], [], []
        folder = self.folder(name) / "renderings"
        some_masks = self.masks is None and next(folder.glob("*_mask.npy"), None) is not None
        for frame in (self._frames(name)[frame] for frame in frames):
            images.append(read_colour(folder / f"{frame.prefix}_rgba.png"))
            if images[-1].shape[:2] != frame.size:
                raise ValueError(
                    f"{folder / frame.prefix}_rgba.png has {images[-1].shape[0]} x {images[-1].shape[1]} pixels, "
                    f"{CAMERAS} says {frame.size[0]} x {frame.size[1]}: they belong to different renderings."
                )
            depth = _depth(folder, frame.prefix)
            with np.errstate(invalid="ignore"):
                valid = (depth > NEAREST) & (depth < FARTHEST)
            depths.append(np.where(valid, depth, np.float32(0)))
            if self.masks or some_masks:
                valid = valid & self._mask(folder / f"{frame.prefix}_mask.npy", depth.shape)
            masks.append(valid)
            intrinsic = to_pixel_centers(torch.from_numpy(frame.intrinsic))
            intrinsics.append(resize_intrinsics(intrinsic, frame.size, (depth.shape[0], depth.shape[1])))
            extrinsics.append(frame.extrinsic)
        if len({image.shape for image in images}) > 1 or len({depth.shape for depth in depths}) > 1:
            raise ValueError(f"{folder} has pictures of different sizes: read frames of one size, or render it again.")
        return Sample(
            name=name,
            frames=tuple(frames),
            images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            depths=torch.from_numpy(np.stack(depths)),
            point_masks=torch.from_numpy(np.stack(masks)),
            intrinsics=torch.stack(intrinsics),
            extrinsics=torch.from_numpy(np.stack(extrinsics)),
            unit=self.unit,
        )

    def _mask(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: make the masks, or read with masks=False to count every pixel with a depth."
            )
        mask = read_mask(path)
        if mask.shape != shape:
            raise ValueError(f"{path} has the shape {mask.shape}, its depth map {shape}: make the masks again.")
        return mask


def _depth(folder: Path, prefix: str) -> np.ndarray:
    for suffix in (".exr", ".npy"):
        if (path := folder / f"{prefix}_depth{suffix}").exists():
            return read_depth(path)
    raise FileNotFoundError(f"{folder / prefix}_depth.exr (or .npy) does not exist: the sequence is not complete.")


def _read_cameras(folder: Path) -> dict[str, _Frame]:
    """Id of each frame, as its files begin, to its camera; a ValueError names the file and the frame."""
    path = folder / CAMERAS
    try:
        records = json.loads(path.read_bytes())["frames"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} holds no cameras ({error!r}): expected {{"frames": [...]}}, make it again.'
        ) from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} has no frames: make it again.")
    frames = {}
    for prefix, record in zip(_prefixes(folder, records), records, strict=True):
        try:
            size = (int(record["h"]), int(record["w"]))
            fx, fy, cx, cy = (float(record[key]) for key in ("fx", "fy", "cx", "cy"))
            w2c = np.asarray(record["w2c"], np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: frame {prefix} is damaged ({error!r}): make the file again.") from error
        if w2c.shape not in ((3, 4), (4, 4)) or not np.isfinite(w2c).all() or not np.isfinite([fx, fy, cx, cy]).all():
            raise ValueError(f"{path}: frame {prefix} has no finite 4 x 4 w2c and fx, fy, cx, cy: make it again.")
        norms = np.linalg.norm(w2c[:3, :3], axis=0)
        if min(fx, fy, *size, *norms) <= 0:
            raise ValueError(f"{path}: frame {prefix} has a size, focal length or axis that is not greater than 0.")
        extrinsic = np.concatenate([w2c[:3, :3] / norms, w2c[:3, 3:]], axis=1)
        frames[prefix] = _Frame(prefix, size, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), extrinsic)
    return frames


def _prefixes(folder: Path, records: list[object]) -> list[str]:
    """What each frame's files begin with: the digits of its `file_path`, else its place with as many digits as the
    files have."""
    paths = [str(record.get("file_path", "")) if isinstance(record, dict) else "" for record in records]
    matches = [re.match(r"\d+", re.split(r"[/\\]", path)[-1]) for path in paths]
    numbers = [match.group() for match in matches if match]
    if len(set(numbers)) == len(records):
        return numbers
    first = next(folder.glob("renderings/*_rgba.png"), None)
    digits = len(first.name.partition("_")[0]) if first else 3
    return [f"{index:0{digits}d}" for index in range(len(records))]


__all__ = ["RenderedDataset"]
