"""Random numbers and the little algebra that give the same bits on every machine.

numpy's sin, matmul, einsum and uniform may round differently from one processor or libm to the next. What a scene is
made of goes through +, -, *, / and sqrt alone, which IEEE 754 fixes, and through RandomState, whose streams numpy
has frozen (NEP 19).
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
TAU = 6.283185307179586


class Draw:
    """A stream of its own for one purpose: `Draw(7, 3, "lighting")` never shifts when another purpose draws more."""

    def __init__(self, seed: int, index: int, purpose: str) -> None:
        self._state = np.random.RandomState([seed, index, zlib.crc32(purpose.encode())])

    def array(self, low: Any, high: Any, shape: tuple[int, ...]) -> Array:
        """Uniform in [low, high), both broadcast against `shape`."""
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        return low + (high - low) * self._state.random_sample(shape)

    def between(self, low: float, high: float) -> float:
        """One uniform number in [low, high)."""
        return low + (high - low) * float(self._state.random_sample())

    def whole(self, low: int, high: int) -> int:
        """One uniform integer, both ends possible."""
        return low + min(int((high - low + 1) * float(self._state.random_sample())), high - low)

    def wide(self, low: float, high: float) -> float:
        """One number uniform in its logarithm, to four digits: the last bits of pow differ between machines."""
        return float(f"{low * (high / low) ** float(self._state.random_sample()):.4g}")

    def chance(self, probability: float) -> bool:
        return bool(self._state.random_sample() < probability)

    def pick(self, weights: tuple[float, ...] | Array) -> int:
        """An index, as often as its weight says."""
        ladder = np.cumsum(np.asarray(weights, dtype=np.float64))
        at = np.searchsorted(ladder, float(self._state.random_sample()) * ladder[-1], side="right")
        return min(int(at), len(ladder) - 1)

    def seed(self) -> int:
        return self.whole(0, 2**31 - 1)

    def directions(self, count: int, height: tuple[float, float] = (-1.0, 1.0)) -> Array:
        """(count, 3) unit vectors uniform on the sphere, or on its zone of z in `height`."""
        return direction(self.array(0.0, 1.0, (count,)), self.array(height[0], height[1], (count,)))


def cos_sin(turns: Any) -> tuple[Array, Array]:
    """cos and sin of 2π·turns, to about 1e-16: Taylor series on an eighth of a turn to either side of a quarter."""
    turns = np.asarray(turns, dtype=np.float64)
    quarter = np.floor(4.0 * turns + 0.5)
    x = (turns - quarter / 4.0) * TAU
    square = x * x
    sine, cosine = np.ones_like(x), np.ones_like(x)
    for k in range(16, 1, -2):
        sine = 1.0 - square / (k * (k + 1)) * sine
        cosine = 1.0 - square / (k * (k - 1)) * cosine
    sine, which = x * sine, np.mod(quarter, 4.0)
    cos = np.select([which == 0, which == 1, which == 2], [cosine, -sine, -cosine], sine)
    sin = np.select([which == 0, which == 1, which == 2], [sine, cosine, -sine], -cosine)
    return cos, sin


def arcsine(value: Any) -> Array:
    """arcsin of values in [0, 0.8], in radians: Newton's steps on `cos_sin`."""
    value = np.asarray(value, dtype=np.float64)
    angle = value
    for _ in range(6):
        cos, sin = cos_sin(angle / TAU)
        angle = angle - (sin - value) / cos
    return angle


def direction(turns: Any, height: Any) -> Array:
    """(..., 3) unit vectors of an azimuth in turns and a height z = sin(elevation)."""
    cos, sin = cos_sin(turns)
    flat = np.sqrt(np.maximum(0.0, 1.0 - np.asarray(height) * height))
    return np.stack([flat * cos, flat * sin, np.broadcast_to(height, cos.shape)], axis=-1)


def dot(a: Array, b: Array) -> Array:
    """(..., 3) and (..., 3) to (...)."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def cross(a: Array, b: Array) -> Array:
    """(..., 3) and (..., 3) to (..., 3)."""
    (ax, ay, az), (bx, by, bz) = np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0)
    return np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=-1)


def unit(a: Array) -> Array:
    """(..., 3) divided by its length; the zero vector stays."""
    length = np.sqrt(dot(a, a))
    return a / np.where(length > 0.0, length, 1.0)[..., None]


def product(a: Array, b: Array) -> Array:
    """(..., n, m) times (..., m, p): the matrix product, summed in one order everywhere."""
    total = a[..., :, :1] * b[..., :1, :]
    for k in range(1, a.shape[-1]):
        total = total + a[..., :, k : k + 1] * b[..., k : k + 1, :]
    return total


def rotations(turns: Array) -> Array:
    """(..., 3) angles about x, y and z in turns to (..., 3, 3) rotations Rz Ry Rx."""
    cos, sin = cos_sin(turns)
    one, nil = np.ones_like(cos[..., 0]), np.zeros_like(cos[..., 0])
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(cos, -1, 0), np.moveaxis(sin, -1, 0)

    def matrix(*rows: list[Array]) -> Array:
        return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    about_x = matrix([one, nil, nil], [nil, cx, -sx], [nil, sx, cx])
    about_y = matrix([cy, nil, sy], [nil, one, nil], [-sy, nil, cy])
    about_z = matrix([cz, -sz, nil], [sz, cz, nil], [nil, nil, one])
    return product(about_z, product(about_y, about_x))


def plain(values: Any, digits: int = 9) -> Any:
    """An array as nested lists of floats with `digits` decimals, and no -0.0."""
    return (np.round(np.asarray(values, dtype=np.float64), digits) + 0.0).tolist()
