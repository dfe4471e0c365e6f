"""Clothed people out of nothing: poses, clothes and colours drawn from a seed. `scans` writes them as data sets.

A person is a skeleton in a random pose, thickened by rounded cones that melt into each other (a signed distance),
with a layer of clothing: a shirt, and trousers or a skirt, with folds; shoes and hair. The surface is taken out of the
distance by naive surface nets. These are not the real data sets, and results on them say nothing about those: they
let everything from the files to the table run without a download. Children in 2K2K's place have larger heads and
shorter limbs. y points up, a person looks along z, and is about 1 tall.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .surfaces import surface_nets

SKIN, TOP, BOTTOM, SHOES, HAIR = range(5)
MELT = 0.018  # width of the joints between the parts of one layer

Draw = Callable[..., Any]


class Bone(NamedTuple):
    """A rounded cone from a to b (3,) with the radii ra and rb; layer: SKIN, TOP, ..."""

    a: np.ndarray
    b: np.ndarray
    ra: float
    rb: float
    layer: int


@dataclass(frozen=True)
class Person:
    """bones: of all layers. skirt: its waist, hem, and the radii there, or None. head: centre (3,), axes (3, 3) as
    columns, radius. colours (5, 2, 3): two sRGB colours per layer. waves (4, 3), phases (4,): of folds and cloth.
    pattern: of the shirt, "plain", "stripes" or "checks"."""

    bones: list[Bone]
    skirt: Bone | None
    head: tuple[np.ndarray, np.ndarray, float]
    colours: np.ndarray
    waves: np.ndarray
    phases: np.ndarray
    pattern: str


def _turn(axis: int, degrees: float) -> np.ndarray:
    """Rotation (3, 3) about a coordinate axis."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    out = np.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    out[i, i] = out[j, j] = cos
    out[i, j], out[j, i] = -sin, sin
    return out


@dataclass(frozen=True)
class _Build:
    """Lengths in units of a person's height, and how far cloth stands off. bulk: of all radii, about 1."""

    head: float
    leg: float
    torso: float
    arm: float
    broad: float
    bulk: float
    coat: float
    cuff: float
    trouser: float


def sample_person(seed: int, child: bool = False) -> Person:
    """Pose, proportions, clothes and colours drawn from the seed; the same seed gives the same person."""
    rng = np.random.default_rng([seed, int(child)])
    u = rng.uniform
    size, leg, torso, arm, broad = (0.095, 0.19, 0.27, 0.125, 0.075) if child else (0.066, 0.235, 0.29, 0.155, 0.092)
    bulk = u(0.85, 1.25) * (1.1 if child else 1.0)
    cloth = (u(0.006, 0.016), u(0.006, 0.014), u(0.008, 0.018))
    build = _Build(size * u(0.95, 1.05), leg, torso, arm, broad * u(0.9, 1.15), bulk, *cloth)
    skirted, sleeved, long_hair = rng.random(3) < [0.35, 0.6, 0.5]
    trunk = _turn(1, u(-15, 15)) @ _turn(0, u(-5, 14)) @ _turn(2, u(-8, 8))
    nod = trunk @ _turn(1, u(-35, 35)) @ _turn(0, u(-15, 15))
    pelvis = np.array([0.0, 2 * leg + 0.04, 0.0])
    neck = pelvis + trunk @ [0, torso, 0]
    head = neck + nod @ [0, 0.012 + 0.9 * build.head, 0.01]
    bones = _head(build, neck, head, nod, trunk, bool(long_hair))
    hips, waist = 0.062 * bulk + build.trouser, pelvis + trunk @ [0, 0.55 * torso, 0.005]
    bones.append(Bone(pelvis - [0.025, 0.015, 0], pelvis - [-0.025, 0.015, 0], hips, hips, BOTTOM))
    bones.append(Bone(pelvis - [0, -0.01, 0], waist, 0.062 * bulk + build.coat, 0.065 * bulk + build.coat, TOP))
    for side in (-1.0, 1.0):
        bones += _arm(build, u, side, pelvis, neck, trunk, bool(sleeved))
        bones += _leg(build, u, side, pelvis, bool(skirted))
    skirt = None
    if skirted:
        hem = pelvis - [0, u(0.7, 1.35) * leg, 0]
        skirt = Bone(pelvis - [0, -0.03, 0], hem, 0.075 * bulk + build.coat, u(0.12, 0.19), BOTTOM)
    colours = u(0.08, 0.92, (5, 2, 3))
    colours[SKIN] = np.array([0.85, 0.64, 0.52]) * u(0.45, 1.1) * np.array([[1.0], [0.93]])
    colours[HAIR] = np.array([0.35, 0.24, 0.15]) * u(0.25, 2.0) * np.array([[1.0], [0.7]])
    colours[SHOES] *= 0.4
    waves = rng.normal(size=(4, 3)) * [1.0, 0.6, 1.0] * np.array([[35.0], [50.0], [70.0], [95.0]])
    pattern = ("plain", "stripes", "checks")[int(rng.integers(3))]
    return Person(bones, skirt, (head, nod, build.head), colours.clip(0, 1), waves, u(0, 6.28, 4), pattern)


def _head(
    build: _Build, neck: np.ndarray, head: np.ndarray, nod: np.ndarray, trunk: np.ndarray, long_hair: bool
) -> list[Bone]:
    """Neck, skull, nose and hair."""

    def at(x: float, y: float, z: float) -> np.ndarray:
        return head + build.head * (nod @ [x, y, z])

    size = build.head
    bones = [
        Bone(neck - trunk @ [0, 0.03, 0], at(0, -0.3, 0), 0.03, 0.028, SKIN),
        Bone(at(0, -0.22, 0.06), at(0, 0.2, 0), 0.78 * size, size, SKIN),
        Bone(at(0, -0.1, 0.85), at(0, -0.3, 1.0), 0.008, 0.011, SKIN),
        Bone(at(0, 0.33, -0.13), at(0, 0.1, -0.3), size, 0.97 * size, HAIR),
    ]
    if long_hair:
        bones.append(Bone(at(0, 0, -0.6), neck - trunk @ [0, 0.06, 0.05], 0.6 * size, 0.025, HAIR))
    return bones


def _arm(
    build: _Build, u: Draw, side: float, pelvis: np.ndarray, neck: np.ndarray, trunk: np.ndarray, sleeved: bool
) -> list[Bone]:
    """One arm, and the half of the shirt it hangs from; side: -1 right, 1 left."""
    bulk, cuff, coat = build.bulk, build.cuff, build.coat
    shoulder = neck + trunk @ [side * build.broad, -0.035, 0]
    flank = pelvis + trunk @ [side * 0.035, 0.6 * build.torso, 0]
    upper = trunk @ _turn(2, side * u(12, 75)) @ _turn(0, u(-45, 25))
    elbow = shoulder + upper @ [0, -build.arm, 0]
    lower = upper @ _turn(1, side * u(-30, 30)) @ _turn(0, -u(5, 85))
    wrist = elbow + lower @ [0, -0.92 * build.arm, 0]
    bones = [
        Bone(flank, shoulder - trunk @ [side * 0.01, 0, 0], 0.05 * bulk + coat, 0.034 * bulk + coat, TOP),
        Bone(shoulder, elbow, 0.03 * bulk, 0.023, SKIN),
        Bone(elbow, wrist, 0.023, 0.015, SKIN),
        Bone(wrist, wrist + lower @ [0, -0.05, 0.008], 0.016, 0.018, SKIN),
        Bone(wrist, wrist + lower @ [-side * 0.02, -0.03, 0.02], 0.009, 0.007, SKIN),
        Bone(shoulder, shoulder + 0.75 * (elbow - shoulder), 0.032 * bulk + cuff, 0.03 + cuff, TOP),
    ]
    if sleeved:
        bones.append(Bone(shoulder, elbow, 0.032 * bulk + cuff, 0.026 + cuff, TOP))
        bones.append(Bone(elbow, elbow + 0.9 * (wrist - elbow), 0.026 + cuff, 0.02 + cuff, TOP))
    return bones


def _leg(build: _Build, u: Draw, side: float, pelvis: np.ndarray, skirted: bool) -> list[Bone]:
    """One leg with its shoe and, unless there is a skirt, its half of the trousers."""
    bulk, cloth = build.bulk, build.trouser
    hip = pelvis - [-side * 0.044 * bulk, 0.01, 0]
    thigh = _turn(2, side * u(2, 14)) @ _turn(0, u(-38, 22))
    knee = hip + thigh @ [0, -build.leg, 0]
    ankle = knee + thigh @ _turn(0, u(2, 45)) @ [0, -build.leg, 0]
    toe = ankle + thigh @ _turn(0, u(0, 15)) @ [side * 0.015, -0.02, 0.08]
    bones = [
        Bone(hip, knee, 0.05 * bulk, 0.034, SKIN),
        Bone(knee, ankle, 0.034, 0.022, SKIN),
        Bone(ankle - [0, 0.012, 0.008], toe, 0.027, 0.02, SHOES),
    ]
    if not skirted:
        bones.append(Bone(hip, knee, 0.055 * bulk + cloth, 0.036 + cloth, BOTTOM))
        bones.append(Bone(knee, knee + u(0.6, 0.95) * (ankle - knee), 0.036 + cloth, 0.03 + cloth, BOTTOM))
    return bones


def layer_distances(person: Person, points: np.ndarray) -> np.ndarray:
    """Signed distances (5, N), about, from points (N, 3) to each layer; negative inside."""
    points = points.astype(np.float32)
    out = np.full((5, len(points)), 9.0, np.float32)
    for bone in person.bones:
        out[bone.layer] = _melt(out[bone.layer], _cone(points, bone), MELT)
    if person.skirt is not None:
        out[BOTTOM] = _melt(out[BOTTOM], _skirt(points, person.skirt), MELT)
    folds = np.sin(points @ person.waves.T.astype(np.float32) + person.phases.astype(np.float32)).sum(axis=1)
    out[[TOP, BOTTOM]] += np.float32(0.0012) * folds
    out[HAIR] += np.float32(0.0015) * folds
    return out


def distance(person: Person, points: np.ndarray) -> np.ndarray:
    """Signed distance (N,) from the whole person; less steep than 1 in places, never much steeper."""
    layers = layer_distances(person, points)
    out = layers[0]
    for layer in layers[1:]:
        out = _melt(out, layer, 0.006)
    return out


def _melt(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """min(a, b) rounded where they are within `width` of each other: min - max(width - |a - b|, 0)^2 / (4 width)."""
    return np.minimum(a, b) - np.maximum(width - np.abs(a - b), 0) ** 2 * np.float32(0.25 / width)


def _along(points: np.ndarray, bone: Bone) -> tuple[np.ndarray, np.ndarray]:
    """Share of the way from a to b (N,), not clipped, and the vectors from a (N, 3)."""
    way, start = (bone.b - bone.a).astype(np.float32), points - bone.a.astype(np.float32)
    return start @ way / np.float32(max(float(way @ way), 1e-12)), start


def _cone(points: np.ndarray, bone: Bone) -> np.ndarray:
    share, start = _along(points, bone)
    share = share.clip(0, 1)
    off = start - share[:, None] * (bone.b - bone.a).astype(np.float32)
    return np.sqrt((off * off).sum(axis=1)) - np.float32(bone.ra) - share * np.float32(bone.rb - bone.ra)


def _skirt(points: np.ndarray, bone: Bone) -> np.ndarray:
    """A cone with a flat hem and eight soft pleats."""
    share, start = _along(points, bone)
    down = (bone.b - bone.a).astype(np.float32)
    off = start - share[:, None] * down
    length = np.float32(np.linalg.norm(down))
    wide = np.sqrt((off * off).sum(axis=1))
    pleats = np.cos(8 * np.arctan2(off[:, 0], off[:, 2])) * 0.007 * share.clip(0, 1)
    side = (wide - bone.ra - share.clip(-0.2, 1.2) * (bone.rb - bone.ra) - pleats) * 0.85
    return np.maximum(side, np.maximum(share - 1, -share) * length).astype(np.float32)


def colour(person: Person, points: np.ndarray) -> np.ndarray:
    """sRGB colours (N, 3) uint8 of points (N, 3) on the surface."""
    layer = layer_distances(person, points).argmin(axis=0)
    head, axes, size = person.head
    grain = np.sin(points @ (3.1 * person.waves.T) + person.phases).mean(axis=1)
    share = 0.25 + 0.25 * grain
    rows, columns = np.sin(170 * points[:, 1]) > 0.3, np.sin(150 * points[:, 0] + 60 * points[:, 2]) > 0.3
    if person.pattern == "stripes":
        share = np.where(layer == TOP, 0.85 * rows, share)
    elif person.pattern == "checks":
        share = np.where(layer == TOP, 0.4 * rows + 0.4 * columns, share)
    out = person.colours[layer, 0] * (1 - share[:, None]) + person.colours[layer, 1] * share[:, None]
    weave = np.sin(points @ (9.7 * person.waves[::-1].T) + person.phases[::-1]).sum(axis=1)
    out = out * (1 + np.where(layer == SKIN, 0.01, 0.05) * weave)[:, None]
    x, y, z = ((points - head) @ axes / size).T  # in units of the head's radius, seen from the person
    front = (layer == SKIN) & (z > 0.4)
    eyes = np.hypot((np.abs(x) - 0.36) / 0.17, (y - 0.06) / 0.09)
    marks = (
        (np.hypot(x / 0.34, (y + 0.55) / 0.07) < 1, [0.62, 0.25, 0.25]),
        ((np.abs(np.abs(x) - 0.37) < 0.2) & (np.abs(y - 0.26) < 0.045), person.colours[HAIR, 1]),
        (eyes < 1, [0.95, 0.95, 0.93]),
        (np.hypot((np.abs(x) - 0.36) / 0.08, (y - 0.06) / 0.09) < 1, [0.12, 0.1, 0.1]),
    )
    for where, paint in marks:
        out[front & where] = paint
    return (out.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def surface(person: Person, detail: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 and quads (Q, 4) int, counter-clockwise from outside, closed; detail: cells per unit."""
    ends = np.array([end for bone in person.bones for end in (bone.a, bone.b)])
    margin = 0.2 if person.skirt is not None else 0.12
    vertices, quads = surface_nets(
        lambda points: distance(person, points), ends.min(0) - margin, ends.max(0) + margin, 1 / detail
    )
    for _ in range(2):  # onto the surface itself, which the nets only come near
        steps = np.eye(3) * 2e-3
        here = distance(person, vertices)
        slope = (
            np.stack([distance(person, vertices + step) - distance(person, vertices - step) for step in steps], 1)
            / 4e-3
        )
        move = here[:, None] * slope / np.maximum((slope * slope).sum(axis=1, keepdims=True), 0.25)
        vertices = vertices - move.clip(-0.5 / detail, 0.5 / detail)
    return vertices, quads
