"""The section of build_basis.py in the README, from its JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Mining a basis"
QUESTION = "How fast, how small and how exact is mining a basis, against reading the files, the dense form and peers?"
NAMES = {
    "ours": "`build_basis`",
    "read_only_warm": "only reading the files (warm)",
    "read_only_cold": "only reading the files (cold)",
    "dense": "dense form",
    "vlora": "vLoRA",
    "lorashare": "lorashare",
}
LABELS = {"k": "adapters k", "r": "rank r", "m": "inputs m", "n": "outputs n"}


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in row) + " |" for row in cells]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def markdown(result: dict) -> str:
    a = result["adapters"]
    lines = [
        f"{a['count']} adapters of rank {a['rank']} on {a['modules']} modules ({a['mib']:.0f} MiB), "
        f"d = {result['settings']['dim']}; {result['iterations']['median']:g} iterations a module (median).",
        "",
    ]
    rows = []
    for name, row in result["contenders"].items():
        if isinstance(row, str):
            rows.append([NAMES.get(name, name), row, "", ""])
            continue
        label = NAMES.get(name, name) + (" (extrapolated)" if row["extrapolated"] else "")
        memory = _number(row["peak_rss_mib"]) + (" MiB, one module" if row["extrapolated"] else " MiB")
        rows.append([label, _number(row["seconds"]["median"]), memory, _number(row["times_ours"])])
    lines += _table(["", "seconds", "memory above the import", "times ours"], rows)
    if result["difference_from_dense"]:
        worst = max(result["difference_from_dense"].values())
        lines += ["", f"The dense form and ours differ by at most {worst:.1g}, relatively."]
    if "large" in result:
        lines += ["", *_large(result["large"])]
    lines += ["", "Relative error, mean over the adapters, by how they were made:", ""]
    lines += _table(
        ["adapters", "d", "contender", "error", "worst", "numbers in the basis"],
        [[r[key] for key in ("fixture", "dim", "contender", "error", "worst", "basis_parameters")]
         for r in result["error_study"]],
    )  # fmt: skip
    lines += ["", "Cost of a module:", ""]
    axes = [(axis, line) for axis, found in result["scaling"].items() for line in found]
    lines += _table(
        ["against", "value", "stacked rank", "seconds", "CPU seconds"],
        [[LABELS[axis], line[axis], line["stacked_rank"], line["seconds_per_module"], line["cpu_seconds_per_module"]]
         for axis, line in axes],
    )  # fmt: skip
    lines += ["", "![cost of a module](figures/build_basis_cost.png)", ""]
    lines += _table(
        ["target", "measured", ""],
        [[t["target"], _number(t["measured"]), "reached" if t["reached"] else "not reached"]
         for t in result["targets"]],
    )  # fmt: skip
    return "\n".join(lines) + "\n"


def _large(large: dict) -> list[str]:
    rows = []
    for row in large.values():
        seconds = _number(row["seconds"]["median"])
        if "seconds_all_modules" in row:
            seconds += f"; all modules, extrapolated: {_number(row['seconds_all_modules'])}"
        rows.append([row["adapters"], row["modules"], seconds, _number(row["peak_rss_mib"]) + " MiB"])
    return _table(["adapters", "modules", "seconds", "memory above the import"], rows)


def figures(result: dict) -> dict[str, Figure]:
    """Seconds a module against k, r, m and n, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(3 * len(result["scaling"]), 3), layout="constrained")
    panels = figure.subplots(1, len(result["scaling"]), sharey=True, squeeze=False)[0]
    for panel, (axis, lines) in zip(panels, result["scaling"].items(), strict=True):
        values = [line[axis] for line in lines]
        panel.loglog(values, [line["seconds_per_module"] for line in lines], "o-", label="wall")
        panel.loglog(values, [line["cpu_seconds_per_module"] for line in lines], "s--", label="CPU")
        panel.set_xlabel(LABELS[axis])
        panel.set_xticks(values, [str(v) for v in values])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("seconds a module")
    panels[0].legend()
    return {"build_basis_cost": figure}
