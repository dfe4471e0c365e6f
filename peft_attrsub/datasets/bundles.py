"""Long bursts as two iOS apps record them: SoaP bundles (Chugunov et al. 2023) and HNDR bundles (2022).

Both are `frame_bundle.npz` with portrait arrays, made from the landscape sensor by a quarter turn clockwise, while
their intrinsics still describe the landscape frame. With that frame's matrix K and its W x H pixels,

    u_portrait = H - 1 - v ,  v_portrait = u ,  so  fx' = fy ,  fy' = fx ,  cx' = H - 1 - cy ,  cy' = cx ,

which is what is given here, with integer coordinates at pixel centres as in the file. SoaP stores K transposed and has
no poses. HNDR has ARKit's: camera axes x right, y up, z towards the viewer, of the landscape frame.

SoaP's depth may be metres or their inverse: the app's two halves disagree, so it is decided here, see `read_soap`.
Lens distortion is not undone. Frames are stored as pickled dictionaries: nothing is unpickled without trust_pickle.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..scenes.pixels import encode_rgb
from ..vggt.cameras import to_image_corner, to_pixel_centers
from .archives import Archive

FILE = "frame_bundle.npz"
CAMERAS = "cameras.json"
ENCODINGS = ("auto", "metric", "inverse")
#: Metres between which the middle of a print held in the hand lies.
NEAR, FAR = 0.15, 2.0
#: Metres beyond which no phone measures: a larger depth is none.
FARTHEST = 100.0
#: ARKit's highest confidence, the only one that counts.
CONFIDENT = 2
# ARKit's axes of the landscape camera to OpenCV's of the portrait one: turn y and z round, then (x, y) -> (-y, x).
TO_PORTRAIT = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BundleFrame:
    """One moment of a burst, upright.

    image (H, W, 3) uint8. depth (h, w) float32 metres, 0 where there is none. valid (h, w) bool: where it is to be
    trusted. image_intrinsic, intrinsic (3, 3) float64: of the image, of the depth map. extrinsic (3, 4) camera from
    world with OpenCV axes, None where unknown. time: seconds. gap: seconds between image and depth.
    """

    image: np.ndarray
    depth: np.ndarray
    valid: np.ndarray
    image_intrinsic: np.ndarray
    intrinsic: np.ndarray
    extrinsic: np.ndarray | None
    time: float
    gap: float = 0.0


@dataclass(frozen=True)
class Bundle:
    """A burst. kind: "soap" or "hndr". depth_encoding: "metric" or "inverse", as the file holds it. frames: read one
    by one when they are asked for, since all of them fill a gigabyte."""

    path: Path
    kind: str
    depth_encoding: str
    frames: Sequence[BundleFrame]


def read_soap(path: str | os.PathLike[str], trust_pickle: bool = False, depth_encoding: str = "auto") -> Bundle:
    """A SoaP bundle: the file, or the folder that holds frame_bundle.npz. Each image gets the depth nearest in time.

    depth_encoding: "metric", "inverse", or "auto": whichever puts the median depth between 0.15 and 2 m, the
    distance of a print in the hand. ValueError where both would (a median of 0.5 to 2), or neither.
    """
    if depth_encoding not in ENCODINGS:
        raise ValueError(f"depth_encoding={depth_encoding!r} was given: {', '.join(map(repr, ENCODINGS))} are known.")
    archive = Archive(_file(path), trust_pickle)
    colours, depths = archive.numbered("rgb"), archive.numbered("depth")
    measured = [archive.record(key, "timestamp", "intrinsics", "depth") for key in depths]
    times = np.array([float(one["timestamp"]) for one in measured])
    raw = [np.asarray(one["depth"], np.float32) for one in measured]
    encoding = _encoding(archive.path, raw) if depth_encoding == "auto" else depth_encoding
    if len(colours) != len(depths):
        log.warning("%s: %d images and %d depth maps, paired by time.", archive.path, len(colours), len(depths))

    def frame(index: int) -> BundleFrame:
        record = archive.record(colours[index], "timestamp", "intrinsics", "rgb", "height", "width")
        time = float(record["timestamp"])
        nearest = int(np.abs(times - time).argmin())
        other = measured[nearest]
        image = _upright(f"{archive.path}, {colours[index]}", np.asarray(record["rgb"], np.uint8)[..., :3])
        values = _upright(f"{archive.path}, {depths[nearest]}", raw[nearest])
        depth = _metres(values, encoding)
        sizes = [(int(record["width"]), int(record["height"]))]
        sizes += [(int(other.get("intrinsic_width", 0)), int(other.get("intrinsic_height", 0)))]
        # Without its own reference size, a depth map's intrinsics are taken to be those of a frame of the image's.
        sizes[1] = sizes[1] if min(sizes[1]) > 0 else sizes[0]
        matrices = [
            portrait_intrinsic(_standard(one["intrinsics"], f"{archive.path}, {key}"), size, part.shape[:2])
            for one, key, size, part in zip(
                (record, other), (colours[index], depths[nearest]), sizes, (image, depth), strict=True
            )
        ]
        gap = abs(float(times[nearest]) - time)
        return BundleFrame(image, depth, depth > 0, matrices[0], matrices[1], None, time, gap)

    return Bundle(archive.path, "soap", encoding, _Frames(len(colours), frame))


def read_hndr(path: str | os.PathLike[str], trust_pickle: bool = False) -> Bundle:
    """An HNDR bundle: the file, or the folder that holds frame_bundle.npz. Depth is metric; valid: confidence 2.

    Poses come from world_pose, which ARKit gives for the landscape frame however the phone is held; world_to_camera,
    which may follow the screen, only stands in for it.
    """
    archive = Archive(_file(path), trust_pickle)
    images = archive.numbered("img")
    numbers = [key.partition("_")[2] for key in images]

    def frame(index: int) -> BundleFrame:
        number = numbers[index]
        info = archive.record(f"info_{number}", "timestamp", "intrinsics")
        where = f"{archive.path}, info_{number}"
        image = _upright(f"{archive.path}, img_{number}", archive.array(f"img_{number}")[..., :3])
        depth = _metres(_upright(f"{archive.path}, depth_{number}", archive.array(f"depth_{number}")), "metric")
        valid = depth > 0
        if f"conf_{number}" in archive.keys:
            confidence = archive.array(f"conf_{number}")
            if confidence.shape != depth.shape:
                raise ValueError(f"{where}: its confidence is {confidence.shape}, its depth {depth.shape}.")
            valid &= confidence >= CONFIDENT
        standard, size = _standard(info["intrinsics"], where), (image.shape[0], image.shape[1])
        of_image, of_depth = (portrait_intrinsic(standard, size, part.shape[:2]) for part in (image, depth))
        extrinsic = _arkit_extrinsic(info, where)
        return BundleFrame(image, depth, valid, of_image, of_depth, extrinsic, float(info["timestamp"]))

    return Bundle(archive.path, "hndr", "metric", _Frames(len(images), frame))


def read_bundle(path: str | os.PathLike[str], trust_pickle: bool = False, depth_encoding: str = "auto") -> Bundle:
    """A bundle of either kind, told by its keys: SoaP's are rgb_0, ..., HNDR's are img_0, ..."""
    archive = Archive(_file(path), trust_pickle)
    if "img_0" in archive.keys:
        if depth_encoding == "inverse":
            raise ValueError(f"{archive.path} is an HNDR bundle, whose depth is metric: leave depth_encoding out.")
        return read_hndr(path, trust_pickle)
    return read_soap(path, trust_pickle, depth_encoding)


def unpack_bundle(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    trust_pickle: bool = False,
    depth_encoding: str = "auto",
    image: str = "jpg",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a bundle as pictures and plain arrays, which `bursts.BurstDataset` reads; returns `out`.

        <out>/images/000000.jpg    upright colour (or .png), at the size it was recorded
        <out>/depths/000000.npy    float32 metres, upright, 0 where there is none
        <out>/masks/000000.npy     bool, where the depth is to be trusted; only where that is less than all of it
        <out>/cameras.json         intrinsics, extrinsics (null: unknown), times, and how depth was encoded

    progress: called with (frames done, frames in all). `out` appears when all is written. FileExistsError where it
    is there already.
    """
    target = Path(out)
    if image not in ("jpg", "png"):
        raise ValueError(f'image={image!r} was given: "jpg" or "png" is expected.')
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already: delete it to unpack again, or choose another folder.")
    bundle = read_bundle(path, trust_pickle, depth_encoding)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for part in ("images", "depths", "masks"):
            (partial / part).mkdir(parents=True, exist_ok=True)
        frames = []
        for index, frame in enumerate(bundle.frames):
            name = f"{index:06d}"
            picture = partial / "images" / f"{name}.{image}"
            picture.write_bytes(encode_rgb(frame.image, None if image == "png" else 95))
            np.save(partial / "depths" / f"{name}.npy", frame.depth, allow_pickle=False)
            if (frame.valid != (frame.depth > 0)).any():
                np.save(partial / "masks" / f"{name}.npy", frame.valid, allow_pickle=False)
            frames.append(_camera(name, frame))
            if progress is not None:
                progress(index + 1, len(bundle.frames))
        record = {
            "format": 1,
            "kind": bundle.kind,
            "source": bundle.path.name,
            "unit": "m",
            "depth_encoding": bundle.depth_encoding,
            "frames": frames,
        }
        (partial / CAMERAS).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if not any((partial / "masks").iterdir()):
            (partial / "masks").rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def portrait_intrinsic(matrix: np.ndarray, size: tuple[int, int], shape: Sequence[int]) -> np.ndarray:
    """Intrinsics (3, 3) of a portrait array of `shape` (rows, columns), from those of the landscape frame.

    matrix (3, 3): standard layout, for a landscape frame of `size` pixels, its two sides in either order. Pixel
    centres are integers in both. See the head of this file for the equation; then as in `resizing`.
    """
    long, short = max(size), min(size)
    turned = np.array([[matrix[1, 1], 0, short - 1 - matrix[1, 2]], [0, matrix[0, 0], matrix[0, 2]], [0, 0, 1]])
    scale = np.diag([shape[1] / short, shape[0] / long, 1.0])
    return to_pixel_centers(scale @ to_image_corner(turned))


class _Frames(Sequence[BundleFrame]):
    """Frames that are read when they are asked for."""

    def __init__(self, count: int, read: Callable[[int], BundleFrame]) -> None:
        self._numbers, self._read = range(count), read

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> BundleFrame: ...
    @overload
    def __getitem__(self, index: slice) -> list[BundleFrame]: ...
    def __getitem__(self, index: int | slice) -> BundleFrame | list[BundleFrame]:
        if isinstance(index, slice):
            return [self._read(number) for number in self._numbers[index]]
        return self._read(self._numbers[index])


def _file(path: str | os.PathLike[str]) -> Path:
    found = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not found.is_file():
        raise FileNotFoundError(f"{found} does not exist: give a {FILE}, or the folder of one.")
    return found


def _standard(matrix: Any, where: str) -> np.ndarray:
    """Intrinsics with the principal point in the last column, whichever way they are stored."""
    k = np.asarray(matrix, np.float64)
    if k.shape == (3, 3) and k[0, 0] > 0 and k[1, 1] > 0:
        if np.abs(k[2] - [0, 0, 1]).max() < 1e-6:
            return k
        if np.abs(k[:, 2] - [0, 0, 1]).max() < 1e-6:
            return k.T
    raise ValueError(f"{where}: its intrinsics are no camera matrix, in neither layout: {k.tolist()}.")


def _upright(where: str, values: np.ndarray) -> np.ndarray:
    if values.ndim < 2 or values.shape[0] < values.shape[1]:
        raise ValueError(f"{where} has shape {values.shape}: a portrait picture is expected, more rows than columns.")
    return np.ascontiguousarray(values)


def _encoding(path: Path, depths: list[np.ndarray]) -> str:
    """ "metric" or "inverse", by the median of all depth values."""
    values = np.concatenate([depth.ravel() for depth in depths])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        raise ValueError(f"{path} has no depth at all: it cannot be evaluated.")
    middle = float(np.median(values))
    fits = [name for name, at in (("metric", middle), ("inverse", 1 / middle)) if NEAR < at < FAR]
    if len(fits) != 1:
        both = "metres and inverse metres would both be" if fits else "neither metres nor inverse metres are"
        raise ValueError(
            f"{path}: the median of its depth values is {middle:.3g}, and {both} the distance of a print in the hand "
            f'({NEAR} to {FAR:g} m): say which with depth_encoding="metric" or "inverse".'
        )
    log.info("%s: median depth value %.3g, taken as %s.", path, middle, fits[0])
    return fits[0]


def _metres(values: np.ndarray, encoding: str) -> np.ndarray:
    depth = np.where(np.isfinite(values), values, 0).astype(np.float32)
    if encoding == "inverse":
        depth = np.divide(1, depth, out=np.zeros_like(depth), where=depth > 1 / FARTHEST)
    return np.where((depth > 0) & (depth <= FARTHEST), depth, np.float32(0))


def _arkit_extrinsic(info: dict[str, Any], where: str) -> np.ndarray:
    """Camera from world (3, 4) of the portrait frame, OpenCV axes."""
    if "world_pose" in info:
        inverse = np.linalg.inv(np.asarray(info["world_pose"], np.float64))
    elif "world_to_camera" in info:
        inverse = np.asarray(info["world_to_camera"], np.float64)
    else:
        raise ValueError(f"{where} has neither world_pose nor world_to_camera: it has {', '.join(map(str, info))}.")
    return np.asarray((TO_PORTRAIT @ inverse)[:3])


def _camera(name: str, frame: BundleFrame) -> dict[str, Any]:
    """A frame's entry in cameras.json."""
    return {
        "frame": name,
        "time": frame.time,
        "time_gap": frame.gap,
        "image_size": [frame.image.shape[1], frame.image.shape[0]],
        "image_intrinsic": frame.image_intrinsic.tolist(),
        "depth_size": [frame.depth.shape[1], frame.depth.shape[0]],
        "intrinsic": frame.intrinsic.tolist(),
        "extrinsic": None if frame.extrinsic is None else frame.extrinsic.tolist(),
    }


__all__ = ["Bundle", "BundleFrame", "portrait_intrinsic", "read_bundle", "read_hndr", "read_soap", "unpack_bundle"]
