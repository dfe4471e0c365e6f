"""The part of a model card that is measured: energy, patterns and overlap of the attributes, with two figures."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..basis import Basis, BasisError
from .analyse import analyse
from .figures import save_figures

_FIGURES = {
    "spectra": "Singular values of C per kind of module (columns) and attribute (rows), one line per layer; dashed: "
    "the dim",
    "overlap": "Median smallest eigenvalue over modules of every two attributes: 0 shares a direction, 1 orthogonal",
}


def card_section(basis: Basis, folder: Path) -> str:
    """Markdown tables of energy and overlap; spectra.png and overlap.png go into `folder`/figures."""
    analysis = analyse(basis)
    record = analysis.to_dict()
    lines = ["## Energy and overlap", "", *_energy(record)]
    if record["pairs"]:
        lines += ["", *_overlap(record)]
    try:
        names = [name for name in _FIGURES if name != "overlap" or record["pairs"]]
        written = save_figures(analysis, folder / "figures", names)
    except BasisError as error:
        warnings.warn(f"the model card goes without figures: {error}", stacklevel=2)
        written = []
    for path in written:
        lines += ["", f"![{_FIGURES[path.stem]}](figures/{path.name})", "", f"*{_FIGURES[path.stem]}.*"]
    return "\n".join([*lines, ""])


def _energy(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "Captured: mean share of ||dW_i||^2 of the source adapters inside the subspace. C: share of the energy of "
        "their weighted mean at this dim. Patterns: where the spectrum of C drops, by number of modules.",
        "",
        "| attribute | captured | C | patterns | muted adapters |",
        "|---|---|---|---|---|",
    ]
    for attribute in record["basis"]["attributes"]:
        rows = [one for one in record["spectra"] if one["attribute"] == attribute]
        patterns = Counter(one["pattern"] for one in rows if one["pattern"])
        muted = [one["adapter"] for one in record["adapters"] if one["attribute"] == attribute and one["muted"]]
        cells = [
            attribute,
            _percent(rows, "captured_energy"),
            _percent(rows, "energy_at_dim"),
            ", ".join(f"{name} {count}" for name, count in patterns.most_common()) or "-",
            str(len(muted)) if muted else "none" if patterns else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{100 * fmean(values):.1f} %" if values else "-"


def _overlap(record: Mapping[str, Any]) -> list[str]:
    lines = [
        "Overlap of two attributes in a module: the smallest generalised eigenvalue (paper, section 4), median over "
        "modules; 0 shares a direction, 1 is orthogonal. Random: subspaces of the same sizes (95 % band). Other "
        "layers: the same attributes from mismatched layers.",
        "",
        "| attributes | side | smallest eigenvalue | random | other layers |",
        "|---|---|---|---|---|",
    ]
    for one in record["pairs"]:
        permuted = "-" if one["permuted_median"] is None else f"{one['permuted_median']:.2f}"
        lines.append(
            f"| {one['attribute']} / {one['other']} | {one['side']} | {one['median']:.2f} | {one['null_median']:.2f} "
            f"({one['null_low']:.2f} to {one['null_high']:.2f}) | {permuted} |"
        )
    return lines
