"""What callers give as images, as scenes of upright RGB images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .._pictures import (
    UPPER_HALF,
    bit_depth_of,
    decode_picture,
    loaded,
    on_white,
    picture_files,
    to_8_bits,
    wide_values,
)

if TYPE_CHECKING:
    from PIL import Image

Fitted = TypeVar("Fitted")

#: Floats may leave [0, 1] by this much, as resampled images do; they are clipped.
SLACK = 1e-3
KINDS = (
    "a PIL image, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), a tensor (1, H, W), (3, H, W) or (4, H, W), "
    "or an image file: its path, its bytes, or the open file"
)


def scenes_of(images: Any) -> list[list[Any]]:
    """What the caller gave, as a list of scenes, each a list of views; a folder is the list of its pictures."""
    images = _unstacked(images)
    if not isinstance(images, list):
        return [[images]]
    nested = [isinstance(one, list) for one in images]
    if any(nested) and not all(nested):
        raise ValueError(
            "the list mixes single images with scenes (lists of images, or folders): give a list of images (one "
            "scene), or a list of lists or folders (a batch of scenes)."
        )
    scenes = images if any(nested) else [images]
    for b, scene in enumerate(scenes):
        if not scene:
            raise ValueError(f"scene {b} has no images: give one or more.")
        if any(isinstance(view, list) for view in scene):
            raise ValueError("the images are nested too deeply: give a list of images or a list of lists of images.")
    return scenes


def _unstacked(images: Any) -> Any:
    """Sequences, iterators, folders and stacks of images as lists; a single image as it is."""
    if hasattr(images, "read"):  # an open file is an iterator too, over its lines
        return images
    if isinstance(images, (str, os.PathLike)):
        return list(picture_files(images)) if os.path.isdir(os.path.expanduser(images)) else images
    if isinstance(images, (list, tuple, Iterator)):
        return [_unstacked(one) for one in images]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim > 3:
        return [_unstacked(one) for one in images]
    return images


def read_scene(
    views: Sequence[Any], b: int, bit_depth: int | None, use: Callable[[Image.Image], Fitted]
) -> list[Fitted]:
    """`use` of every view of scene `b` as an upright RGB image.

    Views of 16 bits a channel are divided by 2^bit_depth - 1; by default that is the smallest of 8, 10, 12 and 16
    bits that holds every value of them in the scene. They are kept until all views are read, the others are not.
    """
    found: dict[int, Fitted] = {}
    wide: dict[int, NDArray[np.uint16]] = {}
    halved: dict[int, int] = {}
    for s, view in enumerate(views):
        with _naming(view, s, b):
            pixels = _pixels(view)
            if not isinstance(pixels, np.ndarray):
                if pixels.info.get(UPPER_HALF):
                    halved[s] = int(np.asarray(pixels)[..., : 1 if pixels.mode == "LA" else 3].max())
                pixels = on_white(pixels)
        if isinstance(pixels, np.ndarray):
            wide[s] = pixels
        else:
            found[s] = use(pixels)
    if halved and (max(halved.values()) < 16 or bit_depth not in (None, 16)):
        s = next(iter(halved))
        with _naming(views[s], s, b):
            raise ValueError(
                "its channels have 16 bits, of which Pillow keeps the upper 8, and the values seem to use 12 bits or "
                "fewer: read it with another library (OpenCV: cv2.imread(path, cv2.IMREAD_UNCHANGED)[..., ::-1]) and "
                "pass the uint16 array"
            )
    if wide:
        colors = bit_depth or bit_depth_of(max(int(values[..., :3].max()) for values in wide.values()))
        alphas = [int(values[..., 3].max()) for values in wide.values() if values.shape[-1:] == (4,)]
        alpha = bit_depth or bit_depth_of(max(alphas, default=0))
        for s, values in wide.items():
            with _naming(views[s], s, b):
                image = _narrowed(values, colors, alpha)
            found[s] = use(image)
    return [found[s] for s in range(len(views))]


@contextmanager
def _naming(view: Any, s: int, b: int) -> Iterator[None]:
    """Errors within name the view, and the file where there is one."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{_name(view, s, b)} does not exist: check the path.") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{_name(view, s, b)} cannot be read as an image: {str(error).rstrip('.')}.") from error


def _name(view: Any, s: int, b: int) -> str:
    path = view if isinstance(view, (str, os.PathLike)) else getattr(view, "filename", None)
    path = path or (getattr(view, "name", None) if hasattr(view, "read") else None)
    named = isinstance(path, (str, bytes, os.PathLike)) and os.fspath(path)
    return f"view {s} of scene {b}" + (f", the file {os.fsdecode(named)!r}," if named else "")


def _pixels(view: Any) -> Image.Image | NDArray[np.uint16]:
    """An image of a mode with 8 bits a channel, or an array (H, W), (H, W, 3) or (H, W, 4) of uint16; both upright."""
    from PIL import Image

    if isinstance(view, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(view, "read"):
        return _checked(decode_picture(view, upright=True))
    if isinstance(view, Image.Image):
        return _checked(loaded(view, upright=True))
    if isinstance(view, torch.Tensor):
        if view.ndim != 3 or view.shape[0] not in (1, 3, 4):
            raise ValueError(f"its shape is {tuple(view.shape)}, expected a tensor (1, H, W), (3, H, W) or (4, H, W)")
        view = view.detach().cpu()
        view = (view.float() if view.is_floating_point() else view).permute(1, 2, 0).numpy()
    if isinstance(view, np.ndarray):
        return _from_array(view)
    raise ValueError(f"it is of type {type(view).__name__}, expected {KINDS}")


def _checked(image: Image.Image) -> Image.Image | NDArray[np.uint16]:
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels, expected at least one")
    values = wide_values(image)
    return image if values is None else _from_array(values)


def _from_array(values: NDArray[Any]) -> Image.Image | NDArray[np.uint16]:
    """The same, from an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16 or floats in [0, 1]."""
    from PIL import Image

    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2 and (values.ndim != 3 or values.shape[2] not in (3, 4)):
        raise ValueError(f"its shape is {values.shape}, expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if not values.size:
        raise ValueError(f"its shape is {values.shape}: expected at least one pixel")
    if values.dtype.newbyteorder("=") == np.uint16:
        return values.astype(np.uint16) if values.ndim == 3 else values.astype(np.uint16)[..., None]
    if np.issubdtype(values.dtype, np.floating):
        low, high = float(values.min()), float(values.max())
        if not (low >= -SLACK and high <= 1 + SLACK):  # also what is not a number
            raise ValueError(f"its floats go from {low:g} to {high:g}, expected [0, 1]: divide by 255, or pass uint8")
        values = np.rint(values.astype(np.float32).clip(0, 1) * 255)
    elif values.dtype != np.uint8:
        raise ValueError(f"its numbers are {values.dtype}, expected uint8, uint16 or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(values, np.uint8))


def _narrowed(values: NDArray[np.uint16], colors: int, alpha: int) -> Image.Image:
    """An array (H, W, C) of uint16 as an RGB image, its colors and its alpha of so many bits."""
    from PIL import Image

    narrow = [to_8_bits(values[..., :3], colors)]
    if values.shape[-1] == 4:
        narrow.append(to_8_bits(values[..., 3:], alpha))
    array = np.concatenate(narrow, -1)
    return on_white(Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)))
