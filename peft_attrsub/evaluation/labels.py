"""Names of runs in tables, from the paths of their adapters, models or folders."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

#: Folders that finetune.py makes in every run: they do not tell one run from another.
OUTPUTS = ("adapter", "best", "model")
Name = str | os.PathLike[str]


def run_label(path: Name) -> str:
    """The run that a path belongs to: "lora" for runs/lora/adapter, the last part of any other path or Hub id."""
    return _split(path)[0][-1]


def run_labels(paths: Sequence[Name]) -> list[str]:
    """A label for each path, in their order: `run_label`, or as much of the path as tells it from the others.

    Different paths get different labels: a/lora and b/lora are called that; two outputs of one run are called
    lora/adapter and lora/best. Equal paths get equal labels.
    """
    parts = {path: _split(path) for path in dict.fromkeys(PurePath(p) for p in paths)}
    outputs: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for run, output in parts.values():
        outputs[run].add(output)
    shown = dict.fromkeys(parts, 1)  # last parts of the run's folder

    def label(path: PurePath) -> str:
        run, output = parts[path]
        tail = output if len(outputs[run]) > 1 else ""
        return str(PurePath(*run[-shown[path] :], tail))

    while True:
        count = Counter(map(label, parts))
        # Whole paths differ, so that this ends.
        longer = [p for p in parts if count[label(p)] > 1 and shown[p] < len(parts[p][0])]
        if not longer:
            return [label(PurePath(path)) for path in paths]
        for path in longer:
            shown[path] += 1


def summary_labels(summaries: Sequence[Mapping[str, Any]], runs: Sequence[Name]) -> list[str]:
    """Labels for the summaries of evaluations, so that no two rows of a table have the same.

    A label that was chosen by hand stands; others are `run_labels` of the adapters, or of the models where there is
    none. Where labels are still equal, as when one adapter was measured in two ways, the folder of the evaluation
    (`runs`, one for each summary) is added in parentheses.
    """
    made_of = [
        str(s.get("adapter") or s.get("settings", {}).get("model") or run)
        for s, run in zip(summaries, runs, strict=True)
    ]
    by_hand = {
        number: str(summary["label"])
        for number, (summary, path) in enumerate(zip(summaries, made_of, strict=True))
        # The last part alone is what earlier versions called a run.
        if summary.get("label") not in (None, run_label(path), PurePath(path).name)
    }
    free = [number for number in range(len(summaries)) if number not in by_hand]
    labels = by_hand | dict(zip(free, run_labels([made_of[number] for number in free]), strict=True))
    count = Counter(labels.values())
    places = run_labels(runs)
    return [f"{labels[n]} ({places[n]})" if count[labels[n]] > 1 else labels[n] for n in range(len(summaries))]


def _split(path: Name) -> tuple[tuple[str, ...], str]:
    """Parts of the run's folder, and the output in it: (("runs", "lora"), "adapter")."""
    parts = PurePath(path).parts or (".",)
    end = len(parts)
    while end and parts[end - 1] in OUTPUTS:
        end -= 1
    if not end or (end == 1 and PurePath(path).is_absolute()):
        return parts, ""
    return parts[:end], "/".join(parts[end:])


__all__ = ["OUTPUTS", "run_label", "run_labels", "summary_labels"]
