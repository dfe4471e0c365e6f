"""The page of `loading.py`."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, prose, rounds, spread, table, targets

TITLE = "Loading a basis"
QUESTION = "How long does it take to put a basis into vggt-1b, how much memory, and how many bytes are read?"


def markdown(result: dict[str, Any]) -> str:
    cases = result["cases"]
    first = next(iter(cases.values()))
    count = rounds(first["seconds"]["rounds"])
    opening = prose(
        "A basis of 4 attributes x 64 directions on the aggregator's linears, from a folder in the page cache;",
        f"every round is a process of its own. Seconds are {count} (least and most). What is held is A and B once,",
        "in the dtype of the base, and the cores; the peak is anonymous memory.",
    )
    columns = ("", "modules", "seconds", "held, MiB", "peak, MiB", "peak / held", "read, MB")
    rows = [
        (
            name,
            case["modules"],
            spread(case["seconds"]),
            number(case["held_mib"]),
            number(case["peak_anon_mib"]),
            case["peak_ratio"],
            number(case["bytes_read"] / 1e6),
        )
        for name, case in cases.items()
    ]
    return page(opening, table(columns, rows), targets(result))
