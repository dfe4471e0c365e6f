"""Static figures of an analysis, for papers and model cards (matplotlib, the [report] extra).

| file         | what                                                                                  |
|--------------|---------------------------------------------------------------------------------------|
| spectra.png  | singular values of C, one line per layer, faint: those of the plain mean, as the paper  |
|              | shows them; kinds as columns, attributes as rows                                        |
| largest.png  | largest singular value by depth, one line per attribute; a panel per kind               |
| patterns.png | pattern of every module, layer x kind; a panel per attribute                            |
| overlap.png  | median smallest eigenvalue of every two attributes beside the random null, both sides   |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basis import BasisError
from .analyse import Analysis
from .spectra import PATTERNS

_WIDTH, _HEIGHT = 1.9, 1.7  # inches per panel
_MOST_KINDS = 12
# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_PATTERN_COLOURS = dict(zip(PATTERNS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#DDDDDD"), strict=True))

Record = Mapping[str, Any]


def save_figures(analysis: Analysis, folder: str | os.PathLike[str], names: Sequence[str] | None = None) -> list[Path]:
    """Write the figures `names` (default: all that the analysis has data for) as PNG; return their paths.

    Raises BasisError when matplotlib is missing or a name is unknown.
    """
    record = analysis.to_dict()
    chosen = names if names is not None else [n for n in _FIGURES if n != "overlap" or record["pairs"]]
    unknown = [name for name in chosen if name not in _FIGURES]
    if unknown:
        raise BasisError(f"there is no figure {unknown[0]!r}: choose from {', '.join(_FIGURES)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BasisError('figures need matplotlib: pip install "peft-attrsub[report]".') from error
    target = Path(folder)
    if target.is_file():
        raise BasisError(f"{str(target)!r} is a file: give the name of a folder for the figures.")
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name in chosen:
        figure = Figure(layout="constrained")
        _FIGURES[name](figure, record)
        beside = target / f".{name}.partial.png"
        # Without the version of matplotlib in the file, an unchanged basis gives unchanged bytes.
        figure.savefig(beside, dpi=150, metadata={"Software": None})
        os.replace(beside, target / f"{name}.png")
        written.append(target / f"{name}.png")
    return written


def _kinds(record: Record) -> list[str]:
    """Kinds of modules, most frequent first to be shown, in the order of the model."""
    counts: dict[str, int] = {}
    for module in record["modules"]:
        counts[module["kind"]] = counts.get(module["kind"], 0) + 1
    shown = sorted(counts, key=lambda kind: -counts[kind])[:_MOST_KINDS]
    return [kind for kind in counts if kind in shown]


def _rows(record: Record, kind: str, attribute: str) -> list[tuple[int, Record]]:
    """(depth, spectrum record) of one kind and attribute, by depth."""
    places = {module["name"]: module for module in record["modules"]}
    rows = [
        one for one in record["spectra"] if one["attribute"] == attribute and places[one["module"]]["kind"] == kind
    ]
    return sorted(((places[one["module"]]["depth"] or 0, one) for one in rows), key=lambda pair: pair[0])


def _spectra(figure: Any, record: Record) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    kinds, attributes = _kinds(record), record["basis"]["attributes"]
    figure.set_size_inches(max(4.0, _WIDTH * len(kinds) + 1), _HEIGHT * len(attributes) + 0.6)
    axes = figure.subplots(len(attributes), len(kinds), sharex=True, sharey=True, squeeze=False)
    depths = [module["depth"] or 0 for module in record["modules"]]
    scale = Normalize(min(depths), max(max(depths), min(depths) + 1))
    # Below this is rounding.
    bottom = 1e-7 * max((one["largest"] or 0 for one in record["spectra"]), default=0) or None
    for row, attribute in zip(axes, attributes, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            for depth, one in _rows(record, kind, attribute):
                color = colormaps["viridis"](scale(depth))
                for part, look in (("first_singular_values", {"alpha": 0.25}), ("singular_values", {})):
                    values = [value for value in one[part] if value > 0]
                    axis.plot(range(1, len(values) + 1), values, lw=0.7, color=color, **look)
                axis.axvline(one["dim"], color="0.6", lw=0.5, ls="--")
            axis.set_yscale("log")
            axis.tick_params(labelsize=6)
            axis.set_ylim(bottom=bottom)
        row[0].set_ylabel(attribute, fontsize=8)
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.set_title(kind, fontsize=8)
    figure.supxlabel("index of the singular value", fontsize=8)
    figure.supylabel("singular value of C", fontsize=8)
    bar = figure.colorbar(_mappable(scale, "viridis"), ax=axes, shrink=0.8, pad=0.01)
    bar.set_label("depth", fontsize=8)
    bar.ax.tick_params(labelsize=6)


def _mappable(scale: Any, name: str) -> Any:
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(scale, name)


def _largest(figure: Any, record: Record) -> None:
    kinds, attributes = _kinds(record), record["basis"]["attributes"]
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure.set_size_inches(max(4.0, 2.2 * columns + 1), 1.9 * rows + 0.8)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, kind in zip(axes, kinds, strict=False):
        for i, attribute in enumerate(attributes):
            points = [(depth, one["largest"]) for depth, one in _rows(record, kind, attribute) if one["largest"]]
            if points:
                colour = _COLOURS[i % len(_COLOURS)]
                axis.plot(*zip(*points, strict=True), marker=".", ms=4, lw=1, color=colour, label=attribute)
        axis.set_title(kind, fontsize=8)
        axis.set_yscale("log")
        axis.tick_params(labelsize=6)
    for axis in axes[len(kinds) :]:
        axis.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.supxlabel("depth", fontsize=8)
    figure.supylabel("largest singular value of C", fontsize=8)


def _patterns(figure: Any, record: Record) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    kinds, attributes = _kinds(record), record["basis"]["attributes"]
    depths = sorted({module["depth"] or 0 for module in record["modules"]})
    figure.set_size_inches(max(4.0, 0.28 * len(kinds) * len(attributes) + 2), 0.16 * len(depths) + 1.8)
    axes = figure.subplots(1, len(attributes), sharey=True, squeeze=False)[0]
    for axis, attribute in zip(axes, attributes, strict=True):
        cells = [[float("nan")] * len(kinds) for _ in depths]
        for column, kind in enumerate(kinds):
            for depth, one in _rows(record, kind, attribute):
                if one["pattern"]:
                    cells[depths.index(depth)][column] = PATTERNS.index(one["pattern"])
        colours = ListedColormap(list(_PATTERN_COLOURS.values()))
        axis.imshow(cells, cmap=colours, vmin=-0.5, vmax=len(PATTERNS) - 0.5, aspect="auto", origin="lower")
        axis.set_xticks(range(len(kinds)), kinds, rotation=90, fontsize=6)
        step = max(1, len(depths) // 12)
        axis.set_yticks(range(0, len(depths), step), depths[::step], fontsize=6)
        axis.set_title(attribute, fontsize=8)
    axes[0].set_ylabel("depth", fontsize=8)
    handles = [Patch(color=colour, label=name) for name, colour in _PATTERN_COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=7, frameon=False)


def _overlap(figure: Any, record: Record) -> None:
    attributes = record["basis"]["attributes"]
    size = 0.95 * len(attributes) + 1.2
    figure.set_size_inches(2 * size + 1, size)
    axes = figure.subplots(1, 2, squeeze=False)[0]
    for axis, side in zip(axes, ("output", "input"), strict=True):
        cells = [[float("nan")] * len(attributes) for _ in attributes]
        for one in record["pairs"]:
            if one["side"] != side:
                continue
            i, j = attributes.index(one["attribute"]), attributes.index(one["other"])
            cells[i][j] = cells[j][i] = one["median"]
            for x, y in ((i, j), (j, i)):
                colour = "white" if one["median"] < 0.55 else "black"
                null = f"random {one['null_median']:.2f}"
                axis.text(x, y - 0.1, f"{one['median']:.2f}", ha="center", va="center", fontsize=9, color=colour)
                axis.text(x, y + 0.2, null, ha="center", va="center", fontsize=6, color=colour)
        image = axis.imshow(cells, cmap="cividis", vmin=0, vmax=1)
        axis.set_xticks(range(len(attributes)), attributes, fontsize=8, rotation=30, ha="right")
        axis.set_yticks(range(len(attributes)), attributes, fontsize=8)
        axis.set_title(f"{side} side", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("median smallest eigenvalue", fontsize=8)
    bar.ax.tick_params(labelsize=7)


_FIGURES: dict[str, Callable[[Any, Record], None]] = {
    "spectra": _spectra,
    "largest": _largest,
    "patterns": _patterns,
    "overlap": _overlap,
}
