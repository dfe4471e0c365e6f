"""Meshes: closed, turned the right way, where the formulas say, the same in every process."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.scenes.description import Camera, Material, Scene, Shape
from peft_attrsub.scenes.heights import height_fields, spline_weights
from peft_attrsub.scenes.meshes import Mesh, build_mesh, smallest_semi_axis

PATCHES = {"ellipsoid": 1, "cube": 6, "cylinder": 3, "room": 6, "floor": 1}
SOLIDS = ("ellipsoid", "cube", "cylinder")
CLOSED = (*SOLIDS, "room")
UNIT = np.eye(4).tolist()
STRETCHED = [[0.5, 0, 0, 3.0], [0, 2.0, 0, -1.0], [0, 0, 1.25, 0.5], [0, 0, 0, 1]]


def scene_of(*shapes: Shape, materials: int = 6) -> Scene:
    stuff = [Material("plain", [[0.5, 0.5, 0.5]])] * materials
    return Scene("test", 0, 0, 8, 8, stuff, list(shapes), [], [Camera(UNIT, 8, 8, 4, 4)])


def shape_of(kind: str, pose: list[list[float]] = UNIT, **more: float) -> Shape:
    return Shape(kind, pose, list(range(PATCHES[kind])), **({"object_id": 1, "resolution": 8} | more))


def mesh_of(kind: str, pose: list[list[float]] = UNIT, **more: float) -> Mesh:
    return build_mesh(scene_of(shape_of(kind, pose, **more)))


def random_pose(seed: int, mirrored: bool = False) -> list[list[float]]:
    """Turned, stretched by 0.05 to 4, moved: what a layout does to a primitive."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn)) * (-1 if mirrored else 1)
    pose = np.eye(4)
    pose[:3, :3] = turn * np.exp(rng.uniform(np.log(0.05), np.log(4.0), 3))
    pose[:3, 3] = rng.uniform(-10, 10, 3)
    return pose.tolist()


def merged(mesh: Mesh) -> np.ndarray:
    """Triangles over the distinct positions, told apart by their bytes."""
    names: dict[bytes, int] = {}
    where = [names.setdefault(vertex.tobytes(), len(names)) for vertex in mesh.vertices]
    return np.array(where)[mesh.triangles]


def directed_edges(triangles: np.ndarray) -> Counter[tuple[int, int]]:
    return Counter((t[k], t[(k + 1) % 3]) for t in triangles.tolist() for k in range(3))


def corners(mesh: Mesh) -> np.ndarray:
    return mesh.vertices.astype(np.float64)[mesh.triangles]


def area_vectors(mesh: Mesh) -> np.ndarray:
    a, b, c = corners(mesh).transpose(1, 0, 2)
    return 0.5 * np.cross(b - a, c - a)


def volume(mesh: Mesh) -> float:
    a, b, c = (corners(mesh) - mesh.vertices.astype(np.float64).mean(axis=0)).transpose(1, 0, 2)
    return float((a * np.cross(b, c)).sum() / 6)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(CLOSED),
    amplitude=st.sampled_from([0.0, 0.1, 0.5, 1.2]),
    resolution=st.integers(2, 13),
    seed=st.integers(0, 2**40),
    mirrored=st.booleans(),
)
def test_every_edge_is_shared_by_two_triangles_that_run_it_both_ways(
    kind: str, amplitude: float, resolution: int, seed: int, mirrored: bool
) -> None:
    pose = random_pose(seed, mirrored)
    mesh = mesh_of(kind, pose, amplitude=amplitude, seed=seed, resolution=resolution)
    triangles = merged(mesh)
    edges = directed_edges(triangles)
    assert set(edges.values()) == {1}
    assert {(b, a) for a, b in edges} == set(edges)
    assert all(len(set(triangle)) == 3 for triangle in triangles.tolist())
    assert len(set(triangles.ravel())) - len(edges) // 2 + len(triangles) == 2, "not one closed surface (Euler)"
    assert sorted(set(mesh.triangles.ravel())) == list(range(len(mesh.vertices))), "vertices that nothing uses"
    if amplitude <= 0.1:
        assert (volume(mesh) > 0) == (kind != "room")


def test_a_slit_would_be_found() -> None:
    mesh = mesh_of("cube", resolution=3)
    mesh.vertices[0] += np.float32(1e-6)
    assert {(b, a) for a, b in directed_edges(merged(mesh))} != set(directed_edges(merged(mesh)))


@pytest.mark.parametrize(
    ("kind", "area", "size"),
    [
        ("ellipsoid", 4 * math.pi, 4 * math.pi / 3),
        ("cube", 24.0, 8.0),
        ("room", 24.0, -8.0),
        ("cylinder", 8 * math.pi - 2 * math.pi, 2 * math.pi),
        ("floor", 4.0, None),
    ],
)
def test_flat_shapes_have_the_areas_and_volumes_of_the_textbook(kind: str, area: float, size: float | None) -> None:
    errors = []
    for resolution in (16, 32):
        mesh = mesh_of(kind, resolution=resolution)
        total = np.linalg.norm(area_vectors(mesh), axis=1).sum()
        errors.append(abs(total / area - 1) + (0 if size is None else abs(volume(mesh) / size - 1)))
    assert errors[1] < 0.01
    assert errors[1] < 0.3 * errors[0] or errors[0] < 1e-5, "not of second order"


def test_volume_grows_with_the_determinant_of_the_pose() -> None:
    for kind in CLOSED:
        for mirrored in (False, True):
            pose = random_pose(3, mirrored)
            factor = abs(np.linalg.det(np.array(pose)[:3, :3]))
            assert volume(mesh_of(kind, pose)) == pytest.approx(factor * volume(mesh_of(kind)), rel=1e-4)


@pytest.mark.parametrize("pose", [UNIT, STRETCHED, random_pose(5), random_pose(6, mirrored=True)])
def test_ellipsoid_normals_are_the_gradient_of_its_quadric(pose: list[list[float]]) -> None:
    """|A^-1 (x - t)| = 1, gradient A^-T A^-1 (x - t): the inverse transpose, not A itself."""
    mesh = mesh_of("ellipsoid", pose, resolution=16)
    inverse = np.linalg.inv(np.array(pose)[:3, :3])
    local = (mesh.vertices - np.array(pose)[:3, 3]) @ inverse.T
    assert np.linalg.norm(local, axis=1) == pytest.approx(1, abs=1e-4)
    gradient = local @ inverse
    gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
    assert (mesh.normals * gradient).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("kind", ["cube", "room", "cylinder", "floor"])
def test_flat_normals_follow_the_inverse_transpose_of_a_pose_that_shears(kind: str) -> None:
    pose = np.array(UNIT)
    pose[:3, :3] = [[1.0, 0.7, 0.0], [0.0, 0.5, 0.2], [0.3, 0.0, 2.0]]
    plain, sheared = mesh_of(kind), mesh_of(kind, pose.tolist())
    expected = plain.normals @ np.linalg.inv(pose[:3, :3])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    around = plain.normals[:, 2] == 0  # a cylinder's side at 8 corners to the half turn, else exact
    assert (sheared.normals * expected).sum(axis=1).min() > 1 - 1e-5
    assert around.any() == (kind != "floor")


@settings(max_examples=25)
@given(kind=st.sampled_from((*CLOSED, "floor")), seed=st.integers(0, 10**6), mirrored=st.booleans())
def test_normals_are_unit_and_match_their_triangles(kind: str, seed: int, mirrored: bool) -> None:
    pose = random_pose(seed, mirrored)
    mesh = mesh_of(kind, pose, amplitude=0.1, seed=seed, resolution=24)
    assert np.linalg.norm(mesh.normals, axis=1) == pytest.approx(1, abs=1e-5)
    points = merged(mesh)  # a seam's two sides are one surface: sum over a position's triangles in the same patch
    sums: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(3))
    for triangle, patch, vector in zip(points.tolist(), mesh.material.tolist(), area_vectors(mesh), strict=True):
        for corner in triangle:
            sums[corner, patch] += vector
    agreement = np.array(
        [
            sums[corner, patch] @ normal / np.linalg.norm(sums[corner, patch])
            for triangle, ends, patch in zip(points.tolist(), mesh.triangles, mesh.material.tolist(), strict=True)
            for corner, normal in zip(triangle, mesh.normals[ends], strict=True)
        ]
    )
    assert agreement.min() > 0.5 and np.quantile(agreement, 0.05) > 0.98


@pytest.mark.parametrize("kind", [*CLOSED, "floor"])
def test_neighbouring_normals_come_together_as_the_mesh_gets_finer(kind: str) -> None:
    largest = []
    for resolution in (20, 80):
        mesh = mesh_of(kind, amplitude=0.3, seed=1, resolution=resolution)
        ends = mesh.normals[mesh.triangles].astype(np.float64)
        largest.append(np.linalg.norm(ends - np.roll(ends, 1, axis=1), axis=2).max())
    assert largest[1] < 0.4 * largest[0], "a crease inside a patch does not shrink"


@pytest.mark.parametrize("kind", [*CLOSED, "floor"])
@pytest.mark.parametrize("pose", [UNIT, STRETCHED, random_pose(8)])
def test_texture_coordinates(kind: str, pose: list[list[float]]) -> None:
    """In [0, 1], continuous in a patch, and not mirrored: along u x along v is the side that is seen."""
    mesh = mesh_of(kind, pose, amplitude=0.05, seed=2, resolution=16)
    assert mesh.uv.min() >= 0 and mesh.uv.max() <= 1
    assert mesh.uv.max() > 0.99
    ends = mesh.uv[mesh.triangles].astype(np.float64)
    assert np.abs(ends - np.roll(ends, 1, axis=1)).max() < 1.01 / 16
    (u1, v1), (u2, v2) = (ends[:, 1] - ends[:, 0]).T, (ends[:, 2] - ends[:, 0]).T
    assert (u1 * v2 - u2 * v1).min() > 0, "some triangle's texture is mirrored"


def test_textures_are_not_stretched() -> None:
    """A metre is as long along u as along v on every flat patch, and the same on all faces of a box."""
    for kind in ("cube", "room", "floor"):
        mesh = mesh_of(kind, STRETCHED, resolution=4)
        a, b, c = mesh.triangles[:, 0], mesh.triangles[:, 1], mesh.triangles[:, 2]
        for one, other in ((a, b), (b, c), (c, a)):
            metres = np.linalg.norm(mesh.vertices[one] - mesh.vertices[other], axis=1)
            assert np.linalg.norm(mesh.uv[one] - mesh.uv[other], axis=1) == pytest.approx(metres / 4.0, rel=1e-4)


@settings(max_examples=30)
@given(kind=st.sampled_from((*CLOSED, "floor")), amplitude=st.floats(0.01, 1.2), seed=st.integers(0, 10**9))
def test_no_point_moves_farther_than_documented(kind: str, amplitude: float, seed: int) -> None:
    pose = random_pose(seed)
    shape = shape_of(kind, pose, amplitude=amplitude, seed=seed)
    moved, flat = mesh_of(kind, pose, amplitude=amplitude, seed=seed), mesh_of(kind, pose)
    way = np.linalg.norm(moved.vertices - flat.vertices, axis=1)
    limit = amplitude * smallest_semi_axis(shape)
    assert smallest_semi_axis(shape) == pytest.approx(
        np.linalg.norm(np.array(pose)[:3, : 2 if kind == "floor" else 3], axis=0).min(), rel=1e-6
    )
    assert 0.2 * limit < way.max() < limit + 1e-5
    along = (moved.vertices - flat.vertices) * flat.normals
    aside = moved.vertices - flat.vertices - along.sum(axis=1, keepdims=True) * flat.normals
    assert np.median(np.linalg.norm(aside, axis=1)) <= 1e-3 * limit + 1e-5, "points do not move along the normal"


@pytest.mark.parametrize("kind", ["cube", "room", "cylinder"])
def test_where_patches_meet_nothing_moves(kind: str) -> None:
    pose = random_pose(12)
    flat, moved = mesh_of(kind, pose), mesh_of(kind, pose, amplitude=1.2, seed=4)
    patches: dict[bytes, set[int]] = defaultdict(set)
    for triangle, patch in zip(flat.triangles, flat.material.tolist(), strict=True):
        for vertex in triangle:
            patches[flat.vertices[vertex].tobytes()].add(patch)
    shared = np.array([len(patches[vertex.tobytes()]) > 1 for vertex in flat.vertices])
    assert shared.sum() == (6 * 4 * 8 if kind != "cylinder" else 4 * 17)
    np.testing.assert_array_equal(flat.vertices[shared], moved.vertices[shared])
    assert (flat.vertices[~shared] != moved.vertices[~shared]).any(axis=1).mean() > 0.9


def test_height_fields() -> None:
    """Bounded, zero at open borders, running around where closed; the grid only samples them."""
    for closed in (False, True):
        fields = height_fields(11, 200, 20, 20, closed)
        assert np.abs(fields).max() <= 1 and np.abs(fields).max() > 0.9
        assert np.std(fields[:, 5:-5, 5:-5]) > 0.25
        assert not fields[:, [0, -1], :].any()
        if closed:
            np.testing.assert_array_equal(fields[:, :, 0], fields[:, :, -1])
            assert fields[:, 1:-1, 0].any(axis=1).all()
        else:
            assert not fields[:, :, [0, -1]].any()
        np.testing.assert_allclose(fields[:, ::2, ::2], height_fields(11, 200, 10, 10, closed), atol=1e-14)
    assert (height_fields(1, 1, 8, 8) != height_fields(2, 1, 8, 8)).any()
    with pytest.raises(ValueError, match="0 or more"):
        height_fields(-1, 1, 8, 8)


@pytest.mark.parametrize(("controls", "closed"), [(7, False), (4, False), (10, True), (4, True)])
def test_spline_weights_match_the_recursion(controls: int, closed: bool) -> None:
    def basis(i: int, degree: int, t: float, knots: list[float]) -> float:
        if degree == 0:
            last = t == knots[-1] and knots[i] < knots[i + 1] == knots[-1]
            return float(knots[i] <= t < knots[i + 1] or last)
        total = 0.0
        if knots[i + degree] > knots[i]:
            total += (t - knots[i]) / (knots[i + degree] - knots[i]) * basis(i, degree - 1, t, knots)
        if knots[i + degree + 1] > knots[i + 1]:
            high = knots[i + degree + 1]
            total += (high - t) / (high - knots[i + 1]) * basis(i + 1, degree - 1, t, knots)
        return total

    weights = spline_weights(12, controls, closed)
    assert weights.shape == (13, controls) and weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-14)
    for row in range(13):
        expected = [0.0] * controls
        if closed:
            knots = [float(k) for k in range(-3, controls + 4)]
            for i in range(controls + 3):  # the control i - 1 belongs to the hump over the knots i - 3 ... i + 1
                expected[(i - 1) % controls] += basis(i, 3, row / 12 * controls % controls, knots)
        else:
            spans = controls - 3
            knots = [0.0] * 3 + [float(k) for k in range(spans + 1)] + [float(spans)] * 3
            expected = [basis(i, 3, row / 12 * spans, knots) for i in range(controls)]
        np.testing.assert_allclose(weights[row], expected, atol=1e-13)
    if closed:
        np.testing.assert_array_equal(weights[0], weights[-1])


def test_a_cube_made_with_loops() -> None:
    """Point by point from the formula x = A p + t + amplitude s h n', in the documented order of patches."""
    pose, amplitude, seed, size = STRETCHED, 0.4, 9, 5
    mesh = mesh_of("cube", pose, amplitude=amplitude, seed=seed, resolution=size)
    fields = height_fields(seed, 6, size, size)
    lengths = {0: 0.5, 1: 2.0, 2: 1.25}
    expected: dict[tuple[int, int, int], tuple[list[float], list[float]]] = {}
    for patch in range(6):
        axis, side = patch // 2, 2 * (patch % 2) - 1
        up = 1 if axis == 2 else 2
        across = 3 - axis - up
        # u grows so that (u, v, outward) is a right-handed frame
        even = (across, up, axis) in ((0, 1, 2), (1, 2, 0), (2, 0, 1))
        turn = side if even else -side
        for row in range(size + 1):
            for col in range(size + 1):
                p = [0.0, 0.0, 0.0]
                p[axis], p[across], p[up] = side, turn * (2 * col / size - 1), 2 * row / size - 1
                x = [sum(pose[i][j] * p[j] for j in range(3)) + pose[i][3] for i in range(3)]
                x[axis] += side * amplitude * 0.5 * fields[patch, row, col]
                uv = [col / size * lengths[across] / 2.0, row / size * lengths[up] / 2.0]
                expected[patch, row, col] = (x, uv)
    places = list(expected)
    assert len(mesh.vertices) == len(places)
    np.testing.assert_allclose(mesh.vertices, [expected[place][0] for place in places], atol=1e-6)
    np.testing.assert_allclose(mesh.uv, [expected[place][1] for place in places], atol=1e-6)
    for triangle, material in zip(mesh.triangles.tolist(), mesh.material.tolist(), strict=True):
        where = [places[vertex] for vertex in triangle]
        assert {patch for patch, _, _ in where} == {material}
        assert max(r for _, r, _ in where) - min(r for _, r, _ in where) == 1
        assert max(c for _, _, c in where) - min(c for _, _, c in where) == 1


def test_patches_have_their_materials_and_objects_their_ids() -> None:
    cylinder = Shape("cylinder", UNIT, [4, 2, 0], object_id=7, resolution=6)
    room = Shape("room", STRETCHED, [5, 4, 3, 2, 1, 0], object_id=65535, resolution=3)
    mesh = build_mesh(scene_of(cylinder, room))
    alone = build_mesh(scene_of(cylinder))
    np.testing.assert_array_equal(mesh.triangles[: len(alone.triangles)], alone.triangles)
    assert Counter(mesh.object_id.tolist()) == {7: len(alone.triangles), 65535: 6 * 2 * 9}
    middle = corners(alone).mean(axis=1)
    np.testing.assert_array_equal(
        alone.material, np.where(middle[:, 2] > 0.9999, 0, np.where(middle[:, 2] < -0.9999, 2, 4))
    )
    walls = corners(mesh).mean(axis=1)[len(alone.triangles) :] - np.array([3.0, -1.0, 0.5])
    walls /= [0.5, 2.0, 1.25]
    for patch in range(6):
        on = np.abs(walls[:, patch // 2] - (2 * (patch % 2) - 1)) < 1e-4
        assert on.sum() == 18
        assert set(mesh.material[len(alone.triangles) :][on].tolist()) == {5 - patch}


def test_the_floor_looks_up_and_keeps_its_border() -> None:
    flat, bumpy = mesh_of("floor"), mesh_of("floor", amplitude=0.5, seed=3)
    assert (flat.vertices[:, 2] == 0).all() and (flat.normals == [0, 0, 1]).all()
    border = (np.abs(flat.vertices[:, :2]) == 1).any(axis=1)
    np.testing.assert_array_equal(flat.vertices[border], bumpy.vertices[border])
    assert (bumpy.vertices[~border, 2] != 0).any() and bumpy.normals[:, 2].min() > 0


def test_an_empty_scene_is_an_empty_mesh() -> None:
    mesh = build_mesh(scene_of())
    assert mesh.vertices.shape == mesh.normals.shape == mesh.triangles.shape == (0, 3) and mesh.uv.shape == (0, 2)


def test_types_and_no_negative_zero() -> None:
    mesh = mesh_of("cylinder", amplitude=0.2)
    assert [getattr(mesh, key).dtype.name for key in ("vertices", "uv", "normals")] == ["float32"] * 3
    assert [getattr(mesh, key).dtype.name for key in ("triangles", "material", "object_id")] == ["int32"] * 3
    assert not np.signbit(mesh.vertices[mesh.vertices == 0]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cone"}, "unknown kind"),
        ({"pose": np.diag([1.0, 0.0, 1.0, 1.0]).tolist()}, "flattens"),
        ({"pose": [[1.0, 0.0], [0.0, 1.0]]}, "4 x 4"),
        ({"pose": np.diag([1.0, 1.0, float("nan"), 1.0]).tolist()}, "finite"),
        ({"pose": np.diag([1.0, 1.0, 1.0, 2.0]).tolist()}, "0 0 0 1"),
        ({"materials": [0]}, "needs 6"),
        ({"materials": [0, 1, 2, 3, 4, 6]}, "0 to 5"),
        ({"materials": [0, 1, 2, 3, 4, -1]}, "0 to 5"),
        ({"object_id": 0}, "1 to 65535"),
        ({"object_id": 65536}, "1 to 65535"),
        ({"resolution": 1}, "2 segments"),
        ({"amplitude": -0.1}, "amplitude"),
        ({"amplitude": float("inf")}, "amplitude"),
        ({"amplitude": 0.1, "seed": -1}, "0 or more"),
    ],
)
def test_a_wrong_shape_is_named(change: dict[str, object], message: str) -> None:
    good = {"kind": "cube", "pose": UNIT, "materials": [0] * 6, "object_id": 1}
    with pytest.raises(ValueError, match=message):
        build_mesh(scene_of(Shape(**(good | change))))


def digest() -> str:
    shapes = [shape_of(kind, random_pose(4), amplitude=0.6, seed=5) for kind in PATCHES]
    mesh = build_mesh(scene_of(*shapes))
    arrays = (mesh.vertices, mesh.triangles, mesh.uv, mesh.normals, mesh.material, mesh.object_id)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_a_fresh_process_makes_the_same_bytes() -> None:
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r})\nfrom tests.scenes.test_meshes import digest\nprint(digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == digest(), done.stderr
