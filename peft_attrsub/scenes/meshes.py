"""A scene's shapes as one triangle mesh, in numpy.

A shape is made of sheets: grids of points p with an outward normal n. A point goes to the world as

    x = A p + t + amplitude * s * h(u, v) * n',   pose = [A t; 0 1],  n' = A^-T n / |A^-T n|

with s the smallest semi-axis of the shape in the world (smallest singular value of A) and h the height field
(|h| <= 1, zero where sheets meet), so no point moves by more than amplitude * s. Normals come from the moved grid:
central differences along its columns and rows, crossed. Sheets that meet share their border points bit by bit, so
that merging equal positions closes every shape but the floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray

from .description import SHAPES, Scene, Shape
from .heights import height_fields

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int32]
PATCHES = {"ellipsoid": 1, "cube": 6, "cylinder": 3, "room": 6, "floor": 1}
# Per face of the cube: its axis and side, and the directions of u and v seen from outside (u x v = outward).
FACES = (
    ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
    ((0, 1, 0), (-1, 0, 0), (0, 0, 1)),
    ((0, 0, -1), (-1, 0, 0), (0, 1, 0)),
    ((0, 0, 1), (1, 0, 0), (0, 1, 0)),
)


@dataclass(frozen=True)
class Mesh:
    """V vertices and T triangles, counter-clockwise seen from outside (rooms: from inside; the floor: from above).

    vertices (V, 3) float32: metres, world. triangles (T, 3) int32. uv (V, 2) float32 in [0, 1]: u x v points to the
    side the normal points to, and one unit is as long along u as along v (see `build_mesh`). normals (V, 3) float32:
    unit, world. material, object_id (T,) int32. A vertex belongs to one surface patch: positions repeat where
    patches meet and where u runs around.
    """

    vertices: Singles
    triangles: Ints
    uv: Singles
    normals: Singles
    material: Ints
    object_id: Ints


@dataclass(frozen=True)
class _Sheet:
    """P grids of the same size before the pose. points (3, P, rows, cols); outward broadcasts against them; uv
    (2, P, rows, cols) in [0, 1]; triangles (P * n, 3) number the points listed in `keep` (all, where None).

    closed: the last column repeats the first. poles: the first, the last row is one point. patches: the numbers of
    the surface patches, also of their height fields.
    """

    points: Floats
    outward: Floats
    uv: Floats
    triangles: Ints
    keep: Ints | None
    closed: bool
    poles: tuple[bool, bool]
    patches: tuple[int, ...]
    vertices: int


def build_mesh(scene: Scene) -> Mesh:
    """The triangles of all shapes of the scene, in their order.

    A shape of resolution R has, per patch: cube, room, floor R x R squares; ellipsoid 2R around and R from pole to
    pole; cylinder 2R around, R along the side, and R // 2 rings in each cap. Texture coordinates keep the shape's
    proportions: one unit is the longest side (cube, room, floor) or the way around (ellipsoid, cylinder), less where
    the other direction would leave [0, 1]. A pose that mirrors is turned right side out.

    Raises ValueError, naming the shape, for an unknown kind, a pose that is not a finite invertible affine 4 x 4
    matrix, a wrong number of materials or an unknown one, an object_id outside 1..65535, a resolution below 2, and
    an amplitude that is negative or not finite.
    """
    for index, shape in enumerate(scene.shapes):
        _check(shape, f"shape {index} ({shape.kind})", len(scene.materials))
    sheets = [(shape, sheet) for shape in scene.shapes for sheet in _sheets(shape.kind, shape.resolution)]
    total = sum(sheet.vertices for _, sheet in sheets)
    faces = sum(len(sheet.triangles) for _, sheet in sheets)
    mesh = Mesh(
        np.empty((total, 3), np.float32),
        np.empty((faces, 3), np.int32),
        np.empty((total, 2), np.float32),
        np.empty((total, 3), np.float32),
        np.empty(faces, np.int32),
        np.empty(faces, np.int32),
    )
    vertex = face = 0
    for shape in scene.shapes:
        lengths = _uv_lengths(shape)
        heights = _heights(shape)
        for number, sheet in enumerate(_sheets(shape.kind, shape.resolution)):
            here, there = slice(vertex, vertex + sheet.vertices), slice(face, face + len(sheet.triangles))
            points, normals, mirrored = _place(sheet, shape, heights[number] if heights else None)
            for axis in range(3):
                mesh.vertices[here, axis] = _kept(points[axis], sheet)
                mesh.normals[here, axis] = _kept(normals[axis], sheet)
            for axis in range(2):
                mesh.uv[here, axis] = _kept(sheet.uv[axis] * lengths[number][axis][:, None, None], sheet)
            mesh.triangles[there] = (sheet.triangles[:, [0, 2, 1]] if mirrored else sheet.triangles) + vertex
            each = len(sheet.triangles) // len(sheet.patches)
            mesh.material[there] = np.repeat([shape.materials[patch] for patch in sheet.patches], each)
            mesh.object_id[there] = shape.object_id
            vertex, face = here.stop, there.stop
    mesh.vertices[:] += np.float32(0)  # no -0.0: equal positions are equal bytes
    return mesh


def smallest_semi_axis(shape: Shape) -> float:
    """Half the least extent of the shape in the world, metres: the smallest singular value of its pose's 3 x 3 part
    (of its first two columns for a floor). A height field moves points by at most amplitude times this."""
    linear = np.array(shape.pose, dtype=np.float64)[:3, : 2 if shape.kind == "floor" else 3]
    # Rounded: the last bits of a decomposition differ between machines.
    return float(np.float32(np.linalg.svd(linear, compute_uv=False)[-1]))


def _check(shape: Shape, name: str, materials: int) -> None:
    if shape.kind not in SHAPES:
        raise ValueError(f"{name}: unknown kind of shape; known are {', '.join(SHAPES)}.")
    pose = np.array(shape.pose, dtype=np.float64)
    if pose.shape != (4, 4) or not np.isfinite(pose).all() or pose[3].tolist() != [0, 0, 0, 1]:
        raise ValueError(f"{name}: its pose is not a 4 x 4 matrix of finite numbers ending in the row 0 0 0 1.")
    if abs(_determinant(pose)) <= 1e-9 * float(np.prod(np.sqrt((pose[:3, :3] ** 2).sum(axis=0)))):
        raise ValueError(f"{name}: its pose flattens it (no inverse): give every semi-axis a length above 0.")
    if len(shape.materials) != PATCHES[shape.kind]:
        raise ValueError(f"{name}: has {len(shape.materials)} materials, needs {PATCHES[shape.kind]}, one per patch.")
    if not all(0 <= material < materials for material in shape.materials):
        raise ValueError(f"{name}: names the materials {shape.materials}, the scene has 0 to {materials - 1}.")
    if not 1 <= shape.object_id <= 65535:
        raise ValueError(f"{name}: has the object_id {shape.object_id}; masks hold 1 to 65535.")
    if shape.resolution < 2:
        raise ValueError(f"{name}: has the resolution {shape.resolution}, needs 2 segments or more.")
    if not 0 <= shape.amplitude < float("inf"):
        raise ValueError(f"{name}: has the amplitude {shape.amplitude}; give 0 (flat) or more.")


def _determinant(pose: Floats) -> float:
    x, y, z = pose[:3, :3].tolist()
    return float(sum(a * b for a, b in zip(x, _cross(y, z), strict=True)))


def _cross(a: list[float], b: list[float]) -> list[float]:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


@lru_cache(maxsize=8)  # a scene has one resolution per kind; more would only pile up over a long run
def _sheets(kind: str, resolution: int) -> tuple[_Sheet, ...]:
    if kind == "ellipsoid":
        return (_ellipsoid(resolution),)
    if kind == "cylinder":
        return _cylinder(resolution)
    side = (2.0 * np.arange(resolution + 1) - resolution) / resolution  # bitwise: side[::-1] == -side
    u, v = np.meshgrid(side, side)
    inward = -1 if kind == "room" else 1
    if kind == "floor":
        faces = [((0, 0, 0), (1, 0, 0), (0, 1, 0))]
        outward = np.array([[0.0, 0.0, 1.0]])
    else:
        faces = [(face, (inward * a, inward * b, inward * c), up) for face, (a, b, c), up in FACES]
        outward = inward * np.array([face for face, _, _ in faces], dtype=np.float64)
    points = np.stack([[f + a * u + b * v for f, a, b in zip(*face, strict=True)] for face in faces], axis=1)
    uv = np.repeat(np.stack([u, v])[:, None] * 0.5 + 0.5, len(faces), axis=1)
    return (_sheet(points, outward.T[:, :, None, None], uv, tuple(range(len(faces)))),)


def _circle(segments: int) -> tuple[Floats, Floats]:
    """cos and sin of 0, 1 / segments, ..., 1 turn; the last equals the first."""
    angles: Floats = (np.arange(segments + 1) % segments).astype(np.float64) * (2 * pi / segments)
    # Rounded: sines differ in their last bit between machines.
    cos, sin = np.cos(angles).round(12), np.sin(angles).round(12)
    return cos, sin


def _ellipsoid(resolution: int) -> _Sheet:
    around = 2 * resolution
    cos, sin = _circle(around)
    up, out = (table[: resolution + 1] for table in _circle(around))  # half a turn: cos is -z, sin the radius
    points = np.stack([out[:, None] * cos, out[:, None] * sin, np.repeat(-up[:, None], around + 1, axis=1)])[:, None]
    u, v = np.meshgrid(np.arange(around + 1) / around, np.arange(resolution + 1) / resolution)
    u[[0, -1]] = (np.arange(around + 1) + 0.5) / around  # a pole has no u of its own: the middle of each triangle
    return _sheet(points, points, np.stack([u, v])[:, None], (0,), closed=True, poles=(True, True))


def _cylinder(resolution: int) -> tuple[_Sheet, ...]:
    around, rings = 2 * resolution, max(1, resolution // 2)
    cos, sin = _circle(around)
    side = (2.0 * np.arange(resolution + 1) - resolution) / resolution
    tall = np.ones((resolution + 1, around + 1))
    points = np.stack([tall * cos, tall * sin, tall * side[:, None]])[:, None]
    uv = np.stack(np.meshgrid(np.arange(around + 1) / around, side * 0.5 + 0.5))[:, None]
    made = [_sheet(points, points * [[[[1.0]]], [[[1.0]]], [[[0.0]]]], uv, (0,), closed=True)]
    for patch, z in ((1, -1.0), (2, 1.0)):
        radius = (np.arange(rings + 1) / rings)[:: -int(z), None]  # the bottom grows to its rim, the top from it
        x, y = radius * cos, radius * sin
        uv = np.stack([0.5 + 0.5 * z * x, 0.5 + 0.5 * y])[:, None]
        outward = np.array([0.0, 0.0, z])[:, None, None, None]
        cap = np.stack([x, y, np.full_like(x, z)])[:, None]
        made.append(_sheet(cap, outward, uv, (patch,), closed=True, poles=(z < 0, z > 0), one_centre=True))
    return tuple(made)


def _sheet(
    points: Floats,
    outward: Floats,
    uv: Floats,
    patches: tuple[int, ...],
    closed: bool = False,
    poles: tuple[bool, bool] = (False, False),
    one_centre: bool = False,
) -> _Sheet:
    """Number the triangles: two per square, one at a pole, where each has its own point unless `one_centre`."""
    rows, cols = points.shape[2:]
    row, col = np.meshgrid(np.arange(rows - 1), np.arange(cols - 1), indexing="ij")
    a = row * cols + col
    b, c, d = a + 1, a + cols + 1, a + cols
    if poles[0]:
        a[0] = 0 if one_centre else a[0]
    if poles[1]:
        c[-1] = (rows - 1) * cols if one_centre else d[-1]
    lower, upper = np.stack([a, b, c], axis=-1), np.stack([a, c, d], axis=-1)
    lower, upper = lower[int(poles[0]) :], upper[: rows - 1 - int(poles[1])]
    one = np.concatenate([lower.reshape(-1, 3), upper.reshape(-1, 3)])
    triangles = (one + rows * cols * np.arange(len(patches))[:, None, None]).reshape(-1, 3)
    used, numbered = np.unique(triangles, return_inverse=True)
    every = len(used) == rows * cols * len(patches)
    return _Sheet(
        points,
        outward,
        np.clip(uv, 0.0, 1.0),
        numbered.reshape(-1, 3).astype(np.int32),
        None if every else used.astype(np.int32),
        closed,
        poles,
        patches,
        len(used),
    )


def _kept(values: Floats, sheet: _Sheet) -> Floats:
    return values.reshape(-1) if sheet.keep is None else values.reshape(-1)[sheet.keep]


def _uv_lengths(shape: Shape) -> list[tuple[Floats, Floats]]:
    """Per sheet: how far u and v run, (P,) each, at most 1."""
    x, y, z = np.sqrt((np.array(shape.pose, dtype=np.float64)[:3, :3] ** 2).sum(axis=0)).tolist()
    around = 2 * pi * sqrt((x * x + y * y) / 2)
    one = np.ones(1)
    if shape.kind == "ellipsoid":
        return [(one, one * min(1.0, pi * sqrt(((x * x + y * y) / 2 + z * z) / 2) / around))]
    if shape.kind == "cylinder":
        cap = (one * (2 * x / around), one * (2 * y / around))
        return [(one, one * min(1.0, 2 * z / around)), cap, cap]
    if shape.kind == "floor":
        return [(one * (x / max(x, y)), one * (y / max(x, y)))]
    sides = np.array([x, y, z]) / max(x, y, z)
    return [(np.abs([u for _, u, _ in FACES]) @ sides, np.abs([v for _, _, v in FACES]) @ sides)]


def _heights(shape: Shape) -> list[Floats] | None:
    """Per sheet: metres along the normal, (P, rows, cols); None where all is flat."""
    if shape.amplitude == 0:
        return None
    size = shape.resolution
    if shape.kind == "ellipsoid":
        fields = [height_fields(shape.seed, 1, size, 2 * size, closed=True)]
    elif shape.kind == "cylinder":
        fields = [height_fields(shape.seed, 1, size, 2 * size, closed=True)]
        square = height_fields(shape.seed, 3, 64, 64)[1:]
        for field, sheet in zip(square, _sheets(shape.kind, size)[1:], strict=True):
            x, y = sheet.points[0], sheet.points[1]
            rim = np.maximum(0.0, 1.0 - (x * x + y * y) ** 2) ** 2
            rim[:, -1 if sheet.poles[0] else 0] = 0.0  # exactly, so that the cap meets the side
            fields.append(rim * _bilinear(field, 0.5 + 0.5 * x, 0.5 + 0.5 * y))
    else:
        fields = [height_fields(shape.seed, PATCHES[shape.kind], size, size)]
    share = shape.amplitude * smallest_semi_axis(shape)
    return [share * field for field in fields]


def _bilinear(field: Floats, u: Floats, v: Floats) -> Floats:
    """`field` (n + 1, n + 1) at u, v in [0, 1]."""
    n = len(field) - 1
    col, row = (np.clip(np.floor(w * n), 0, n - 1).astype(np.int64) for w in (u, v))
    x, y = u * n - col, v * n - row
    low = (1 - x) * field[row, col] + x * field[row, col + 1]
    high = (1 - x) * field[row + 1, col] + x * field[row + 1, col + 1]
    blended: Floats = (1 - y) * low + y * high
    return blended


def _place(sheet: _Sheet, shape: Shape, heights: Floats | None) -> tuple[Floats, Floats, bool]:
    """World points and unit normals, (3, P, rows, cols) each, and whether the pose mirrors."""
    pose = np.array(shape.pose, dtype=np.float64)
    mirrored = _determinant(pose) < 0
    points = _linear(pose[:3, :3], sheet.points)
    if heights is not None:
        outward = _outward(pose, sheet)
        for axis in range(3):
            points[axis] += outward[axis] * heights
    # Differences before the shift: far from the origin they would lose digits.
    normals = _normals(points, sheet, -1.0 if mirrored else 1.0)
    length = np.sqrt(normals[0] ** 2 + normals[1] ** 2 + normals[2] ** 2)
    if not length.all():  # a fold of the height field has squeezed a spot to a line: any normal is as good
        flat = np.broadcast_to(_outward(pose, sheet), normals.shape)
        normals, length = np.where(length > 0, normals, flat), np.where(length > 0, length, 1.0)
    normals /= length
    for axis in range(3):
        points[axis] += pose[axis, 3]
    return points, normals, mirrored


def _outward(pose: Floats, sheet: _Sheet) -> Floats:
    """Unit analytic normals in the world. The cofactors of A are det(A) A^-T, so no inverse is needed."""
    x, y, z = pose[:3, :3].tolist()
    sign = -1.0 if _determinant(pose) < 0 else 1.0
    normals = _linear(sign * np.array([_cross(y, z), _cross(z, x), _cross(x, y)]), sheet.outward)
    normals /= np.sqrt(normals[0] ** 2 + normals[1] ** 2 + normals[2] ** 2)
    return normals


def _linear(matrix: Floats, points: Floats) -> Floats:
    """matrix @ points, one term after the other: equal points stay equal bit by bit."""
    x, y, z = points
    return np.stack([a * x + b * y + c * z for a, b, c in matrix.tolist()])


def _normals(points: Floats, sheet: _Sheet, sign: float) -> Floats:
    """Area vectors around each point, sign * (along columns x along rows), not yet of length 1."""
    u, v = np.empty_like(points), np.empty_like(points)
    u[..., 1:-1] = points[..., 2:] - points[..., :-2]
    u[..., 0] = points[..., 1] - points[..., -2 if sheet.closed else 0]
    u[..., -1] = u[..., 0] if sheet.closed else points[..., -1] - points[..., -2]
    v[..., 1:-1, :] = points[..., 2:, :] - points[..., :-2, :]
    v[..., 0, :] = points[..., 1, :] - points[..., 0, :]
    v[..., -1, :] = points[..., -1, :] - points[..., -2, :]
    normals = _crossed(u, v)
    for pole, row, ring, turn in ((sheet.poles[0], 0, 1, -1.0), (sheet.poles[1], -1, -2, 1.0)):
        if pole:
            spokes = points[..., ring, :] - points[..., row, :]
            fan = _crossed(spokes[..., :-1], spokes[..., 1:]).sum(axis=-1, keepdims=True)
            normals[..., row, :] = turn * fan
    return normals if sign > 0 else -normals


def _crossed(a: Floats, b: Floats) -> Floats:
    return np.stack([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])
