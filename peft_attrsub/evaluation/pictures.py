"""Pictures of one sequence: prediction beside truth beside error, and point clouds that any viewer opens."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .._extras import require
from .colors import color_map, paint
from .files import write_atomically

TITLES = ("image", "prediction", "truth", "error |d - z| / z")
GAP, TEXT, BAR = 8, 22, 14


def _pillow(module: str) -> Any:
    return require(f"PIL.{module}", "eval", "drawing pictures")


def error_colors(distances: ArrayLike, vmax: float) -> np.ndarray:
    """Colours (N, 3) uint8 of distances (N,): dark for 0, light yellow for vmax and more, grey for nan."""
    if not vmax > 0:
        raise ValueError(f"vmax is {vmax}: expected the positive distance that the last colour stands for.")
    return paint(np.asarray(distances, np.float64), 0.0, vmax, "error")


def error_figure(
    images: ArrayLike,
    pred_depth: ArrayLike,
    true_depth: ArrayLike,
    mask: ArrayLike,
    path: str | os.PathLike[str],
    *,
    vmax: float | None = None,
    max_views: int = 4,
    width: int = 320,
    title: str = "",
) -> Path:
    """A PNG with a line per view: image, aligned prediction d, truth z, relative error |d - z| / z.

    images (S, 3, H, W) in [0, 1]; depths and mask (S, h, w), which may be of another size. Prediction and truth share
    one scale of colours, from the 2nd to the 98th percentile of the truth; grey is outside of the mask. vmax: the
    error of the last colour, else the 95th percentile of what is there. max_views: evenly spaced, the first and the
    last among them. width: of one picture, in pixels. The ranges stand in the legend.
    """
    pictures, d, z = np.asarray(images), np.asarray(pred_depth, np.float64), np.asarray(true_depth, np.float64)
    valid = np.asarray(mask)
    if pictures.ndim != 4 or pictures.shape[1] != 3 or d.ndim != 3 or z.shape != d.shape or valid.shape != d.shape:
        raise ValueError(
            f"images are {pictures.shape}, pred_depth {d.shape}, true_depth {z.shape}, mask {valid.shape}: expected "
            "(S, 3, H, W) and three of one shape (S, h, w)."
        )
    if len(pictures) != len(d) or valid.dtype != np.bool_ or len(d) < 1 or max_views < 1:
        raise ValueError(
            f"{len(pictures)} images, {len(d)} depth maps, mask {valid.dtype}, max_views {max_views}: expected as "
            "many of one as of the other, bool, and at least one view."
        )
    valid = valid & (z > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(valid, np.abs(d - z) / z, np.nan)
    low, high = np.percentile(z[valid], (2, 98)) if valid.any() else (0.0, 1.0)
    if vmax is None:
        known = error[np.isfinite(error)]
        vmax = max(float(np.percentile(known, 95)), 1e-6) if len(known) else 1.0
    views = np.unique(np.linspace(0, len(d) - 1, min(max_views, len(d))).round().astype(int))
    rows = []
    for view in views:
        photo = np.rint(255 * np.clip(pictures[view].astype(np.float64).transpose(1, 2, 0), 0, 1)).astype(np.uint8)
        maps = [paint(np.where(valid[view], values[view], np.nan), low, high, "depth") for values in (d, z)]
        rows.append([photo, *maps, paint(error[view], 0.0, vmax, "error")])
    return _save_sheet(rows, (float(low), float(high)), vmax, Path(path), width, title)


def _save_sheet(
    rows: list[list[np.ndarray]], depth: tuple[float, float], vmax: float, path: Path, width: int, title: str
) -> Path:
    """The pictures in a grid, titles above and the two legends below."""
    image, draw_module, font_module = _pillow("Image"), _pillow("ImageDraw"), _pillow("ImageFont")
    heights = [max(1, round(width * max(cell.shape[0] / cell.shape[1] for cell in row))) for row in rows]
    above = TEXT * (2 if title else 1) + GAP
    total = above + sum(heights) + GAP * len(heights) + BAR + TEXT + GAP
    sheet = image.new("RGB", (4 * width + 5 * GAP, total), "white")
    draw, font = draw_module.Draw(sheet), font_module.load_default(size=15)
    if title:
        draw.text((GAP, 4), title, fill="black", font=font)
    left = [GAP + column * (width + GAP) for column in range(4)]
    for x, text in zip(left, TITLES, strict=True):
        draw.text((x, above - TEXT), text, fill="black", font=font)
    top = above
    for row, height in zip(rows, heights, strict=True):
        for x, cell in zip(left, row, strict=True):
            # Maps keep hard edges, photographs do not.
            how = image.Resampling.BICUBIC if x == left[0] else image.Resampling.NEAREST
            size = (width, max(1, round(width * cell.shape[0] / cell.shape[1])))
            sheet.paste(image.fromarray(np.ascontiguousarray(cell)).resize(size, how), (x, top))
        top += height + GAP
    shared = 2 * width + GAP
    _legend(sheet, "depth", (left[1], top, shared), (f"{depth[0]:.4g}", f"depth {depth[1]:.4g}"), font)
    _legend(sheet, "error", (left[3], top, width), ("0", f"{100 * vmax:.3g} % and more"), font)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return write_atomically(path, data.getvalue())


def _legend(sheet: Any, name: str, where: tuple[int, int, int], texts: tuple[str, str], font: Any) -> None:
    """A strip of a colour map at (left, top, width), and below it what its two ends stand for."""
    left, top, width = where
    strip = np.broadcast_to(color_map(name)[None], (1, 256, 3))
    image = _pillow("Image")
    bar = image.fromarray(np.ascontiguousarray(strip)).resize((width, BAR), image.Resampling.BILINEAR)
    sheet.paste(bar, (left, top))
    draw = _pillow("ImageDraw").Draw(sheet)
    draw.text((left, top + BAR + 2), texts[0], fill="black", font=font)
    draw.text((left + width, top + BAR + 2), texts[1], fill="black", font=font, anchor="ra")


def save_points(path: str | os.PathLike[str], points: ArrayLike, colors: ArrayLike | None = None) -> Path:
    """A binary PLY of points (N, 3) float32 and colors (N, 3), uint8 or in [0, 1].

    Points that are not finite are left out, since viewers lose the whole cloud over one of them.
    """
    p = np.asarray(points)
    if p.ndim != 2 or p.shape[1] != 3:
        raise ValueError(f"points have shape {p.shape}: expected (N, 3).")
    fields: list[tuple[str, str]] = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
    c = None if colors is None else np.asarray(colors)
    if c is not None:
        if c.shape != p.shape:
            raise ValueError(f"colors have shape {c.shape}: expected {p.shape}, as the points.")
        if c.dtype != np.uint8:
            c = np.rint(255 * np.clip(np.nan_to_num(c.astype(np.float64)), 0, 1)).astype(np.uint8)
        fields += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    with np.errstate(over="ignore"):
        good = np.isfinite(p.astype(np.float32)).all(1)
    record = np.empty(int(good.sum()), dtype=fields)
    for index, name in enumerate("xyz"):
        record[name] = p[good, index]
    if c is not None:
        for index, name in enumerate(("red", "green", "blue")):
            record[name] = c[good, index]
    kinds = {"<f4": "float", "u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(record)}"]
    header += [f"property {kinds[kind]} {name}" for name, kind in fields] + ["end_header", ""]
    return write_atomically(path, "\n".join(header).encode() + record.tobytes())


__all__ = ["error_colors", "error_figure", "save_points"]
