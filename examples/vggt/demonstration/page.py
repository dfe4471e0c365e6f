"""The page of the demo: one HTML file with everything in it but the basis report, which it links to.

Nothing in it reaches for a network, and a Content-Security-Policy refuses what would.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from peft_attrsub.datasets import open_benchmark
from peft_attrsub.evaluation.files import write_atomically
from peft_attrsub.evaluation.markdown import Column, parameters_text, point_columns

from .clouds import clouds
from .plan import ATTRIBUTES, METHODS, Step
from .results import NAMES, collect, forgotten, sentences

PAGE, SUMMARY, REPORT = "index.html", "summary.json", "report.html"
HERE = Path(__file__).resolve().parent
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_VARIES = {
    "texture": "the scene stays, its surfaces change",
    "geometry": "the shapes change",
    "camera": "the viewpoints change",
    "lighting": "the lamps change",
}


def write_page(out: Path, settings: Mapping[str, Any], steps: Sequence[Step]) -> list[str]:
    """Write index.html and summary.json of a demo whose steps are all done; the sentences that the page opens with."""
    result = collect(out, settings, steps)
    said = sentences(result)
    write_atomically(out / SUMMARY, (json.dumps(_finite(result) | {"says": said}, indent=1) + "\n").encode())
    write_atomically(out / PAGE, render(result, pictures(out, result)).encode())
    return said


def pictures(out: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows: "sheets" attribute -> PNG, "panels" method -> PNG, "clouds", "sequence"."""
    sheets = {attribute: sheet(out / "data" / f"{attribute}_00") for attribute in ATTRIBUTES}
    measured = result["methods"]["base"]["people"]["errors"]
    folders = {method: out / "measured" / f"people-{method}" / "pictures" for method in METHODS}
    name = quote(next(iter(measured), ""), safe=" ,=+()")
    if not name or not all((folder / f"{name}.png").is_file() for folder in folders.values()):
        return {"sheets": sheets, "panels": {}, "clouds": [], "sequence": ""}
    return {
        "sheets": sheets,
        "panels": {method: (folder / f"{name}.png").read_bytes() for method, folder in folders.items()},
        "clouds": clouds(folders, name),
        "sequence": name,
    }


def sheet(folder: Path, scenes: int = 3, views: int = 4) -> bytes:
    """A PNG of a dataset's first scenes as rows and some of their views as columns, with nothing between or around."""
    from PIL import Image

    dataset, rows = open_benchmark("scenes", folder), []
    for name in dataset.names[:scenes]:
        images = dataset.read(name).images  # (V, 3, H, W)
        chosen = images[[index * len(images) // views for index in range(views)]]
        rows.append(np.concatenate(list(chosen.permute(0, 2, 3, 1).numpy()), axis=1))
    picture = np.rint(255 * np.concatenate(rows)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def render(result: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    """The page as text, from `results.collect` and `pictures`."""
    parts = [
        _result(result),
        _clouds(shown),
        _panels(shown),
        _scenes(result, shown),
        _basis(result),
        _commands(result),
    ]
    settings, style = result["settings"], (HERE / "page.css").read_text(encoding="utf-8")
    data = json.dumps([{k: v for k, v in cloud.items() if k != "label"} for cloud in shown["clouds"]])
    script = (HERE / "clouds.js").read_text(encoding="utf-8") if shown["clouds"] else ""
    toy = " This is the toy scale, in which nothing can be learnt." if settings["scale"] == "toy" else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>peft_attrsub: the demo</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>Attribute subspaces, from made scenes to tuned cores</h1>
<p class="lead">{escape(_model(settings))} ({parameters_text(settings["parameters"])} parameters) was tuned on
made-up people in rooms, by a LoRA and by cores in a basis mined from {result["adapters"]} adapters, each of which saw
scenes in which one attribute varies.{toy}</p>
</header>
<main>
{"".join(parts)}</main>
<footer>Made by examples/vggt/demo.py; all numbers are in {SUMMARY} beside this page.</footer>
<script id="clouds" type="application/json">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def _model(settings: Mapping[str, Any]) -> str:
    return Path(str(settings["model"])).name


def _result(result: Mapping[str, Any]) -> str:
    says = "".join(f"<li>{escape(text)}</li>" for text in sentences(result))
    return (
        f'<section id="result"><h2>What came out</h2><ul class="says">{says}</ul>'
        f'<div class="wide" style="margin-top:14px">{table(result)}</div>'
        '<p class="note">Acc: mean distance from a predicted point to the true surface; Comp: from the true surface '
        "to the prediction; NC: agreement of normals; after a similarity and ICP. People: in thousandths of their "
        "height; scenes: in centimetres. Forgetting: growth of (Acc + Comp) / 2 on generic scenes from the model as "
        "it is. Seconds: of training on one core, beside other commands. The heads stay frozen, data and steps are "
        "the same for both.</p>"
        "</section>"
    )


def table(result: Mapping[str, Any]) -> str:
    """The result table, a row per method; what prints best in a column is marked."""
    columns = [("people", column) for column in point_columns(1e-3)] + [("scenes", c) for c in point_columns(1e-2)]
    methods = result["methods"]
    best = {(place, c.key): _best(methods, place, c) for place, c in columns}
    rows = []
    for method in METHODS:
        values = methods[method]
        cells = [f"<td>{parameters_text(values['trainable'])}</td>"]
        for place, column in columns:
            text = _text(column, values[place][column.key])
            mark = ' class="best"' if text != "–" and text == best[place, column.key] else ""
            cells.append(f"<td{mark}>{text}</td>")
        cells.append(f"<td>{_grown(result, method)}</td>")
        cells.append(f"<td>{values['seconds']:.0f}</td>" if method != "base" else "<td>–</td>")
        rows.append(f"<tr><td>{escape(NAMES[method])}</td>{''.join(cells)}</tr>")
    names = "".join(
        f"<th>{column.title.split(' ')[0]} {'↑' if column.best == 'high' else '↓'}</th>" for _, column in columns
    )
    return (
        '<table><thead><tr><th></th><th></th><th colspan="3">held-out people</th><th colspan="3">generic scenes</th>'
        f"<th></th><th></th></tr><tr><th>method</th><th>trainable</th>{names}<th>forgetting ↓</th><th>seconds</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _text(column: Column, value: float) -> str:
    return column.text(value) if math.isfinite(value) else "–"


def _best(methods: Mapping[str, Any], place: str, column: Column) -> str:
    known = [values[place][column.key] for values in methods.values() if math.isfinite(values[place][column.key])]
    if not known:
        return ""
    return column.text(max(known) if column.best == "high" else min(known))


def _grown(result: Mapping[str, Any], method: str) -> str:
    share = forgotten(result, method)
    if method == "base" or math.isnan(share):
        return "–"
    text = f"{100 * share:+.1f} %"
    return "0.0 %" if text in ("+0.0 %", "-0.0 %") else text.replace("-", "−")


def _clouds(shown: Mapping[str, Any]) -> str:
    if not shown["clouds"]:
        return ""
    names = {"truth": "truth"} | NAMES
    figures = "".join(
        f"<figure><figcaption><b>{escape(names[cloud['label']])}</b></figcaption>"
        f'<canvas data-cloud="{number}" tabindex="0" role="img" '
        f'aria-label="point cloud: {escape(names[cloud["label"]])}"></canvas></figure>'
        for number, cloud in enumerate(shown["clouds"])
    )
    return (
        f'<section id="points"><h2>Points, prediction beside truth</h2><p>Room {escape(shown["sequence"])}, which no '
        "training saw, from all views, in the colours of the pictures; predictions are aligned to the truth as they "
        "are for the table. Drag to turn, or use the arrow keys.</p>"
        '<p><button id="nearer" type="button">nearer</button> '
        f'<button id="farther" type="button">farther</button></p><div class="grid">{figures}</div></section>'
    )


def _panels(shown: Mapping[str, Any]) -> str:
    if not shown["panels"]:
        return ""
    figures = "".join(
        f"<figure><figcaption><b>{escape(NAMES[method])}</b></figcaption>"
        f'<img alt="depth of {escape(NAMES[method])}: image, prediction, truth, error" src="{_uri(data)}">'
        "</figure>"
        for method, data in shown["panels"].items()
    )
    return (
        '<section id="depth"><h2>Depth and its error</h2><p>The same room: image, predicted depth, true depth, and '
        f'relative error. Each picture has its own scale of the error, which stands below it.</p><div class="three">'
        f"{figures}</div></section>"
    )


def _scenes(result: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    figures = "".join(
        f"<figure><figcaption><b>{attribute}</b>: {_VARIES[attribute]}</figcaption>"
        f'<img alt="three scenes of the attribute {attribute}" src="{_uri(data)}"></figure>'
        for attribute, data in shown["sheets"].items()
    )
    return (
        '<section id="scenes"><h2>Scenes in which one attribute varies</h2><p>Three scenes of one dataset of each '
        f'attribute, one per row.</p><div class="pairs">{figures}</div></section>'
    )


def _basis(result: Mapping[str, Any]) -> str:
    tiles = "".join(
        f'<div class="finding"><p class="topic">{escape(one["topic"])}</p>'
        f'<p class="headline">{escape(one["headline"])}</p>'
        f"<p>{escape(one['text'])}</p></div>"
        for one in result["basis"]
    )
    return (
        f'<section id="basis"><h2>The mined basis</h2><p>{escape(", ".join(result["attributes"]))}; everything about '
        f'it, module by module: <a href="{REPORT}">{REPORT}</a>.</p><div class="pairs">{tiles}</div></section>'
    )


def _commands(result: Mapping[str, Any]) -> str:
    items = "".join(
        f"<li>{escape(step['title'])}, {step['seconds']:.0f} s<code>{escape(step['command'])}</code></li>"
        for step in result["steps"]
    )
    total = sum(step["seconds"] for step in result["steps"])
    return (
        f'<section id="commands"><h2>The commands</h2><p>{len(result["steps"])} commands, {total:.0f} seconds of '
        "theirs together; several ran side by side. A command that was stopped and continued counts from its last "
        "start.</p>"
        f'<details><summary>show them</summary><ol class="commands">{items}</ol></details></section>'
    )


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _finite(value: Any) -> Any:
    """`value` with null for what is not finite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
