"""The page of the demo: one HTML file with everything in it but the basis report, which it links to.

It is written from the first minute on and grows with what the commands leave: an unfinished page says so, says what
is being done in the place of what is missing, and reloads itself. Nothing in it reaches for a network, and a
Content-Security-Policy refuses what would.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from peft_attrsub.evaluation.files import write_atomically
from peft_attrsub.evaluation.markdown import Column, parameters_text, point_columns

from .clouds import clouds
from .estimate import spoken
from .plan import METHODS, SHEET, Step
from .results import NAMES, collect, forgotten, sentences
from .scales import ATTRIBUTES

PAGE, SUMMARY, REPORT = "index.html", "summary.json", "report.html"
#: Seconds after which an unfinished page reloads itself.
RELOAD = 5
#: A training's precision, in words.
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HERE = Path(__file__).resolve().parent
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_VARIES = {
    "texture": "the scene stays, its surfaces change",
    "geometry": "the shapes change",
    "camera": "the viewpoints change",
    "lighting": "the lamps change",
}


@dataclass(frozen=True)
class Status:
    """How far an unfinished demo is. share: of its work, in [0, 1]. left: seconds, None where it is not known yet.
    running: titles of the commands at work, each with its share. stopped: why nothing is at work, or ""."""

    share: float = 0.0
    left: float | None = None
    running: tuple[tuple[str, float], ...] = ()
    stopped: str = ""


def write_page(
    out: Path, settings: Mapping[str, Any], steps: Sequence[Step], status: Status | None = None
) -> list[str]:
    """Write index.html of what is there; with all steps done, and no status, summary.json as well.

    Returns the sentences that a finished page opens with.
    """
    result = collect(out, settings, steps)
    if status is None:
        said = sentences(result)
        write_atomically(out / SUMMARY, (json.dumps(_finite(result) | {"says": said}, indent=1) + "\n").encode())
    write_atomically(out / PAGE, render(result, pictures(out), status).encode())
    return said if status is None else []


def pictures(out: Path) -> dict[str, Any]:
    """What there is to show: "sheets" attribute -> PNG, "panels" method -> PNG, "clouds", "sequence"."""
    datasets = {attribute: out / "data" / f"{attribute}_00" for attribute in ATTRIBUTES}
    sheets = {name: sheet(folder) for name, folder in datasets.items() if (folder / SHEET).is_file()}
    folders = {method: out / "measured" / f"people-{method}" for method in METHODS}
    folders = {method: folder / "pictures" for method, folder in folders.items() if (folder / "table.md").is_file()}
    # Of the first room that is shown for all of them: names are quoted as evaluate.py quotes them.
    found = [{path.stem for path in folder.glob("*.png")} for folder in folders.values()]
    names = sorted(set.intersection(*found)) if found else []
    if not names:
        return {"sheets": sheets, "panels": {}, "clouds": [], "sequence": ""}
    return {
        "sheets": sheets,
        "panels": {method: (folder / f"{names[0]}.png").read_bytes() for method, folder in folders.items()},
        "clouds": clouds(folders, names[0]),
        "sequence": names[0],
    }


@lru_cache(16)
def sheet(folder: Path, scenes: int = 3, views: int = 4) -> bytes:
    """A PNG of a dataset's first scenes as rows and some of their views as columns, with nothing between or around."""
    from PIL import Image

    rows = []
    for scene in sorted(folder.glob("scene_*"))[:scenes]:
        paths = sorted(path for path in (scene / "images").iterdir() if not path.name.startswith("."))
        chosen = [paths[index * len(paths) // views] for index in range(views)]
        rows.append(np.concatenate([np.asarray(Image.open(path).convert("RGB")) for path in chosen], axis=1))
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(stream, "PNG")
    return stream.getvalue()


def render(result: Mapping[str, Any], shown: Mapping[str, Any], status: Status | None = None) -> str:
    """The page as text, from `results.collect` and `pictures`; with a status it is an unfinished one."""
    parts = [
        "" if status is None else _progress(result, status),
        _result(result, status),
        _clouds(shown, status),
        _panels(shown, status),
        _scenes(result, shown, status),
        _basis(result, status),
        _commands(result),
    ]
    settings, style = result["settings"], (HERE / "page.css").read_text(encoding="utf-8")
    data = json.dumps([{k: v for k, v in cloud.items() if k != "label"} for cloud in shown["clouds"]])
    script = (HERE / "clouds.js").read_text(encoding="utf-8") if shown["clouds"] else ""
    toy = " This is the toy scale, in which nothing can be learned." if settings["scale"] == "toy" else ""
    model, clock = escape(_model(settings)), time.strftime("%H:%M:%S")
    foot = f"all numbers are in {SUMMARY} next to this page" if status is None else f"written at {clock}"
    foot = f"Made by examples/vggt/demo.py; {foot}."
    reload = "" if status is None else f'<meta http-equiv="refresh" content="{RELOAD}">\n'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
{reload}<title>{"" if status is None else f"{_percent(status.share)}: "}peft_attrsub: the demo</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>Attribute subspaces, from synthetic scenes to tuned cores</h1>
<p class="lead">{model} is tuned on synthetic people in rooms in two ways: by a LoRA, and by cores in a basis. The
basis is mined from adapters, each of which was trained on scenes in which one attribute varies.{toy}</p>
</header>
<main>
{"".join(parts)}</main>
<footer>{foot}</footer>
<script id="clouds" type="application/json">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def _model(settings: Mapping[str, Any]) -> str:
    name, count = Path(str(settings["model"])).name, (settings.get("speed") or {}).get("parameters")
    return f"{name} ({parameters_text(count)} parameters)" if count else name


def _progress(result: Mapping[str, Any], status: Status) -> str:
    """What an unfinished page begins with."""
    share = _percent(status.share)
    if status.stopped:
        head, text = f"Stopped at {share}", f"{status.stopped} The same command continues."
    else:
        left = "measuring this machine" if status.left is None else f"about {spoken(status.left)} left"
        head = f"At work: {share}, {left}"
        text = ", ".join(f"{title}{f' {_percent(part)}' if part else ''}" for title, part in status.running)
        text = f"Now: {text}." if text else ""
    return (
        f'<section id="progress"><h2>{head}</h2><div class="bar"><div style="width:{100 * status.share:.1f}%"></div>'
        f'</div><p>{escape(text)}</p><p class="note">This page is unfinished: it was written at '
        f"{time.strftime('%H:%M:%S')} and reloads itself every {RELOAD} seconds.</p></section>"
    )


def _percent(share: float) -> str:
    return f"{math.floor(100 * share)} %"


def _later(name: str, title: str, text: str, status: Status | None) -> str:
    """A section that has nothing to show: what it waits for, or nothing at all on a finished page."""
    if status is None:
        return ""
    return f'<section id="{name}" class="later"><h2>{title}</h2><p>{escape(text)}</p></section>'


def _result(result: Mapping[str, Any], status: Status | None) -> str:
    measured = any(values["people"]["sequences"] for values in result["methods"].values())
    if status is not None and not measured:
        return _later("result", "Results", "Each model is measured on held-out people and on generic scenes.", status)
    if status is None:
        says = "".join(f"<li>{escape(text)}</li>" for text in sentences(result))
        says = f'<ul class="says">{says}</ul>'
    else:
        says = "<p>So far; a dash is still to be measured.</p>"
    numbers = table(result, marked=status is None)
    return (
        f'<section id="result"><h2>Results</h2>{says}'
        f'<div class="wide" tabindex="0" role="region" aria-label="results">{numbers}</div>'
        '<p class="note">Acc: mean distance from a predicted point to the true surface; Comp: from the true surface '
        "to the prediction; NC: agreement of normals; after a similarity and ICP. People: in thousandths of their "
        "height; scenes: in centimeters. Forgetting: growth of (Acc + Comp) / 2 on generic scenes from the model as "
        "it is. Seconds: of training on one core, next to other commands. The heads stay frozen; data and steps are "
        "the same for both.</p>"
        "</section>"
    )


def table(result: Mapping[str, Any], *, marked: bool = True) -> str:
    """The result table, a row per method; what prints best in a column is marked."""
    columns = [("people", column) for column in point_columns(1e-3)] + [("scenes", c) for c in point_columns(1e-2)]
    methods = result["methods"]
    best = {(place, c.key): _best(methods, place, c) if marked else "" for place, c in columns}
    rows = []
    for method in METHODS:
        values = methods[method]
        count = values["trainable"]
        cells = [f"<td>{'–' if count is None else parameters_text(count)}</td>"]
        for place, column in columns:
            text = _text(column, values[place][column.key])
            mark = ' class="best"' if text != "–" and text == best[place, column.key] else ""
            cells.append(f"<td{mark}>{text}</td>")
        cells.append(f"<td>{_grown(result, method)}</td>")
        seconds = values["seconds"]
        cells.append(f"<td>{seconds:.0f}</td>" if method != "base" and seconds is not None else "<td>–</td>")
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


def _clouds(shown: Mapping[str, Any], status: Status | None) -> str:
    title = "Points: predictions and truth"
    if not shown["clouds"]:
        return _later("points", title, "Shown once the untuned model has been measured on held-out people.", status)
    names = {"truth": "truth"} | NAMES
    figures = "".join(
        f"<figure><figcaption><b>{escape(names[cloud['label']])}</b></figcaption>"
        f'<canvas data-cloud="{number}" tabindex="0" role="img" '
        f'aria-label="point cloud: {escape(names[cloud["label"]])}"></canvas></figure>'
        for number, cloud in enumerate(shown["clouds"])
    )
    return (
        f'<section id="points"><h2>{title}</h2><p>Room {escape(shown["sequence"])}, which no '
        "training saw, from all views, in the colors of the pictures; predictions are aligned to the truth as they "
        "are for the table. Drag to turn, or use the arrow keys.</p>"
        '<p><button id="nearer" type="button">nearer</button> '
        f'<button id="farther" type="button">farther</button></p><div class="grid">{figures}</div></section>'
    )


def _panels(shown: Mapping[str, Any], status: Status | None) -> str:
    title = "Depth and its error"
    if not shown["panels"]:
        return _later("depth", title, "Shown once the untuned model has been measured on held-out people.", status)
    figures = "".join(
        f"<figure><figcaption><b>{escape(NAMES[method])}</b></figcaption>"
        f'<img alt="depth of {escape(NAMES[method])}: image, prediction, truth, error" src="{_uri(data)}">'
        "</figure>"
        for method, data in shown["panels"].items()
    )
    return (
        f'<section id="depth"><h2>{title}</h2><p>The same room: image, predicted depth, true depth, and '
        f'relative error. Each picture has its own scale of the error, given below it.</p><div class="three">'
        f"{figures}</div></section>"
    )


def _scenes(result: Mapping[str, Any], shown: Mapping[str, Any], status: Status | None) -> str:
    title = "Scenes in which one attribute varies"
    if status is not None and not shown["sheets"]:
        return _later("scenes", title, "The first ones are being rendered.", status)
    figures = "".join(
        f"<figure><figcaption><b>{attribute}</b>: {_VARIES[attribute]}</figcaption>"
        f'<img alt="three scenes of the attribute {attribute}" src="{_uri(data)}"></figure>'
        for attribute, data in shown["sheets"].items()
    )
    missing = [attribute for attribute in ATTRIBUTES if attribute not in shown["sheets"]]
    more = f" Still to be rendered: {', '.join(missing)}." if status is not None and missing else ""
    return (
        f'<section id="scenes"><h2>{title}</h2><p>Three scenes of one dataset of each '
        f'attribute, one per row.{more}</p><div class="pairs">{figures}</div></section>'
    )


def _basis(result: Mapping[str, Any], status: Status | None) -> str:
    title = "The mined basis"
    if status is not None and not result["basis"]:
        count = result["adapters"]
        planned = f" of {result['settings']['adapters']}" if "adapters" in result["settings"] else ""
        text = f"The basis is mined once the adapters are trained: {count}{planned} so far."
        return _later("basis", title, text, status)
    tiles = "".join(
        f'<div class="finding"><p class="topic">{escape(one["topic"])}</p>'
        f'<p class="headline">{escape(one["headline"])}</p>'
        f"<p>{escape(one['text'])}</p></div>"
        for one in result["basis"]
    )
    return (
        f'<section id="basis"><h2>{title}</h2><p>Mined from {result["adapters"]} adapters: '
        f"{escape(', '.join(result['attributes']))}. Everything about it, module by module: "
        f'<a href="{REPORT}">{REPORT}</a>.</p><div class="pairs">{tiles}</div></section>'
    )


def _commands(result: Mapping[str, Any]) -> str:
    items = "".join(
        f"<li>{escape(step['title'])}, {step['seconds']:.0f} s<code>{escape(step['command'])}</code></li>"
        for step in result["steps"]
    )
    count, total = len(result["steps"]), sum(step["seconds"] for step in result["steps"])
    run = "have run" if count != 1 else "has run"
    return (
        f'<section id="commands"><h2>How it was made</h2>{made(result)}<p>{count} command{"s" * (count != 1)} {run}, '
        f"{total:.0f} seconds of theirs together; several run side by side. A command that was stopped and continued "
        "counts from its last start.</p>"
        f'<details><summary>show them</summary><ol class="commands">{items}</ol></details></section>'
    )


def made(result: Mapping[str, Any]) -> str:
    """Scale, precision, machine and time as paragraphs, as far as they are known."""
    settings = result["settings"]
    said = []
    if settings.get("why"):
        said.append(settings["why"])
    if settings["scale"] == "small":
        said.append(
            "The small scale has fewer rooms and training steps than the laptop's, so its differences say less."
        )
    if precision := result["precision"]:
        why = f" ({precision['why']})" if precision["why"] else ""
        said.append(f"Trainings computed in {PRECISIONS.get(precision['name'], precision['name'])}{why}.")
    speed = settings.get("speed") or {}
    if speed:
        workers = settings.get("workers", 1)
        said.append(
            f"Machine: {speed['processor']} ({speed['instructions']}), torch {speed['torch']}, "
            f"{workers} command{'s' * (workers != 1)} at a time, one core each."
        )
    if calls := settings.get("calls"):
        runs = f", in {len(calls)} runs" if len(calls) > 1 else ""
        said.append(f"Time: {sum(calls):.0f} seconds{runs}.")
    return f"<p>{escape(' '.join(said))}</p>" if said else ""


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _finite(value: Any) -> Any:
    """`value` with null for what is not finite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
