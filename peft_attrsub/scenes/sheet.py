"""A contact sheet: a few scenes of a dataset as rows, a few of their views as columns, to see what varies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from .._extras import require
from . import pixels
from .dataset import SHEET, Dataset, scene_name
from .storage import TRANSFORMS, read_json, write_atomically

GAP, TITLE, LABEL = 4, 34, 18  # pixels
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)


def contact_sheet(
    folder: str | Path, path: str | Path | None = None, scenes: int = 6, views: int = 6, cell: int = 160
) -> Path:
    """Draw `scenes` x `views` pictures, evenly chosen, the longer side of each `cell` pixels, and write a PNG
    (default: contact_sheet.png in the dataset; a name that ends in .jpg gives a JPEG). Returns its path.

    ValueError where the dataset has no finished scene or less than one row, column or pixel is asked for.
    """
    image, draw, font = (
        require(f"PIL.{name}", "vggt", "contact sheets") for name in ("Image", "ImageDraw", "ImageFont")
    )
    if min(scenes, views, cell) < 1:
        raise ValueError(f"a sheet of {scenes} scenes, {views} views and {cell} pixels was asked for: 1 or more each.")
    dataset = Dataset.open(folder)
    finished = dataset.finished()
    if not finished:
        raise ValueError(f"{folder} has no finished scene yet: generate some first.")
    chosen = _spread(finished, scenes)
    frames = {index: read_json(dataset.scene(index) / TRANSFORMS)["frames"] for index in chosen}
    columns = min(views, max(len(frames[index]) for index in chosen))
    step = cell + GAP
    size = (GAP + columns * step, TITLE + len(chosen) * (step + LABEL))
    sheet = image.new("RGB", size, PAPER)
    pen, letters = draw.Draw(sheet), font.load_default(13)
    fields = dataset.plan["recipe"]["fields"]
    words = [Path(folder).resolve().name, *(f"{key} {fields[key]}" for key in ("attribute", "seed") if key in fields)]
    pen.text((GAP, 8), "   ".join(words), INK, font=letters)
    for row, index in enumerate(chosen):
        top = TITLE + row * (step + LABEL)
        for column, view in enumerate(_spread(list(range(len(frames[index]))), columns)):
            source = dataset.scene(index) / frames[index][view]["file_path"]
            picture = image.fromarray(pixels.decode(source.read_bytes(), source))
            picture = _fitted(picture, cell, image.Resampling)
            left = GAP + column * step
            label = f"{scene_name(index)}  view {view}" if column == 0 else f"view {view}"
            pen.text((left, top), label, FAINT, font=letters)
            sheet.paste(picture, (left, top + LABEL))
    target = Path(path) if path is not None else dataset.folder / SHEET
    if target.suffix.lower() in (".jpg", ".jpeg"):
        stream = io.BytesIO()
        sheet.save(stream, "JPEG", quality=85)
        write_atomically(target, stream.getvalue())
    else:
        write_atomically(target, pixels.encode_rgb(np.asarray(sheet)))
    return target


def _fitted(picture: Any, cell: int, ways: Any) -> Any:
    """As large as the cell allows: smaller by filtering, larger by repeating pixels, so that they stay visible."""
    scale = cell / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, ways.NEAREST if scale > 1 else ways.LANCZOS)


def _spread(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spaced, the first one always among them."""
    count = min(count, len(values))
    return [values[place * len(values) // count] for place in range(count)]
