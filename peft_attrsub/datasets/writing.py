"""Writes one rendered sequence, in the layout that `rendered.RenderedDataset` reads, whole or not at all.

    <folder>/renderings/007_rgba.png     colour and coverage, 8 bits each (faces: 00000007_rgba.png)
    <folder>/renderings/007_depth.exr    float32 planar z, 0 where nothing is (or .npy)
    <folder>/renderings/007_mask.npy     bool, the pixels that count; only where a mask was given
    <folder>/opencv_cameras.json         {"frames": [{"w", "h", "fx", "fy", "cx", "cy", "w2c", "file_path", ...}]}

Source: the layout of the rendered test sets of the paper's release (VGGT subspaces, arXiv 2604.10095).
The sequence grows in `.<name>.partial` beside its folder and moves there when it is finished. A frame counts as soon
as its camera is written, which happens last, so a killed run goes on where it was.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from .._files import lock
from ..scenes import pixels
from ..scenes.storage import json_bytes, write_atomically
from .sample import RIGID

CAMERAS = "opencv_cameras.json"
#: Beside the unfinished sequence itself: the cameras of its frames, the settings they were made with, a lock.
SEQUENCE, PENDING, SETTINGS, LOCK = "sequence", "cameras", "settings.json", "lock"
DEPTHS = ("exr", "npy")


def is_finished(folder: str | os.PathLike[str]) -> bool:
    """Whether a whole sequence stands in the folder: its cameras are there, which are written last."""
    return (Path(folder) / CAMERAS).is_file()


def frame_name(index: int, digits: int) -> str:
    """Number of a frame as file names hold it: 7 with 3 digits is "007"."""
    return f"{index:0{digits}d}"


class RenderedWriter:
    """Fills one sequence frame by frame: `has`, `add`, and at the end `finish`, which gives the folder its name.

        with RenderedWriter(folder, digits=3) as writer:
            for index in range(96):
                if not writer.has(index):  # left by a run that was killed
                    writer.add(index, rgba, depth, w2c, fx, fy, cx, cy)
            writer.finish()

    digits: 3 for humans, 8 for faces. depth: "exr" or "npy". tag: any string that stands for the protocol, the number
    of frames included; frames that a killed run left with another tag, or other digits or depths, are thrown away.
    cx, cy are the file's: the centre of the first pixel is (0.5, 0.5), so the middle of w columns is w / 2.
    FileExistsError where a sequence, or anything else, is in the folder already; BlockingIOError where another
    process is writing it.
    """

    def __init__(self, folder: str | os.PathLike[str], digits: int = 3, depth: str = "exr", tag: str = "") -> None:
        self.folder, self.digits, self.depth, self.tag = Path(folder), digits, depth, tag
        if depth not in DEPTHS:
            raise ValueError(f"the depth format is {depth!r}: give one of {', '.join(DEPTHS)}.")
        if not 1 <= digits <= 12:
            raise ValueError(f"file names with {digits} digits were asked for: give 3 (humans) or 8 (faces).")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            state = "holds a finished sequence" if is_finished(self.folder) else "exists and is not empty"
            raise FileExistsError(f"{self.folder} {state}: delete it to write it again, or choose another folder.")
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._sequence, self._pending = self._partial / SEQUENCE, self._partial / PENDING
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] | None = _locked(self._partial / LOCK, self.folder)
        settings = json_bytes({"digits": digits, "depth": depth, "tag": tag})
        same = (self._partial / SETTINGS).exists() and (self._partial / SETTINGS).read_bytes() == settings
        if not same or not self._sequence.exists():
            for part in (self._pending, self._sequence):
                shutil.rmtree(part, ignore_errors=True)
            write_atomically(self._partial / SETTINGS, settings)
        for part in (self._pending, self._sequence / "renderings"):
            part.mkdir(parents=True, exist_ok=True)

    def has(self, index: int) -> bool:
        """Whether frame `index` was added, by this run or an earlier one."""
        return self._camera(index).exists()

    def add(
        self,
        index: int,
        rgba: np.ndarray,
        depth: np.ndarray,
        w2c: np.ndarray,
        fx: float,
        fy: float,
        cx: float,
        cy: float,
        mask: np.ndarray | None = None,
    ) -> None:
        """Write frame `index` (0, 1, ...); one that is there already is written again.

        rgba (H, W, 4) uint8, colour not multiplied by alpha. depth (H, W) float32, planar z, 0 where nothing is. w2c
        (4, 4): camera from world, OpenCV axes. fx, fy, cx, cy in pixels. mask (H, W) bool: the pixels that count.
        """
        self._need_open()
        _check(f"{self.folder}, frame {index}", index, rgba, depth, np.asarray(w2c), (fx, fy, cx, cy), mask)
        self._camera(index).unlink(missing_ok=True)
        stem = f"renderings/{frame_name(index, self.digits)}"
        (self._sequence / f"{stem}_rgba.png").write_bytes(pixels.encode_rgb(rgba))
        (self._sequence / f"{stem}_depth.{self.depth}").write_bytes(pixels.encode_depth(depth, self.depth))
        if mask is None:
            (self._sequence / f"{stem}_mask.npy").unlink(missing_ok=True)
        else:
            target = io.BytesIO()
            np.save(target, np.ascontiguousarray(mask), allow_pickle=False)
            (self._sequence / f"{stem}_mask.npy").write_bytes(target.getvalue())
        pose = np.asarray(w2c, np.float64) + 0.0  # -0.0 reads badly
        record = {
            "w": int(rgba.shape[1]),
            "h": int(rgba.shape[0]),
            **{key: float(value) for key, value in zip(("fx", "fy", "cx", "cy"), (fx, fy, cx, cy), strict=True)},
            "w2c": pose.tolist(),
            "file_path": f"{stem}_rgba.png",
            "blender_camera_location": (-pose[:3, :3].T @ pose[:3, 3] + 0.0).tolist(),
        }
        write_atomically(self._camera(index), json_bytes(record))

    def finish(self) -> Path:
        """Write the cameras and rename; returns the folder. A ValueError where there is no frame, or one is missing
        between the others: readers count the frames from 0."""
        self._need_open()
        present = sorted(int(path.stem) for path in self._pending.glob("[0-9]*.json"))
        if not present:
            raise ValueError(f"{self.folder} has no frames: add them before it is finished.")
        if missing := sorted(set(range(present[-1] + 1)) - set(present)):
            raise ValueError(f"{self.folder} has no frame {missing[0]} ({len(missing)} are missing): add it first.")
        record: dict[str, Any] = {"frames": [json.loads(self._camera(index).read_bytes()) for index in present]}
        if self.tag:
            record["tag"] = self.tag
        write_atomically(self._sequence / CAMERAS, json_bytes(record))
        os.rename(self._sequence, self.folder)
        shutil.rmtree(self._partial, ignore_errors=True)
        self.close()
        return self.folder

    def close(self) -> None:
        """Let go of the sequence; what is unfinished stays for the next run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _camera(self, index: int) -> Path:
        return self._pending / f"{index}.json"

    def _need_open(self) -> None:
        if self._lock is None:
            raise ValueError(f"the writer of {self.folder} is closed: make another one.")


def _locked(path: Path, folder: Path) -> IO[bytes]:
    """The file, locked against other processes until it is closed or the process ends."""
    file = path.open("wb")
    try:
        lock(file.fileno())
    except BlockingIOError as error:
        file.close()
        raise BlockingIOError(
            error.errno, f"another process is writing {folder}: wait for it, or choose another folder"
        ) from error
    return file


def _check(
    where: str,
    index: int,
    rgba: np.ndarray,
    depth: np.ndarray,
    w2c: np.ndarray,
    lens: tuple[float, float, float, float],
    mask: np.ndarray | None,
) -> None:
    """A ValueError for what no reader could make sense of."""
    if index < 0:
        raise ValueError(f"{where}: frames are counted from 0.")
    size = rgba.shape[:2]
    for name, array, shape, kind in (
        ("rgba", rgba, (*size, 4), np.uint8),
        ("depth", depth, size, np.float32),
        ("mask", mask, size, np.bool_),
    ):
        if array is not None and (array.shape != shape or array.dtype != kind):
            raise ValueError(
                f"{where}: {name} is {array.dtype} {array.shape}, expected {np.dtype(kind)} {shape}: convert it first."
            )
    if not np.isfinite(lens).all() or min(lens[:2]) <= 0:
        raise ValueError(f"{where}: fx, fy, cx, cy are {lens}: give finite pixels, focal lengths greater than 0.")
    if w2c.shape != (4, 4) or not np.isfinite(w2c).all() or np.abs(w2c[3] - [0, 0, 0, 1]).max() > 0:
        raise ValueError(f"{where}: w2c has shape {w2c.shape}: give a finite 4 x 4 matrix [R t; 0 0 0 1].")
    rotation = np.asarray(w2c[:3, :3], np.float64)
    off = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if off > RIGID or np.linalg.det(rotation) < 0:
        raise ValueError(f"{where}: w2c is no rotation and translation (off by {off:.2g}): give camera from world.")


__all__ = ["RenderedWriter", "is_finished"]
