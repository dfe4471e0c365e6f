"""What the commands of the demo have left, read into plain numbers, and the sentences that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_attrsub.analysis.findings import findings
from peft_attrsub.evaluation.markdown import parameters_text
from peft_attrsub.evaluation.tables import read_csv, read_summary

from .plan import METHODS, SPEED, TUNED, Step, read_json
from .runner import record_of
from .scales import ATTRIBUTES

#: Errors that differ by less than this share count as equal.
EQUAL = 0.005
NAMES = {"base": "VGGT as it is", "lora": "LoRA", "cores": "cores in the mined basis"}
PLACES = ("people", "scenes")


def collect(out: Path, settings: Mapping[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """All numbers that are there so far, as plain JSON types.

    methods: label -> trainable parameters, seconds of training, and of "people" and "scenes" the means of Acc, Comp
    (in the unit of the truth), NC in [0, 1], the error of every sequence, (Acc + Comp) / 2, and its mean; None and nan
    for what is not there yet. finished: whether every step is done.
    """
    records = [(step, record_of(out, step)) for step in steps]
    analysis = read_json(out / "analysis.json") if (out / "analysis.json").is_file() else {}
    return {
        "settings": dict(settings),
        "finished": all(record is not None for _, record in records),
        "methods": {method: _method(out, method) for method in METHODS},
        "basis": [{"topic": f.topic, "headline": f.headline, "text": f.text} for f in findings(analysis)]
        if analysis
        else [],
        "attributes": analysis["basis"]["attributes"] if analysis else list(ATTRIBUTES),
        "adapters": len(list(out.glob("adapters/*/adapter_config.json"))),
        "precision": _precision(out),
        "steps": [
            {
                "name": step.name,
                "title": step.title,
                "command": step.typed,
                "seconds": record["seconds"],
                "cpu_seconds": record.get("cpu_seconds"),
            }
            for step, record in records
            if record is not None
        ],
    }


def _method(out: Path, method: str) -> dict[str, Any]:
    found: dict[str, Any] = {"trainable": 0, "seconds": 0.0, "steps": 0}
    if method in TUNED:
        path = out / "tuned" / method / "summary.json"
        run = read_json(path) if path.is_file() else {}
        found = {
            "trainable": run.get("trainable_parameters"),
            "seconds": run.get("seconds"),
            "steps": run.get("steps", 0),
        }
    for place in PLACES:
        folder = out / "measured" / f"{place}-{method}"
        # Written last: without it the measurement is still at work.
        there = (folder / "table.md").is_file()
        rows = [row for row in read_csv(folder / "sequences.csv") if row["status"] == "ok"] if there else []
        errors = {str(row["sequence"]): (row["acc"] + row["comp"]) / 2 for row in rows}
        mean = math.fsum(errors.values()) / len(errors) if errors else math.nan
        summary = read_summary(folder) if there else {"metrics": {}, "n_sequences": 0}
        metrics = {key: summary["metrics"].get(key, math.nan) for key in ("acc", "comp", "nc")}
        found[place] = metrics | {"errors": errors, "error": mean, "sequences": summary["n_sequences"]}
    return found


def _precision(out: Path) -> dict[str, str]:
    """What the trainings computed in and why, by their own record; empty before the first has ended."""
    for path in (*(out / "tuned" / method / "summary.json" for method in TUNED), out / "speed" / SPEED):
        if path.is_file() and (found := read_json(path).get("precision")):
            name, why = (found["precision"], found.get("why", "")) if isinstance(found, Mapping) else (found, "")
            return {"name": str(name), "why": str(why)}
    return {}


def change(after: float, before: float) -> float:
    """(after - before) / before of two errors: -0.1 for a tenth less; nan where there is nothing to compare."""
    return (after - before) / before if before > 0 else math.nan


def forgotten(result: Mapping[str, Any], method: str) -> float:
    """By which share the error on generic scenes has grown from the model as it is."""
    methods = result["methods"]
    return change(methods[method]["scenes"]["error"], methods["base"]["scenes"]["error"])


def percent(share: float) -> str:
    """0.123 -> "12 %"; below 10 one digit more. Without a sign."""
    value = abs(100 * share)
    return f"{value:.1f} %" if value < 9.95 else f"{value:.0f} %"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The table in words: learnt or not, cores against LoRA, what was forgotten, and how far to trust it."""
    said = [_learnt(result, method) for method in TUNED]
    said.append(_against(result))
    said += [_forgetting(result, method) for method in TUNED]
    count = len(result["methods"]["base"]["people"]["errors"])
    said.append(
        f"One training of each on a few rooms, measured in {count} held-out {'room' if count == 1 else 'rooms'}: "
        "differences of ten or twenty percent may be chance."
    )
    return said


def _learnt(result: Mapping[str, Any], method: str) -> str:
    before, after = (result["methods"][name]["people"] for name in ("base", method))
    share, name = change(after["error"], before["error"]), _begin(method)
    if math.isnan(share):
        return f"{name}: nothing could be measured."
    if abs(share) < EQUAL:
        return f"{name} changed little: on held-out people the error is within half a percent of the base model's."
    if share > 0:
        return f"{name} made held-out people worse: their points err by {percent(share)} more than the base model's."
    return (
        f"{name} learned: on held-out people points err by {percent(share)} less than the base model's "
        f"({_rooms(after, before, share)})."
    )


def _against(result: Mapping[str, Any]) -> str:
    lora, cores = (result["methods"][name] for name in TUNED)
    share = change(cores["people"]["error"], lora["people"]["error"])
    sizes = (
        f"{parameters_text(cores['trainable'])} trainable parameters against the LoRA's "
        f"{parameters_text(lora['trainable'])}"
    )
    if math.isnan(share):
        return f"Cores and LoRA could not be compared ({sizes})."
    if abs(share) < EQUAL:
        return f"With {sizes}, the cores are as good as the LoRA on people, to half a percent."
    word = "less" if share < 0 else "more"
    return (
        f"With {sizes}, the cores err by {percent(share)} {word} than the LoRA on people "
        f"({_rooms(cores['people'], lora['people'], share)})."
    )


def _rooms(after: Mapping[str, Any], before: Mapping[str, Any], share: float) -> str:
    """In how many rooms the error is smaller, and whether they agree with the change of the mean, `share`.

    A mean that half of the rooms or more disagree with comes from a few in which one of the two fails.
    """
    common = [one for one in after["errors"] if one in before["errors"]]
    better = sum(after["errors"][one] < before["errors"][one] for one in common)
    agree = better if share < 0 else len(common) - better
    return f"better in {better} of {len(common)} rooms{'; a few rooms decide' if 2 * agree <= len(common) else ''}"


def _forgetting(result: Mapping[str, Any], method: str) -> str:
    share, name = forgotten(result, method), _begin(method)
    if math.isnan(share):
        return f"{name}: what was forgotten could not be measured."
    if abs(share) < EQUAL:
        return f"{name} forgot nothing: on generic scenes the error is within half a percent of the base model's."
    if share < 0:
        return f"{name} forgot nothing: on generic scenes the error fell by {percent(share)}."
    return f"{name} forgot some of what the base model knew: on generic scenes the error grew by {percent(share)}."


def _begin(method: str) -> str:
    return "The LoRA" if method == "lora" else "The cores"
