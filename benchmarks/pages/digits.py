"""The page of `examples/digits.py`, whose summary.json is kept as results/digits.json."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, plural, prose, table

TITLE = "The demo on digits"
QUESTION = (
    "What is the consensus start worth on a small task with few labels, and how do cores do against LoRA, PSV, random "
    "directions and full fine-tuning, with equal sweeps?"
)
SCRIPT = "../examples/digits.py"
HOW = "`make demo-digits`, then `cp demo-output/summary.json benchmarks/results/digits.json`"


def markdown(result: dict[str, Any]) -> str:
    settings, methods = result["settings"], result["methods"]
    opening = prose(
        f"A ViT of {number(result['base']['parameters'])} parameters, {settings['steps']} steps; mean and standard",
        f"deviation of {plural(settings['seeds'], 'run')}, the learning rate of every method chosen from",
        f"{len(settings['learning_rates'])} on a validation split, for each number of labels apart.",
        '"From the consensus": the model, or the cores, begin at the sum of the attributes\' consensus updates, whose',
        'four scales `calibrate_start` finds on the same labels; "consensus alone" trains nothing else.',
        "Bases from",
        f"{settings['source_adapters']} adapters of rank {settings['source_rank']} per attribute. Before tuning:",
        f"{result['base']['plain_accuracy']:.1f} % on plain digits. The whole demo took",
        f"{number(result['seconds']['total'])} s.",
    )
    columns = settings["labels"]
    by_label: dict[str, dict[int, dict[str, Any]]] = {}
    for method in sorted(methods, key=lambda m: -m["labels"]):  # the most labels have all methods, in their order
        by_label.setdefault(method["label"], {})[method["labels"]] = method
    rows = [
        [label, number(found[max(columns)]["trainable"]), *(_cell(found.get(labels)) for labels in columns)]
        for label, found in by_label.items()
    ]
    head = ("accuracy %", "trainable", *(f"{labels} labels" for labels in columns))
    figure = "![Accuracy against trained numbers, from zero and from the consensus](figures/digits.png)"
    return page(opening, table(head, rows), figure, _start(result), _scales(methods, max(columns)), _export(result))


def _cell(method: dict[str, Any] | None) -> str:
    if method is None:
        return ""
    return f"{method['accuracy']:.1f} ± {method['std']:.1f}" if method["std"] else f"{method['accuracy']:.1f}"


def _start(result: dict[str, Any]) -> str:
    """What the start is worth: the best from zero against the best from the consensus, for each number of labels."""
    lines = []
    for labels in result["settings"]["labels"]:
        rows = [method for method in result["methods"] if method["labels"] == labels]
        untuned = next(m for m in rows if m["kind"] == "base" and not m["start"])
        zero, start = (
            max((m for m in rows if m["start"] is started and m is not untuned), key=lambda m: m["accuracy"])
            for started in (False, True)
        )
        lines.append(
            f"{labels} labels: untuned {untuned['accuracy']:.1f}; best from zero {zero['accuracy']:.1f}"
            f" ({zero['label']}), best from the consensus {start['accuracy']:.1f} ({start['label']})."
        )
    return prose(*lines)


def _scales(methods: list[dict[str, Any]], labels: int) -> str:
    alone = next(m for m in methods if m["kind"] == "base" and m["start"] and m["labels"] == labels)
    names = list(alone["scales"][0])
    means = {name: sum(run[name] for run in alone["scales"]) / len(alone["scales"]) for name in names}
    found = ", ".join(f"{name} {means[name]:.2f}" for name in names)
    return prose(f"Scales found with {labels} labels, mean of {plural(len(alone['scales']), 'run')}: {found}.")


def _export(result: dict[str, Any]) -> str:
    export = result["export"]
    return prose(
        "Exported to LoRA and loaded by stock PEFT, the logits differ by",
        f"{number(export['max_abs_difference'])} at most, of {number(export['largest_logit'])}.",
    )


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against trained numbers, a panel per number of labels: filled from the consensus, open from zero."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    labels, methods = result["settings"]["labels"], result["methods"]
    figure = Figure(figsize=(3.6 * len(labels), 3.4), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False, sharex=True, sharey=True)[0]
    colors = {
        "full": "C3",
        "lora": "C1",
        "attrsub": "C0",
        "dials": "C2",
        "psv": "C4",
        "random": "C7",
        "gradient": "C5",
        "base": "k",
    }
    names = {"full": "full", "lora": "LoRA", "attrsub": "mined cores", "dials": "dials", "psv": "PSV cores"}
    names |= {"random": "random cores", "gradient": "gradient cores", "base": "consensus alone"}
    for axes, count in zip(panels, labels, strict=True):
        rows = [method for method in methods if method["labels"] == count]
        untuned = next(row for row in rows if row["kind"] == "base" and not row["start"])
        axes.axhline(untuned["accuracy"], color="0.6", linewidth=1)
        for row in rows:
            if row is untuned:
                continue
            color = colors[row["kind"]]
            face = color if row["start"] else "none"
            at = (row["trainable"], row["accuracy"])
            axes.errorbar(*at, yerr=row["std"], fmt="o", color=color, markerfacecolor=face, markersize=7)
        axes.set(xscale="log", xlabel="trained numbers", title=f"{count} labels")
    panels[0].set_ylabel("accuracy %")
    present = [kind for kind in names if any(method["kind"] == kind for method in methods)]
    handles = [Line2D([], [], marker="o", linestyle="", color=colors[kind], label=names[kind]) for kind in present]
    handles += [
        Line2D([], [], marker="o", linestyle="", color="0.4", label="from the consensus"),
        Line2D([], [], marker="o", linestyle="", color="0.4", markerfacecolor="none", label="from zero"),
        Line2D([], [], color="0.6", linewidth=1, label="untuned"),
    ]
    figure.legend(handles=handles, loc="outside right center", fontsize="small")
    return {"digits": figure}
