"""Profiles of drinking glasses, bottles, bowls and flasks, for `refraction.Lathe`."""

from __future__ import annotations

import numpy as np

KINDS = ("tumbler", "wine", "bottle", "bowl", "flask", "ball")


def meridian(kind: str, scale: float = 1.0) -> np.ndarray:
    """Closed profile (M, 2) of a glass, (r, z) in metres: up the outside, down the inside; 6 to 21 cm high."""
    quarter = np.linspace(0, np.pi / 2, 13)
    if kind == "tumbler":
        profile = [(0, 0), (0.030, 0), (0.038, 0.11), (0.0355, 0.11), (0.0278, 0.010), (0, 0.010)]
    elif kind == "wine":
        bowl = [(0.037 * np.sin(a) + 0.004, 0.125 - 0.04 * np.cos(a)) for a in quarter]
        inner = [(0.0365 * np.sin(a), 0.127 - 0.036 * np.cos(a)) for a in quarter]
        foot = [(0, 0), (0.034, 0), (0.034, 0.003), (0.006, 0.006), (0.004, 0.015)]
        profile = [*foot, *bowl, (0.033, 0.19), (0.0315, 0.19), *inner[::-1]]
    elif kind == "bottle":
        shoulder = [(0.013 + 0.022 * np.cos(a), 0.13 + 0.03 * np.sin(a)) for a in quarter]
        inside = [(0.0105 + 0.0215 * np.cos(a), 0.13 + 0.0275 * np.sin(a)) for a in quarter]
        neck = [(0.013, 0.21), (0.0105, 0.21)]
        profile = [(0, 0), (0.035, 0), *shoulder, *neck, *inside[::-1], (0.032, 0.006), (0, 0.006)]
    elif kind == "bowl":
        outer = [(0.025 + 0.05 * np.sin(a), 0.06 - 0.06 * np.cos(a)) for a in quarter]
        inner = [(0.022 + 0.049 * np.sin(a), 0.06 - 0.055 * np.cos(a)) for a in quarter]
        profile = [(0, 0), *outer, *inner[::-1], (0, 0.005)]
    elif kind == "flask":
        turn = np.linspace(-np.pi / 2, np.arccos(0.35), 25)
        outer = [(0.045 * np.cos(a), 0.045 + 0.045 * np.sin(a)) for a in turn]
        inner = [(0.042 * np.cos(a), 0.0455 + 0.0415 * np.sin(a)) for a in turn]
        profile = [*outer, (0.0158, 0.14), (0.0135, 0.14), *inner[::-1]]
    elif kind == "ball":
        profile = [(0.032 * np.cos(a), 0.032 + 0.032 * np.sin(a)) for a in np.linspace(-np.pi / 2, np.pi / 2, 33)]
    else:
        raise ValueError(f"there is no glass {kind!r}: give one of {', '.join(KINDS)}.")
    points = np.array(profile, np.float64) * scale
    points[[0, -1], 0] = 0.0
    return points


__all__ = ["KINDS", "meridian"]
