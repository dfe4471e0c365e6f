"""Losses on the differences between neighbouring pixels, over several scales.

Scale s looks at every 2^s-th row and column. Inputs of both losses are prediction and target (N, H, W, C) and mask
(N, H, W) bool, with finite values where mask is False; the result is a scalar, 0 and connected where nothing is valid.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .masked import bounded, masked_mean

GradientLoss = Literal["grad", "normal"]
SCALES: dict[GradientLoss, int] = {"grad": 4, "normal": 3}
#: A normal counts if its cross product is longer than this: neighbours a millionth of the scene apart.
MIN_CROSS = 1e-12


def difference_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over 4 scales of (sum |dx d| + sum |dy d|) / n, with d = prediction - target.

    The sums run over pairs of neighbours that are both valid, in all views together, each |.| cut at 100; n is the
    number of valid pixels of the scale (not of pairs). With several channels, the mean over channels is taken.
    """
    error = prediction - target
    total = torch.zeros((), device=error.device)
    for scale in range(SCALES["grad"]):
        d, m = (x[:, :: 2**scale, :: 2**scale] for x in (error, mask))
        across = _pairs(d[:, :, 1:] - d[:, :, :-1], m[:, :, 1:] & m[:, :, :-1])
        down = _pairs(d[:, 1:] - d[:, :-1], m[:, 1:] & m[:, :-1])
        total = total + (across + down) / (m.sum() * d.shape[-1]).clamp(min=1)
    return total / SCALES["grad"]


def _pairs(difference: Tensor, both: Tensor) -> Tensor:
    return torch.where(both[..., None], bounded(difference.abs()), 0.0).sum()


def normal_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over 3 scales of the mean of 1 - cos(angle between predicted and true surface normals), for C = 3.

    A pixel has up to four normals: the cross products of its differences to up and left, left and down, down and
    right, right and up. One counts where all three pixels are valid and where neither its prediction nor its truth
    is shorter than 1e-12. The mean of a scale is over all that count, in all views.
    """
    if prediction.shape[-1] != 3:
        raise ValueError(f"normals need points of 3 coordinates, and not {prediction.shape[-1]}: use 'grad'.")
    total = torch.zeros((), device=prediction.device)
    for scale in range(SCALES["normal"]):
        p, t, m = (x[:, :: 2**scale, :: 2**scale] for x in (prediction, target, mask))
        ours, theirs, count = _crosses(p), _crosses(t), _triples(m)
        length = torch.linalg.vector_norm(ours, dim=-1), torch.linalg.vector_norm(theirs, dim=-1)
        # "not shorter": NaN counts, and shows.
        count = count & ~(length[0] <= MIN_CROSS) & ~(length[1] <= MIN_CROSS)
        cosine = (ours * theirs).sum(-1) / torch.where(count, length[0] * length[1], 1.0)
        total = total + masked_mean(1 - cosine, count)
    return total / SCALES["normal"]


def _crosses(points: Tensor) -> Tensor:
    """Four cross products (4, N, H, W, 3) a pixel; neighbours outside of the image are the pixel itself: zero."""
    up, left, down, right = (torch.zeros_like(points) for _ in range(4))
    vertical, horizontal = points[:, 1:] - points[:, :-1], points[:, :, 1:] - points[:, :, :-1]
    up[:, 1:], down[:, :-1] = -vertical, vertical
    left[:, :, 1:], right[:, :, :-1] = -horizontal, horizontal
    around = (up, left, down, right, up)
    return torch.stack([torch.linalg.cross(a, b, dim=-1) for a, b in pairwise(around)])


def _triples(mask: Tensor) -> Tensor:
    """(4, N, H, W): whether a pixel and the two neighbours of each cross product are all valid."""
    up, left, down, right = (torch.zeros_like(mask) for _ in range(4))
    up[:, 1:], down[:, :-1] = mask[:, :-1], mask[:, 1:]
    left[:, :, 1:], right[:, :, :-1] = mask[:, :, :-1], mask[:, :, 1:]
    around = (up, left, down, right, up)
    return torch.stack([mask & a & b for a, b in pairwise(around)])


GRADIENT_LOSSES: dict[GradientLoss, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grad": difference_loss,
    "normal": normal_loss,
}
