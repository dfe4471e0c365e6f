"""ClearPose: transparent household objects on tables, seen by a depth camera that they fool, with the true depth.

    <root>/set3/scene8/metadata.mat              cameras and object poses of all frames (see `clearpose_cameras`)
    <root>/set3/scene8/000100-color.png          RGB, 640 x 480
    <root>/set3/scene8/000100-depth.png          what the camera measured: uint16 millimetres, 0 where nothing
    <root>/set3/scene8/000100-depth_true.png     the same with the rendered depth of the objects written over it
    <root>/set3/scene8/000100-label.png          uint8 object ids: 0 none, 1-63 transparent, 200 and more opaque

Conventions: K is calibrated in OpenCV's convention, integer coordinates at pixel centres, and is used unchanged; the
stored poses are world from camera and are inverted; depth is divided by the file's factor_depth, to metres.
Source: ClearPose (arXiv 2203.03890); split and frames of the paper's release (VGGT subspaces, arXiv 2604.10095),
which reads every 100th frame: all of the public clearpose_downsample_100.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._extras import require
from .._pictures import decode_picture
from .base import Frames, MultiViewDataset
from .clearpose_cameras import SceneCameras, scene_cameras
from .sample import Sample
from .splits import CLEARPOSE_SPLITS

#: A depth counts above this, in metres.
NEAREST = 1e-4
#: Object ids that are transparent.
TRANSPARENT = (1, 63)
#: Frames of a test sequence.
TEST_VIEWS = 12
COLOR, DEPTH, DEPTH_TRUE, LABEL = "color", "depth", "depth_true", "label"
NAME = re.compile(r"set(\d+)/scene(\d+)")
COLOR_FILE = re.compile(r"(\d{6})-color\.png")


def transparent(sample: Sample) -> Tensor:
    """Pixels (S, h, w) bool that count and show a transparent object: point_masks and 1 <= label <= 63.

    The opaque table fills most of a picture, so numbers over all of it say little about glass. ValueError for a
    sample without labels.
    """
    if sample.labels is None:
        raise ValueError(f"{sample.name} has no labels: the pixels of its transparent objects are not known.")
    low, high = TRANSPARENT
    return sample.point_masks & (sample.labels >= low) & (sample.labels <= high)


def spaced(count: int, total: int) -> list[int]:
    """`count` numbers from 0 to total - 1, evenly: int(i / (count - 1) * (total - 1)); all where there are fewer."""
    if count >= total:
        return list(range(total))
    if count == 1:
        return [0]
    return [int(i / (count - 1) * (total - 1)) for i in range(count)]


def split_scenes(split: str) -> list[str]:
    """Names of the scenes of a split, "set3/scene8", ...: see `splits.CLEARPOSE_SPLITS`."""
    if split not in CLEARPOSE_SPLITS:
        raise ValueError(f"there is no split {split!r} of ClearPose: give one of {', '.join(CLEARPOSE_SPLITS)}.")
    return ["/".join(pair) for pair in CLEARPOSE_SPLITS[split]]


def scenes_on_disk(root: Path) -> list[str]:
    """Names of all scene folders under the root, sorted by their numbers."""
    found = [
        f"{folder.parent.name}/{folder.name}"
        for folder in root.glob("set*/scene*")
        if NAME.fullmatch(f"{folder.parent.name}/{folder.name}") and folder.is_dir()
    ]
    return sorted(found, key=lambda name: [int(part) for part in NAME.findall(name)[0]])


def frame_file(folder: Path, frame: str, kind: str) -> Path:
    """Path of a frame's picture; kind: "color", "depth", "depth_true", "label", "normal_true"."""
    return folder / f"{frame}-{kind}.png"


def usable_frames(
    folder: Path, cameras: SceneCameras, every: int = 1, depth: str = DEPTH_TRUE
) -> tuple[list[str], dict[str, str]]:
    """Ids of the frames that can be read, and of those that cannot, with the reason: "no depth_true.png".

    Both of the multiples of `every` that have a colour picture or a camera.
    """
    here = {match[1] for name in os.listdir(folder) if (match := COLOR_FILE.fullmatch(name))}
    posed, named = set(cameras.index()), {str(frame) for frame in cameras.frames}
    good, bad = [], {}
    for frame in sorted(here | named):
        if int(frame) % every:
            continue
        if frame not in here:
            bad[frame] = "no color.png"
        elif not frame_file(folder, frame, depth).is_file():
            bad[frame] = f"no {depth}.png"
        elif frame not in posed:
            bad[frame] = "no pose" if frame in named else "not in metadata.mat"
        else:
            good.append(frame)
    return good, bad


def read_picture(path: Path, mode: str) -> np.ndarray:
    """A picture as (H, W, 3) uint8 for the mode "RGB", or as its plain numbers (H, W) for "L"; errors name it."""
    require("PIL.Image", "vggt", "reading ClearPose")
    try:
        picture = decode_picture(path)
        array = np.asarray(picture.convert("RGB") if mode == "RGB" else picture)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: the scene was not downloaded as a whole.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a readable picture ({error}): download it again.") from error
    if array.ndim != (3 if mode == "RGB" else 2):
        raise ValueError(f"{path} has the shape {array.shape}: expected one number per pixel.")
    return array


class _Scene(NamedTuple):
    cameras: SceneCameras
    rows: dict[str, int]  # frame -> its row in cameras
    frames: list[str]
    left_out: dict[str, str]


class ClearPoseDataset(MultiViewDataset):
    """Scenes of ClearPose: `ClearPoseDataset(root)[0]`, or by name: `.read("set3/scene8")`.

    split: "test" (19 scenes) or "train" (32), both of the paper's release; "all": whatever is on disk (51);
    "authors-train" (24) or "authors-test" (27), ClearPose's own. Scenes of it that are not on disk are in `absent`.
    every: only frames whose id is a multiple of it; 100 is the paper's. views: how many of them `default_frames`
    picks, evenly, 0 for all; None is the protocol: 12, and all to train on. depth: "depth_true", or "depth" for what
    the camera measured, which sees through the glass. nearer_than: quantile of a view's depths above which pixels do
    not count; the release trains with 0.98 and tests with 1. cache: folder for the cameras read from metadata.mat;
    None is beside it, or the user's cache folder where that cannot be written.

    Sample: depths in metres; point_masks where depth > 1e-4; labels where every view has label.png, else None.
    """

    layout = "expected set1/scene1/metadata.mat, set1/scene1/000000-color.png, ..., with scenes of the split."

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "test",
        sequences: Mapping[str, Frames] | str | os.PathLike[str] | None = None,
        *,
        every: int = 100,
        views: int | None = None,
        depth: str = DEPTH_TRUE,
        nearer_than: float = 1.0,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if every < 1 or (views is not None and views < 0):
            raise ValueError(f"every is {every} and views {views}: give 1 or more, and 0 or more.")
        if depth not in (DEPTH, DEPTH_TRUE):
            raise ValueError(f"depth is {depth!r}: give depth_true, or depth for what the camera measured.")
        if not 0 < nearer_than <= 1:
            raise ValueError(f"nearer_than is {nearer_than}: give a quantile above 0 and up to 1.")
        self.split, self.every, self.depth, self.nearer_than, self.cache = split, every, depth, nearer_than, cache
        self.views = views if views is not None else 0 if split.endswith("train") else TEST_VIEWS
        self.absent: tuple[str, ...] = ()
        self._known: dict[str, _Scene] = {}
        super().__init__(root, sequences)

    def _find(self) -> list[str]:
        present = scenes_on_disk(self.root)
        wanted = split_scenes(self.split)
        self.absent = tuple(name for name in wanted if name not in present)
        if self.split == "all":
            return present
        return [name for name in wanted if name in present]

    def _scene(self, name: str) -> _Scene:
        if name not in self._known:
            folder = self.root / name
            cameras = scene_cameras(folder, self.cache)
            good, bad = usable_frames(folder, cameras, self.every, self.depth)
            if not good:
                first = next(iter(bad.items()), ("none", "no frame is a multiple of `every`"))
                raise ValueError(f"{folder} has no frame to read ({first[0]}: {first[1]}): download it again.")
            self._known[name] = _Scene(cameras, cameras.index(), good, bad)
        return self._known[name]

    def frames(self, name: str) -> list[str]:
        return self._scene(name).frames

    def left_out(self, name: str) -> dict[str, str]:
        """Frames of a scene that cannot be read -> why: "no depth_true.png", "no pose", ..."""
        return self._scene(name).left_out

    def default_frames(self, name: str) -> list[str]:
        known = self.frames(name)
        return [known[index] for index in spaced(self.views, len(known))] if self.views else known

    def cameras(self, name: str) -> SceneCameras:
        """Cameras and object poses of all frames in metadata.mat."""
        return self._scene(name).cameras

    def _pictures(self, folder: Path, frame: str, kinds: list[str]) -> list[np.ndarray]:
        """Colour (H, W, 3) and the maps (H, W) of these kinds, all of one size."""
        colour = read_picture(frame_file(folder, frame, COLOR), "RGB")
        maps = [read_picture(frame_file(folder, frame, kind), "L") for kind in kinds]
        for kind, array in zip(kinds, maps, strict=True):
            if array.shape != colour.shape[:2]:
                raise ValueError(
                    f"{frame_file(folder, frame, kind)} is {array.shape} pixels and the colour {colour.shape[:2]}: "
                    "all pictures of a frame have one size; download them again."
                )
        return [colour, *maps]

    def _counting(self, depths: Tensor) -> Tensor:
        """point_masks of depths (S, h, w): above NEAREST, and of each view not above its quantile `nearer_than`."""
        mask = depths > NEAREST
        if self.nearer_than < 1:
            for view, there in zip(depths.double(), mask, strict=True):
                if bool(there.any()):
                    there &= view <= float(np.quantile(view[there].numpy(), self.nearer_than))
        return mask

    def _read(self, name: str, frames: list[str]) -> Sample:
        scene, folder = self._scene(name), self.root / name
        rows = [scene.rows[frame] for frame in frames]
        has_labels = all(frame_file(folder, frame, LABEL).is_file() for frame in frames)
        kinds = [self.depth, LABEL] if has_labels else [self.depth]
        views = [self._pictures(folder, frame, kinds) for frame in frames]
        for frame, view in zip(frames, views, strict=True):
            if view[0].shape != views[0][0].shape:
                raise ValueError(f"{frame_file(folder, frame, COLOR)} has another size than those before it.")
        colours, stored, *labels = (np.stack(pictures) for pictures in zip(*views, strict=True))
        metres = (stored / scene.cameras.factors[rows][:, None, None]).astype(np.float32)
        depths = torch.from_numpy(np.where(metres > NEAREST, metres, np.float32(0)))
        back = scene.cameras.world_from_camera[rows]
        rotation = back[:, :, :3].transpose(0, 2, 1)
        return Sample(
            name=name,
            frames=tuple(frames),
            images=torch.from_numpy(colours).permute(0, 3, 1, 2).float() / 255,
            depths=depths,
            point_masks=self._counting(depths),
            intrinsics=torch.from_numpy(scene.cameras.intrinsics[rows]),
            extrinsics=torch.from_numpy(np.concatenate([rotation, -rotation @ back[:, :, 3:]], axis=2)),
            labels=torch.from_numpy(labels[0].astype(np.int64)) if labels else None,
            unit="m",
        )


__all__ = ["ClearPoseDataset", "transparent"]
