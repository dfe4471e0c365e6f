"""Images, depth maps and cameras at another size, so that a point still falls on its pixel.

Pixel centres are integers, so a pixel u of W columns goes to (u + 1/2) W'/W - 1/2 of W':

    fx' = fx W'/W ,  cx' = (cx + 1/2) W'/W - 1/2 ,  and fy, cy with H in the place of W.

Colour is averaged (bicubic, antialiased); depth, masks and labels are taken from the nearest pixel, because the mean
of two depths lies on neither surface.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..vggt.cameras import to_image_corner, to_pixel_centers
from .sample import Sample


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (S, 3, H, W) in [0, 1] at size (height, width)."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return torch.nn.functional.interpolate(
        images, size=tuple(size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (S, H, W) of any type at size (height, width): each pixel is the one whose square holds its centre."""
    rows, columns = (
        ((torch.arange(new, dtype=torch.float64) + 0.5) * old / new).floor().long().clamp(max=old - 1)
        for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


def resize_intrinsics(intrinsics: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Intrinsics (S, 3, 3) of maps of old (height, width), for maps of the new one."""
    down, across = new[0] / old[0], new[1] / old[1]
    out = to_image_corner(intrinsics)
    out[..., 0, :] *= across
    out[..., 1, :] *= down
    return to_pixel_centers(out)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """The sample with images and depth maps of size (height, width)."""
    old = (sample.depths.shape[-2], sample.depths.shape[-1])
    return replace(
        sample,
        images=resize_images(sample.images, size),
        depths=resize_nearest(sample.depths, size),
        point_masks=resize_nearest(sample.point_masks, size),
        intrinsics=resize_intrinsics(sample.intrinsics, old, size),
        labels=None if sample.labels is None else resize_nearest(sample.labels, size),
    )


def crop(sample: Sample, top: int, left: int, size: tuple[int, int]) -> Sample:
    """The part of size (height, width) whose first pixel is (top, left): cx' = cx - left, cy' = cy - top."""
    height, width = size
    if sample.images.shape[-2:] != sample.depths.shape[-2:]:
        raise ValueError(f"{sample.name}: its depth maps are not of the size of its images: resize it before a crop.")
    rows, columns = sample.depths.shape[-2:]
    if min(top, left) < 0 or min(size) < 1 or top + height > rows or left + width > columns:
        raise ValueError(
            f"{sample.name}: a crop of {height} x {width} pixels at ({top}, {left}) lies not in {rows} x {columns}."
        )
    part = (..., slice(top, top + height), slice(left, left + width))
    intrinsics = sample.intrinsics.clone()
    intrinsics[..., 0, 2] -= left
    intrinsics[..., 1, 2] -= top
    return replace(
        sample,
        images=sample.images[part],
        depths=sample.depths[part],
        point_masks=sample.point_masks[part],
        intrinsics=intrinsics,
        labels=None if sample.labels is None else sample.labels[part],
    )


__all__ = ["crop", "resize", "resize_images", "resize_intrinsics", "resize_nearest"]
