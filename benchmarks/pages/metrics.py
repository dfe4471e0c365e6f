"""The page of `metrics.py`."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, percent, plural, prose, spread, table, targets

TITLE = "The metrics of the benchmarks"
QUESTION = "What do Acc, Comp and NC of 2 million points cost, how far are they from exact, and what does Open3D take?"
NAMES = {
    "default": "`point_metrics`",
    "exact": "`point_metrics(exact=True)`",
    "longest_icp": "ICP alone, with every update it may make",
    "open3d": "Open3D, straightforward, all points",
}


def markdown(result: dict[str, Any]) -> str:
    settings, contenders = result["settings"], result["contenders"]
    rows, missing = [], []
    for key, name in NAMES.items():
        one = contenders[key]
        if isinstance(one, str):
            missing.append(f"{name}: {one}.")
            continue
        off = max(one["deviation"].values()) if "deviation" in one and key != "exact" else None
        row = [name, spread(one["seconds"]), one["cpu_seconds"]["median"], _mib(one["peak_rss_mib"])]
        rows.append([*row, None if off is None else percent(off)])
    opening = prose(
        f"Acc, Comp and NC of {number(settings['points'])} points (views: {settings['views']} of {settings['size']} x",
        f"{settings['size']}), similarity and ICP before, on {plural(settings['cores'], 'core')}. By default",
        f"{number(contenders['default']['values']['queries'])} points of each side ask for their neighbour among all",
        "of the other; `exact` lets all ask. Deviation: the largest of any number from `exact`, over all rounds, each",
        f"with another choice of points (seeds: {contenders['default']['seconds']['rounds']}).",
    )
    columns = ("", "seconds", "CPU seconds", "peak memory", "largest deviation")
    return page(opening, table(columns, rows), prose(*missing), _open3d(contenders), targets(result))


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{number(value)} MiB"


def _open3d(contenders: dict[str, Any]) -> str:
    theirs = contenders["open3d"]
    if isinstance(theirs, str):
        return ""
    ours, exact, peer = (contenders[key]["seconds"]["median"] for key in ("default", "exact", "open3d"))
    agree = max(theirs["deviation"].values())
    return prose(
        f"Where all points ask, Open3D takes {number(peer / exact)} times the seconds of `exact` and its numbers",
        f"differ by {percent(agree)} at most; the default takes {number(ours / peer)} times the seconds of Open3D.",
    )
