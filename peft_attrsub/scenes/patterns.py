"""One tile of each procedural pattern: where which colour is, and how high the surface stands.

Every pattern is a function (rng, size, colours (C, 3) float32) -> Tile. Texture coordinates of pixel (row, col) are
u = (col + 0.5) / size, v = (row + 0.5) / size: row 0 is at v = 0, the bottom. All patterns repeat without a seam.
Only +, *, / and comparisons of floats are used, so that a seed gives the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
Generator = np.random.Generator


class Tile(NamedTuple):
    """albedo (S, S, 3) linear RGB in [0, 1]; height (S, S) in [0, 1]; both float32."""

    albedo: Pixels
    height: Pixels


def plain(rng: Generator, size: int, colours: Pixels) -> Tile:
    """The first colour, flat."""
    return Tile(np.broadcast_to(colours[0], (size, size, 3)).copy(), np.full((size, size), 0.5, np.float32))


def noise(rng: Generator, size: int, colours: Pixels) -> Tile:
    """Smooth value noise in octaves, mapped over all colours in their order."""
    field = _octaves(rng, size, 3 + int(3 * rng.random()), 5)
    return Tile(_ramp(field, colours), field)


def voronoi(rng: Generator, size: int, colours: Pixels) -> Tile:
    """Cells around scattered points, each in one of the colours or between two of them, with grooves."""
    cells = 4 + int(5 * rng.random())
    label, groove = _cells(rng, size, cells)
    picked = _ramp(rng.random(cells * cells).astype(np.float32), colours)
    height = _smooth(groove / np.float32(0.12))
    return Tile(picked[label] * (0.6 + 0.4 * height)[..., None], height)


def wave(rng: Generator, size: int, colours: Pixels) -> Tile:
    """Bands bent by noise, fading from the first colour to the last and back."""
    phase = _phase(rng, size, 2, 6) + (1.0 + 2.0 * rng.random()) * _octaves(rng, size, 3, 3)
    field = _bump((phase - np.floor(phase)).astype(np.float32))
    return Tile(_ramp(field, colours), field)


def stripes(rng: Generator, size: int, colours: Pixels) -> Tile:
    """Straight stripes of different widths, the colours in turn; every other stripe is raised."""
    rounds = 1 + int(3 * rng.random())
    bands = len(colours) * (rounds + len(colours) * rounds % 2)  # whole rounds of colours, an even number of bands
    edges = np.concatenate([[0.0], np.cumsum(0.4 + rng.random(bands))])
    edges /= edges[-1]
    phase = _phase(rng, size, 1, 2)
    phase -= np.floor(phase)
    band = np.clip(np.searchsorted(edges, phase, side="right") - 1, 0, bands - 1)
    inside = np.minimum(phase - edges[band], edges[band + 1] - phase)
    slope = _smooth(np.asarray(inside / 0.03, dtype=np.float32))
    height = np.where(band % 2 == 0, 0.5 + 0.5 * slope, 0.5 - 0.5 * slope).astype(np.float32)
    return Tile(colours[band % len(colours)], height)


def checker(rng: Generator, size: int, colours: Pixels) -> Tile:
    """Squares, two by two or more to a tile, the colours in turn along the diagonals."""
    count = len(colours)  # the colours come round after as many squares
    where = _middles(size) * count
    square = np.minimum(np.floor(where).astype(np.int64), count - 1)
    edge = np.minimum(where - square, square + 1 - where).astype(np.float32)
    height = _smooth(np.asarray(np.minimum(edge[:, None], edge) / 0.06, dtype=np.float32))
    return Tile(colours[(square[:, None] + square) % count], height)


def brick(rng: Generator, size: int, colours: Pixels) -> Tile:
    """Courses of bricks, every other one moved by half a brick; the first colour is the mortar."""
    rows, cols = 2 * (2 + int(3 * rng.random())), 2 + int(3 * rng.random())
    gap = 0.04 + 0.06 * rng.random()  # of a course's height
    along = _middles(size) * rows
    course = np.minimum(np.floor(along).astype(np.int64), rows - 1)
    from_bed = np.minimum(along - course, course + 1 - along)
    across = _middles(size)[None, :] * cols + 0.5 * (course % 2)[:, None]
    stone = np.floor(across).astype(np.int64)
    from_joint = np.minimum(across - stone, stone + 1 - across) * (rows / cols)
    inside = (np.minimum(from_bed[:, None], from_joint) - gap).astype(np.float32)
    pixel = np.float32(rows / size)  # the mortar's edge is as soft as a pixel, the brick's shoulder 2 gaps wide
    filled = np.clip(inside / pixel + np.float32(0.5), 0.0, 1.0).astype(np.float32)
    number = (course[:, None] * cols + stone % cols) % (rows * cols)
    tint = _ramp(rng.random(rows * cols).astype(np.float32), colours[1:])
    tint = tint * (0.85 + 0.15 * rng.random(rows * cols).astype(np.float32))[:, None]
    grain = _octaves(rng, size, 16, 3)
    height = _smooth(inside / np.float32(2 * gap)) * (0.85 + 0.15 * grain)
    albedo = colours[0] + filled[..., None] * (tint[number] - colours[0])
    return Tile(albedo * (0.9 + 0.1 * grain)[..., None], height)


PROCEDURAL: dict[str, Callable[[Generator, int, Pixels], Tile]] = {
    "plain": plain,
    "noise": noise,
    "voronoi": voronoi,
    "wave": wave,
    "stripes": stripes,
    "checker": checker,
    "brick": brick,
}


def _middles(size: int) -> NDArray[np.float64]:
    return (np.arange(size) + 0.5) / size


def _smooth(x: Pixels) -> Pixels:
    """0 below 0, 1 above 1, 3 x^2 - 2 x^3 between."""
    x = np.clip(x, np.float32(0), np.float32(1))
    return x * x * (np.float32(3) - np.float32(2) * x)


def _bump(x: Pixels) -> Pixels:
    """16 x^2 (1 - x)^2: one smooth hump over [0, 1], a sine's look without its last bits."""
    y = x * (np.float32(1) - x)
    return np.float32(16) * y * y


def _ramp(field: Pixels, colours: Pixels) -> Pixels:
    """Colours interpolated along [0, 1]: (...,) -> (..., 3). Through a table, which is fast and as fine as 1/1024."""
    steps = np.linspace(0.0, len(colours) - 1.0, 1025)
    low = np.minimum(steps.astype(np.int64), max(0, len(colours) - 2))
    high = np.minimum(low + 1, len(colours) - 1)
    table = colours[low] + (steps - low).astype(np.float32)[:, None] * (colours[high] - colours[low])
    return table[(field * np.float32(1024) + np.float32(0.5)).astype(np.int64)]


def _phase(rng: Generator, size: int, least: int, most: int) -> NDArray[np.float64]:
    """Whole turns along a random direction, so that it repeats: across * u + up * v + phi."""
    turns = least + int((most - least + 1) * rng.random())
    across, up = ((turns, 0), (0, turns), (turns, turns), (turns, -turns))[int(4 * rng.random())]
    where = _middles(size)
    return across * where + up * where[:, None] + rng.random()


def _octaves(rng: Generator, size: int, first: int, count: int) -> Pixels:
    """Value noise, octave i with first * 2^i lattice points a side and half the strength of the one before,
    stretched to [0, 1]."""
    total = np.zeros((size, size), np.float32)
    for octave in range(count):
        lattice = rng.random((first << octave, first << octave)).astype(np.float32) / np.float32(2**octave)
        total += _spline(_spline(lattice, size).T, size).T
    low, high = total.min(), total.max()
    return (total - low) / max(high - low, np.float32(1e-6))


def _spline(values: Pixels, size: int) -> Pixels:
    """Periodic cubic B-spline along the first axis: (n, m) -> (size, m)."""
    n = len(values)
    where = _middles(size) * n
    span = np.floor(where).astype(np.int64)
    x = (where - span)[:, None]
    weights = ((1 - x) ** 3 / 6, x * x * (x / 2 - 1) + 2 / 3, x * (x * (1 - x) + 1) / 2 + 1 / 6, x * x * x / 6)
    total = np.zeros((size, values.shape[1]), np.float32)
    for step, weight in enumerate(weights):
        total += weight.astype(np.float32) * values[(span + step - 1) % n]
    return total


def _cells(rng: Generator, size: int, cells: int) -> tuple[NDArray[np.int64], Pixels]:
    """Which point is nearest, (S, S), and how much farther the second nearest is, in cells.

    One point in the middle 60 % of every square of a grid: the nearest one then lies in the 3 x 3 squares around.
    """
    points = (0.2 + 0.6 * rng.random((2, cells, cells))).astype(np.float32)
    where = _middles(size) * cells
    square = np.minimum(np.floor(where).astype(np.int64), cells - 1)
    inside = (where - square).astype(np.float32)
    first = np.full((size, size), np.inf, np.float32)
    second = first.copy()
    label = np.zeros((size, size), np.int64)
    for down in (-1, 0, 1):
        rows = ((square + down) % cells)[:, None]
        for right in (-1, 0, 1):
            cols = (square + right) % cells
            x = points[0][rows, cols] + (right - inside).astype(np.float32)
            y = points[1][rows, cols] + (down - inside).astype(np.float32)[:, None]
            far = x * x + y * y
            nearer = far < first
            second = np.minimum(second, np.maximum(first, far))
            np.minimum(first, far, out=first)
            np.copyto(label, rows * cells + cols, where=nearer)
    return label, np.sqrt(second) - np.sqrt(first)
