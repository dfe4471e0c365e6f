"""scikit-learn's handwritten digits, drawn with four attributes: rotation, thickness, contrast, shift.

Data for `digits.py`. The 1,797 images of 8 x 8 pixels come with scikit-learn, so nothing is downloaded. They are cut
into four disjoint splits: `source` (the base model and the source adapters), `tune` (the few labels of the new task),
`validation` (the choice of the learning rate) and `test`.

One number per image and attribute says how far the picture is from a plain one (0). Per source dataset only one
attribute varies, to the extreme; the others stay nearly fixed, and are drawn anew for the next dataset
(paper, section on synthetic data).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ATTRIBUTES = ("rotation", "thickness", "contrast", "shift")
IMAGE_SIZE = 32  # pixels, square
DIGIT_SIZE = 20  # pixels of the canvas that the 8 x 8 original covers
SPLITS = {"source": 897, "tune": 300, "validation": 200, "test": 400}

EXTREME = 1.0  # half-width of an attribute that varies, in the units of `render`
FIXED = 0.2  # half-width of the draw that places a fixed attribute, once per dataset
MIXED = 0.6  # half-width of every attribute when all vary at once: at 1.0 even unlimited labels do not help
JITTER = 0.05  # what remains of it within the dataset ("nearly fixed")

MAX_ANGLE = 60.0  # degrees; below 90, or a 6 turns into a 9
MAX_SHIFT = 5.0  # pixels


@dataclass(frozen=True)
class Digits:
    """Plain digits of one split: `images` [N, 1, 8, 8] in 0..1 and `labels` [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, chosen: Tensor) -> Digits:
        return Digits(self.images[chosen], self.labels[chosen])

    def repeat(self, times: int) -> Digits:
        return Digits(self.images.repeat(times, 1, 1, 1), self.labels.repeat(times))

    def take(self, count: int, generator: torch.Generator) -> Digits:
        """`count` digits without repetition, as many of each class as the split allows."""
        order = torch.randperm(len(self), generator=generator)
        # Position of every digit within its own class: sorting by it deals the classes out in turn.
        turn = torch.zeros(len(self), dtype=torch.long)
        for label in range(10):
            of_class = order[self.labels[order] == label]
            turn[of_class] = torch.arange(len(of_class))
        return self.pick(order[torch.argsort(turn[order], stable=True)][:count])


def load_splits(seed: int = 0) -> dict[str, Digits]:
    """The four disjoint splits of `SPLITS`, shuffled by `seed`."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(raw.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(order, list(SPLITS.values()))
    return {name: Digits(images, labels).pick(part) for name, part in zip(SPLITS, parts, strict=True)}


def attribute_dataset(digits: Digits, attribute: str, generator: torch.Generator) -> Tensor:
    """Pictures [N, 1, 32, 32] in which only `attribute` varies, to the extreme; the others nearly stand still."""
    values = {}
    for name in ATTRIBUTES:
        if name == attribute:
            values[name] = _uniform(EXTREME, len(digits), generator)
        else:
            place = _uniform(FIXED, 1, generator)  # one draw for the whole dataset
            values[name] = place + _uniform(JITTER, len(digits), generator)
    return render(digits.images, values, generator)


def mixture(digits: Digits, generator: torch.Generator) -> Tensor:
    """The new task: pictures [N, 1, 32, 32] in which all attributes vary at once."""
    return render(digits.images, {a: _uniform(MIXED, len(digits), generator) for a in ATTRIBUTES}, generator)


def plain(digits: Digits, generator: torch.Generator, half_width: float = JITTER) -> Tensor:
    """Pictures [N, 1, 32, 32] of digits as they are, every attribute within `half_width` of 0."""
    values = {a: _uniform(half_width, len(digits), generator) for a in ATTRIBUTES}
    return render(digits.images, values, generator)


def render(images: Tensor, values: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Draw plain digits [N, 1, 8, 8] with one number in about -1..1 per image and attribute; 0 is plain.

    rotation: +-60 degrees. shift: 5 pixels at most, in a direction drawn at random. thickness: strokes eaten away
    (-1) or swollen (+1). contrast: the paper rises to nearly the ink (-1), or the ink fades to a fifth (+0.5) and
    comes back with ink and paper swapped (+1). Returns [N, 1, 32, 32] in about -1..1, as the model takes them.
    """
    pictures = _place(images, values["rotation"], values["shift"], generator)
    pictures = _thicken(pictures, values["thickness"])
    return _contrast(pictures, values["contrast"])


def _uniform(half_width: float, count: int, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(count, generator=generator) - 1) * half_width


def _place(images: Tensor, rotation: Tensor, shift: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, move and enlarge in one resampling: the grid maps canvas coordinates (-1..1) to the 8 x 8 original."""
    angle = rotation * math.radians(MAX_ANGLE)
    heading = 2 * math.pi * torch.rand(len(images), generator=generator)
    pixels = shift * MAX_SHIFT
    offset = torch.stack([heading.cos(), heading.sin()], dim=1) * (2 * pixels / IMAGE_SIZE)[:, None]  # [N, 2]
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # [N, 2, 2]
    turn = turn * (IMAGE_SIZE / DIGIT_SIZE)
    theta = torch.cat([turn, -turn @ offset[:, :, None]], dim=2)  # [N, 2, 3]
    grid = F.affine_grid(theta, [len(images), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _thicken(pictures: Tensor, thickness: Tensor) -> Tensor:
    """Blend with the picture's erosion (negative) or dilation (positive) by a 5 x 5 square."""
    amount = thickness[:, None, None, None]
    swollen = F.max_pool2d(pictures, 5, stride=1, padding=2)
    eaten = -F.max_pool2d(-pictures, 5, stride=1, padding=2)
    target = torch.where(amount >= 0, swollen, eaten)
    return pictures + amount.abs() * (target - pictures)


def _contrast(pictures: Tensor, contrast: Tensor) -> Tensor:
    """Ink and paper values: paper rises towards the ink (negative); ink fades, then both swap (positive)."""
    amount = contrast[:, None, None, None]
    ink = torch.where(amount < 0.5, 1 - 1.6 * amount.clamp(min=0), -(1.6 * amount - 0.6))  # jumps over 0: never blank
    paper = 0.8 * (-amount).clamp(min=0)
    signed = ink * (2 * pictures - 1)
    return signed + paper * (1 - signed)
