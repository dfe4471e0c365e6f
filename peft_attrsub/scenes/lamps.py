"""What shines: suns from above, lamps in the room, and the even light of the background.

Strengths are given by the light they cast, in W/m^2: a sun of strength S on a surface across it gives S, an area lamp
of P watts gives P / (π d²) at distance d in front of it. Walls cast no shadows, so that suns shine into rooms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .description import Light
from .draws import TAU, Array, Draw, plain, unit
from .trajectories import clear_of

DIGITS = 5


@dataclass(frozen=True)
class Lamps:
    """The lights of a scene, the background (linear RGB), and the glow of its bulbs (W/m^2/sr, linear RGB)."""

    lights: list[Light]
    background: list[float]
    glow: float
    tint: list[float]


def usual(draw: Draw, room: Array | None, extent: float) -> Lamps:
    """Two suns, and in a room a panel under the roof, all nearly white."""
    lights = [
        _sun(draw, _tint(draw, 0.15), draw.between(1.5, 2.5), (0.4, 0.95)),
        _sun(draw, _tint(draw, 0.15), draw.between(0.3, 0.8), (0.3, 0.95)),
    ]
    if room is not None:
        place = np.array([0.0, 0.0, 0.45 * room[2]]) + draw.array(-0.1, 0.1, (3,)) * room * [1.0, 1.0, 0.0]
        lights.append(_panel(draw, place, _tint(draw, 0.1), draw.between(0.8, 1.6), extent, room))
    background = draw.between(0.2, 0.4) * _tint(draw, 0.1)
    return Lamps(lights, plain(background, DIGITS), round(draw.between(1.0, 3.0), DIGITS), plain(_tint(draw, 0.3), 5))


def wild(draw: Draw, room: Array | None, extent: float, boxes: Array) -> Lamps:
    """One to five suns from anywhere above, up to three lamps in free places of a room; any colour and strength."""
    total = draw.wide(0.8, 7.0)
    suns, inside = draw.whole(1, 5), draw.whole(0, 3) if room is not None else 0
    shares = draw.array(0.05, 1.0, (suns + inside,))
    shares = shares / float(np.cumsum(shares)[-1]) * total
    lights = [_sun(draw, _tint(draw, 1.0), float(share), (0.05, 1.0)) for share in shares[:suns]]
    for share in shares[suns:]:
        assert room is not None
        tries = draw.array(-0.45 * room, 0.45 * room, (64, 3))
        size = draw.between(0.01, 0.06) * extent
        free = tries[clear_of(tries, boxes, size)]
        bulb, colour = draw.chance(0.4), _tint(draw, 1.0)
        # With no free place among 64 the panel stays where boxes were kept away from it.
        place = free[0] if len(free) else np.array([0.0, 0.0, 0.45 * room[2]])
        if bulb:
            # A point of P watts gives P / (4 π d²).
            watts = round(float(share) * 2.0 * TAU * (0.2 * extent) ** 2, DIGITS)
            lights.append(Light("point", plain(colour, DIGITS), watts, position=plain(place)))
        else:
            lights.append(_panel(draw, place, colour, float(share), extent, room, size))
    background = draw.wide(0.02, 0.8) * _tint(draw, 0.7)
    glow, tint = draw.wide(0.3, 15.0), plain(_tint(draw, 1.0), DIGITS)
    return Lamps(lights, plain(background, DIGITS), glow, tint)


def nearly(draw: Draw, lamps: Lamps) -> Lamps:
    """The same lamps with strengths up to 1 % and directions up to about half a degree away."""
    lights = []
    for light in lamps.lights:
        ways = unit(np.array(light.direction or [0.0, 0.0, -1.0]) + draw.array(-0.005, 0.005, (3,)))
        strength = round(light.strength * draw.between(0.99, 1.01), DIGITS)
        lights.append(replace(light, strength=strength, direction=plain(ways) if light.direction else None))
    background = np.array(lamps.background) * draw.between(0.99, 1.01)
    return replace(lamps, lights=lights, background=plain(background, DIGITS))


def _tint(draw: Draw, strength: float) -> Array:
    """White at strength 0, any colour at 1; the largest part is 1, as a lamp's strength says how bright it is."""
    colour = 1.0 - strength * draw.array(0.0, 1.0, (3,))
    return colour / colour.max()


def _sun(draw: Draw, colour: Array, strength: float, height: tuple[float, float]) -> Light:
    ways = -draw.directions(1, height)[0]
    return Light("sun", plain(colour, DIGITS), round(strength, DIGITS), direction=plain(ways))


def _panel(
    draw: Draw, place: Array, colour: Array, light: float, extent: float, room: Array, size: float | None = None
) -> Light:
    """A square lamp that gives `light` W/m^2 a quarter of the extent in front of it, aimed near the room's middle."""
    aim = draw.array(-0.15, 0.15, (3,)) * room
    ways = unit(np.array([aim[0], aim[1], -0.5 * room[2] + aim[2]]) - place)
    watts = light * TAU / 2.0 * (0.25 * extent) ** 2
    side = 0.1 * extent if size is None else size
    return Light("area", plain(colour, DIGITS), round(watts, DIGITS), plain(ways), plain(place), round(side, DIGITS))
