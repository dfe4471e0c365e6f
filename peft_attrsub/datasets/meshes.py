"""Scans of clothed people as their authors ship them: THuman 2.0 / 2.1 (OBJ with a texture), 2K2K (coloured PLY).

    THuman   <root>/<id4>/<id4>.obj, material0.mtl, material0.jpeg; also below model/, THUman/model/,
             THuman2.1_Release/ and THuman2.1_Release/model/. y points up, the unit is not fixed.
    2K2K     <root>/{train,test}/<id5>/<id5>.ply; also <root>/<id5>/<id5>.ply, and the old train/50K/<id5>/<id5>.ply.
             Colour per vertex. y points up as a rule, sometimes z; the unit is about a centimetre.

Pictures of them are made by `examples/vggt/prepare_thuman.py` and `prepare_2k2k.py`, and read by `rendered`.
Sources: github.com/ytrock/THuman2.0-Dataset, github.com/ketiVision/2K2K.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._extras import require
from .._pictures import decode_picture, to_rgba
from ..scenes.view import decode_srgb, encode_srgb

Singles = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]

THUMAN_FOLDERS = ("", "model", "THUman/model", "THuman2.1_Release", "THuman2.1_Release/model")
SPLITS = ("train", "test", "all")
#: What a person without colour is painted with, sRGB.
GREY = 176


@dataclass(frozen=True)
class PersonMesh:
    """V vertices and T triangles in the axes and the unit of the file.

    vertices (V, 3) float32. triangles (T, 3) int32, counter-clockwise seen from outside. normals (V, 3) float32,
    unit: smooth also where a texture is cut. Either uv (V, 2) float32, v upwards, and texture (H, W, 3) uint8 sRGB,
    whose first row is the top (v = 1); or colors (V, 3) uint8 sRGB.
    """

    vertices: Singles
    triangles: Ints
    normals: Singles
    uv: Singles | None = None
    texture: Bytes | None = None
    colors: Bytes | None = None


@dataclass(frozen=True)
class Placement:
    """How a mesh was put into the world: x_world = scale (turn R_up x - centre).

    up: the axis of the file that points up, "y" or "z". turn: degrees about the vertical. centre (3,): of the
    bounding box before scaling. scale: 1 where the height was left as it is.
    """

    up: str
    turn: float
    centre: list[float]
    scale: float


def find_thuman(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Id ("0000" ... "2444") -> its OBJ file, sorted by id, in any of the three layouts in use.

    FileNotFoundError where there is none, and where a folder of an id has no OBJ: "the last 100 ids" would be others
    if it were left out quietly. ValueError for an id that is there twice.
    """
    places = (Path(root) / folder for folder in THUMAN_FOLDERS)
    return _find(Path(root), places, r"\d{4}", ".obj", "THuman: expected <id>/<id>.obj, or model/<id>/<id>.obj")


def find_2k2k(root: str | os.PathLike[str], split: str = "test") -> dict[str, Path]:
    """Id ("07184" ...) -> its PLY file, sorted by id. split: "train", "test" or "all", by the folder it is in; people
    straight below the root belong to every split. Errors as of `find_thuman`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: give one of {', '.join(SPLITS)}.")
    root = Path(root)
    places = [root]
    for part in ("train", "test") if split == "all" else (split,):
        places += [root / part, *sorted(path for path in (root / part).glob("*K") if path.is_dir())]
    return _find(root, places, r"\d{5}", ".ply", f"2K2K: expected {split}/<id>/<id>.ply, or <id>/<id>.ply")


def _find(root: Path, places: Iterable[Path], pattern: str, ending: str, layout: str) -> dict[str, Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: give the one with the meshes ({layout}).")
    found: dict[str, Path] = {}
    empty: list[Path] = []
    for place in places:
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if not re.fullmatch(pattern, folder.name) or not folder.is_dir():
                continue
            file = folder / f"{folder.name}{ending}"
            if not file.is_file():
                empty.append(folder)
            elif folder.name in found:
                raise ValueError(
                    f"{folder.name} is in {root} twice, {found[folder.name]} and {file}: give one of the two folders."
                )
            else:
                found[folder.name] = file
    if empty:
        raise FileNotFoundError(
            f"{empty[0]} has no {empty[0].name}{ending} ({len(empty)} of {len(empty) + len(found)} people have none): "
            "download it again, or remove the folder."
        )
    if not found:
        raise FileNotFoundError(f"{root} holds no people in the layout of {layout}.")
    return dict(sorted(found.items()))


def load_mesh(path: str | os.PathLike[str], grey: bool = False) -> PersonMesh:
    """The mesh in an OBJ or PLY file, with the texture its material names, or the colours of its vertices.

    grey: paint a mesh without colour grey (old 2K2K test meshes) instead of raising ValueError. Faces with more than
    three corners are cut into triangles. FileNotFoundError for a missing file or texture, ValueError for a file that
    is no mesh, or an empty one; ImportError without trimesh or Pillow.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give an OBJ or PLY file.")
    read = _read(path)
    vertices = np.asarray(read.vertices, np.float32) + np.float32(0)  # no -0.0: equal positions are equal bytes
    triangles = np.asarray(read.faces, np.int32)
    if not len(triangles) or not np.isfinite(vertices).all():
        raise ValueError(f"{path} has no triangles, or vertices that are not finite: it is damaged.")
    mesh = PersonMesh(vertices, triangles, smooth_normals(vertices, triangles))
    uv, image = getattr(read.visual, "uv", None), _texture(read, path)
    if uv is not None and image is not None:
        return replace(mesh, uv=np.asarray(uv, np.float32), texture=image)
    if getattr(read.visual, "kind", None) == "vertex":
        return replace(mesh, colors=np.array(read.visual.vertex_colors, np.uint8)[:, :3])
    if grey:
        return replace(mesh, colors=np.full((len(vertices), 3), GREY, np.uint8))
    raise ValueError(f"{path} has neither a texture nor colours of its vertices: ask for grey if it is to be used.")


def _read(path: Path) -> Any:
    """trimesh's own mesh. Its PLY reader knows colours by the names red, green, blue alone."""
    require("PIL.Image", "vggt", "reading meshes")  # without it trimesh leaves textures out and says nothing
    trimesh = require("trimesh", "vggt", "reading meshes")
    try:
        if path.suffix.lower() == ".obj":
            return trimesh.load(path, force="mesh", process=False)
        data = path.read_bytes()
        header, end, body = data.partition(b"end_header")
        for colour in (b"red", b"green", b"blue"):
            header = re.sub(
                rb"(property\s+\w+\s+)(?:diffuse_%b|%b)(\s)" % (colour, colour[:1]), rb"\1%b\2" % colour, header
            )
        return trimesh.load(io.BytesIO(header + end + body), file_type="ply", force="mesh", process=False)
    except Exception as error:  # trimesh raises whatever its parsers trip over
        raise ValueError(f"{path} is no mesh that can be read ({error!r}): download it again.") from error


def _texture(read: Any, path: Path) -> Bytes | None:
    """The picture that the material of an OBJ names; trimesh alone would invent one where none is in use."""
    if path.suffix.lower() != ".obj":
        return None
    with path.open("rb") as file:  # the material is named before the first face
        head = file.read(1 << 16).decode("utf-8", "replace")
    library = re.search(r"^mtllib\s+(.+?)\s*$", head, re.MULTILINE)
    if library is None:
        return None
    material = path.parent / library[1]
    if not material.is_file():
        raise FileNotFoundError(f"{material}, the material of {path}, does not exist: download it again.")
    names = re.findall(r"^\s*map_Kd\s+(.+?)\s*$", material.read_text("utf-8", "replace"), re.MULTILINE)
    for name in names:
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path.parent / name}, the texture of {path}, does not exist: download it again.")
    if not names:
        return None
    if len(set(names)) > 1:  # trimesh has packed them into one, and changed uv to fit
        return np.asarray(read.visual.material.image.convert("RGB"), np.uint8)
    try:
        return np.ascontiguousarray(to_rgba(decode_picture(path.parent / names[0]))[..., :3])
    except ValueError as error:
        raise ValueError(
            f"{path.parent / names[0]}, the texture of {path}, is not a readable picture ({error}): download it again."
        ) from error


def smooth_normals(vertices: Singles, triangles: Ints) -> Singles:
    """Unit normals (V, 3): the sum of the normals of the triangles around a place, each as long as twice its area.

    Vertices at the same place share it: a texture's cuts do not show. A place without area has the normal (0, 0, 1).
    """
    rows = np.ascontiguousarray(vertices).view(np.dtype((np.void, 12))).reshape(-1)
    _, place = np.unique(rows, return_inverse=True)
    place = place.reshape(-1)
    a, b, c = (vertices[triangles[:, corner]].astype(np.float64) for corner in range(3))
    outward = np.cross(b - a, c - a)
    corners = place[triangles].ravel()
    total = np.stack(
        [np.bincount(corners, np.repeat(outward[:, axis], 3), place.max(initial=0) + 1) for axis in range(3)], axis=1
    )
    length = np.linalg.norm(total, axis=1, keepdims=True)
    unit = np.where(length > 0, total / np.maximum(length, 1e-300), [0.0, 0.0, 1.0])
    return unit[place].astype(np.float32)


def place(mesh: PersonMesh, up: str = "auto", height: float = 1.0, turn: float = 0.0) -> tuple[PersonMesh, Placement]:
    """The person upright (z up), turned, with the middle of the bounding box at the origin, and `height` tall.

    up: "y", "z", or "auto": whichever of the two the person is longer along. A y-up file is turned by 90 degrees
    about x: (x, y, z) -> (x, -z, y). turn: degrees about the vertical, counter-clockwise from above. height: extent
    along z afterwards; 0 leaves the size as it is.
    """
    if up not in ("auto", "y", "z"):
        raise ValueError(f"up is {up!r}: give auto, y or z.")
    if not 0 <= height < float("inf"):
        raise ValueError(f"the height is {height}: give 0 (as it is) or more.")
    if up == "auto":
        extent = np.ptp(mesh.vertices, axis=0)
        up = "z" if extent[2] > extent[1] else "y"
    angle = np.deg2rad(turn)
    cos, sin = np.cos(angle).round(15), np.sin(angle).round(15)
    upright = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) if up == "y" else np.eye(3)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ upright
    vertices = mesh.vertices.astype(np.float64) @ rotation.T
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    tall = float(high[2] - low[2])
    if tall <= 0:
        raise ValueError("the mesh has no height: it is flat, or another axis points up.")
    centre, scale = (low + high) / 2, height / tall if height else 1.0
    placed = replace(
        mesh,
        vertices=((vertices - centre) * scale).astype(np.float32),
        normals=(mesh.normals @ rotation.T).astype(np.float32),
    )
    return placed, Placement(up, float(turn), [float(value) for value in centre], float(scale))


def atlas_cells(centres: np.ndarray) -> tuple[NDArray[np.int64], int]:
    """A cell (row, column) (N, 2) of a square of `side` x `side` cells for each of N places (N, 3), and that side.

    Both the places and the cells are taken along a Z curve: what is near in the picture is near in space, so that a
    smaller picture of the picture (a mip level) still shows about the right colours. side: a power of two.
    """
    low = centres.min(axis=0)
    steps = ((centres - low) / max(float((centres.max(axis=0) - low).max()), 1e-30) * 1023).astype(np.int64)
    code = np.zeros(len(centres), np.int64)
    for bit in range(10):
        for axis in range(3):
            code |= (steps[:, axis] >> bit & 1) << (3 * bit + axis)
    number = np.empty(len(centres), np.int64)
    number[np.argsort(code, kind="stable")] = np.arange(len(centres))
    side = 1
    while side * side < len(centres):
        side *= 2
    cells = np.zeros((len(centres), 2), np.int64)
    for bit in range(side.bit_length() - 1):
        cells[:, 1] |= (number >> (2 * bit) & 1) << bit
        cells[:, 0] |= (number >> (2 * bit + 1) & 1) << bit
    return cells, side


def bake_colors(mesh: PersonMesh) -> PersonMesh:
    """The same surface with its vertex colours as a texture, for renderers that know nothing else: 3 T vertices.

    Each triangle has a cell of 2 x 2 texels, its corners at the centres of three of them. With c11 = c10 + c01 - c00
    in the fourth, bilinear interpolation between the four is linear on the triangle, in linear light, except where
    c11 would leave [0, 1]. A mesh that has a texture is returned as it is.
    """
    if mesh.colors is None:
        return mesh
    corners = mesh.triangles.reshape(-1)
    cells, side = atlas_cells(mesh.vertices[mesh.triangles].mean(axis=1))
    size = 2 * side
    colors = mesh.colors[mesh.triangles]  # (T, 3, 3)
    light = decode_srgb(colors)
    texture = np.empty((size, size, 3), np.uint8)
    texture[:] = colors.mean(axis=(0, 1)).round()  # of the cells that are left over
    row, column = size - 1 - 2 * cells[:, 0], 2 * cells[:, 1]  # row 0 is at v = 1
    texture[row, column], texture[row, column + 1], texture[row - 1, column] = colors.transpose(1, 0, 2)
    texture[row - 1, column + 1] = encode_srgb(light[:, 1] + light[:, 2] - light[:, 0])
    first = np.stack([column + 0.5, 2 * cells[:, 0] + 0.5], axis=1)
    uv = (first[:, None] + np.array([[0, 0], [1, 0], [0, 1]])) / size
    return PersonMesh(
        mesh.vertices[corners],
        np.arange(len(corners), dtype=np.int32).reshape(-1, 3),
        mesh.normals[corners],
        uv.reshape(-1, 2).astype(np.float32),
        texture,
    )


__all__ = [
    "PersonMesh",
    "Placement",
    "atlas_cells",
    "bake_colors",
    "find_2k2k",
    "find_thuman",
    "load_mesh",
    "place",
    "smooth_normals",
]
