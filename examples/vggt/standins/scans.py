"""Procedural people in the files of THuman (OBJ, material, JPEG) and of 2K2K (coloured PLY). No real data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from .people import Person, colour, surface
from .surfaces import triangles


def paint_quads(person: Person, vertices: np.ndarray, quads: np.ndarray, texels: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture (S, S, 3) uint8, first row at v = 1, and texture coordinates (Q, 4, 2): a cell of texels x texels for
    each quad, whose corners are the centres of the cell's outer texels. S: a power of two, if texels is one."""
    from peft_attrsub.datasets.meshes import atlas_cells

    corners = vertices[quads]  # (Q, 4, 3)
    cells, side = atlas_cells(corners.mean(axis=1))
    size = side * texels
    share = np.arange(texels) / (texels - 1)
    s, t = share[None, :, None], share[:, None, None]
    weights = np.stack([(1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t])[..., 0].reshape(4, -1)
    picture = np.full((size, size, 3), 128, np.uint8)
    row, column = np.mgrid[:texels, :texels].reshape(2, -1)
    for part in np.array_split(np.arange(len(quads)), len(quads) // 4000 + 1):
        points = np.einsum("qcx,cp->qpx", corners[part], weights)
        paint = colour(person, points.reshape(-1, 3)).reshape(len(part), -1, 3)
        rows, columns = (cells[part] * texels).T[:, :, None]
        picture[size - 1 - rows - row, columns + column] = paint
    first = cells[:, None, ::-1] * texels + 0.5
    uv = (first + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (texels - 1)) / size
    return picture, uv


def write_thuman(root: Path, name: str, person: Person, detail: int = 128, texels: int = 8) -> Path:
    """<root>/model/<name>/{<name>.obj, material0.mtl, material0.jpeg}; the folder; kept where it is there."""
    from PIL import Image

    folder = root / "model" / name
    if folder.exists():
        return folder
    vertices, quads = surface(person, detail)
    picture, uv = paint_quads(person, vertices, quads, texels)
    lines = ["mtllib material0.mtl", "usemtl material0"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices.tolist()]
    lines += [f"vt {u:.6f} {v:.6f}" for u, v in uv.reshape(-1, 2).tolist()]
    places = triangles(quads) + 1
    coordinates = triangles(np.arange(4 * len(quads)).reshape(-1, 4)) + 1
    for (a, b, c), (p, q, r) in zip(places.tolist(), coordinates.tolist(), strict=True):
        lines.append(f"f {a}/{p} {b}/{q} {c}/{r}")
    partial = _beside(folder)
    (partial / f"{name}.obj").write_text("\n".join(lines) + "\n", encoding="utf-8")
    material = "newmtl material0\nKd 1 1 1\nKa 0 0 0\nKs 0 0 0\nmap_Kd material0.jpeg\n"
    (partial / "material0.mtl").write_text(material, encoding="utf-8")
    Image.fromarray(picture).save(partial / "material0.jpeg", quality=95, subsampling=0)
    os.rename(partial, folder)
    return folder


def write_2k2k(root: Path, name: str, person: Person, detail: int = 160, up: str = "y", unit: float = 120.0) -> Path:
    """<root>/test/<name>/<name>.ply, binary, uchar red, green, blue. up: "y" or "z". unit: how long 1 becomes."""
    folder = root / "test" / name
    if folder.exists():
        return folder
    vertices, quads = surface(person, detail)
    colours, faces = colour(person, vertices), triangles(quads)
    if up == "z":
        vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    kinds = [("xyz", "<f4", 3), ("rgb", "u1", 3)]
    points = np.empty(len(vertices), kinds)
    points["xyz"], points["rgb"] = vertices * unit, colours
    rows = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
    rows["count"], rows["corners"] = 3, faces
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {channel}" for channel in ("red", "green", "blue")]
    header += [f"element face {len(rows)}", "property list uchar int vertex_indices", "end_header"]
    partial = _beside(folder)
    (partial / f"{name}.ply").write_bytes("\n".join(header).encode() + b"\n" + points.tobytes() + rows.tobytes())
    os.rename(partial, folder)
    return folder


def _beside(folder: Path) -> Path:
    """An empty folder beside the one that is to be, to be renamed when it is full."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial
