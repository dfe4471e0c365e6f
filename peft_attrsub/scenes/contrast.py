"""How much a scene's surfaces or lamps will show, judged from their description before anything is rendered.

Numbers are those of an encoded picture, with the square root in place of sRGB's curve. On 192 rendered scenes of
texture datasets, half of them rooms, the spread of colors correlates with that of the pixels by 0.71 in rooms (0.43
around objects) and the brightness by 0.9; on 192 of lighting datasets the contrast by 0.71 to 0.76 and the brightness
by 0.87.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .description import Light, Material
from .draws import Array
from .lamps import Lamps

# Below these a picture is nearly one color, outside of these nearly black or white: the draw is made again.
LEAST_SPREAD, PALETTE_RANGE = 0.25, (0.3, 0.8)
LEAST_CONTRAST, LIGHT_RANGE = 0.05, (0.3, 0.85)
TRIES = 32
# Rec. 709.
LUMINANCE = (0.2126, 0.7152, 0.0722)
ALBEDO = 0.45  # of the gray surfaces that lamps are judged on


def palette_spread(materials: Sequence[Material]) -> tuple[float, float]:
    """(spread, brightness) of the colors of a palette, each material counting the same.

    Spread: sqrt of the sum over R, G, B of the variances of sqrt(color). Brightness: mean luminance of sqrt(color).
    """
    shown = []
    for material in materials:
        colors = material.colours[:1] if material.pattern == "plain" else material.colours
        shown += [([math.sqrt(part) for part in color], 1.0 / len(colors)) for color in colors]
    total = sum(weight for _, weight in shown)
    means = [sum(color[k] * weight for color, weight in shown) / total for k in range(3)]
    squares = [sum((color[k] - means[k]) ** 2 * weight for color, weight in shown) / total for k in range(3)]
    return math.sqrt(sum(squares)), sum(part * mean for part, mean in zip(LUMINANCE, means, strict=True))


def light_contrast(lamps: Lamps, room: Array | None) -> tuple[float, float]:
    """(standard deviation, mean) of the encoded luminance of six gray surfaces: the walls of the room, or the sides of
    a cube in the middle of an object-centered scene.

    Radiance L = a (E / pi + A): E of suns (S cos), area lamps (P cos cos' / (pi d^2)), points (P cos / (4 pi d^2))
    without shadows; A the background and what the walls pass on (`shading.ambient_light`).
    """
    half = None if room is None else [float(side) / 2.0 for side in room]
    ambient = [float(part) for part in lamps.background]
    if half is not None:
        walls = [4.0 * half[1] * half[2], 4.0 * half[0] * half[2], 4.0 * half[0] * half[1]]
        passed = ALBEDO / (math.pi * 2.0 * sum(walls) * (1.0 - ALBEDO))
        for light in lamps.lights:
            way = light.direction or [0.0, 0.0, 0.0]
            section = sum(abs(way[k]) * walls[k] for k in range(3)) if light.kind == "sun" else 1.0
            ambient = [ambient[k] + light.colour[k] * light.strength * section * passed for k in range(3)]
    values = []
    for axis in range(3):
        for sign in (1.0, -1.0):
            normal = [sign * (axis == k) for k in range(3)]
            place = [0.0] * 3 if half is None else [-normal[k] * half[k] for k in range(3)]
            color = list(ambient)
            for light in lamps.lights:
                share = _irradiance(light, normal, place) / math.pi
                color = [color[k] + light.colour[k] * share for k in range(3)]
            values.append(sum(LUMINANCE[k] * math.sqrt(min(1.0, ALBEDO * color[k])) for k in range(3)))
    mean = sum(values) / 6.0
    return math.sqrt(sum((value - mean) ** 2 for value in values) / 6.0), mean


def shows_palette(materials: Sequence[Material]) -> bool:
    """Whether a palette is neither nearly one color nor nearly black or white. The colors of maps are not known."""
    if any(material.pattern == "maps" for material in materials):
        return True
    spread, brightness = palette_spread(materials)
    return spread >= LEAST_SPREAD and PALETTE_RANGE[0] <= brightness <= PALETTE_RANGE[1]


def shows_light(lamps: Lamps, room: Array | None) -> bool:
    """Whether lamps make surfaces of different directions look different, and neither black nor white."""
    contrast, brightness = light_contrast(lamps, room)
    return contrast >= LEAST_CONTRAST and LIGHT_RANGE[0] <= brightness <= LIGHT_RANGE[1]


def _irradiance(light: Light, normal: list[float], place: list[float]) -> float:
    """W/m^2 on a surface at `place`, without shadows."""
    if light.kind == "sun":
        way = light.direction or [0.0, 0.0, 0.0]
        return light.strength * max(0.0, -sum(normal[k] * way[k] for k in range(3)))
    to = [there - here for there, here in zip(light.position or [0.0] * 3, place, strict=True)]
    square = sum(part * part for part in to)
    distance = math.sqrt(square)
    cosine = max(0.0, sum(normal[k] * to[k] for k in range(3))) / max(distance, 1e-9)
    falloff = cosine / (square + 0.1)  # a lamp on a wall does not blind the others
    if light.kind == "point":
        return light.strength * falloff / (4.0 * math.pi)
    way = light.direction or [0.0, 0.0, -1.0]
    front = max(0.0, -sum(to[k] * way[k] for k in range(3))) / max(distance, 1e-9)
    return light.strength * falloff * front / math.pi
