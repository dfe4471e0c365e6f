"""The page of `mixed.py`."""

from __future__ import annotations

from typing import Any

from pages._words import join, number, page, plural, prose, spread, table, targets

TITLE = "A different adapter for every sample"
QUESTION = "What does a batch cost whose samples use many adapters, against one adapter, LoRA and merging?"


def markdown(result: dict[str, Any]) -> str:
    settings, cases = result["settings"], result["cases"]
    sizes = {r["contender"]: r["trained_parameters_each"] for r in cases[0]["rows"] if "trained_parameters_each" in r}
    opening = prose(
        f"{plural(settings['blocks'], 'block')} of width {settings['width']} on {cases[0]['samples']} samples of",
        f"{join(number(case['tokens']) for case in cases)} tokens, {settings['dtype']}, without gradients; the",
        "adapters take turns over the samples. Trained parameters of an adapter:",
        f"{join(f'{name} {number(size)}' for name, size in sizes.items())}. Milliseconds are those of the whole",
        f"batch ({plural(settings['rounds'], 'round')}, in brackets the least and the most); / one adapter is the",
        "median of the ratios within a round.",
    )
    figure = "![Cost against the number of adapters](figures/mixed.png)"
    return page(opening, *(part for case in cases for part in _case(case)), figure, targets(result))


def _case(case: dict[str, Any]) -> tuple[str, str, str]:
    rows = [
        (
            r["contender"],
            number(r["adapters"]) if r["adapters"] else "-",
            spread({k: v if k == "rounds" else 1000 * v for k, v in r["seconds"].items()}),
            r["ratio_to_base"],
            r.get("ratio_to_one"),
            r.get("cpu_ratio_to_one"),
        )
        for r in case["rows"]
    ]
    columns = ("", "adapters", "ms", "/ frozen base", "/ one adapter", "CPU / one adapter")
    return f"{plural(case['tokens'], 'token')} a sample:", table(columns, rows), _difference(case)


def _difference(case: dict[str, Any]) -> str:
    if case["difference"] is None:
        return ""
    return prose(
        f"Mixed and merged outputs with {case['samples']} adapters differ by {number(case['difference'])} of the",
        "largest output.",
    )


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Cost against the number of adapters, one panel per length of the samples."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    cases = result["cases"]
    figure = Figure(figsize=(4.2 * len(cases), 3.4), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        names = dict.fromkeys(r["contender"] for r in case["rows"] if r["adapters"])
        for name in names:
            points = [(r["adapters"], r["ratio_to_base"]) for r in case["rows"] if r["contender"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        counts = sorted({r["adapters"] for r in case["rows"] if r["adapters"]})
        tokens = f"{case['tokens']} token{'s' * (case['tokens'] != 1)} a sample"
        axes.set(xscale="log", yscale="log", xlabel="adapters in the batch", title=tokens)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel("seconds / frozen base")
    figure.axes[-1].legend(fontsize="small")
    return {"mixed": figure}
