"""Single files of foreign datasets to arrays: colour, depth in several formats, masks. Errors name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from .._pictures import decode_picture, to_rgba

#: What a channel of planar z is called: by us, by Blender (also in a layer: "ViewLayer.Depth.Z"), as grey, as colour.
DEPTH_CHANNELS = ("V", "Z", "Y", "R")


def read_colour(path: Path) -> np.ndarray:
    """A picture (PNG, JPEG, ...) as (H, W, 3) float32 in [0, 1]; where it has alpha, laid on white.

    colour = a c + (1 - a), for alpha a and colours c that are not multiplied by it; 16 bits are brought to 8. The
    pixels are as stored, whatever the EXIF orientation: depth and masks belong to them.
    """
    require("PIL.Image", "vggt", "reading pictures")
    try:
        rgba = np.asarray(to_rgba(decode_picture(path)), np.float32) / 255
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist: the sequence is not complete, fetch or make it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not a readable picture ({error}): fetch or make it again.") from error
    alpha = rgba[..., 3:]
    colour: np.ndarray = rgba[..., :3] * alpha + (1 - alpha)
    return colour


def read_depth(path: Path) -> np.ndarray:
    """A depth map, (H, W) float32 as it is in an .npy, or in the one channel of an .exr that holds depth."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the sequence is not complete, fetch or make it again.")
    if path.suffix == ".exr":
        depth = _read_exr(path)
    elif path.suffix == ".npy":
        depth = _read_npy(path)
    else:
        raise ValueError(f"{path} is no depth map that can be read: expected .exr or .npy.")
    if depth.ndim != 2:
        raise ValueError(f"{path} has the shape {depth.shape}, expected a depth map (height, width).")
    return depth.astype(np.float32)


def read_mask(path: Path) -> np.ndarray:
    """A mask in an .npy, (H, W) bool: what is greater than 0. Dimensions of 1 around it, as SAM 2 has, are dropped."""
    mask = _read_npy(path)
    if mask.ndim == 3 and 1 in (mask.shape[0], mask.shape[-1]):
        mask = mask[0] if mask.shape[0] == 1 else mask[..., 0]
    if mask.ndim != 2:
        raise ValueError(f"{path} has the shape {mask.shape}, expected a mask (height, width).")
    return mask if mask.dtype == np.bool_ else mask > 0


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} does not exist: the sequence is not complete, fetch or make it again."
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no readable array ({error}): fetch or make it again.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "bifu":
        raise ValueError(f"{path} holds no array of numbers: fetch or make it again.")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _read_exr(path: Path) -> np.ndarray:
    """The channel of depth; layers have it as "ViewLayer.Depth.Z". Three equal colours, as old Blender writes, do."""
    exr = require("OpenEXR", "eval", "EXR depth maps")
    try:
        channels: dict[str, Any] = exr.File(str(path), separate_channels=True).channels()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no readable depth map ({error}): fetch or make it again.") from error
    for wanted in DEPTH_CHANNELS:
        for name in sorted(channels):
            if name == wanted or name.endswith(f".{wanted}"):
                return np.array(channels[name].pixels)
    if len(channels) == 1:
        return np.array(next(iter(channels.values())).pixels)
    raise ValueError(f"{path} has the channels {', '.join(sorted(channels))}: expected one of depth, V or Z.")


__all__ = ["read_colour", "read_depth", "read_mask"]
