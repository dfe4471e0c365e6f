"""One scene on disk, in a folder that nerfstudio opens, and that is either whole or not there.

    images/00000.png    colour, sRGB (or .jpg)
    depth/00000.png     planar z, 16-bit millimetres, 0 where nothing is (or .npy, .exr: float32 metres)
    masks/00000.png     object ids, 16-bit, 0 where nothing is
    transforms.json     cameras: nerfstudio's convention, and OpenCV extrinsics and intrinsics beside it; where things
                        move, their poses in every view
    scene.json          the description that was rendered
    manifest.json       size and SHA-256 of all of these; written last, so its presence means done

The folder grows under another name and is renamed when it is finished. Files are not flushed one by one: after a
power cut, let `check.check_dataset` compare them with the manifests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write_atomically as write_atomically  # for those who write into datasets
from . import pixels
from .description import Camera, Scene
from .posed import moving_ids
from .view import FLIP, View

FORMAT = 1
MANIFEST = "manifest.json"
TRANSFORMS = "transforms.json"
DESCRIPTION = "scene.json"


@dataclass(frozen=True)
class SceneFormat:
    """How pictures are stored. jpeg: its quality, 1 to 100, or None for PNG; depth: "png", "npy" or "exr"."""

    jpeg: int | None = None
    depth: str = "png"

    def __post_init__(self) -> None:
        if self.jpeg is not None and not 1 <= self.jpeg <= 100:
            raise ValueError(f"the JPEG quality is {self.jpeg}: give a number from 1 to 100, or None for PNG.")
        if self.depth not in pixels.DEPTH_SUFFIX:
            raise ValueError(f"the depth format is {self.depth!r}: give one of {', '.join(pixels.DEPTH_SUFFIX)}.")

    def names(self, index: int) -> dict[str, str]:
        """The files of one view, relative to the scene's folder: rgb, depth, ids."""
        rgb = ".png" if self.jpeg is None else ".jpg"
        return {
            "rgb": f"images/{index:05d}{rgb}",
            "depth": f"depth/{index:05d}{pixels.DEPTH_SUFFIX[self.depth]}",
            "ids": f"masks/{index:05d}.png",
        }


def json_bytes(record: Any) -> bytes:
    """Readable JSON, the same bytes for the same record; NaN and infinity are refused."""
    return (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The record in a JSON file; a ValueError names a file that is none."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): repair the dataset.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no record: repair the dataset.")
    return record


def intrinsic(camera: Camera) -> np.ndarray:
    """K (3, 3) = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels; the centre of the first pixel is (0.5, 0.5)."""
    return np.array([[camera.fx, 0.0, camera.cx], [0.0, camera.fy, camera.cy], [0.0, 0.0, 1.0]])


def extrinsic(camera: Camera) -> np.ndarray:
    """[R|t] (3, 4), world to camera, OpenCV axes: R = P[:3, :3]^T, t = -R P[:3, 3] for the pose P.

    A pose that is no rigid motion (to 1e-4) is a ValueError.
    """
    pose = np.asarray(camera.pose, np.float64)
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise ValueError(f"a camera's pose has shape {pose.shape}: give a finite 4 x 4 matrix, camera to world.")
    rotation = pose[:3, :3].T
    error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if error > 1e-4 or np.linalg.det(rotation) < 0 or np.abs(pose[3] - [0, 0, 0, 1]).max() > 0:
        raise ValueError(f"a camera's pose is no rotation and translation (off by {error:.2g}): make the scene again.")
    return np.concatenate([rotation, -rotation @ pose[:3, 3:]], axis=1)


def transforms(scene: Scene, form: SceneFormat) -> dict[str, Any]:
    """The content of transforms.json.

    nerfstudio's part: `transform_matrix`, camera to world with OpenGL axes (x right, y up, looking along -z),
    `fl_x`, `fl_y`, `cx`, `cy`, `w`, `h`, no distortion, and `depth_file_path` where depth is PNG in millimeters:
    nerfstudio multiplies by 0.001 whatever the file says, so that meters would come out 1000 times too small, and it
    cannot read EXR. (To train on npy, copy `depth_path` to `depth_file_path` and give nerfstudio's dataparser
    `--depth-unit-scale-factor 1`.) Ours: `extrinsic` (3, 4), `intrinsic` (3, 3), `depth_path`, `ids_path`, and where
    things move `object_poses`: object id to the rigid transform (4, 4) of its mesh, as in scene.json. Ids are not
    given as `mask_path`: there nerfstudio expects the pixels to train on.
    """
    moving_ids(scene)  # a motion that is none must not be stored
    frames = []
    for index, camera in enumerate(scene.cameras):
        names = form.names(index)
        lens = {"fl_x": camera.fx, "fl_y": camera.fy, "cx": camera.cx, "cy": camera.cy}
        frame: dict[str, Any] = {
            "file_path": names["rgb"],
            "transform_matrix": _rows(np.asarray(camera.pose, np.float64) @ FLIP),
            "depth_path": names["depth"],
            "ids_path": names["ids"],
            "extrinsic": _rows(extrinsic(camera)),
            "intrinsic": _rows(intrinsic(camera)),
            **lens,
        }
        if scene.motion:
            frame["object_poses"] = scene.motion[index]
        if form.depth == "png":
            frame["depth_file_path"] = names["depth"]
        frames.append(frame)
    shared = {key: frames[0][key] for key in ("fl_x", "fl_y", "cx", "cy")} if frames else {}
    if any(frame[key] != value for frame in frames for key, value in shared.items()):
        shared = {}  # nerfstudio prefers the shared numbers where there are any
    return {
        "camera_model": "OPENCV",
        "w": scene.width,
        "h": scene.height,
        **dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0),
        **shared,
        "depth_unit_scale_factor": 0.001 if form.depth == "png" else 1.0,
        "frames": frames,
    }


class SceneWriter:
    """Fills the empty folder of one scene: `add` every view, then `finish`, which writes the manifest.

    tag: any string that says how the scene was made; the manifest keeps it.
    """

    def __init__(self, folder: str | Path, scene: Scene, form: SceneFormat | None = None, tag: str = "") -> None:
        self.folder, self.scene, self.form, self.tag = Path(folder), scene, form or SceneFormat(), tag
        self.files: dict[str, dict[str, Any]] = {}
        for part in ("images", "depth", "masks"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self._write(DESCRIPTION, scene.to_json().encode() + b"\n")
        self._write(TRANSFORMS, json_bytes(transforms(scene, self.form)))

    def add(self, index: int, view: View) -> None:
        """Write view `index`; a ValueError where its arrays do not have the scene's size and the types of View."""
        size = (self.scene.height, self.scene.width)
        for name, array, shape, kind in (
            ("rgb", view.rgb, (*size, 3), np.uint8),
            ("depth", view.depth, size, np.float32),
            ("ids", view.ids, size, np.uint16),
        ):
            if array.shape != shape or array.dtype != kind:
                raise ValueError(
                    f"view {index}: {name} is {array.dtype} {array.shape}, expected {np.dtype(kind)} {shape}: "
                    "this is a fault of the renderer."
                )
        names = self.form.names(index)
        self._write(names["rgb"], pixels.encode_rgb(view.rgb, self.form.jpeg))
        self._write(names["depth"], pixels.encode_depth(view.depth, self.form.depth))
        self._write(names["ids"], pixels.encode_grey(view.ids))

    def keep(self, index: int, old: Path) -> None:
        """Take the files of view `index` from a finished folder of the same scene instead of rendering it."""
        for name in self.form.names(index).values():
            self._write(name, (old / name).read_bytes())

    def finish(self) -> dict[str, Any]:
        """Write and return the manifest; a ValueError where views are missing."""
        wanted = {name for index in range(len(self.scene.cameras)) for name in self.form.names(index).values()}
        if missing := sorted(wanted - set(self.files)):
            raise ValueError(f"{self.folder}: {missing[0]} is missing ({len(missing)} files): add every view first.")
        manifest = {
            "format": FORMAT,
            "index": self.scene.index,
            "views": len(self.scene.cameras),
            "width": self.scene.width,
            "height": self.scene.height,
            "jpeg": self.form.jpeg,
            "depth": self.form.depth,
            "tag": self.tag,
            "bytes": sum(entry["bytes"] for entry in self.files.values()),
            "files": self.files,
        }
        write_atomically(self.folder / MANIFEST, json_bytes(manifest))
        return manifest

    def _write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def publish(partial: Path, folder: Path, replace: bool = False) -> None:
    """Give a finished scene its name. What already stands there: kept if whole and not `replace`, else removed."""
    if not (partial / MANIFEST).exists():
        raise ValueError(f"{partial} has no {MANIFEST}: only a finished scene gets its name.")
    if folder.exists():
        if (folder / MANIFEST).exists() and not replace:
            shutil.rmtree(partial)
            return
        aside = partial.with_name(partial.name + ".old")
        os.rename(folder, aside)
        os.rename(partial, folder)
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink()
        return
    try:
        os.rename(partial, folder)
    except OSError:
        # Another process was faster with the same scene, which has the same bytes.
        if not (folder / MANIFEST).exists():
            raise
        shutil.rmtree(partial)


def write_scene(
    folder: str | Path, scene: Scene, views: Iterable[View], form: SceneFormat | None = None, tag: str = ""
) -> dict[str, Any]:
    """Write a whole scene, one view per camera, and return its manifest; a finished folder is left as it is."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        writer = SceneWriter(partial, scene, form, tag)
        for index, view in enumerate(views):
            writer.add(index, view)
        manifest = writer.finish()
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished scene: FileNotFoundError where there is none, ValueError where it is damaged."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: the scene is not finished, run the same command again.")
    manifest = read_json(path)
    if manifest.get("format") not in range(1, FORMAT + 1):
        raise ValueError(f"{path} has format {manifest.get('format')}, this version reads up to {FORMAT}: upgrade it.")
    files = manifest.get("files")
    good = isinstance(files, dict) and all(
        isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )
    good = good and all(type(manifest.get(key)) is int for key in ("index", "views", "width", "height", "bytes"))
    if not good or not isinstance(manifest.get("tag"), str) or not {"jpeg", "depth"} <= set(manifest):
        raise ValueError(f"{path} is no manifest of a scene: repair the dataset.")
    if manifest["bytes"] != sum(entry["bytes"] for entry in manifest["files"].values()):
        raise ValueError(f"{path} is damaged, its sizes do not add up: repair the dataset.")
    return manifest


def read_scene(folder: str | Path, views: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a finished scene, of all N views or of the chosen ones.

    Returns images (N, H, W, 3) uint8 sRGB, depth (N, H, W) float32 planar z in metres, 0 where nothing is, ids
    (N, H, W) uint16, extrinsic (N, 3, 4) float64 world to camera (OpenCV), intrinsic (N, 3, 3) float64 in pixels.
    FileNotFoundError for a scene that is not finished, ValueError for one that is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    size = (manifest["height"], manifest["width"])
    frames = read_json(folder / TRANSFORMS)["frames"]
    chosen = range(len(frames)) if views is None else views
    if any(not 0 <= index < len(frames) for index in chosen):
        raise ValueError(f"{folder} has the views 0 to {len(frames) - 1}, {list(chosen)} were asked for.")
    count = len(chosen)
    out = {
        "images": np.empty((count, *size, 3), np.uint8),
        "depth": np.empty((count, *size), np.float32),
        "ids": np.empty((count, *size), np.uint16),
    }
    for place, index in enumerate(chosen):
        for key, name in (("images", "file_path"), ("depth", "depth_path"), ("ids", "ids_path")):
            path = folder / frames[index][name]
            array = (pixels.decode_depth if key == "depth" else pixels.decode)(path.read_bytes(), path)
            if array.shape != out[key].shape[1:]:
                raise ValueError(f"{path} has the shape {array.shape}, expected {out[key].shape[1:]}: repair it.")
            out[key][place] = array
    for key in ("extrinsic", "intrinsic"):
        width = 4 if key == "extrinsic" else 3
        out[key] = np.array([frames[index][key] for index in chosen], np.float64).reshape(count, 3, width)
    return out


def _rows(matrix: np.ndarray) -> list[list[float]]:
    """Nested lists; adding 0 turns -0.0 into 0.0, which reads better."""
    return [[float(value) for value in row] for row in matrix + 0.0]
