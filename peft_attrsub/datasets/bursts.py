"""Bursts of printed faces, unpacked from the phone's bundles: the real half of the face benchmark.

    <root>/[SoaP/datasets/]<sequence>/images/000000.jpg   (or .jpeg, .png)
                                      depths/000000.npy   metres, 0 or not finite where there is none
                                      masks/000000.npy    bool, optional: the pixels that count
                                      cameras.json        see `bundles.unpack_bundle`

Depth keeps the sensor's own size. Intrinsics are calibrated ones with integer coordinates at pixel centres, as in the
files: nothing is shifted. SoaP bundles have no poses (extrinsics None); HNDR bundles have ARKit's.
Source: section 1 of the benchmark's protocol, VGGT subspaces (arXiv 2604.10095); its release reads every 2nd of 42.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..vggt.cameras import to_pixel_centers
from .base import Frames, MultiViewDataset
from .bundles import CAMERAS
from .pictures import read_colour, read_depth, read_mask
from .resizing import resize_images
from .sample import Sample

IMAGES = (".jpg", ".jpeg", ".png")
#: Where the release expects its sequences below the root.
RELEASE = Path("SoaP") / "datasets"


class BurstDataset(MultiViewDataset):
    """Unpacked bursts; frame ids are the names of the files without their ending.

    stride: `dataset[i]` gives every stride-th frame (2: 21 of 42, the paper's). longest: images are made smaller
    until their longer side is this, None for as they are; depth maps keep their size. fov: horizontal field of view
    in degrees that is taken where a sequence has no cameras.json, as those unpacked by others; None refuses them.
    """

    layout = "folders <sequence>/images, <sequence>/depths and cameras.json (prepare_faces.py unpack writes them)."

    def __init__(
        self,
        root: str | os.PathLike[str],
        sequences: Mapping[str, Frames] | str | os.PathLike[str] | None = None,
        *,
        stride: int = 2,
        longest: int | None = 512,
        fov: float | None = None,
    ) -> None:
        if stride < 1 or (longest is not None and longest < 1):
            raise ValueError(f"stride={stride}, longest={longest} were given: both must be 1 or more.")
        if fov is not None and not 0 < fov < 180:
            raise ValueError(f"fov={fov} was given: degrees between 0 and 180 are expected.")
        self.stride, self.longest, self.fov = stride, longest, fov
        self._files: dict[str, dict[str, Path]] = {}
        super().__init__(root, sequences)

    def _find(self) -> list[str]:
        below = self.root / RELEASE
        self._base = below if below.is_dir() else self.root
        return sorted(
            folder.name
            for folder in self._base.iterdir()
            if not folder.name.startswith(".") and (folder / "images").is_dir() and (folder / "depths").is_dir()
        )

    def frames(self, name: str) -> list[str]:
        return list(self._images(name))

    def default_frames(self, name: str) -> list[str]:
        return self.frames(name)[:: self.stride]

    def _images(self, name: str) -> dict[str, Path]:
        """Frame id to its picture, in order; each has a depth map of its name."""
        if name not in self._files:
            folder = self._base / name
            found = {
                path.stem: path
                for path in sorted((folder / "images").iterdir())
                if path.suffix.lower() in IMAGES and not path.name.startswith(".")
            }
            depths = {path.stem for path in (folder / "depths").glob("*.npy") if not path.name.startswith(".")}
            if odd := sorted(set(found) ^ depths):
                has, lacks = ("a depth map", "picture") if odd[0] in depths else ("a picture", "depth map")
                raise ValueError(f"{folder}: frame {odd[0]} has {has} but no {lacks}: unpack the bundle again.")
            self._files[name] = found
        return self._files[name]

    def _read(self, name: str, frames: list[str]) -> Sample:
        folder = self._base / name
        cameras = self._cameras(folder)
        images, depths, masks, intrinsics, extrinsics = [], [], [], [], []
        for frame in frames:
            path = self._images(name)[frame]
            images.append(self._picture(path))
            depth = read_depth(folder / "depths" / f"{frame}.npy")
            depth = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
            valid = depth > 0
            if (masked := folder / "masks" / f"{frame}.npy").exists():
                mask = read_mask(masked)
                if mask.shape != valid.shape:
                    raise ValueError(f"{masked} is {mask.shape}, the depth map of its frame {valid.shape}.")
                valid &= mask
            intrinsic, extrinsic = self._camera(cameras, frame, depth.shape, folder)
            depths.append(torch.from_numpy(depth))
            masks.append(torch.from_numpy(valid))
            intrinsics.append(torch.from_numpy(intrinsic))
            extrinsics.append(extrinsic)
        for what, parts in (("pictures", images), ("depth maps", depths)):
            if len(sizes := {tuple(part.shape[-2:]) for part in parts}) > 1:
                raise ValueError(f"{folder}: its {what} are of different sizes, {sorted(sizes)}.")
        known = [torch.from_numpy(one) for one in extrinsics if one is not None]
        return Sample(
            name=name,
            frames=tuple(frames),
            images=torch.stack(images),
            depths=torch.stack(depths),
            point_masks=torch.stack(masks),
            intrinsics=torch.stack(intrinsics),
            extrinsics=torch.stack(known) if len(known) == len(frames) else None,
            unit="m",
        )

    def _picture(self, path: Path) -> Tensor:
        """(3, H, W) in [0, 1], not larger than asked for."""
        image = torch.from_numpy(read_colour(path)).permute(2, 0, 1).contiguous()
        height, width = image.shape[-2:]
        if self.longest is None or max(height, width) <= self.longest:
            return image
        scale = self.longest / max(height, width)
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        return resize_images(image[None], size)[0]

    def _cameras(self, folder: Path) -> dict[str, dict[str, Any]] | None:
        path = folder / CAMERAS
        if not path.exists():
            if self.fov is None:
                raise FileNotFoundError(
                    f"{path} does not exist: unpack the bundle with prepare_faces.py, or give fov, the horizontal "
                    "field of view in degrees."
                )
            return None
        try:
            return {frame["frame"]: frame for frame in json.loads(path.read_bytes())["frames"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): unpack the bundle again.") from error

    def _camera(
        self, cameras: dict[str, dict[str, Any]] | None, frame: str, shape: tuple[int, ...], folder: Path
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Intrinsics (3, 3) of a frame's depth map, and its extrinsics (3, 4) or None."""
        if cameras is None:
            assert self.fov is not None
            rows, columns = shape
            focal = columns / 2 / math.tan(math.radians(self.fov) / 2)
            return to_pixel_centers(np.array([[focal, 0, columns / 2], [0, focal, rows / 2], [0, 0, 1.0]])), None
        try:
            camera = cameras[frame]
            intrinsic = np.array(camera["intrinsic"], np.float64).reshape(3, 3)
            pose = camera["extrinsic"]
            columns, rows = camera["depth_size"]
            extrinsic = None if pose is None else np.array(pose, np.float64).reshape(3, 4)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / CAMERAS}: frame {frame} is damaged ({error!r}): unpack again.") from error
        if (rows, columns) != shape:
            raise ValueError(
                f"{folder}: the depth map of frame {frame} is {shape} (rows, columns), cameras.json says "
                f"{(rows, columns)}: unpack the bundle again."
            )
        return intrinsic, extrinsic


__all__ = ["BurstDataset"]
