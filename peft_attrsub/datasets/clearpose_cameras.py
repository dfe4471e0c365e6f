"""Cameras and object poses of one ClearPose scene: from metadata.mat, which is slow to read, by way of a small cache.

metadata.mat holds one 1 x 1 struct per frame, under its 6-digit id, with the fields

    cls_indexes (n, 1)             ids of the objects
    intrinsic_matrix (3, 3)        K in pixels of the pictures; some releases call it camera_intrinsics
    factor_depth [[1000]]          metres = stored depth / factor_depth
    poses (3, 4, n)                camera from object, metres; a file may drop the last 1 where n = 1
    rotation_translation_matrix    (3, 4), WORLD FROM CAMERA, OpenCV axes, metres; an extrinsic is its inverse

K is calibrated in OpenCV's convention, integer coordinates at pixel centres, and stays as it is.
Source: ClearPose (arXiv 2203.03890), its release.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from ..scenes.storage import write_atomically

METADATA = "metadata.mat"
CACHE = "cameras.npz"
FRAME = re.compile(r"\d{6}")
#: How far R R^T of a stored pose may be from I; up to there it is replaced by the nearest rotation.
ROUNDING = 1e-3
#: Length of the axes of objects that `SceneCameras.spread` follows, in metres.
ARM = 0.2
#: Names of unfinished files tell processes apart, not threads.
_WRITING = threading.Lock()


@dataclass(frozen=True)
class SceneCameras:
    """F frames of one scene, with P object poses in all.

    frames (F,) str: 6-digit ids, sorted. intrinsics (F, 3, 3). world_from_camera (F, 3, 4), NaN where the file has no
    pose. factors (F,): stored depth per metre. owners (P,): the frame, 0 to F - 1, that a pose belongs to;
    objects (P,): id of its object; poses (P, 3, 4): camera from object. Floats are float64, lengths metres.
    """

    frames: np.ndarray
    intrinsics: np.ndarray
    world_from_camera: np.ndarray
    factors: np.ndarray
    owners: np.ndarray
    objects: np.ndarray
    poses: np.ndarray

    def __post_init__(self) -> None:
        count, total = len(self.frames), len(self.owners)
        shapes = ((count,), (count, 3, 3), (count, 3, 4), (count,), (total,), (total,), (total, 3, 4))
        for field, shape in zip(fields(self), shapes, strict=True):
            if (found := getattr(self, field.name).shape) != shape:
                raise ValueError(f"{field.name} has the shape {found}, expected {shape}.")

    def index(self) -> dict[str, int]:
        """Frame id -> its number here, for the frames that have a pose."""
        known = np.isfinite(self.world_from_camera).all((1, 2))
        return {str(frame): number for number, frame in enumerate(self.frames) if known[number]}

    def spread(self) -> float:
        """How far objects seem to move in the world, in metres; about 0 where the poses mean what they should.

        The largest over objects, and over their origins and the points ARM along their axes, of the median over
        frames of |x - median x|, with x = R_wc (R_co p + t_co) + t_wc the place of p. Nothing moves in a ClearPose
        scene, so this finds cameras of the wrong direction.
        """
        points = np.concatenate([np.zeros((1, 3)), ARM * np.eye(3)]).T  # (3, 4)
        cameras = self.world_from_camera[self.owners]
        inner = self.poses[:, :, :3] @ points + self.poses[:, :, 3:]
        places = cameras[:, :, :3] @ inner + cameras[:, :, 3:]  # (P, 3, 4)
        worst = 0.0
        for item in np.unique(self.objects):
            own = places[(self.objects == item) & np.isfinite(places).all((1, 2))]
            if len(own):
                away = np.linalg.norm(own - np.median(own, axis=0), axis=1)  # (frames, 4)
                worst = max(worst, float(np.median(away, axis=0).max()))
        return worst


def _matrix(entry: Any, name: str, columns: int) -> np.ndarray:
    """The field (3, columns) as float64, of whatever numbers."""
    matrix = np.asarray(entry[name], np.float64)
    if matrix.shape != (3, columns):
        raise ValueError(f"{name} has the shape {matrix.shape}, expected (3, {columns})")
    return matrix


def _poses(value: Any, count: int) -> np.ndarray:
    """(n, 3, 4) of the stored (3, 4, n), or (3, 4) where n is 1, or anything empty where n is 0."""
    poses = np.asarray(value, np.float64)
    if poses.shape == (3, 4):
        poses = poses[..., None]
    if poses.size == 0:
        poses = np.zeros((3, 4, 0))
    if poses.shape != (3, 4, count):
        raise ValueError(f"poses has the shape {poses.shape}, expected (3, 4, {count}) for its {count} cls_indexes")
    return poses.transpose(2, 0, 1)


def _lens(entry: Any) -> np.ndarray:
    names = entry.dtype.names or ()
    matrix = _matrix(entry, "camera_intrinsics" if "intrinsic_matrix" not in names else "intrinsic_matrix", 3)
    if not np.isfinite(matrix).all() or min(matrix[0, 0], matrix[1, 1]) <= 0:
        raise ValueError(f"the intrinsics are {matrix.tolist()}")
    return matrix


def _world_from_camera(entry: Any) -> np.ndarray:
    """The stored pose with the nearest rotation; NaN where tracking gave none."""
    pose = _matrix(entry, "rotation_translation_matrix", 4)
    if not np.isfinite(pose).all():
        return np.full((3, 4), np.nan)
    rotation = pose[:, :3]
    off = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if off > ROUNDING or np.linalg.det(rotation) < 0:
        raise ValueError(f"rotation_translation_matrix is no rotation and translation (off by {off:.2g})")
    u, _, v = np.linalg.svd(rotation)
    return np.concatenate([u @ v, pose[:, 3:]], axis=1)


def read_metadata(path: str | os.PathLike[str]) -> SceneCameras:
    """The whole of a metadata.mat. ValueError names the file, the frame and the field that is not as documented.

    Needs scipy: pip install "peft-attrsub[eval]".
    """
    matlab = require("scipy.io", "eval", f"reading {path}")
    try:
        record = matlab.loadmat(os.fspath(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # scipy hands on whatever its decompressor meets in a damaged file
        raise ValueError(
            f"{path} is no readable MATLAB file ({type(error).__name__}: {error}): download it again."
        ) from error
    frames = sorted(key for key in record if FRAME.fullmatch(key))
    if not frames:
        raise ValueError(f"{path} holds no frame: expected a variable per frame, named 000000, 000001, ...")
    columns: dict[str, list[Any]] = {key: [] for key in ("k", "c2w", "factor", "owner", "object", "pose")}
    for number, frame in enumerate(frames):
        try:
            entry = record[frame][0, 0]
            lens = _lens(entry)
            factor = float(np.ravel(entry["factor_depth"])[0])
            if not factor > 0:
                raise ValueError(f"factor_depth is {factor}")
            objects = np.ravel(entry["cls_indexes"]).astype(np.int64)
            poses = _poses(entry["poses"], len(objects))
            camera = _world_from_camera(entry)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, frame {frame}: {error}: this is no metadata of ClearPose.") from error
        columns["k"].append(lens)
        columns["c2w"].append(camera)
        columns["factor"].append(factor)
        columns["owner"].extend([number] * len(objects))
        columns["object"].extend(objects)
        columns["pose"].extend(poses)
    return SceneCameras(
        np.array(frames),
        np.array(columns["k"]),
        np.array(columns["c2w"]),
        np.array(columns["factor"]),
        np.array(columns["owner"], np.int64),
        np.array(columns["object"], np.int64),
        np.array(columns["pose"], np.float64).reshape(-1, 3, 4),
    )


def file_stamp(path: Path) -> np.ndarray:
    """Size and time of a file: another one means that the cache is of an older file."""
    status = path.stat()
    return np.array([status.st_size, status.st_mtime_ns])


def _load(path: Path, stamp: np.ndarray | None) -> SceneCameras | None:
    """What the cache holds, or None: there is none, it is of another file, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if stamp is not None and not np.array_equal(stored["stamp"], stamp):
                return None
            return SceneCameras(**{field.name: stored[field.name] for field in fields(SceneCameras)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def save_cameras(cameras: SceneCameras, path: Path, stamp: np.ndarray) -> None:
    """Write the cache, whole or not at all. stamp: `file_stamp` of the metadata.mat that it is of."""
    target = io.BytesIO()
    np.savez_compressed(target, stamp=stamp, **{field.name: getattr(cameras, field.name) for field in fields(cameras)})
    with _WRITING:
        write_atomically(path, target.getvalue())


def cache_paths(folder: Path, cache: Path | None = None) -> list[Path]:
    """Where the cache of a scene may lie, the preferred place first.

    In the folder `cache` where one is given; else beside metadata.mat, and for data that cannot be written in the
    user's cache folder ($XDG_CACHE_HOME or ~/.cache).
    """
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    own = f"{folder.parent.name}_{folder.name}_{digest}.npz"
    if cache is not None:
        return [cache / own, folder / CACHE]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [folder / CACHE, Path(home) / "peft_attrsub" / "clearpose" / own]


def scene_cameras(folder: str | os.PathLike[str], cache: str | os.PathLike[str] | None = None) -> SceneCameras:
    """Cameras of the scene in `folder`: from a cache of its metadata.mat, which is written at first use.

    A cache of a metadata.mat of another size or time is not used; one without any metadata.mat beside it is. That
    none can be written is no error: the next process reads metadata.mat again.
    """
    folder = Path(folder)
    source = folder / METADATA
    stamp = file_stamp(source) if source.is_file() else None
    places = cache_paths(folder, None if cache is None else Path(cache))
    for place in places if stamp is not None else [folder / CACHE]:
        if (known := _load(place, stamp)) is not None:
            return known
    if stamp is None:
        raise FileNotFoundError(f"{source} is missing: without it the scene has no cameras; download it again.")
    cameras = read_metadata(source)
    for place in places:
        if place.parent != folder:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
        try:
            save_cameras(cameras, place, stamp)
            break
        except OSError:
            continue
    return cameras


__all__ = [
    "CACHE",
    "METADATA",
    "SceneCameras",
    "cache_paths",
    "file_stamp",
    "read_metadata",
    "save_cameras",
    "scene_cameras",
]
