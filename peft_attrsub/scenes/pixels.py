"""One picture to the bytes of one file, and back: colour, depth, object ids. Same array, same bytes, no time stamps.

Depth as 16-bit PNG is in millimetres, 0 where nothing is: what nerfstudio, Open3D and the TUM tools open directly.
It is exact to 0.5 mm and ends at 65.535 m; `npy` and `exr` keep the float32 metres as they are.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np

from .._extras import require
from .._pictures import decode_picture

FARTHEST = 65.535  # metres: the largest 16-bit number of millimetres
DEPTH_SUFFIX = {"png": ".png", "npy": ".npy", "exr": ".exr"}
# zlib's level 1 costs a quarter of the time of level 6 on a rendered picture, for 8 % more bytes.
RGB_LEVEL, GREY_LEVEL = 1, 3


def encode_rgb(rgb: np.ndarray, quality: int | None = None) -> bytes:
    """(H, W, 3) uint8 sRGB to PNG, or to JPEG of that quality, 1 to 100 (95 and more: colour at full resolution)."""
    picture = require("PIL.Image", "vggt", "writing pictures").fromarray(np.ascontiguousarray(rgb))
    target = io.BytesIO()
    if quality is None:
        picture.save(target, "PNG", compress_level=RGB_LEVEL)
    else:
        picture.save(target, "JPEG", quality=quality, subsampling=0 if quality >= 95 else 2)
    return target.getvalue()


def encode_grey(values: np.ndarray) -> bytes:
    """(H, W) uint16 to a 16-bit greyscale PNG."""
    target = io.BytesIO()
    picture = require("PIL.Image", "vggt", "writing pictures").fromarray(np.ascontiguousarray(values, dtype=np.uint16))
    picture.save(target, "PNG", compress_level=GREY_LEVEL)
    return target.getvalue()


def encode_depth(depth: np.ndarray, kind: str) -> bytes:
    """(H, W) float32 planar z in metres, 0 where nothing is, to the bytes of a "png", "npy" or "exr" file.

    png: round(1000 z), at least 1 where z > 0, so that something near never turns into nothing.
    A depth that is not finite, negative, or too far for the PNG is a ValueError.
    """
    if not np.isfinite(depth).all() or (depth < 0).any():
        raise ValueError("a depth map has values that are negative or not finite: 0 is what stands for nothing.")
    if kind == "npy":
        target = io.BytesIO()
        np.save(target, np.ascontiguousarray(depth, dtype="<f4"), allow_pickle=False)
        return target.getvalue()
    if kind == "exr":
        return _write_exr(np.ascontiguousarray(depth, dtype=np.float32))
    far = float(depth.max(initial=0.0))
    if far > FARTHEST:
        raise ValueError(f"a depth of {far:.3f} m does not fit a 16-bit PNG ({FARTHEST} m): write npy or exr instead.")
    millimetres = np.rint(depth.astype(np.float64) * 1000)
    return encode_grey(np.where(depth > 0, np.maximum(millimetres, 1), 0).astype(np.uint16))


def decode(data: bytes, where: Path) -> np.ndarray:
    """The array in a PNG or JPEG: (H, W, 3) uint8, or (H, W) uint16 for a greyscale; a ValueError names the file."""
    require("PIL.Image", "vggt", "reading pictures")
    try:
        picture = decode_picture(data)
        if picture.mode.startswith("I"):
            return np.asarray(picture).astype(np.uint16)
        return np.asarray(picture.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"{where} is not a readable picture ({error}): repair the dataset.") from error


def decode_depth(data: bytes, where: Path) -> np.ndarray:
    """(H, W) float32 metres from what `encode_depth` wrote; the kind follows from the name of the file."""
    if where.suffix == ".png":
        grey = decode(data, where)
        if grey.ndim != 2:
            raise ValueError(f"{where} is a colour picture: a depth map is a 16-bit greyscale PNG in millimetres.")
        return (grey / 1000.0).astype(np.float32)
    if where.suffix == ".exr":
        return _read_exr(data, where)
    try:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False), np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{where} is no readable depth map ({error}): repair the dataset.") from error


def _write_exr(depth: np.ndarray) -> bytes:
    """One float32 channel "V". OpenEXR writes to names only, so a temporary file lends one."""
    exr = require("OpenEXR", "eval", "EXR depth maps")
    handle, name = tempfile.mkstemp(suffix=".exr")
    os.close(handle)
    try:
        header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
        exr.File(header, {"V": depth}).write(name)
        return Path(name).read_bytes()
    finally:
        os.unlink(name)


def _read_exr(data: bytes, where: Path) -> np.ndarray:
    exr = require("OpenEXR", "eval", "EXR depth maps")
    handle, name = tempfile.mkstemp(suffix=".exr")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        return np.array(exr.File(name).channels()["V"].pixels, np.float32)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{where} is no readable depth map ({error}): repair the dataset.") from error
    finally:
        os.unlink(name)
