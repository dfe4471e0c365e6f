"""Figures of the study: accuracy against parameters, and the mined basis beside its nulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .statistics import row_spread

Row = Mapping[str, Any]
# Okabe and Ito's colours, told apart by colour-blind readers.
COLOURS = {
    "none": "#000000",
    "full": "#999999",
    "lora": "#0072B2",
    "pissa": "#56B4E9",
    "adalora": "#009E73",
    "psv": "#E69F00",
    "random": "#CC79A7",
    "attrsub": "#D55E00",
    "oracle": "#000000",
}
#: How the legend calls what is called otherwise elsewhere.
WORDS = {"lora": "LoRA", "pissa": "PiSSA", "adalora": "AdaLoRA", "psv": "PSV", "attrsub": "mined"}
PARTS = (("test", "in domain"), ("cross", "across"), ("generic", "where it came from"))


def accuracy(result: Row) -> Any:
    """A row per benchmark, a column per set: Acc (AbsRel where there are no poses, and on generic scenes)."""
    from matplotlib.figure import Figure

    benchmarks = result["settings"]["benchmarks"]
    figure = Figure(figsize=(10.5, 2.6 * len(benchmarks) + 0.6), layout="constrained")
    axes = figure.subplots(len(benchmarks), len(PARTS), squeeze=False)
    for line, benchmark in zip(axes, benchmarks, strict=True):
        for axis, (part, words) in zip(line, PARTS, strict=True):
            depth = part == "generic" or (part == "cross" and result["units"][benchmark]["cross"] == "depth")
            _curves(axis, result, benchmark, part, "abs_rel" if depth else "acc")
            axis.set_title(f"{benchmark}, {words}", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=9, fontsize=8, frameon=False)
    figure.supxlabel("trained parameters", fontsize=8)
    return figure


def _curves(axis: Any, result: Row, benchmark: str, part: str, name: str) -> None:
    factor = 1 / result["units"][benchmark]["scale"] if name == "acc" else 100
    for method, colour in COLOURS.items():
        points = []
        for row in result["rows"]:
            if row["benchmark"] == benchmark and _kind(row) == method:
                found = row_spread(row, part, name)
                if found["mean"] is not None:
                    points.append((row["trainable"], found["mean"] * factor, (found["sd"] or 0.0) * factor))
        if method == "none":
            for _, mean, _ in points:
                axis.axhline(mean, color=colour, lw=0.8, ls=":", label=method)
        elif points:
            x, y, error = zip(*sorted(points), strict=True)
            axis.errorbar(
                x, y, error, color=colour, marker="o", ms=3, lw=1, capsize=2, label=WORDS.get(method, method)
            )
    axis.set_xscale("log")
    axis.tick_params(labelsize=6)
    axis.set_ylabel({"acc": "Acc", "abs_rel": "AbsRel, %"}[name], fontsize=7)


def _kind(row: Row) -> str | None:
    """Which curve a row belongs to; None for an ablation."""
    if row["group"] == "oracle":
        return str(row["label"]).partition("-")[0]
    return str(row["method"]) if row["group"] == "main" else None


def basis(result: Row) -> Any:
    """Mean spectra of C by attribute; smallest eigenvalues of pairs beside random ones, of the default and of the
    shared basis."""
    from matplotlib.figure import Figure

    bases = {name: result["bases"][name] for name in ("default", "shared") if result["bases"].get(name)}
    figure = Figure(figsize=(4.2 + 3.6 * len(bases), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(bases), squeeze=False)[0]
    for name, values in bases["default"]["spectra"].items():
        axes[0].plot(range(1, len(values) + 1), values, lw=1, label=name)
    axes[0].set_yscale("log")
    axes[0].set_ylim(bottom=1e-4)
    axes[0].set_xlabel("singular value of C", fontsize=8)
    axes[0].set_ylabel("relative to the largest, mean over modules", fontsize=7)
    axes[0].legend(fontsize=7, frameon=False)
    for axis, (name, found) in zip(axes[1:], bases.items(), strict=True):
        _overlaps(axis, found["pairs"])
        axis.set_title(f"{name} basis", fontsize=8)
    for axis in axes:
        axis.tick_params(labelsize=6)
    return figure


def _overlaps(axis: Any, pairs: Any) -> None:
    names = list(dict.fromkeys(f"{row['attribute']} - {row['other']}" for row in pairs))
    for side, shift, colour in (("output", -0.15, "#0072B2"), ("input", 0.15, "#E69F00")):
        own = {f"{row['attribute']} - {row['other']}": row for row in pairs if row["side"] == side}
        places = [place + shift for place, name in enumerate(names) if name in own]
        rows = [own[name] for name in names if name in own]
        axis.plot([row["median"] for row in rows], places, "o", ms=4, color=colour, label=side)
        axis.plot([row["null_median"] for row in rows], places, "|", ms=8, color=colour, label=f"random, {side}")
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("smallest eigenvalue (0: a shared direction)", fontsize=7)
    axis.legend(fontsize=6, frameon=False)
