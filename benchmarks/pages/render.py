"""The page of `render.py`."""

from __future__ import annotations

from typing import Any

from pages._words import bullets, join, number, page, percent, plural, prose, rounds, spread, table, targets

TITLE = "The renderers of scenes"
QUESTION = "How many pictures a second do the two renderers of scenes give, files included, and does memory stay flat?"


def markdown(result: dict[str, Any]) -> str:
    scene, cases = result["geometry"]["scene"], result["raycast"]
    opening = prose(
        f'Rooms of {number(scene["triangles"])} triangles from the recipe "mixed"; colour, depth and ids written as',
        "PNG by the datasets' own writer. Pictures a second by ray casting,",
        f"{rounds(cases[0]['images_per_second']['rounds'])}; several processes share the cores, as the workers of a",
        "dataset do.",
    )
    rows = [
        [
            f"{case['size']} px, {plural(case['processes'], 'process')}".replace("processs", "processes"),
            spread(case["images_per_second"]),
            spread(case["with_setup"]),
            case["cpu_seconds_per_view"],
            percent(case["writing_share"]),
            f"{number(case['kib_per_view'])} KiB",
        ]
        for case in cases
    ]
    columns = ("", "images/s", "whole scenes, set-up included", "CPU s a view", "of it writing", "files of a view")
    points = bullets(_steps(result), _cycles(result["cycles"]), _memory(result["memory"]), _blenderproc(result))
    return page(opening, table(columns, rows), points, targets(result))


def _steps(result: dict[str, Any]) -> str:
    steps = result["geometry"]["seconds"]
    parts = (f"`{name}` {number(row['median'])} s" for name, row in steps.items())
    return f"Before the first picture: {join(parts)}."


def _cycles(cycles: dict[str, Any] | str) -> str:
    if isinstance(cycles, str):
        return f"Cycles: {cycles}."
    ratio = cycles["render_and_write_over_bare"]["median"]
    return (
        f"Cycles, {cycles['size']} px, {cycles['samples']} samples, denoised: "
        f"{number(cycles['render_and_write']['median'])} s an image with its files, {number(ratio)} times the bare "
        "render call of the same scene."
    )


def _memory(memory: dict[str, Any]) -> str:
    after = join(f"{number(mib)} after {count}" for count, mib in memory["rss_mib"].items())
    return f"Memory of one process that makes scene after scene, in MiB: {after}."


def _blenderproc(result: dict[str, Any]) -> str:
    return f"BlenderProc: {result['rules']['blenderproc']}."
