"""What surfaces look like: the palette of materials of a scene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .description import Material
from .draws import Draw, plain

PROCEDURAL = ("plain", "noise", "voronoi", "wave", "brick", "checker", "stripes")
DIGITS = 4


def palette(draw: Draw, textures: list[str] | None = None) -> list[Material]:
    """The four to six materials of a whole dataset, of moderate colours and frequencies."""
    return [
        _material(draw, textures, draw.array(0.2, 0.7, (3,)), draw.between(0.1, 0.25), draw.whole(2, 8), wild=False)
        for _ in range(draw.whole(4, 6))
    ]


def wild_palette(draw: Draw, textures: list[str] | None = None) -> list[Material]:
    """The 1 to 12 materials of one scene, from everything there is, around a colour and a frequency of its own."""
    tint, spread = draw.array(0.0, 1.0, (3,)), draw.between(0.02, 0.6)
    coarse = draw.wide(1.0, 20.0)
    found = []
    for _ in range(draw.whole(1, 12)):
        centre = tint + spread * draw.array(-1.0, 1.0, (3,))
        scale = max(1, round(coarse * draw.wide(0.6, 1.6)))
        found.append(_material(draw, textures, centre, draw.between(0.02, 0.6), scale, wild=True))
    return found


def nearly(draw: Draw, material: Material) -> Material:
    """The same material with colours and roughness up to 1 % away."""
    tint = 1.0 + draw.array(-0.01, 0.01, (3,))
    roughness = material.roughness * draw.between(0.99, 1.01)
    return replace(
        material,
        colours=plain(np.clip(np.array(material.colours) * tint, 0.0, 1.0), DIGITS),
        roughness=round(min(1.0, roughness), DIGITS),
    )


def _material(
    draw: Draw, textures: list[str] | None, centre: np.ndarray, spread: float, scale: int, wild: bool
) -> Material:
    # Whole repetitions: a pattern then meets itself where its picture is tiled.
    colours = np.clip(centre + spread * draw.array(-1.0, 1.0, (draw.whole(2, 4), 3)), 0.02, 0.98)
    pattern = PROCEDURAL[draw.whole(0, len(PROCEDURAL) - 1)]
    chosen = draw.whole(0, len(textures) - 1) if textures else None
    shiny = wild and draw.chance(0.3)
    return Material(
        pattern=pattern if chosen is None else "maps",
        # Maps bring their colours along.
        colours=plain(colours, DIGITS) if chosen is None else [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
        scale=float(scale) if chosen is None else float(max(1, scale // 4)),
        roughness=round(draw.between(0.05, 1.0) if wild else draw.between(0.4, 0.9), DIGITS),
        metallic=round(draw.between(0.2, 1.0), DIGITS) if shiny else 0.0,
        bump=round(draw.between(0.0, 1.0) if wild else draw.between(0.0, 0.3), DIGITS),
        seed=draw.seed(),
        maps=None if textures is None or chosen is None else textures[chosen],
    )
