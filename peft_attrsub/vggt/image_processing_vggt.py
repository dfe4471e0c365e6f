"""VggtImageProcessor: images of a scene, of any kind and size, to the pixels that VGGT reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

# Not from transformers itself, which puts a dummy in its place where Pillow is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ImagesKwargs

from .._extras import require
from .configuration_vggt import VggtConfig
from .image_input import read_scene, scenes_of
from .shipped import find_shipped

if TYPE_CHECKING:
    from PIL import Image

MODES = ("crop", "pad", "square")


class VggtImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings that from_pretrained may override."""

    mode: str
    image_size: int
    patch_size: int
    pad_views: bool
    bit_depth: int | None


class VggtImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (B, S, 3, H, W), float32 RGB in [0, 1], H and W multiples of the patch size.

    An image of w x h pixels is resized with PIL's bicubic filter, with side = image_size, by `mode`:

        crop    to the width `side` and the height round(h side / w / patch) patch; of what is higher than `side` the
                middle is kept: rows (height - side) // 2 and on.
        pad     the longer side to `side`, the other rounded to patches as above; padded with white to a square.
        square  padded with black to a square of max(w, h), which is resized to side x side.

    A side never rounds to less than one patch. Images that still differ in size are padded with white, evenly on
    both sides (left and top get pad // 2), to the largest of all scenes of the call. Mean and deviation are the
    model's own business: nothing is normalised here. The defaults are those of facebook/VGGT-1B.

    An image is a PIL image, a numpy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), a tensor (1, H, W), (3, H, W) or
    (4, H, W), or an image file: its path, its bytes, or the file opened in binary mode (io.BytesIO too). One image or
    a list of images is one scene, and so is the path of a folder: its pictures in natural order (img2 before img10),
    without hidden files and subfolders. A list of lists or folders, or an array or tensor with one axis more than a
    scene's, is a batch of scenes. Arrays and tensors hold uint8, uint16, or floats in [0, 1].

    All are brought to 8 bits a channel before they are resized, so the same picture gives the same pixels in whatever
    form it comes. Transparency (also of palettes and of grey images) is laid on white, grey is repeated, of an
    animation the first frame counts. PIL images and files are turned upright as their EXIF orientation says. HEIC and
    HEIF files are read where pillow-heif is installed.

    A value v of a 16-bit image becomes round(255 v / (2^bit_depth - 1)). Many cameras and scanners write 10 or 12 bits
    into 16, which would come out nearly black: without bit_depth it is the smallest of 8, 10, 12 and 16 that holds
    every 16-bit value of the scene, so it is the same for all views of a scene. Of 16-bit RGB files Pillow keeps the
    upper 8 bits alone; a scene whose values then stay below 16 is refused, pass uint16 arrays instead.

    Args:
        mode: "crop", "pad" or "square".
        image_size: side in pixels, a multiple of patch_size.
        patch_size: side of the model's patches in pixels.
        pad_views: scenes of a batch may have different numbers of views: shorter ones repeat their last view, and
            the output holds `view_mask` (B, S), False for the repeats. The model knows of no mask: the repeats take
            part in its attention, which is why it is a view again and not an empty image.
        bit_depth: bits that the values of 16-bit images use, from 8 to 16; None decides for each scene, as above.

    Source: arXiv 2503.11651 and its released inference recipe (crop, pad, square); EXIF, 16 bits and masks are ours.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own attribute
    valid_kwargs = VggtImagesKwargs

    def __init__(
        self,
        mode: str = "crop",
        image_size: int = 518,
        patch_size: int = 14,
        pad_views: bool = False,
        bit_depth: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_settings(mode, image_size, patch_size, bit_depth)
        self.mode = mode
        self.image_size = image_size
        self.patch_size = patch_size
        self.pad_views = pad_views
        self.bit_depth = bit_depth

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> VggtImageProcessor:
        """As transformers does it, from a folder or the Hub; "vggt-mini" is the one of this repository."""
        # Here and not below alone: newer versions of transformers ask the Hub for the revision of a name first.
        found: VggtImageProcessor = super().from_pretrained(
            find_shipped(pretrained_model_name_or_path), *args, **kwargs
        )
        return found

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers does it; "vggt-mini" is the one of this repository."""
        return super().get_image_processor_dict(find_shipped(pretrained_model_name_or_path), **kwargs)

    def preprocess(
        self,
        images: Any,
        mode: str | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        pad_views: bool | None = None,
        bit_depth: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """The pixels of one scene or of a batch of scenes; every argument but the images overrides the processor's.

        Returns: a BatchFeature of torch tensors (numpy arrays with return_tensors="np") with
            pixel_values (B, S, 3, H, W): float32 in [0, 1].
            original_sizes (B, S, 2): height and width of the images in pixels, upright.
            boxes (B, S, 6): float32 [x1, y1, x2, y2, w, h]. The whole upright image, w x h pixels, fills the rectangle
                from (x1, y1) to (x2, y2) of the output; it reaches outside the output where the image was cropped. In
                coordinates that are 0 at the left or top edge of the first pixel, x of the output lies at
                (x - x1) w / (x2 - x1) of the image, and y likewise.
            view_mask (B, S): with pad_views only; False for views that were repeated.

        Raises: ValueError that names the view (and its file) for what cannot be read as an image, for a folder
            without pictures, and for scenes with different numbers of views without pad_views.
        """
        mode = self.mode if mode is None else mode
        side = self.image_size if image_size is None else image_size
        patch = self.patch_size if patch_size is None else patch_size
        pad_views = self.pad_views if pad_views is None else pad_views
        depth = self.bit_depth if bit_depth is None else bit_depth
        _check_settings(mode, side, patch, depth)
        _check_pillow()

        scenes = scenes_of(images)
        counts = [len(scene) for scene in scenes]
        views = max(counts)
        if min(counts) != views and not pad_views:
            raise ValueError(
                f"the scenes have {', '.join(map(str, counts))} views, and a batch needs as many of each: pass them "
                f"one by one, or pad_views=True to repeat the last view of the shorter ones."
            )

        fitted = [
            read_scene(scene, b, depth, lambda image: _fit(image, mode, side, patch)) for b, scene in enumerate(scenes)
        ]
        every = [view for scene in fitted for view in scene]
        height = max(pixels.shape[0] for pixels, _ in every)
        width = max(pixels.shape[1] for pixels, _ in every)
        if mode == "pad":
            height = width = side

        values = np.ones((len(scenes), views, 3, height, width), np.float32)
        boxes = np.zeros((len(scenes), views, 6), np.float32)
        for b, scene in enumerate(fitted):
            for s in range(views):
                pixels, box = scene[min(s, len(scene) - 1)]
                h, w = pixels.shape[:2]
                top, left = (height - h) // 2, (width - w) // 2
                np.divide(pixels.transpose(2, 0, 1), 255, out=values[b, s, :, top : top + h, left : left + w])
                boxes[b, s] = box + np.array([left, top, left, top, 0, 0])
        data = {"pixel_values": values, "original_sizes": boxes[..., [5, 4]].astype(np.int64), "boxes": boxes}
        if pad_views:
            data["view_mask"] = np.arange(views) < np.array(counts)[:, None]
        return BatchFeature(data, tensor_type=return_tensors)


def _check_settings(mode: str, image_size: int, patch_size: int, bit_depth: int | None) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known: choose from {', '.join(MODES)}.")
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise ValueError(
            f"image_size={image_size} cannot be cut into patches of {patch_size}: give a multiple of patch_size."
        )
    if bit_depth is not None and not (isinstance(bit_depth, int) and 8 <= bit_depth <= 16):
        raise ValueError(f"bit_depth={bit_depth!r} is not known: give an integer from 8 to 16, or None.")


def _check_pillow() -> None:
    require("PIL.Image", "vggt", "VggtImageProcessor")


# ------------------------------------------------------------------------------------------------------- geometry


def _fit(image: Image.Image, mode: str, side: int, patch: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """One RGB image resized by `mode`: pixels (H, W, 3), and its box [x1, y1, x2, y2, w, h]."""
    from PIL import Image

    bicubic = Image.Resampling.BICUBIC
    width, height = image.size
    if mode == "square":
        longest = max(width, height)
        left, top = (longest - width) // 2, (longest - height) // 2
        canvas = Image.new("RGB", (longest, longest))
        canvas.paste(image, (left, top))
        corners = np.array([left, top, left + width, top + height]) * (side / longest)
        return np.asarray(canvas.resize((side, side), bicubic)), np.append(corners, (width, height))

    new_width = new_height = side
    if mode == "pad" and height > width:
        new_width = _in_patches(width * side / height, patch)
    else:
        new_height = _in_patches(height * side / width, patch)
    pixels = np.asarray(image.resize((new_width, new_height), bicubic))
    start = max(0, new_height - side) // 2
    box = np.array([0, -start, new_width, new_height - start, width, height], np.float64)
    return pixels[start : start + side], box


def _in_patches(length: float, patch: int) -> int:
    return max(1, round(length / patch)) * patch


AutoImageProcessor.register(VggtConfig, slow_image_processor_class=VggtImageProcessor, exist_ok=True)

__all__ = ["MODES", "VggtImageProcessor"]
