"""A predicted depth map at the size of the truth.

Pixel u of W columns lies at (u + 1/2) W'/W - 1/2 of W'. The truth is never resized for a metric: its values are
measurements, and the mean of two depths lies on neither surface.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

MODES = ("bicubic", "bilinear", "nearest-exact")
Map = TypeVar("Map", np.ndarray, Tensor)


def resize_prediction(pred: Map, size: tuple[int, int], mode: str = "bicubic") -> Map:
    """Predicted maps (S, h, w) at size (height, width), an array for an array and a tensor for a tensor; float.

    mode: "bicubic" for depth metrics, "bilinear" for points, as the authors' code does; "nearest-exact". Interpolated
    without antialiasing; bicubic may overshoot an edge, also below zero.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: expected one of {', '.join(MODES)}.")
    if pred.ndim != 3 or min(pred.shape) < 1:
        raise ValueError(f"the prediction has shape {tuple(pred.shape)}: expected (frames, height, width).")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size is {tuple(size)}: expected (height, width) in pixels.")
    if isinstance(pred, np.ndarray):
        resized = resize_prediction(torch.from_numpy(np.ascontiguousarray(pred)), size, mode)
        return resized.numpy()
    if tuple(pred.shape[-2:]) == tuple(size):
        return pred
    values = pred if pred.dtype in (torch.float32, torch.float64) else pred.float()
    corners = None if mode == "nearest-exact" else False
    return torch.nn.functional.interpolate(values[None], size=tuple(size), mode=mode, align_corners=corners)[0]


__all__ = ["resize_prediction"]
