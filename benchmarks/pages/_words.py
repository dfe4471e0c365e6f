"""Markdown from numbers: tables, wrapped sentences, targets, and one spelling of a number for all pages."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDTH = 119


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, all of them written: 0.0348, 5.00, 1,117, 3e-8; counts as they are."""
    if value is None:
        return "-"
    size = abs(value)
    if isinstance(value, int) or size == 0:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 10**digits / 10:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".removesuffix(".")


def spread(summary: Mapping[str, float]) -> str:
    """A summary of rounds: its median, and the least and the most where there were several."""
    if summary["rounds"] == 1:
        return number(summary["median"])
    return f"{number(summary['median'])} ({number(summary['min'])} to {number(summary['max'])})"


def percent(share: float) -> str:
    """0.0022 is 0.22 %."""
    return f"{number(100 * share)} %"


def rounds(count: int) -> str:
    """How many runs a number is the median of."""
    return "one run" if count == 1 else f"medians of {count} runs"


def plural(count: int, noun: str) -> str:
    """1 frame, 4 frames."""
    return f"{number(count)} {noun}" + ("" if count == 1 else "s")


def join(words: Iterable[str]) -> str:
    """a, b and c."""
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats are spelt by `number`, None is a dash."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[number(c) if c is None or isinstance(c, float) else str(c) for c in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prose(*sentences: str) -> str:
    """Sentences as one paragraph, wrapped; empty ones are left out."""
    return textwrap.fill(" ".join(filter(None, sentences)), WIDTH, break_long_words=False, break_on_hyphens=False)


def bullets(*sentences: str) -> str:
    """A list, every point wrapped; empty ones are left out."""
    return "\n".join(
        textwrap.fill(
            s, WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for s in sentences
        if s
    )


def targets(result: Mapping[str, Any]) -> str:
    """What was asked, what came out, and whether that is reached."""
    rows = [(t["target"], t["measured"], "reached" if t["reached"] else "**not reached**") for t in result["targets"]]
    return table(("target", "measured", ""), rows)


def page(*parts: str) -> str:
    """Paragraphs and tables with an empty line between them; empty ones are left out."""
    return "\n\n".join(filter(None, parts))
