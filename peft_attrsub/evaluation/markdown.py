"""Several runs side by side in one Markdown table, in the paper's units, the best of a column in bold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Settings that are said under a table, in this order, where a run has them.
STATED = (
    "benchmark",
    "align",
    "icp_threshold",
    "depth_align",
    "depth_solver",
    "depth_scope",
    "exact",
    "max_queries",
    "dtype",
)


@dataclass(frozen=True)
class Column:
    """A metric in a table. key: in the rows; unit: what it is divided by before it is printed, which title says.

    best: "low" or "high", or None where no value is better than another. digits: after the decimal point.
    """

    key: str
    title: str
    unit: float = 1.0
    best: str | None = "low"
    digits: int = 3

    def text(self, value: float) -> str:
        return f"{value / self.unit:.{self.digits}f}"

    @property
    def head(self) -> str:
        """The title, and which way is better."""
        return self.title + {"low": " ↓", "high": " ↑"}.get(self.best or "", "")


def point_columns(unit: float, prefix: str = "") -> tuple[Column, ...]:
    """Acc, Comp in `unit` (1e-3 for faces and humans, 1e-2 for ClearPose) and NC in percent.

    prefix: of keys for a part of the pixels, "transparent_" for example, which the titles say too.
    """
    part = f" {prefix.rstrip('_').replace('_', ' ')}" if prefix else ""
    size = "" if unit == 1 else f" (×{unit:.0e})".replace("e-0", "e-")
    return (
        Column(f"{prefix}acc", f"Acc{part}{size}", unit),
        Column(f"{prefix}comp", f"Comp{part}{size}", unit),
        Column(f"{prefix}nc", f"NC{part} (%)", 0.01, "high", 2),
    )


def depth_columns(prefix: str = "") -> tuple[Column, ...]:
    """AbsRel and delta 1.25, in percent. prefix: of keys for another alignment, "scale_" for example."""
    other = f" {prefix.rstrip('_')}" if prefix else ""
    return (
        Column(f"{prefix}abs_rel", f"AbsRel{other} (%)", 0.01),
        Column(f"{prefix}delta", f"δ1.25{other} (%)", 0.01, "high", 2),
    )


def relief_columns() -> tuple[Column, ...]:
    """The relief of prints, in percent of their width: 0 for a flat one, and no value is best for a real face."""
    return (Column("relief_ratio", "Relief / width (%)", 0.01, None, 2),)


def markdown_table(summaries: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """One line per run, and under the table how each was aligned, and how many sequences it rests on.

    summaries: of `tables.summarise`, with "label" and "trainable_parameters" beside. Values that print alike are
    equally good: all of them are bold. Where runs rest on other settings or other numbers of sequences, a last line
    says that they cannot be compared.
    """
    if not summaries:
        raise ValueError("there is no run to make a table of.")
    bold = [_best(column, summaries) for column in columns]
    lines = ["| Method | Trainable | " + " | ".join(_safe(column.head) for column in columns) + " |"]
    lines.append("|---|--:|" + "--:|" * len(columns))
    for summary in summaries:
        cells = []
        for column, best in zip(columns, bold, strict=True):
            value = summary["metrics"].get(column.key)
            text = "–" if value is None else column.text(value)
            cells.append(f"**{text}**" if value is not None and text == best else text)
        lines.append(f"| {_label(summary)} | {parameters_text(summary.get('trainable_parameters'))} | {_row(cells)}")
    lines.append("")
    lines += _notes(summaries)
    return "\n".join(lines) + "\n"


def parameters_text(count: int | None) -> str:
    """A number of parameters for people: 0, 950, 73.7 K, 16.3 M, 1.16 B; a dash where it is unknown."""
    if count is None:
        return "–"
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        # A number that rounds up to the next unit is printed in it.
        if count >= size * 0.9995:
            digits = 2 if letter == "B" else 1
            return f"{count / size:.{digits}f} {letter}"
    return str(count)


def _best(column: Column, summaries: Sequence[Mapping[str, Any]]) -> str | None:
    """What the best value of a column prints as, or None where there is nothing to compare."""
    values = [run["metrics"][column.key] for run in summaries if column.key in run["metrics"]]
    if column.best is None or len(values) < 2:
        return None
    return column.text(min(values) if column.best == "low" else max(values))


def _notes(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each run rests on; said once where it is the same for all."""
    texts = [_basis_of(summary) for summary in summaries]
    inverted = [f"- {_label(summary)}: {text}" for summary in summaries if (text := _inverted(summary))]
    if len(set(texts)) == 1:
        return [f"All runs: {texts[0]}", *([""] if inverted else []), *inverted]
    notes = [f"- {_label(summary)}: {text}" for summary, text in zip(summaries, texts, strict=True)]
    caution = "**These runs do not rest on the same settings and sequences: compare them with care.**"
    return [*notes, *inverted, "", caution]


def _basis_of(summary: Mapping[str, Any]) -> str:
    settings = summary.get("settings", {})
    stated = [f"{key} = {settings[key]}" for key in STATED if settings.get(key) is not None]
    sequences = f"{summary['n_evaluated']} of {summary['n_sequences']} sequences evaluated"
    if summary["n_skipped"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["skipped_reasons"].items())
        sequences += f", {summary['n_skipped']} skipped ({reasons})"
    if summary.get("n_missing"):
        sequences += f", {summary['n_missing']} missing"
    weights = summary.get("weights") or {}
    mean = ", ".join(["mean over sequences", *(f"of {key} weighted by {by}" for key, by in weights.items())])
    return _safe("; ".join([*stated, mean, sequences]) + ".")


def _inverted(summary: Mapping[str, Any]) -> str:
    """A warning where fits of depth have a negative scale, else nothing."""
    share = summary["metrics"].get("depth_inverted", 0.0)
    if not share:
        return ""
    return (
        f"**the fitted scale of depth is negative in {100 * share:.1f} % of the frames**: depth is inverted there, "
        "near and far exchanged, and AbsRel and δ1.25 are those of the inverted depth."
    )


def _label(summary: Mapping[str, Any]) -> str:
    return _safe(str(summary.get("label", "unnamed")))


def _row(cells: Sequence[str]) -> str:
    return " | ".join(cells) + " |"


def _safe(text: str) -> str:
    """Text that breaks no cell."""
    return text.replace("|", "\\|").replace("\n", " ")


__all__ = ["Column", "depth_columns", "markdown_table", "parameters_text", "point_columns", "relief_columns"]
