"""The page of `report.py`."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, prose, rounds, spread, table, targets

TITLE = "The report"
QUESTION = "How long from a saved basis to its report, how much memory, and how large is the file?"


def markdown(result: dict[str, Any]) -> str:
    cases = result["cases"]
    first = cases[0]
    opening = prose(
        f"{first['modules']} modules x {first['attributes']} attributes, {first['adapters_each']} adapters of rank",
        f"{first['rank']} each, mined and saved before the clock starts; every round is a process of its own, so that",
        f"no null is remembered. Seconds are {rounds(first['report_seconds']['rounds'])} (least and most).",
    )
    rows = [[f"d = {case['dim']}", *_stages(case), _memory(case), f"{number(case['html_mb'])} MB"] for case in cases]
    columns = ["", "`analyse`", "`write_report`", "each adapter to explain"]
    columns += ["all figures (PNG)"] if "save_figures" in first["stages"] else []
    return page(opening, table([*columns, "peak memory", "HTML"], rows), targets(result))


def _stages(case: dict[str, Any]) -> list[str]:
    names = ("analyse", "write_report", "explain", "save_figures")
    return [spread(case["stages"][name]["seconds"]) for name in names if name in case["stages"]]


def _memory(case: dict[str, Any]) -> str:
    if case["peak_anon_mib"] is None:
        return "-"
    return f"{number(case['peak_anon_mib'])} MiB ({number(case['peak_rss_mib'])} MiB with mapped files)"
