"""Crops, sizes and colours that change at random, with cameras and depth that follow them.

Geometry, of each view on its own, with its principal point (cx, cy) and a target of H x W pixels:

    1. a window about the principal point of c h x c w pixels, c = min(1, U(0.8, 1.2)) for each side: the point
       becomes its centre, so where it is not that of the picture the window is smaller;
    2. a size of at least (H + 4) x (W + 4), e max(H, W) more with e from the triangular distribution on [0, 0.3]
       whose mode is 0; both sides by one factor;
    3. exactly H x W about the principal point, black and without depth where the picture does not reach.

Colour, of all views alike with probability 0.7, else of each on its own: brightness, contrast, saturation (factors
U(0.5, 1.5)) and hue (turned by U(-0.1, 0.1) of a circle) in a random order with probability 0.9, then grey with 0.05.
Source: VGGT (arXiv 2503.11651), released training recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from peft_attrsub.datasets import Sample, resize
from peft_attrsub.datasets.resizing import resize_images, resize_intrinsics, resize_nearest
from peft_attrsub.vggt import to_image_corner

#: Pixels by which a picture is larger than its target before it is cut, so that rounding leaves no black border.
MARGIN = 4
#: Weights of red, green and blue in grey (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)
BLUR_SIDE = 5


@dataclass(frozen=True)
class Augmentation:
    """The recipe's numbers; `Augmentation.none()` changes neither colour nor anything at random.

    crop_min, crop_max: range of c, cut at 1. rescale: largest e. brightness, contrast, saturation: factors lie within
    1 +- this. hue: in circles. jitter, gray, blur: probability that a picture's colours are changed, lost, blurred
    (with a sigma of 0.1 to 1 pixel). same_colors: probability that all views of a scene change alike.
    """

    crop_min: float = 0.8
    crop_max: float = 1.2
    rescale: float = 0.3
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.1
    jitter: float = 0.9
    gray: float = 0.05
    blur: float = 0.0
    same_colors: float = 0.7

    def __post_init__(self) -> None:
        for name in ("jitter", "gray", "blur", "same_colors"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation: {name} is {getattr(self, name)}, expected a probability, 0 to 1.")
        for name in ("rescale", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augmentation: {name} is {getattr(self, name)}, expected 0 (off) or more.")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"augmentation: hue is {self.hue}, expected 0 (off) to 0.5, half a circle.")
        if not 0 < self.crop_min <= self.crop_max < math.inf:
            raise ValueError(
                f"augmentation: crops of {self.crop_min} to {self.crop_max} of a side: expected 0 < crop_min <= "
                "crop_max."
            )

    @classmethod
    def of(cls, settings: object) -> Augmentation:
        """From an object with attributes of these names, such as DataSettings."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    @classmethod
    def none(cls) -> Augmentation:
        off = dict.fromkeys((field.name for field in fields(cls)), 0.0)
        return cls(**{**off, "crop_min": 1.0, "crop_max": 1.0})


def augment(sample: Sample, size: tuple[int, int], augmentation: Augmentation, rng: np.random.Generator) -> Sample:
    """The sample at size (height, width) with crops and colours drawn from rng; poses are not changed.

    A point still falls on its pixel (colour is averaged, depth taken from the nearest pixel), and the principal point
    is the centre of every view to half a pixel. Depth maps of another size than the images are brought to it first.
    The same rng in the same state gives the same sample. ValueError where a principal point lies outside of its view.
    """
    sample = change_geometry(sample, size, augmentation, rng)
    return replace(sample, images=change_colours(sample.images, augmentation, rng))


def change_geometry(
    sample: Sample, size: tuple[int, int], augmentation: Augmentation, rng: np.random.Generator
) -> Sample:
    """Steps 1 to 3 of the module: images, depths, masks, labels and intrinsics of `size`."""
    full = (sample.images.shape[-2], sample.images.shape[-1])
    if sample.depths.shape[-2:] != sample.images.shape[-2:]:
        sample = resize(sample, full)
    images, depths, masks, labels, intrinsics = [], [], [], [], []
    for view in range(len(sample)):
        way = _draw_way(sample.name, sample.intrinsics[view], full, size, augmentation, rng)
        images.append(way.cut(resize_images(way.window(sample.images[view : view + 1]), way.size)))
        depths.append(way.nearest(sample.depths[view : view + 1]))
        masks.append(way.nearest(sample.point_masks[view : view + 1]))
        if sample.labels is not None:
            labels.append(way.nearest(sample.labels[view : view + 1]))
        intrinsics.append(way.intrinsic)
    return replace(
        sample,
        images=torch.cat(images),
        depths=torch.cat(depths),
        point_masks=torch.cat(masks),
        labels=torch.cat(labels) if labels else None,
        intrinsics=torch.stack(intrinsics),
    )


@dataclass(frozen=True)
class _Way:
    """One view's way to its target: window (top, left, height, width), then a size, then the target from an offset."""

    first: tuple[int, int, int, int]
    size: tuple[int, int]
    offset: tuple[int, int]
    target: tuple[int, int]
    intrinsic: Tensor  # (3, 3), of the target

    def window(self, maps: Tensor) -> Tensor:
        top, left, height, width = self.first
        return maps[..., top : top + height, left : left + width]

    def nearest(self, maps: Tensor) -> Tensor:
        return self.cut(resize_nearest(self.window(maps), self.size))

    def cut(self, maps: Tensor) -> Tensor:
        """Maps (..., h, w) to (..., H, W), 0 where they do not reach."""
        out = maps.new_zeros(*maps.shape[:-2], *self.target)
        to, source = zip(
            *(_overlap(o, n, t) for o, n, t in zip(self.offset, maps.shape[-2:], self.target, strict=True)),
            strict=True,
        )
        out[(..., *to)] = maps[(..., *source)]
        return out


def _overlap(offset: int, have: int, want: int) -> tuple[slice, slice]:
    """Where `want` pixels from `offset` on meet `have` pixels: in the target's coordinates, and in the source's."""
    low, high = max(0, offset), max(0, min(have, offset + want))
    return slice(low - offset, max(low, high) - offset), slice(low, max(low, high))


def _draw_way(
    name: str,
    intrinsic: Tensor,
    full: tuple[int, int],
    target: tuple[int, int],
    augmentation: Augmentation,
    rng: np.random.Generator,
) -> _Way:
    shares = rng.uniform(augmentation.crop_min, augmentation.crop_max, 2)
    extra = rng.triangular(0, 0, augmentation.rescale) if augmentation.rescale > 0 else 0.0
    (top, height), (left, width) = (
        _window(name, float(to_image_corner(intrinsic)[axis, 2]), side, float(share))
        for axis, side, share in ((1, full[0], shares[0]), (0, full[1], shares[1]))
    )
    intrinsic = intrinsic.clone()
    intrinsic[0, 2] -= left
    intrinsic[1, 2] -= top
    margin = (MARGIN if augmentation.rescale > 0 else 0) + extra * max(target)
    factor = max((target[0] + margin) / height, (target[1] + margin) / width)
    size = (max(target[0], round(height * factor)), max(target[1], round(width * factor)))
    intrinsic = resize_intrinsics(intrinsic, (height, width), size)
    # From the image's corner the middle of the target is at half its side.
    corner = to_image_corner(intrinsic)
    offset = tuple(round(float(corner[axis, 2]) - target[1 - axis] / 2) for axis in (1, 0))
    intrinsic[0, 2] -= offset[1]
    intrinsic[1, 2] -= offset[0]
    return _Way((top, left, height, width), size, (offset[0], offset[1]), target, intrinsic)


def _window(name: str, point: float, side: int, share: float) -> tuple[int, int]:
    """First pixel and length of the window on one axis: about the principal point, given from the image's corner,
    `share` of the side where that fits."""
    if not 0 < point < side:
        raise ValueError(
            f"{name}: its principal point {point:.1f} lies outside of {side} pixels: the cameras are damaged, or "
            "belong to pictures of another size."
        )
    half = min(share * side / 2, point, side - point)
    length = max(1, round(2 * half))
    return min(max(0, round(point - length / 2)), side - length), length


def change_colours(images: Tensor, augmentation: Augmentation, rng: np.random.Generator) -> Tensor:
    """Images (S, 3, H, W) in [0, 1] with other colours, of the same shape and in the same range."""
    if rng.random() < augmentation.same_colors:
        return _draw_colours(augmentation, rng)(images)
    return torch.cat([_draw_colours(augmentation, rng)(images[view : view + 1]) for view in range(len(images))])


@dataclass(frozen=True)
class _Colours:
    """What happens to a picture: (kind, amount), one after the other."""

    steps: tuple[tuple[str, float], ...]

    def __call__(self, images: Tensor) -> Tensor:
        for kind, amount in self.steps:
            images = _CHANGES[kind](images, amount)
        return images


def _draw_colours(augmentation: Augmentation, rng: np.random.Generator) -> _Colours:
    # All numbers are drawn whether they are used or not: a probability does not shift what follows it.
    chances, sigma = rng.random(3), rng.uniform(0.1, 1.0)
    steps = []
    for kind in ("brightness", "contrast", "saturation"):
        spread = getattr(augmentation, kind)
        steps.append((kind, float(rng.uniform(max(0.0, 1 - spread), 1 + spread))))
    steps.append(("hue", float(rng.uniform(-augmentation.hue, augmentation.hue))))
    steps = [steps[place] for place in rng.permutation(len(steps)) if getattr(augmentation, steps[place][0]) > 0]
    if chances[0] >= augmentation.jitter:
        steps = []
    if chances[1] < augmentation.gray:
        steps.append(("gray", 0.0))
    if chances[2] < augmentation.blur:
        steps.append(("blur", float(sigma)))
    return _Colours(tuple(steps))


def grey(images: Tensor) -> Tensor:
    """Grey (..., 1, H, W) of colours (..., 3, H, W): 0.299 R + 0.587 G + 0.114 B."""
    weights = torch.tensor(GREY, dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(-3, keepdim=True)


def _blend(images: Tensor, other: Tensor | float, factor: float) -> Tensor:
    """factor x + (1 - factor) other, cut to [0, 1]."""
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def turn_hue(images: Tensor, turn: float) -> Tensor:
    """Colours (..., 3, H, W) with their hue in HSV turned by `turn` of a circle; saturation and value stay.

    With M and m the largest and the smallest of R, G and B, C = M - m and hue h in sixths of a circle,

        colour_n = M - C max(0, min(k, 4 - k, 1)) ,  k = (n + h) mod 6 ,  n = 5, 3, 1 for R, G, B.
    """
    red, green, blue = images.unbind(-3)
    largest, which = images.max(-3)
    chroma = largest - images.amin(-3)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(
        which == 0,
        (green - blue) / safe,
        torch.where(which == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    n = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device)[:, None, None]
    k = (n + (sixth + 6 * turn).unsqueeze(-3)) % 6
    return largest.unsqueeze(-3) - chroma.unsqueeze(-3) * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Images (S, 3, H, W) under a 5 x 5 Gaussian of `sigma` pixels; the border is mirrored."""
    reach = BLUR_SIDE // 2
    if min(images.shape[-2:]) <= reach:
        raise ValueError(f"pictures of {tuple(images.shape[-2:])} pixels are too small for a blur of {BLUR_SIDE}.")
    steps = torch.arange(-reach, reach + 1, dtype=images.dtype)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    padded = torch.nn.functional.pad(images, (reach,) * 4, mode="reflect")
    out = torch.nn.functional.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None].to(images))
    return out.reshape(images.shape)


_CHANGES = {
    "brightness": lambda images, factor: _blend(images, 0.0, factor),
    "contrast": lambda images, factor: _blend(images, grey(images).mean((-3, -2, -1), keepdim=True), factor),
    "saturation": lambda images, factor: _blend(images, grey(images), factor),
    "hue": turn_hue,
    "gray": lambda images, _: grey(images).expand_as(images).contiguous(),
    "blur": blur,
}


__all__ = ["Augmentation", "augment", "blur", "change_colours", "change_geometry", "grey", "turn_hue"]
