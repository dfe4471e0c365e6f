"""Scans of people: found in every layout, read as they are, put upright, and their colours as a texture."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from peft_attrsub.datasets.meshes import (
    GREY,
    THUMAN_FOLDERS,
    PersonMesh,
    atlas_cells,
    bake_colors,
    find_2k2k,
    find_thuman,
    load_mesh,
    place,
    smooth_normals,
)
from peft_attrsub.datasets.splits import thuman_split, two_k_test
from peft_attrsub.scenes.view import decode_srgb, encode_srgb

pytest.importorskip("trimesh", reason='meshes are read with trimesh: pip install "peft-attrsub[vggt]"')

# Faces of a box: four corners each (bit 0 x, bit 1 y, bit 2 z), counter-clockwise from outside.
BOX = ((1, 3, 7, 5), (4, 6, 2, 0), (2, 6, 7, 3), (4, 0, 1, 5), (5, 7, 6, 4), (0, 2, 3, 1))


def box(size: tuple[float, float, float]) -> np.ndarray:
    return np.array([[(i >> axis & 1) * size[axis] for axis in range(3)] for i in range(8)])


def write_thuman(folder: Path, size: tuple[float, float, float] = (0.4, 1.0, 0.2)) -> Path:
    """A box of 12 triangles with texture coordinates, a material and a picture of 4 x 4 pixels."""
    folder.mkdir(parents=True)
    lines = ["mtllib material0.mtl", "usemtl material0", *(f"v {x} {y} {z}" for x, y, z in box(size))]
    lines += ["vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1"]
    for a, b, c, d in np.array(BOX) + 1:
        lines += [f"f {a}/1 {b}/2 {c}/3", f"f {a}/1 {c}/3 {d}/4"]
    (folder / f"{folder.name}.obj").write_text("\n".join(lines))
    (folder / "material0.mtl").write_text("newmtl material0\nKd 1 1 1\nmap_Kd material0.jpeg\n")
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    Image.fromarray(picture).save(folder / "material0.jpeg", quality=100, subsampling=0)
    return folder / f"{folder.name}.obj"


def colours_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 3)).astype(np.uint8)


def write_2k2k(
    folder: Path,
    size: tuple[float, float, float] = (40.0, 120.0, 20.0),
    kind: str = "binary",
    names: tuple[str, ...] = ("red", "green", "blue"),
    quads: bool = False,
) -> Path:
    """A box with a colour for each of its 8 vertices; names: of the colours, () for none."""
    folder.mkdir(parents=True)
    points, paint = box(size), colours_of(8)
    faces = [list(face) for face in BOX]
    if not quads:
        faces = [part for a, b, c, d in faces for part in ([a, b, c], [a, c, d])]
    header = ["ply", f"format {'ascii' if kind == 'ascii' else 'binary_little_endian'} 1.0", "element vertex 8"]
    header += [f"property float {axis}" for axis in "xyz"] + [f"property uchar {name}" for name in names]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    data = "\n".join(header).encode()
    if kind == "ascii":
        shown = [
            [*map(str, row), *map(str, colour if names else ())] for row, colour in zip(points, paint, strict=True)
        ]
        shown += [[str(len(face)), *map(str, face)] for face in faces]
        data += "\n".join(map(" ".join, shown)).encode() + b"\n"
    else:
        for row, colour in zip(points, paint, strict=True):
            data += row.astype("<f4").tobytes() + (colour.tobytes() if names else b"")
        for face in faces:
            data += bytes([len(face)]) + np.array(face, "<i4").tobytes()
    path = folder / f"{folder.name}.ply"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("layout", THUMAN_FOLDERS)
def test_thuman_is_found_in_every_layout(tmp_path: Path, layout: str) -> None:
    for name in ("0526", "0001", "2444"):
        write_thuman(tmp_path / layout / name)
    (tmp_path / "smplx" / "0001").mkdir(parents=True)
    (tmp_path / "smplx" / "0001" / "mesh_smplx.obj").touch()
    found = find_thuman(tmp_path)
    assert list(found) == ["0001", "0526", "2444"]
    assert found["0526"] == tmp_path / layout / "0526" / "0526.obj"
    assert thuman_split(found, "test", count=2) == sorted(found)[-2:]
    assert thuman_split(found, "train", count=2) == ["0001"]


def test_an_incomplete_thuman_is_not_split_elsewhere_in_silence(tmp_path: Path) -> None:
    write_thuman(tmp_path / "0000")
    (tmp_path / "0001").mkdir()
    with pytest.raises(FileNotFoundError, match=r"0001 has no 0001\.obj \(1 of 2"):
        find_thuman(tmp_path)


def test_a_person_in_two_places_and_an_empty_or_absent_folder_are_named(tmp_path: Path) -> None:
    write_thuman(tmp_path / "0000")
    write_thuman(tmp_path / "model" / "0000")
    with pytest.raises(ValueError, match=r"0000 is in .* twice"):
        find_thuman(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no people in the layout of THuman"):
        find_thuman(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        find_thuman(tmp_path / "nowhere")


def test_2k2k_is_found_by_split_and_in_its_old_layout(tmp_path: Path) -> None:
    write_2k2k(tmp_path / "test" / "07693")
    write_2k2k(tmp_path / "test" / "07184")
    write_2k2k(tmp_path / "test" / "07700")
    write_2k2k(tmp_path / "train" / "50K" / "00003")
    assert list(find_2k2k(tmp_path, "test")) == ["07184", "07693", "07700"]
    assert two_k_test(find_2k2k(tmp_path, "test")) == ["07184", "07693"]
    assert find_2k2k(tmp_path, "train") == {"00003": tmp_path / "train" / "50K" / "00003" / "00003.ply"}
    assert list(find_2k2k(tmp_path, "all")) == ["00003", "07184", "07693", "07700"]
    assert list(find_2k2k(tmp_path / "test", "test")) == ["07184", "07693", "07700"]
    with pytest.raises(ValueError, match="split is 'val'"):
        find_2k2k(tmp_path, "val")


@pytest.mark.parametrize("height", [0.58, 1.0, 175.0])
def test_an_obj_is_read_with_its_texture_and_stood_up(tmp_path: Path, height: float) -> None:
    path = write_thuman(tmp_path / "0000", (0.4 * height, height, 0.2 * height))
    mesh = load_mesh(path)
    assert len(mesh.triangles) == 12 and mesh.colors is None
    with Image.open(path.parent / "material0.jpeg") as picture:
        np.testing.assert_array_equal(mesh.texture, np.asarray(picture))
    assert mesh.uv is not None
    corners = np.concatenate([mesh.vertices[mesh.triangles], mesh.uv[mesh.triangles]], axis=-1)
    expected = box((0.4 * height, height, 0.2 * height))
    for number, face in enumerate(BOX):
        for triangle, order in ((corners[2 * number], (0, 1, 2)), (corners[2 * number + 1], (0, 2, 3))):
            np.testing.assert_allclose(triangle[:, :3], expected[[face[i] for i in order]], rtol=1e-6)
            np.testing.assert_allclose(triangle[:, 3:], [[(0, 0), (1, 0), (1, 1), (0, 1)][i] for i in order])

    placed, how = place(mesh, "y", 1.0)
    np.testing.assert_allclose(placed.vertices.min(axis=0), [-0.2, -0.1, -0.5], atol=1e-6)
    np.testing.assert_allclose(placed.vertices.max(axis=0), [0.2, 0.1, 0.5], atol=1e-6)
    assert how.up == "y" and how.scale == pytest.approx(1 / height)
    as_it_is, how = place(mesh, "y", 0.0)
    assert how.scale == 1 and np.ptp(as_it_is.vertices[:, 2]) == pytest.approx(height, rel=1e-6)


def test_a_missing_texture_or_material_is_named(tmp_path: Path) -> None:
    path = write_thuman(tmp_path / "0000")
    (path.parent / "material0.jpeg").unlink()
    with pytest.raises(FileNotFoundError, match=r"material0\.jpeg"):
        load_mesh(path)
    (path.parent / "material0.jpeg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"material0\.jpeg.*is not a readable picture"):
        load_mesh(path)
    (path.parent / "material0.mtl").write_text("newmtl material0\nKd 1 1 1\n")
    with pytest.raises(ValueError, match="neither a texture nor colours"):
        load_mesh(path)
    (path.parent / "material0.mtl").unlink()
    with pytest.raises(FileNotFoundError, match=r"material0\.mtl"):
        load_mesh(path)


@pytest.mark.parametrize("kind", ["binary", "ascii"])
@pytest.mark.parametrize(
    "names", [("red", "green", "blue"), ("r", "g", "b"), tuple(map("diffuse_{}".format, ("red", "green", "blue")))]
)
@pytest.mark.parametrize("quads", [False, True])
def test_a_ply_is_read_with_the_colours_of_its_vertices(
    tmp_path: Path, kind: str, names: tuple[str, ...], quads: bool
) -> None:
    mesh = load_mesh(write_2k2k(tmp_path / "07184", kind=kind, names=names, quads=quads))
    assert len(mesh.triangles) == 12 and mesh.texture is None and mesh.uv is None
    np.testing.assert_allclose(mesh.vertices, box((40.0, 120.0, 20.0)))
    np.testing.assert_array_equal(mesh.colors, colours_of(8))
    outward = mesh.vertices - mesh.vertices.mean(axis=0)
    assert ((mesh.normals * outward).sum(axis=1) > 0).all()


def test_a_mesh_without_colour_is_refused_or_grey(tmp_path: Path) -> None:
    path = write_2k2k(tmp_path / "07184", names=())
    with pytest.raises(ValueError, match="neither a texture nor colours"):
        load_mesh(path)
    colors = load_mesh(path, grey=True).colors
    assert colors is not None and (colors == GREY).all() and colors.shape == (8, 3)


def test_what_is_no_mesh_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"07184\.ply does not exist"):
        load_mesh(tmp_path / "07184.ply")
    good = write_2k2k(tmp_path / "07184").read_bytes()
    for content in (b"", b"ply\n", good[: len(good) // 2]):
        (tmp_path / "cut.ply").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.ply"):
            load_mesh(tmp_path / "cut.ply")


def test_without_trimesh_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_2k2k(tmp_path / "07184")
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(ImportError, match=r"peft-attrsub\[vggt\]"):
        load_mesh(path)


@pytest.mark.parametrize(("size", "up"), [((40, 120, 20), "y"), ((40, 20, 120), "z"), ((150, 120, 20), "y")])
def test_the_longer_of_y_and_z_points_up(tmp_path: Path, size: tuple[float, float, float], up: str) -> None:
    placed, how = place(load_mesh(write_2k2k(tmp_path / "07184", size)), "auto", 1.0)
    assert how.up == up
    np.testing.assert_allclose(np.ptp(placed.vertices, axis=0) * 120, [size[0], 20, 120], rtol=1e-5)


@given(seed=st.integers(0, 10**6), up=st.sampled_from(["y", "z"]), turn=st.floats(-360, 360), height=st.floats(0.1, 9))
def test_placing_is_a_similarity_that_keeps_the_hand(seed: int, up: str, turn: float, height: float) -> None:
    rng = np.random.default_rng(seed)
    vertices = rng.normal(size=(9, 3)).astype(np.float32) * 50
    triangles = np.arange(9, dtype=np.int32).reshape(3, 3)
    mesh = PersonMesh(vertices, triangles, smooth_normals(vertices, triangles))
    placed, how = place(mesh, up, height, turn)
    # One linear map, 3 x 3, takes differences of the old vertices to those of the new ones.
    linear, *_ = np.linalg.lstsq(vertices[1:] - vertices[0], placed.vertices[1:] - placed.vertices[0], rcond=None)
    np.testing.assert_allclose(linear.T @ linear, how.scale**2 * np.eye(3), atol=1e-4 * how.scale**2)
    assert np.linalg.det(linear) > 0
    assert np.ptp(placed.vertices[:, 2]) == pytest.approx(height, rel=1e-4)
    middle = (placed.vertices.min(axis=0) + placed.vertices.max(axis=0)) / 2
    np.testing.assert_allclose(middle, 0, atol=1e-5 * height * 10)
    rise = np.array([0, 1, 0]) if up == "y" else np.array([0, 0, 1])
    np.testing.assert_allclose(rise @ linear, [0, 0, how.scale], atol=1e-4 * how.scale)
    np.testing.assert_allclose(placed.normals, smooth_normals(placed.vertices, triangles), atol=1e-3)


def test_what_cannot_be_placed_is_refused(tmp_path: Path) -> None:
    mesh = load_mesh(write_2k2k(tmp_path / "07184", (40.0, 0.0, 20.0)))
    with pytest.raises(ValueError, match="no height"):
        place(mesh, "y")
    with pytest.raises(ValueError, match="up is 'x'"):
        place(mesh, "x")
    with pytest.raises(ValueError, match="height is -1"):
        place(mesh, "z", -1)


def slow_normals(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    total = np.zeros(vertices.shape)
    for triangle in triangles:
        a, b, c = vertices[triangle].astype(np.float64)
        for number, vertex in enumerate(vertices):
            for corner in triangle:
                if (vertices[corner] == vertex).all():
                    total[number] += np.cross(b - a, c - a)
    return np.array([row / np.linalg.norm(row) if np.linalg.norm(row) > 0 else [0, 0, 1] for row in total])


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_normals_ignore_the_cuts_of_a_texture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vertices = rng.normal(size=(6, 3)).astype(np.float32)[rng.integers(0, 6, 10)]  # most places are there twice
    triangles = rng.integers(0, 10, (12, 3)).astype(np.int32)
    expected = slow_normals(vertices, triangles)
    got = smooth_normals(vertices, triangles)
    # Where the normals around a place cancel, nothing but rounding is left.
    np.testing.assert_allclose(got, expected, atol=1e-5)


@given(count=st.integers(1, 300), seed=st.integers(0, 100))
@settings(max_examples=30)
def test_every_place_has_a_cell_of_its_own(count: int, seed: int) -> None:
    cells, side = atlas_cells(np.random.default_rng(seed).normal(size=(count, 3)))
    assert len({tuple(cell) for cell in cells.tolist()}) == count
    assert cells.min() >= 0 and cells.max() < side
    assert side * side >= count and (side == 1 or (side // 2) ** 2 < count)


def test_neighbours_in_the_atlas_are_neighbours_in_space() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4096, 3))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    cells, side = atlas_cells(centres)
    grid = np.full((side, side, 3), np.nan)
    grid[tuple(cells.T)] = centres
    blocks = grid.reshape(side // 4, 4, side // 4, 4, 3)
    spread = np.linalg.norm(blocks - blocks.mean(axis=(1, 3), keepdims=True), axis=-1)
    assert np.median(spread) < 0.15  # at random it would be about 1


def look_up(texture: np.ndarray, u: float, v: float) -> np.ndarray:
    """Bilinear, in linear light, row 0 of the picture on top."""
    light = decode_srgb(texture[::-1])
    size = len(light)
    x, y = u * size - 0.5, v * size - 0.5
    column, row = int(np.floor(x + 1e-4)), int(np.floor(y + 1e-4))
    across, along = x - column, y - row
    right, above = min(column + 1, size - 1), min(row + 1, size - 1)
    low = light[row, column] * (1 - across) + light[row, right] * across
    high = light[above, column] * (1 - across) + light[above, right] * across
    return low * (1 - along) + high * along


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_baked_colours_are_linear_on_every_triangle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vertices = rng.normal(size=(7, 3)).astype(np.float32)
    triangles = np.array([rng.permutation(7)[:3] for _ in range(11)], np.int32)
    # Between 0.3 and 0.6 the fourth texel, c10 + c01 - c00, stays within [0, 1].
    colors = encode_srgb(rng.uniform(0.3, 0.6, (7, 3)))
    mesh = PersonMesh(vertices, triangles, smooth_normals(vertices, triangles), colors=colors)
    baked = bake_colors(mesh)
    assert baked.texture is not None and baked.uv is not None and baked.colors is None
    np.testing.assert_array_equal(baked.vertices[baked.triangles], vertices[triangles])
    np.testing.assert_array_equal(baked.normals[baked.triangles], mesh.normals[triangles])
    for triangle, corners in zip(baked.triangles, triangles, strict=True):
        weights = rng.dirichlet(np.ones(3))
        for share in (np.eye(3)[rng.integers(3)], weights):
            expected = share @ decode_srgb(colors[corners])
            np.testing.assert_allclose(look_up(baked.texture, *(share @ baked.uv[triangle])), expected, atol=4e-3)


def test_corners_keep_their_colour_whatever_the_fourth_texel() -> None:
    colors = np.array([[255, 255, 255], [0, 0, 0], [0, 255, 0]], np.uint8)
    triangles = np.array([[0, 1, 2]], np.int32)
    vertices = np.eye(3, dtype=np.float32)
    baked = bake_colors(PersonMesh(vertices, triangles, vertices, colors=colors))
    assert baked.texture is not None and baked.uv is not None
    for corner in range(3):
        np.testing.assert_array_equal(encode_srgb(look_up(baked.texture, *baked.uv[corner])), colors[corner])


def test_a_textured_mesh_is_not_baked(tmp_path: Path) -> None:
    mesh = load_mesh(write_thuman(tmp_path / "0000"))
    assert bake_colors(mesh) is mesh
