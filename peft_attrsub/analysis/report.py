"""The report: one self-contained HTML file in which every module of a basis can be looked at.

Nothing in the file reaches for the network, and names out of strangers' files (attributes, adapters, modules) only
ever become text: the page shows them with `textContent`, plotly's labels get them escaped, and a
Content-Security-Policy refuses what would be fetched.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..basis import BasisError
from ..basis.files import check_file, write_file
from ..basis.naming import counted
from .findings import Finding, findings
from .outliers import MUTED_MODULES, MUTED_WEIGHT

# In the order they are joined: each file uses what stands before it.
SCRIPTS = (
    "data",
    "theme",
    "filters",
    "heatmap",
    "maps",
    "module",
    "depth",
    "overlap",
    "adapters",
    "explained",
    "main",
)


def write_report(analysis: Any, path: str | os.PathLike[str], title: str | None = None) -> Path:
    """Write the HTML report of an analysis: spectra, overlap (paper section 4), adapters, explained adapters.

    Args:
        analysis: an `Analysis`, or what its `to_dict` gives.
        path: the file to write; its folder exists, and a file of that name is replaced in one step.
        title: heading of the page; by default it names the basis.

    Returns:
        The path written. The file holds everything it needs (plotly.js included, about 5 MB) and opens offline.

    Raises:
        BasisError: plotly is missing, `path` is a folder or stands in none, or `analysis` is neither.
    """
    data = analysis.to_dict() if hasattr(analysis, "to_dict") else analysis
    if not isinstance(data, Mapping) or "spectra" not in data:
        raise BasisError(f"a report is made of an Analysis or its to_dict(), not of {type(analysis).__name__}.")
    check_file(path)
    return write_file(path, render(dict(data), title))


def render(data: dict[str, Any], title: str | None = None) -> str:
    """The page as text, from `Analysis.to_dict()`."""
    basis = data["basis"]
    name = basis["source"] or basis["name"]
    heading = title or ("Basis" if name == "basis" else f"Basis {name}")
    scripts = "\n".join(_asset(f"js/{name}.js") for name in SCRIPTS)
    parts = {
        "title": escape(heading),
        "lead": _lead(data),
        "facts": _facts(basis),
        "findings": "\n".join(map(_tile, findings(data))),
        "style": _asset("report.css"),
        "data": _json(data | {"limits": {"muted_weight": MUTED_WEIGHT, "muted_modules": MUTED_MODULES}}),
        "plotly": _plotly(),
        # One scope of its own: plotly's names and ours cannot meet.
        "script": f'(() => {{\n"use strict";\n{scripts}\n}})();',
    }
    # One pass: what a part holds is never searched for another part's name.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("report.html"))


def _lead(data: dict[str, Any]) -> str:
    basis = data["basis"]
    sizes = f"{counted(len(data['modules']), 'module')} × {counted(len(basis['attributes']), 'attribute')}"
    mined = f", mined from {counted(len(data['adapters']), 'adapter')}" if data["adapters"] else ""
    model = f" of <b>{escape(basis['base_model'])}</b>" if basis["base_model"] else "; base model unknown"
    return f"{sizes}{mined}{model}"


def _facts(basis: dict[str, Any]) -> str:
    rows = {
        "Source": basis["source"],
        "Attributes": ", ".join(basis["attributes"]),
        "Stored as": basis["dtype"],
        "Digest": basis["digest"],
        "Made by": basis["command"],
    }
    return "\n".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items() if value)


def _tile(finding: Finding) -> str:
    bars = "".join(
        f'<li><span class="bar-label">{escape(bar.label)}</span><span class="bar-value">{escape(bar.value)}</span>'
        '<span class="bar">'
        + "".join(
            f'<i class="part-{kind}" style="width:{100 * share:.2f}%" title="{escape(text)}"></i>'
            for kind, share, text in bar.parts
        )
        + "</span></li>"
        for bar in finding.bars
    )
    keys = "".join(f'<span><i class="square part-{kind}"></i>{escape(text)}</span>' for kind, text in finding.keys)
    return (
        f'<article class="tile"><h3>{escape(finding.topic)}</h3><p class="headline">{escape(finding.headline)}</p>'
        + (f'<ul class="bars">{bars}</ul>' if bars else "")
        + (f'<div class="keys">{keys}</div>' if keys else "")
        + _scale(finding.scale)
        + f"<p>{escape(finding.text)}</p></article>"
    )


def _scale(scale: dict[str, float]) -> str:
    """The line from 0 (shared) to 1 (orthogonal): null band, mismatched layers, and the value itself."""
    if not scale:
        return ""
    low, high = (100 * min(1.0, max(0.0, scale[key])) for key in ("low", "high"))
    marks = f'<i class="band" style="left:{low:.1f}%;width:{max(1.0, high - low):.1f}%"></i>'
    for key in ("permuted", "value"):
        if key in scale:
            marks += f'<i class="{key}" style="left:{100 * scale[key]:.1f}%"></i>'
    keys = '<span><i class="value"></i>this pair</span><span><i class="band"></i>random, 95 %</span>'
    if "permuted" in scale:
        keys += '<span><i class="permuted"></i>mismatched layers</span>'
    return (
        f'<div class="scale" aria-hidden="true"><div class="track">{marks}</div>'
        f'<div class="ends"><span>0 shared</span><span>1 orthogonal</span></div><div class="keys">{keys}</div></div>'
    )


def _json(data: dict[str, Any]) -> str:
    """JSON that may stand inside a script element: no character in it can end the element or open a comment."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON lacks, as null: the page shows them as missing."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise BasisError(
            'a report needs plotly, which is not installed: pip install "peft-attrsub[report]".'
        ) from error
    # The script ends at its own tag, whatever a version of plotly holds in its strings.
    return re.sub("</(?=script)", r"<\\/", get_plotlyjs(), flags=re.IGNORECASE)


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")
