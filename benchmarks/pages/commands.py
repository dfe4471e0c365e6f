"""The page of `commands.py`."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, prose, table

TITLE = "The project's own commands"
QUESTION = (
    "How long do `make demo`, `make test` and the other commands take, on AVX2 alone and on all that the CPU has?"
)


def markdown(result: dict[str, Any]) -> str:
    runs = result["runs"]
    opening = prose(
        "Set-up excluded; one run of each, alone on two cores. AVX2: torch, oneDNN and MKL were told to use nothing",
        "beyond it, as most laptops would, so that bfloat16 is not native and float32 is chosen.",
    )
    rows = [
        (
            f"`{one['command']}`",
            {"avx2": "AVX2", "native": "native"}[one["setting"]],
            minutes(one["seconds"]),
            minutes(one["cpu_seconds"]),
            one["machine"]["load_at_start"],
            one["date"],
        )
        for one in runs.values()
    ]
    return page(opening, table(("", "instructions", "wall", "CPU", "load when it began", "date"), rows))


def minutes(seconds: float) -> str:
    """63.2 is 1 min 3 s."""
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{number(seconds)} s"
