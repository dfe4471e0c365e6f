"""Rays through glass, in numpy: solids of revolution and boxes, hit exactly, and light that bends in the glass.

A glass is a closed meridian (r, z) turned about the z axis of the object: every edge of it sweeps a part of a cone

    x^2 + y^2 = (a + b z)^2

or a ring of a plane, which a ray meets at the root of a quadratic. Light goes on by Snell's law, n1 sin i = n2 sin t,
is weakened by Fresnel's reflectance and by exp(-absorption x way inside), and is reflected where there is no t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

#: A ray goes on this far behind the surface that it left, in metres.
STEP = 1e-6
#: An edge of a meridian that rises less than this, per length, is a ring.
FLAT = 1e-6


@dataclass(frozen=True)
class Lathe:
    """A glass. meridian (M, 2): (r, z) in metres, from the axis up the outside and down the inside to the axis again.

    pose (4, 4): world from object. ior: index of refraction. absorption (3,): per metre, red, green, blue.
    """

    meridian: np.ndarray
    pose: np.ndarray
    label: int
    ior: float = 1.5
    absorption: tuple[float, float, float] = (4.0, 2.0, 3.0)

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance (N,) to the first surface, inf where none, and its outward normal (N, 3), for rays of length 1."""
        distance, normal = np.full(len(origins), np.inf), np.zeros((len(origins), 3))
        o, d = (origins - self.pose[:3, 3]) @ self.pose[:3, :3], directions @ self.pose[:3, :3]
        low, high = self.meridian[:, 1].min(), self.meridian[:, 1].max()
        middle = o - [0.0, 0.0, (low + high) / 2]
        along = (middle * d).sum(1)
        radius = np.hypot(self.meridian[:, 0].max(), (high - low) / 2)
        near = np.flatnonzero(along**2 - (middle**2).sum(1) + radius**2 >= 0)  # those that meet the sphere around it
        if not len(near):
            return distance, normal
        o, d = o[near], d[near]
        best, turned = np.full(len(near), np.inf), np.zeros((len(near), 3))
        for (r0, z0), (r1, z1) in zip(self.meridian[:-1], self.meridian[1:], strict=True):
            length = np.hypot(r1 - r0, z1 - z0)
            if length == 0:
                continue
            across, up = (z1 - z0) / length, (r0 - r1) / length  # the outside is on the right of the way
            for t in _ring(o, d, z0, r0, r1) if abs(across) < FLAT else _cone(o, d, r0, z0, r1, z1):
                closer = np.flatnonzero(t < best)
                best[closer] = t[closer]
                at = o[closer] + t[closer, None] * d[closer]
                round_ = np.maximum(np.hypot(at[:, 0], at[:, 1]), 1e-12)
                turned[closer, 0], turned[closer, 1] = across * at[:, 0] / round_, across * at[:, 1] / round_
                turned[closer, 2] = up
        distance[near], normal[near] = best, turned @ self.pose[:3, :3].T
        return distance, normal


@dataclass(frozen=True)
class Box:
    """An opaque box of half sizes (3,) about the origin of its pose (4, 4), world from object."""

    half: np.ndarray
    pose: np.ndarray
    label: int = 0

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As of `Lathe`, for rays that begin outside."""
        o, d = (origins - self.pose[:3, 3]) @ self.pose[:3, :3], directions @ self.pose[:3, :3]
        d = np.where(np.abs(d) < 1e-12, 1e-12, d)
        enter = (-np.sign(d) * self.half - o) / d
        leave = (np.sign(d) * self.half - o) / d
        axis = enter.argmax(1)
        first = enter.max(1)
        distance = np.where((first <= leave.min(1)) & (first > 0), first, np.inf)
        normal = np.zeros_like(o)
        rows = np.arange(len(o))
        normal[rows, axis] = -np.sign(d[rows, axis])
        return distance, normal @ self.pose[:3, :3].T


class Solid(Protocol):
    """Anything that a ray can hit."""

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def _ring(o: np.ndarray, d: np.ndarray, z: float, r0: float, r1: float) -> list[np.ndarray]:
    slope = np.where(np.abs(d[:, 2]) < 1e-12, 1e-12, d[:, 2])
    t = (z - o[:, 2]) / slope
    square = (o[:, 0] + t * d[:, 0]) ** 2 + (o[:, 1] + t * d[:, 1]) ** 2
    good = (t > 0) & (square >= min(r0, r1) ** 2) & (square <= max(r0, r1) ** 2)
    return [np.where(good, t, np.inf)]


def _cone(o: np.ndarray, d: np.ndarray, r0: float, z0: float, r1: float, z1: float) -> list[np.ndarray]:
    slope = (r1 - r0) / (z1 - z0)
    edge = r0 + slope * (o[:, 2] - z0)  # radius of the cone at the height of the origin
    a = d[:, 0] ** 2 + d[:, 1] ** 2 - (slope * d[:, 2]) ** 2
    b = o[:, 0] * d[:, 0] + o[:, 1] * d[:, 1] - slope * d[:, 2] * edge
    c = o[:, 0] ** 2 + o[:, 1] ** 2 - edge**2
    under = b * b - a * c
    # The sum without cancellation, q, gives both roots as q / a and c / q.
    q = -(b + np.where(b < 0, -1.0, 1.0) * np.sqrt(np.maximum(under, 0)))
    roots = []
    for top, bottom in ((q, a), (c, q)):
        t = np.divide(top, bottom, out=np.full_like(top, np.inf), where=np.abs(bottom) > 1e-14)
        z = o[:, 2] + np.where(np.isfinite(t), t, 0.0) * d[:, 2]
        good = (under >= 0) & (t > 0) & (z >= min(z0, z1)) & (z <= max(z0, z1)) & (r0 + slope * (z - z0) >= 0)
        roots.append(np.where(good, t, np.inf))
    return roots


def nearest(
    solids: Sequence[Solid], origins: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance (N,), outward normal (N, 3) and number (N,) of the first solid on each ray; inf, 0, -1 where none."""
    distance = np.full(len(origins), np.inf)
    normal, which = np.zeros((len(origins), 3)), np.full(len(origins), -1)
    for number, solid in enumerate(solids):
        t, n = solid.hit(origins, directions)
        closer = t < distance
        distance[closer], normal[closer], which[closer] = t[closer], n[closer], number
    return distance, normal, which


def refract(
    directions: np.ndarray, normals: np.ndarray, ratio: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Refracted and mirrored directions (N, 3), and the reflectance (N,), 1 where all light is reflected.

    normals (N, 3) point against the light; ratio (N,) is n1 / n2. With c = -d n and k = 1 - ratio^2 (1 - c^2):
    t = ratio d + (ratio c - sqrt k) n, mirrored d + 2 c n; the reflectance is the mean of both polarisations'.
    """
    c = np.clip(-(directions * normals).sum(1), 0, 1)
    k = 1 - ratio**2 * (1 - c**2)
    root = np.sqrt(np.maximum(k, 0))
    bent = ratio[:, None] * directions + (ratio * c - root)[:, None] * normals
    mirrored = directions + 2 * c[:, None] * normals
    across = (ratio * c - root) / np.maximum(ratio * c + root, 1e-12)
    along = (ratio * root - c) / np.maximum(ratio * root + c, 1e-12)
    return bent, mirrored, np.where(k > 0, (across**2 + along**2) / 2, 1.0)


def trace(
    glasses: Sequence[Lathe],
    boxes: Sequence[Box],
    origins: np.ndarray,
    directions: np.ndarray,
    shade: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    sky: Callable[[np.ndarray], np.ndarray],
    bounces: int = 10,
) -> np.ndarray:
    """Linear colour (N, 3) that comes along each ray, whose directions have the length 1.

    shade(which, points, normals) gives the colour of points on boxes, sky(directions) what is behind all. Mirrored
    light is followed inside the glass alone: outside it shows the sky.
    """
    colour = np.zeros((len(origins), 3))
    weight = np.ones((len(origins), 3))
    active = np.arange(len(origins))
    o, d = origins.copy(), directions.copy()
    for _ in range(bounces):
        t, n, which = nearest(glasses, o, d)
        behind, m, box = nearest(boxes, o, d)
        ends = ~(t < behind)
        seen = ends & (box >= 0)
        if seen.any():
            points = o[seen] + behind[seen, None] * d[seen]
            colour[active[seen]] += weight[active[seen]] * shade(box[seen], points, m[seen])
        empty = ends & (box < 0)
        colour[active[empty]] += weight[active[empty]] * sky(d[empty])
        go = ~ends
        active, o, d, t, n, which = active[go], o[go], d[go], t[go], n[go], which[go]
        if not len(active):
            return colour
        inside = (d * n).sum(1) > 0
        ior = np.array([glass.ior for glass in glasses])[which]
        absorbed = np.array([glass.absorption for glass in glasses])[which]
        weight[active] *= np.where(inside[:, None], np.exp(-absorbed * t[:, None]), 1.0)
        against = np.where(inside[:, None], -n, n)
        bent, mirrored, share = refract(d, against, np.where(inside, ior, 1 / ior))
        total = share >= 1
        outer = ~inside
        colour[active[outer]] += weight[active[outer]] * share[outer, None] * sky(mirrored[outer])
        weight[active] *= np.where(total, 1.0, 1 - share)[:, None]
        at = o + t[:, None] * d
        d = np.where(total[:, None], mirrored, bent)
        d /= np.linalg.norm(d, axis=1, keepdims=True)
        o = at + STEP * d
    colour[active] += weight[active] * sky(d)
    return colour
