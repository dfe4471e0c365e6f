"""The page of `startup.py`."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, prose, rounds, spread, table, targets

TITLE = "Starting a command"
QUESTION = "How much CPU does a command take before it does any work?"
GROUPS = {
    "import": "",
    "help": "Commands that need no torch:",
    "job": "Commands that compute with torch, on a basis of eight small linears:",
}


def markdown(result: dict[str, Any]) -> str:
    cases = result["cases"]
    opening = prose(
        "CPU seconds, user and system, of a process that does next to nothing, so that nearly all of it is Python and",
        f"its imports; {rounds(cases[0]['cpu_seconds']['rounds'])} (least and most), files in the page cache.",
        f"Programs competing for the cores when the run began and ended: {number(result['machine']['load_at_start'])}",
        f"and {number(result['load_at_end'])}. `import peft_attrsub` does not load PEFT: the tuner is registered when",
        "something else imports PEFT, which the last row of the first table includes.",
    )
    parts = [opening]
    for group, heading in GROUPS.items():
        rows = [
            [f"`{case['name']}`", spread(case["cpu_seconds"]), case["seconds"]["median"]]
            for case in cases
            if case["group"] == group
        ]
        parts += [heading, table(("", "CPU seconds", "seconds"), rows)]
    return page(*parts, targets(result))
