"""The page of `examples/digits.py`, whose summary.json is kept as results/digits.json."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, plural, prose, table

TITLE = "The demo on digits"
QUESTION = (
    "How do cores do against LoRA, PSV, random directions and full fine-tuning on a small task, with equal sweeps?"
)
SCRIPT = "../examples/digits.py"
HOW = "`make demo-digits`, then `cp demo-output/summary.json benchmarks/results/digits.json`"


def markdown(result: dict[str, Any]) -> str:
    settings, methods = result["settings"], result["methods"]
    opening = prose(
        f"A ViT of {number(result['base']['parameters'])} parameters, {settings['labels']} labels,",
        f"{settings['steps']} steps; mean and standard deviation of {plural(settings['seeds'], 'run')},",
        f"the learning rate of every method chosen from {len(settings['learning_rates'])} on a validation split.",
        "Bases from",
        f"{settings['source_adapters']} adapters of rank {settings['source_rank']} per attribute. Before tuning:",
        f"{result['base']['plain_accuracy']:.1f} % on plain digits. The whole demo took",
        f"{number(result['seconds']['total'])} s.",
    )
    rows = [
        [
            method["label"],
            number(method["trainable"]),
            f"{method['learning_rate']:g}" if method["learning_rate"] else "-",
            f"{method['accuracy']:.1f} ± {method['std']:.1f}" if method["std"] else f"{method['accuracy']:.1f}",
        ]
        for method in methods
    ]
    return page(
        opening, table(("", "trainable", "learning rate", "accuracy %"), rows), _noise(methods), _export(result)
    )


def _noise(methods: list[dict[str, Any]]) -> str:
    """How far apart the tuned methods are, in units of how far apart two runs of one method are."""
    tuned = [method for method in methods if method["kind"] not in ("base", "full")]
    best, worst = (pick(tuned, key=lambda m: m["accuracy"]) for pick in (max, min))
    largest = max(method["std"] for method in tuned)
    return prose(
        f"Between the best adapter ({best['label']}) and the worst ({worst['label']}) lie",
        f"{number(best['accuracy'] - worst['accuracy'])} points of accuracy; runs of one method differ by up to",
        f"{number(largest)} (standard deviation).",
    )


def _export(result: dict[str, Any]) -> str:
    export = result["export"]
    return prose(
        "Exported to LoRA and loaded by stock PEFT, the logits differ by",
        f"{number(export['max_abs_difference'])} at most, of {number(export['largest_logit'])}.",
    )
