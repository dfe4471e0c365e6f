"""Two colour maps whose lightness grows evenly, so that equal steps of a value look like equal steps.

A colour is a point of Oklab in its polar form: lightness L, chroma c, hue h in degrees. Along a map L is linear and
h turns one way; c is lowered where the screen has no such colour.
"""

from __future__ import annotations

from functools import cache

import numpy as np

STEPS, SMOOTH = 256, 24
#: name -> (lightness from, to; hue in degrees from, to; the largest chroma)
MAPS = {"depth": (0.24, 0.93, 295.0, 105.0, 0.13), "error": (0.22, 0.95, -5.0, 105.0, 0.18)}
#: What has no value.
NOTHING = (128, 128, 128)


def _to_rgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Linear RGB (N, 3) of Oklab colours, outside [0, 1] where the screen has none (Ottosson 2020)."""
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        1,
    )


@cache
def color_map(name: str) -> np.ndarray:
    """The (256, 3) uint8 sRGB colours of a map, "depth" or "error", from the least value to the greatest."""
    if name not in MAPS:
        raise ValueError(f"there is no colour map {name!r}: expected one of {', '.join(MAPS)}.")
    dark, light, first, last, most = MAPS[name]
    along = np.linspace(0.0, 1.0, STEPS)
    lightness, hue = dark + (light - dark) * along, first + (last - first) * along
    low, high = np.zeros(STEPS), np.full(STEPS, most)
    for _ in range(20):  # bisection for the largest chroma that can be shown
        middle = (low + high) / 2
        rgb = _to_rgb(lightness, middle, hue)
        shown = ((rgb >= 0) & (rgb <= 1)).all(1)
        low, high = np.where(shown, middle, low), np.where(shown, high, middle)
    # Where the limit has a corner an edge would be seen that no value has: the mean of minima around it has none.
    around = np.lib.stride_tricks.sliding_window_view
    least = around(np.pad(low, SMOOTH, mode="edge"), 2 * SMOOTH + 1).min(1)
    chroma = around(np.pad(least, SMOOTH, mode="edge"), 2 * SMOOTH + 1).mean(1)
    linear = np.clip(_to_rgb(lightness, chroma, hue), 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colors = np.rint(255 * srgb).astype(np.uint8)
    colors.flags.writeable = False
    return colors


def paint(values: np.ndarray, low: float, high: float, name: str) -> np.ndarray:
    """Colours (..., 3) uint8 of values (...): low and less is the first, high and more the last, nan is grey."""
    finite = ~np.isnan(values)
    span = high - low if high > low else 1.0
    along = np.clip((np.where(finite, values, low) - low) / span, 0, 1)
    colors = color_map(name)[np.rint(along * (STEPS - 1)).astype(int)]
    return np.where(finite[..., None], colors, np.array(NOTHING, np.uint8))


__all__ = ["color_map", "paint"]
