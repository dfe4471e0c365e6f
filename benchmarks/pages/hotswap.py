"""The page of `hotswap.py`."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, prose, rounds, spread, table

TITLE = "Hot swap"
QUESTION = "What does it take to put other values into a loaded adapter, against PEFT's hot swap and loading anew?"


def markdown(result: dict[str, Any]) -> str:
    rows = result["contenders"]
    count = next(iter(rows.values()))["seconds"]["rounds"]
    opening = prose(
        f"{result['settings']['modules']} linears of VGGT's shapes, adapters of rank 16 and cores of 64 and 256; from",
        f"the saved adapter to the values in place. Milliseconds are {rounds(count)} (least and most); the ratio is",
        "paired within rounds. Neither hot swap compiles a compiled model again; load_adapter does.",
    )
    columns = ("", "ms", "/ PEFT's hot swap", "peak memory, MiB", "with mapped files", "file, MB")
    body = [
        (
            name,
            spread({k: v if k == "rounds" else 1000 * v for k, v in row["seconds"].items()}),
            row["ratio"],
            number(row["peak_anon_mib"]),
            number(row["peak_rss_mib"]),
            number(row["file_mb"]),
        )
        for name, row in rows.items()
    ]
    return page(opening, table(columns, body))
