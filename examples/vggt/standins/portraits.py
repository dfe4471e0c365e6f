"""Portraits that nobody sat for: a face of ellipses and strokes with noise, its mask, and the relief of a real head.

They stand in for the photographs that the face benchmark prints: bright, symmetric, with eyes, nose and mouth where
eyes, nose and mouth belong. They are not the paper's data, and numbers on them are not the paper's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SKIN = ((244, 208, 177), (229, 184, 143), (198, 142, 100), (150, 98, 66), (105, 66, 45))
HAIR = ((32, 24, 20), (74, 47, 30), (122, 82, 45), (190, 152, 92), (150, 150, 150), (128, 52, 28))
IRIS = ((86, 58, 34), (52, 92, 130), (70, 110, 70), (110, 100, 80))
CLOTH = ((40, 60, 110), (120, 40, 45), (50, 90, 70), (200, 195, 185), (60, 60, 65))
#: Height of a portrait over its width.
ASPECT = 4 / 3


@dataclass(frozen=True)
class Portrait:
    """image (H, W, 3) uint8 sRGB. mask (H, W) bool: the face. height (H, W) float32: how far a head in its place would
    stand out, as a share of the portrait's width, 0 around the head."""

    image: np.ndarray
    mask: np.ndarray
    height: np.ndarray


class _Canvas:
    """A picture on which soft ellipses are laid. x runs over [-1, 1] to the right, y over [-4/3, 4/3] upwards."""

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        self.rows, self.columns = round(width * ASPECT), width
        self.x = np.broadcast_to((np.arange(width) + 0.5) / width * 2 - 1, (self.rows, width))
        self.y = np.broadcast_to(((np.arange(self.rows) + 0.5) / width * -2 + ASPECT)[:, None], (self.rows, width))
        self.soft = 3.0 / width
        self.light = np.zeros((self.rows, width, 3))
        self._rng = rng

    def radius(self, x: float, y: float, across: float, up: float, turn: float = 0.0) -> np.ndarray:
        """1 on the ellipse around (x, y) with these semi-axes, turned by `turn` radians; 0 in its middle."""
        cos, sin = np.cos(turn), np.sin(turn)
        right, above = self.x - x, self.y - y
        return np.hypot((right * cos + above * sin) / across, (above * cos - right * sin) / up)

    def ellipse(self, x: float, y: float, across: float, up: float, turn: float = 0.0) -> np.ndarray:
        """How much of each pixel an ellipse covers, in [0, 1]."""
        edge = (1 - self.radius(x, y, across, up, turn)) * min(across, up)
        return np.clip(edge / self.soft + 0.5, 0, 1)

    def blob(self, x: float, y: float, across: float, up: float) -> np.ndarray:
        """A soft spot, exp(-r^2 / 2)."""
        return np.exp(-0.5 * self.radius(x, y, across, up) ** 2)

    def paint(self, cover: np.ndarray, colour: object) -> None:
        """Lay a colour (3,) or (H, W, 3), 0 to 255, over the picture where `cover` (H, W) says."""
        share = cover[..., None]
        self.light = self.light * (1 - share) + np.asarray(colour, float) / 255 * share

    def noise(self, slope: float = 1.0) -> np.ndarray:
        """(H, W) noise whose spectrum falls as 1 / f^slope, mean 0, standard deviation 1."""
        rows, columns = np.fft.fftfreq(self.rows)[:, None], np.fft.rfftfreq(self.columns)[None]
        frequency = np.maximum(np.hypot(rows * self.rows, columns * self.columns), 1.0)
        spectrum = self._rng.normal(size=(*frequency.shape, 2)) @ [1, 1j] / frequency**slope
        spectrum[0, 0] = 0
        field: np.ndarray = np.fft.irfft2(spectrum, s=(self.rows, self.columns))
        return field / max(float(field.std()), 1e-12)


def draw_portrait(seed: int, width: int = 384) -> Portrait:
    """The portrait with this number, `width` pixels wide and 4/3 as high. ValueError below 16 pixels."""
    if width < 16:
        raise ValueError(f"a portrait {width} pixels wide was asked for: give 16 or more.")
    rng = np.random.default_rng([seed, 0xFACE])
    canvas = _Canvas(width, rng)
    skin, hair, iris, cloth = (np.array(table[rng.integers(len(table))]) for table in (SKIN, HAIR, IRIS, CLOTH))
    wide, tall = rng.uniform(0.50, 0.58), rng.uniform(0.70, 0.80)  # semi-axes of the face
    middle = (rng.uniform(-0.04, 0.04), rng.uniform(0.0, 0.08))
    _surroundings(canvas, rng, middle, (wide, tall), skin, hair, cloth)
    face = canvas.ellipse(*middle, wide, tall)
    _skin(canvas, face, middle, (wide, tall), skin)
    _features(canvas, rng, middle, (wide, tall), skin, hair, iris)
    _fringe(canvas, rng, middle, (wide, tall), hair)
    light = canvas.light * (1 + 0.015 * canvas.noise(0.3)[..., None])
    image = (np.clip(light, 0, 1) * 255 + 0.5).astype(np.uint8)
    share = rng.uniform(0.08, 0.12)
    return Portrait(image, face > 0.5, (share * _relief(canvas, middle, (wide, tall))).astype(np.float32))


def _surroundings(
    canvas: _Canvas,
    rng: np.random.Generator,
    middle: tuple[float, float],
    axes: tuple[float, float],
    skin: np.ndarray,
    hair: np.ndarray,
    cloth: np.ndarray,
) -> None:
    """Background, the hair behind the face, neck, shoulders and ears."""
    (x, y), (wide, tall) = middle, axes
    wall = rng.uniform(120, 215) + rng.uniform(-25, 25, 3)
    canvas.paint(np.ones_like(canvas.x), wall * (1 + 0.12 * canvas.y + 0.05 * canvas.noise(1.2))[..., None])
    full = rng.uniform(1.12, 1.3)
    long = rng.choice([0.0, 0.35])
    strands = hair * (1 + 0.10 * canvas.noise(0.9))[..., None]
    canvas.paint(canvas.ellipse(x, y + 0.12 - long, full * wide, 1.12 * tall + long), strands)
    canvas.paint(canvas.ellipse(x, y - tall - 0.1, 0.45 * wide, 0.45), skin * 0.74)
    canvas.paint(canvas.ellipse(x, -1.6, 1.0, 0.68), cloth * (1 + 0.08 * canvas.noise(0.8))[..., None])
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(x + side * 1.0 * wide, y - 0.02, 0.1, 0.17, -0.15 * side), skin * 0.86)


def _skin(
    canvas: _Canvas, face: np.ndarray, middle: tuple[float, float], axes: tuple[float, float], skin: np.ndarray
) -> None:
    """The face, darker towards its rim as if lit from ahead, with red cheeks: what makes a print look round."""
    (x, y), (wide, tall) = middle, axes
    shade = 1.04 - 0.30 * canvas.radius(x - 0.06, y + 0.1, wide, tall) ** 2.5 + 0.02 * canvas.noise(0.9)
    canvas.paint(face, skin * np.clip(shade, 0.4, 1.1)[..., None])
    for side in (-1, 1):
        cheek = canvas.blob(x + side * 0.52 * wide, y - 0.22 * tall, 0.12, 0.10) * face
        canvas.paint(0.25 * cheek, skin * [1.0, 0.70, 0.66])


def _features(
    canvas: _Canvas,
    rng: np.random.Generator,
    middle: tuple[float, float],
    axes: tuple[float, float],
    skin: np.ndarray,
    hair: np.ndarray,
    iris: np.ndarray,
) -> None:
    """Eyes, brows, nose and mouth."""
    (x, y), (wide, tall) = middle, axes
    apart, eye, open_ = 0.42 * wide, rng.uniform(0.10, 0.125), rng.uniform(0.045, 0.06)
    level, gaze = y + 0.12 * tall, rng.uniform(-0.015, 0.015)
    for side in (-1, 1):
        at = x + side * apart
        canvas.paint(0.35 * canvas.blob(at, level + 0.02, 1.3 * eye, 0.07), skin * 0.62)
        white = canvas.ellipse(at, level, eye, open_)
        canvas.paint(white, (236, 232, 226))
        canvas.paint(white * canvas.ellipse(at + gaze, level, 0.052, 0.055), iris)
        canvas.paint(white * canvas.ellipse(at + gaze, level, 0.024, 0.026), (12, 10, 10))
        canvas.paint(canvas.ellipse(at + gaze + 0.02, level + 0.02, 0.011, 0.011), (255, 255, 255))
        canvas.paint(0.85 * (canvas.ellipse(at, level + 0.012, 1.08 * eye, open_ + 0.012) * (1 - white)), skin * 0.38)
        tilt = -side * rng.uniform(-0.02, 0.14)
        canvas.paint(0.85 * canvas.ellipse(at, level + 0.15, 1.25 * eye, 0.026, tilt), hair * 0.7)
        canvas.paint(0.8 * canvas.blob(x + side * 0.055, y - 0.235 * tall, 0.022, 0.014), skin * 0.35)
        canvas.paint(0.30 * canvas.blob(x + side * 0.09, y - 0.17 * tall, 0.028, 0.06), skin * 0.55)
    canvas.paint(0.35 * canvas.blob(x, y - 0.06 * tall, 0.028, 0.16), np.minimum(skin * 1.18, 255))
    canvas.paint(0.45 * canvas.blob(x, y - 0.20 * tall, 0.05, 0.04), np.minimum(skin * 1.15, 255))
    lips, mouth = skin * [0.86, 0.55, 0.54], y - 0.47 * tall
    width, smile = rng.uniform(0.17, 0.23), rng.uniform(-0.02, 0.05)
    canvas.paint(canvas.ellipse(x, mouth - 0.028, 0.85 * width, 0.046), lips)
    canvas.paint(canvas.ellipse(x, mouth + 0.020, width, 0.032), lips * 0.86)
    line = mouth + smile * ((canvas.x - x) / width) ** 2
    stroke = np.clip(1.2 - np.abs(canvas.y - line) / 0.010, 0, 1) * (np.abs(canvas.x - x) < 1.02 * width)
    canvas.paint(0.8 * stroke, skin * 0.28)
    canvas.paint(0.25 * canvas.blob(x, mouth - 0.13, 0.12, 0.03), skin * 0.6)


def _fringe(
    canvas: _Canvas,
    rng: np.random.Generator,
    middle: tuple[float, float],
    axes: tuple[float, float],
    hair: np.ndarray,
) -> None:
    """Hair over the forehead: a cap, less what the hairline leaves free."""
    (x, y), (wide, tall) = middle, axes
    cap = canvas.ellipse(x, y + 0.10, 1.06 * wide, 1.0 * tall)
    parting = rng.uniform(-0.25, 0.25) * wide
    free = canvas.ellipse(x + parting, y - 0.30 * tall, 1.08 * wide, rng.uniform(0.86, 0.96) * tall)
    canvas.paint(cap * (1 - free), hair * (1.08 + 0.12 * canvas.noise(0.9))[..., None])


def _relief(canvas: _Canvas, middle: tuple[float, float], axes: tuple[float, float]) -> np.ndarray:
    """Half an ellipsoid with a nose and eye sockets, its highest point 1."""
    (x, y), (wide, tall) = middle, axes
    dome = np.sqrt(np.maximum(0.0, 1 - canvas.radius(x, y, wide, tall) ** 2))
    nose = 0.30 * canvas.blob(x, y - 0.12 * tall, 0.06, 0.14)
    sockets = sum(0.10 * canvas.blob(x + side * 0.42 * wide, y + 0.12 * tall, 0.12, 0.08) for side in (-1, 1))
    height = np.where(dome > 0, np.maximum(dome + nose - sockets, 0), 0)
    return height / height.max()


__all__ = ["Portrait", "draw_portrait"]
