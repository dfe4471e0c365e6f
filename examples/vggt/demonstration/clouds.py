"""Point clouds of the evaluation as small bytes that the page's canvas draws."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

#: Points of one cloud on the page.
MOST = 9000
_FIELDS = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) float32 and colours (N, 3) uint8 of a file that `evaluation.save_points` wrote."""
    head, _, body = path.read_bytes().partition(b"end_header\n")
    if b"property uchar red" not in head:
        raise ValueError(f"{path} has no coloured points: make it again with evaluate.py.")
    record = np.frombuffer(body, _FIELDS)
    points = np.stack([record[name] for name in "xyz"], 1)
    return points, np.stack([record[name] for name in ("red", "green", "blue")], 1)


def clouds(folders: dict[str, Path], name: str) -> list[dict[str, Any]]:
    """The truth of one sequence and, from each run's folder of pictures, the prediction of it.

    Each {"label", "count", "points", "colours"}: base64 of int16 (N, 3), in 1/32767 of the half-size of the truth's
    box about its middle, clipped to twice that size; and of uint8 (N, 3). A prediction has the colours of the image
    where it has the truth's points one by one, which it has unless a point was not finite.
    """
    truth, colours = read_ply(next(iter(folders.values())) / f"{name}-truth.ply")
    low, high = np.percentile(truth, (1, 99), axis=0)
    middle, half = (low + high) / 2, float((high - low).max()) / 2 or 1.0
    made = [_packed("truth", truth, colours, middle, half)]
    for label, folder in folders.items():
        points, errors = read_ply(folder / f"{name}-prediction.ply")
        made.append(_packed(label, points, colours if len(points) == len(truth) else errors, middle, half))
    return made


def _packed(label: str, points: np.ndarray, colours: np.ndarray, middle: np.ndarray, half: float) -> dict[str, Any]:
    # Points come view by view: evenly spaced ones are of all views.
    chosen = np.linspace(0, len(points) - 1, min(MOST, len(points))).round().astype(int)
    scaled = np.clip((points[chosen] - middle) / (2 * half), -1, 1)
    return {
        "label": label,
        "count": len(chosen),
        "points": base64.b64encode(np.rint(32767 * scaled).astype("<i2").tobytes()).decode(),
        "colours": base64.b64encode(np.ascontiguousarray(colours[chosen]).tobytes()).decode(),
    }
