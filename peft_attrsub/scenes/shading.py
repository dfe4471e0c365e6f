"""Direct light on surfaces, in numpy: lamps in physical units and the reflection of a rough dielectric or metal.

Radiance towards the eye, W/m^2/sr: sum over lamps of f(l, v) E (n.l), with E the irradiance that the lamp
would cause on a surface facing it and f = (1 - F) (1 - metallic) albedo / pi + D V F (GGX, alpha = roughness^2;
Schlick's F from F0 = 0.04 or, for metals, the albedo). The units are Blender's: a sun of strength S gives E = S
W/m^2, a point of P watts E = P / (4 pi d^2), a square of area A radiance P / (pi A) from its front.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .description import Light, Scene
from .filtering import Texels
from .view import lamp_axes

# Sharper highlights than this are smaller than a pixel and would only sparkle.
SHARPEST = np.float32(0.01)


@dataclass(frozen=True)
class Surface:
    """n points seen by the eye. points, normal (shading), face (geometry), eye (unit, to the camera): (3, n) float32;
    both normals on the eye's side."""

    points: np.ndarray
    normal: np.ndarray
    face: np.ndarray
    eye: np.ndarray
    texels: Texels


@dataclass(frozen=True)
class LampLight:
    """Light of one lamp at n points, as if nothing stood in between. toward (3, n): unit, where it comes from on the
    whole; irradiance (n,): on a surface that faces `toward`, without the lamp's colour."""

    toward: np.ndarray
    irradiance: np.ndarray


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Scalar products of columns: (3, n), (3, n) -> (n,). Columns, for numpy is slow on inner loops of three."""
    product: np.ndarray = a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
    return product


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Vector products of columns: (3, n), (3, n) -> (3, n)."""
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Columns (3, n) at length 1; columns of zeros stay."""
    scaled: np.ndarray = vectors / np.maximum(np.sqrt(dot(vectors, vectors)), np.float32(1e-20))
    return scaled


def lamp_light(light: Light, points: np.ndarray) -> LampLight:
    """The unshadowed light of one lamp at n points (3, n).

    For a square lamp this is Lambert's vector irradiance, L / 2 sum_i angle_i normal_i over the edges seen from the
    point: exact for a matt surface that has the whole lamp above its horizon, and free of noise.
    """
    if light.kind == "sun":
        toward = np.empty_like(points)
        toward[:] = lamp_axes(light.direction or [0, 0, 0])[:, 2:]
        return LampLight(toward, np.full(points.shape[1], light.strength, np.float32))
    to = _position(light) - points
    if light.kind == "point":
        square = np.maximum(dot(to, to), np.float32(1e-8))
        return LampLight(to / np.sqrt(square), np.float32(light.strength / (4 * np.pi)) / square)
    if light.kind != "area":
        raise ValueError(f"the scene has a lamp of kind {light.kind!r}: 'sun', 'area' or 'point' is expected.")
    if light.size <= 0:
        raise ValueError(f"an area lamp has the size {light.size}: its side in metres is expected, more than 0.")
    across, along, back = lamp_axes(light.direction or [0, 0, 0]).astype(np.float32).T[:, :, None]
    half = np.float32(light.size / 2)
    corners = [unit(to + half * (x * across + y * along)) for x, y in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    vector = np.zeros_like(to)
    for here, there in zip(corners, corners[1:] + corners[:1], strict=True):
        normal = cross(here, there)
        sine = np.sqrt(dot(normal, normal))
        vector += normal * (np.arctan2(sine, dot(here, there)) / np.maximum(sine, np.float32(1e-12)))
    strength = np.sqrt(dot(vector, vector))
    radiance = light.strength / (np.pi * light.size**2)
    front = dot(to, back) > 0
    return LampLight(vector / np.maximum(strength, np.float32(1e-20)), strength * front * np.float32(radiance / 2))


def shadow_rays(light: Light, points: np.ndarray, dither: np.ndarray, samples: int) -> Iterator[np.ndarray]:
    """Vectors (3, n) from n points to one spot of a sun or a point lamp, or to `samples` spots of an area lamp.

    dither (2, n): in [0, 1), shifts the spots of a point. A ray ends on the lamp at its parameter 1, a sun's nowhere.
    """
    if light.kind == "sun":
        ray = np.empty_like(points)
        ray[:] = lamp_axes(light.direction or [0, 0, 0])[:, 2:]
        yield ray
        return
    to = _position(light) - points
    if light.kind == "point":
        yield to
        return
    across, along, _ = lamp_axes(light.direction or [0, 0, 0]).astype(np.float32).T[:, :, None]
    for number in range(samples):
        # Roberts' R2 sequence: the spots of a point, and those of its neighbours, lie evenly on the square.
        step = np.array([[0.7548776662], [0.5698402910]], np.float32) * np.float32(number)
        x, y = ((dither + step) % 1 - np.float32(0.5)) * np.float32(light.size)
        yield to + across * x + along * y


def reflect(surface: Surface, toward: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """f(l, v) (n.l) per colour, (3, k), at the k points `chosen` (indices), for light from the unit `toward`."""
    normal, eye = surface.normal.take(chosen, 1), surface.eye.take(chosen, 1)
    albedo, metallic = surface.texels.albedo.take(chosen, 1), surface.texels.metallic[chosen]
    alpha = np.maximum(surface.texels.roughness[chosen] ** 2, SHARPEST)
    half = unit(toward + eye)
    nl, nv = np.maximum(dot(normal, toward), 0), np.maximum(dot(normal, eye), np.float32(1e-3))
    nh, vh = np.maximum(dot(normal, half), 0), np.clip(dot(eye, half), 0, 1)
    a2 = alpha * alpha
    peak = nh * nh * (a2 - 1) + 1
    spread = a2 / (np.float32(np.pi) * peak * peak)
    masking = np.float32(0.5) / (nl * (nv * (1 - alpha) + alpha) + nv * (nl * (1 - alpha) + alpha) + np.float32(1e-6))
    base = np.float32(0.04) * (1 - metallic) + albedo * metallic
    rest = 1 - vh
    rest2 = rest * rest
    fresnel = base + (1 - base) * (rest2 * rest2 * rest)
    diffuse = (1 - fresnel) * ((1 - metallic) * np.float32(1 / np.pi)) * albedo
    total: np.ndarray = (diffuse + fresnel * (spread * masking)) * nl
    return total


def ambient_light(scene: Scene, mean_albedo: float) -> np.ndarray:
    """Even light from all sides, radiance (3,): the background, and in a room what its walls pass on.

    A closed room of surface A and mean albedo r that lamps fill with the flux P has the mean radiance
    P r / (pi A (1 - r)) from everything but the lamps (the integrating sphere).
    """
    light = np.asarray(scene.background, np.float64)
    if scene.size is None:
        return light.astype(np.float32)
    x, y, z = (abs(side) for side in scene.size)
    walls = np.array([y * z, x * z, x * y])
    flux = np.zeros(3)
    for lamp in scene.lights:
        # A sun pours through the room's box seen along its direction.
        section = float(np.abs(lamp_axes(lamp.direction or [0, 0, 0])[:, 2]) @ walls) if lamp.kind == "sun" else 1.0
        flux += np.asarray(lamp.colour) * lamp.strength * section
    albedo = min(max(mean_albedo, 0.0), 0.9)
    passed = flux * albedo / (np.pi * max(2 * float(walls.sum()), 1e-9) * (1 - albedo))
    return (light + passed).astype(np.float32)


def _position(light: Light) -> np.ndarray:
    if light.position is None:
        raise ValueError(f"a lamp of kind {light.kind!r} has no position: it needs one.")
    return np.asarray(light.position, np.float32)[:, None]
