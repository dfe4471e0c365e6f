"""Texture lookups for the ray caster: mip pyramids of all materials in one table, bilinear, wrapping around.

A texel is eight numbers: albedo (3, linear RGB), roughness, metallic, normal (3, tangent space), kept as 16-bit
fixed point (16 bytes a texel, 5.6 MB for a 512 x 512 material with its pyramid).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

CHANNELS = 8
FULL = np.float32(65535)


class Maps(Protocol):
    """What `textures.render_maps` gives; row 0 of every map begins at v = 0, column 0 at u = 0."""

    @property
    def albedo(self) -> np.ndarray: ...
    @property
    def roughness(self) -> np.ndarray: ...
    @property
    def metallic(self) -> np.ndarray: ...
    @property
    def normal(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Texels:
    """Lookup results for n points. albedo (3, n), roughness (n,), metallic (n,), normal (3, n), all float32."""

    albedo: np.ndarray
    roughness: np.ndarray
    metallic: np.ndarray
    normal: np.ndarray


class TextureTable:
    """Every map of every material with its mip pyramid (2 x 2 means, down to one texel), in one array of texels.

    maps: one per material, square, sides that are powers of two (they may differ).
    """

    def __init__(self, maps: Sequence[Maps]) -> None:
        levels, sizes, starts, start = [], [], [], 0
        depth = max((int(one.albedo.shape[0]).bit_length() for one in maps), default=1)
        for number, one in enumerate(maps):
            side = one.albedo.shape[0]
            if one.albedo.shape != (side, side, 3) or side & (side - 1):
                raise ValueError(
                    f"material {number} has an albedo map of shape {one.albedo.shape}: a square with a side that is "
                    "a power of two is expected."
                )
            texels = np.empty((side, side, CHANNELS), np.float32)
            texels[..., :3], texels[..., 3], texels[..., 4] = one.albedo, one.roughness, one.metallic
            texels[..., 5:] = one.normal * 0.5 + 0.5
            row_sizes, row_starts = [], []
            for _ in range(depth):
                levels.append((np.clip(texels, 0, 1) * FULL + 0.5).astype(np.uint16).reshape(-1, CHANNELS))
                row_sizes.append(side)
                row_starts.append(start)
                start += side * side
                if side == 1:
                    break
                side //= 2
                pairs = texels[::2] + texels[1::2]
                texels = (pairs[:, ::2] + pairs[:, 1::2]) * np.float32(0.25)
            pad = depth - len(row_sizes)
            sizes.append(row_sizes + row_sizes[-1:] * pad)
            starts.append(row_starts + row_starts[-1:] * pad)
        self._texels = np.concatenate(levels) if levels else np.zeros((1, CHANNELS), np.uint16)
        self._sizes = np.array(sizes, np.int32).reshape(-1, depth)
        self._starts = np.array(starts, np.int32).reshape(-1, depth)
        self.sizes = self._sizes[:, 0].copy()  # (M,) texels along a side of each material's finest map

    def mean_albedo(self) -> np.ndarray:
        """(M, 3): the coarsest level of every material."""
        return self._texels[self._starts[:, -1], :3] / FULL

    def look_up(self, material: np.ndarray, uv: np.ndarray, footprint: np.ndarray) -> Texels:
        """The texels under n points, bilinear on the mip level just finer than the footprint.

        material (n,) int, uv (2, n) float32, footprint (n,): width of a pixel on the surface in finest texels.
        """
        last = np.float32(self._sizes.shape[1] - 1)
        # The level below: a pixel then covers one to two texels, and bilinear weights blend the rest.
        level = np.clip(np.log2(np.maximum(footprint, 1e-6)), 0, last).astype(np.int32)
        size = self._sizes[material, level]
        start = self._starts[material, level]
        mask = size - 1
        # Texel (row, column) has its centre at u = (column + 1/2) / size, v = (row + 1/2) / size.
        x = (uv[0] - np.floor(uv[0])) * size - np.float32(0.5)
        y = (uv[1] - np.floor(uv[1])) * size - np.float32(0.5)
        left, low = np.floor(x), np.floor(y)
        fx, fy = (x - left).astype(np.float32), (y - low).astype(np.float32)
        x0, y0 = left.astype(np.int32), low.astype(np.int32)
        x1, row0, row1 = (x0 + 1) & mask, (y0 & mask) * size + start, ((y0 + 1) & mask) * size + start
        x0 &= mask
        total = np.zeros((CHANNELS, len(size)), np.float32)
        for at, weight in (
            (row0 + x0, (1 - fx) * (1 - fy)),
            (row0 + x1, fx * (1 - fy)),
            (row1 + x0, (1 - fx) * fy),
            (row1 + x1, fx * fy),
        ):
            total += self._texels.take(at, axis=0).T * (weight * (1 / FULL))
        return Texels(total[:3], total[3], total[4], total[5:] * 2 - 1)
