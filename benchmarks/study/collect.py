"""From summaries to the result: rows of the tables, and the questions of the study answered by rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .data import reader_of
from .entries import Entry, entries, reference
from .measuring import COLUMNS
from .mining import variants
from .plan import Done, decision, explained_name, oracle_name, seed_name, swept
from .settings import Study
from .statistics import paired, tally
from .tuning import SETS

#: Columns that questions are asked of, by set; what a set does not have is left out.
ASKED = ("acc", "comp", "nc", "abs_rel", "delta")
Row = Mapping[str, Any]

RULES = {
    "heads": "The camera and the depth head and the encoder stay frozen for every method, full fine-tuning included: "
    "what differs is the aggregator alone, and parameters are those of the method and nothing else. (The paper puts a "
    "LoRA of rank 16 on the heads, which here would be most of what is trained.)",
    "rate": "Every method and size has its own learning rate, chosen on the validation set by (Acc + Comp) / 2 with "
    "seed 0, from rates about 3 apart; where the best lay on the border, up to two more were tried on that side. "
    "Ablations take the rate of the row they change, except for spectral columns, whose scale is another one.",
    "seed": "A seed decides the part of the training set, the order of the data and what a method draws at its start "
    "(random bases too). Numbers are means over seeds with the standard deviation of one.",
    "verdict": "Two methods are compared by the differences at equal seeds: better or worse where the mean difference "
    "exceeds two standard errors, else no difference. With three seeds that is a rough rule.",
    "metrics": "Acc, Comp, NC: similarity by all pixels, then ICP within 0.1, in the benchmark's own unit. AbsRel, "
    "δ1.25: one scale per sequence, in percent. All on fixed views that no training has seen.",
    "parameters": "At equal parameters or fewer: cores of total size D have D² parameters a matrix, a LoRA of rank r "
    "(n + m) r.",
    "oracle": "The oracle's A and B are the first singular vectors of the update that full fine-tuning made on the "
    "part of the training set that seed 0 has: what holds most of it, known only afterwards. It has seen no test set. "
    "Foreign: the oracle of the next benchmark.",
    "blind": "With the pictures of another sequence: what the answer is worth that looks at none. Test set, seed 0.",
    "forgetting": "Generic scenes are of the kind that the base was trained on, with seeds of their own.",
}


def collect(study: Study, done: Done) -> dict[str, Any]:
    """All numbers of the study. Rows that are not complete are left out; `missing` says how many."""
    rows, sweeps, missing = [], [], 0
    for benchmark in study.benchmarks:
        by_label = {entry.label: entry for entry in entries(study, benchmark)}
        base = done.get(f"tuning/{benchmark}/none")
        if base is not None:
            rows.append(_row(benchmark, "none", "none", "main", base, {0: base}))
        for entry in by_label.values():
            leader = by_label[entry.like] if entry.like else entry
            if entry.like is None and (swept_row := _sweep(study, benchmark, entry, done)):
                sweeps.append(swept_row)
            seeds = {s: done.get(seed_name(benchmark, entry.label, s)) for s in range(study.seeds)}
            found = {seed: summary for seed, summary in seeds.items() if summary is not None}
            missing += len(seeds) - len(found)
            if found:
                choice = decision(study, benchmark, leader, done)
                first = next(iter(found.values()))
                row = _row(benchmark, entry.label, entry.method, entry.group, first, found)
                row |= {"rate": first["rate"], "border": bool(choice and choice[2])}
                rows.append(row)
    result = {
        "rules": RULES,
        "units": {name: _unit(name) for name in study.benchmarks},
        "missing": missing,
        "rows": rows,
        "sweeps": sweeps,
        "diagnosis": _without_job(done.get("diagnosis")),
        "bases": {name: _without_job(done.get(f"bases/{name}")) for name in variants(study)},
        "sources": _sources(done),
        "explained": {name: _without_job(done.get(explained_name(name))) for name in study.benchmarks},
        "oracle": {name: _without_job(done.get(oracle_name(name))) for name in study.benchmarks},
    }
    return result | {"answers": answers(study, result)}


def _row(benchmark: str, label: str, method: str, group: str, first: Row, seeds: Mapping[int, Row]) -> dict[str, Any]:
    by_seed = {
        str(seed): {part: summary["sets"][part]["mean"] for part in SETS}
        | {"skipped": sum(len(summary["sets"][part]["skipped"]) for part in SETS)}
        | {"seconds": (summary.get("trained") or {}).get("seconds")}
        for seed, summary in seeds.items()
    }
    found = {"benchmark": benchmark, "label": label, "method": method, "group": group}
    found |= {"trainable": first["trainable"], "seeds": by_seed}
    found["blind"] = next((summary["blind"] for summary in seeds.values() if "blind" in summary), None)
    if "orthonormal_modules" in first:
        found["orthonormal_modules"] = first["orthonormal_modules"]
    return found


def _sweep(study: Study, benchmark: str, entry: Entry, done: Done) -> dict[str, Any] | None:
    scores = swept(study, benchmark, entry, done)
    if not scores:
        return None
    choice = decision(study, benchmark, entry, done)
    taken = choice is not None and choice[0] == "take"
    return {
        "benchmark": benchmark,
        "label": entry.label,
        "scores": {f"{rate:g}": score for rate, score in sorted(scores.items())},
        "rate": choice[1] if choice is not None and taken else None,
        "border": bool(choice is not None and taken and choice[2]),
    }


def _unit(benchmark: str) -> dict[str, Any]:
    from peft_attrsub.datasets import protocol

    rules = protocol(benchmark)
    cross = protocol(reader_of(benchmark, "cross"))
    return {"scale": rules.scale, "unit": rules.unit, "cross": cross.metrics, "title": rules.title}


def _without_job(summary: Row | None) -> dict[str, Any] | None:
    return None if summary is None else {key: value for key, value in summary.items() if key != "job"}


def _sources(done: Done) -> dict[str, Any]:
    """Of the adapters of each rank: how many, how far lora_A moved, the loss at the start and at the end."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, summary in done.items():
        if name.startswith("sources/"):
            row = found[name.split("/")[1]]
            row["moved_a"].append(summary["moved_a"])
            losses = [loss for loss in summary["losses"] if loss is not None]
            if losses:
                row["first_loss"].append(losses[0])
                row["last_loss"].append(losses[-1])
    return {
        rank: {"adapters": len(row["moved_a"])} | {key: sum(values) / len(values) for key, values in row.items()}
        for rank, row in sorted(found.items())
    }


# --- the questions --------------------------------------------------------------------------------------------------


def column(row: Row, part: str, name: str) -> dict[str, float | None]:
    """Seed -> a number of a row; seeds without it are left out."""
    return {seed: one[part][name] for seed, one in row["seeds"].items() if one[part].get(name) is not None}


def compare(one: Row, other: Row, parts: Sequence[str] = SETS) -> list[dict[str, Any]]:
    """Verdicts on `one` against `other` in every set and column that both have."""
    found = []
    for part in parts:
        for name in ASKED:
            a, b = column(one, part, name), column(other, part, name)
            if a and b:
                found.append({"set": part, "column": name} | paired(a, b, COLUMNS[name]))
    return found


def answers(study: Study, result: Mapping[str, Any]) -> dict[str, Any]:
    """Do the subspaces exist, are they apart, and is tuning in them better; as numbers and verdicts."""
    rows = {(row["benchmark"], row["label"]): row for row in result["rows"]}
    default = result["bases"].get("default") or {}
    found: dict[str, Any] = {"exist": default.get("held_out"), "apart": _apart(result["bases"])}
    found["same_size"] = [
        _against(rows, benchmark, f"attrsub-{dim}", f"{other}-{dim}")
        for benchmark in study.benchmarks
        for other in ("psv", "random")
        for dim in study.basis_dims
        if {(benchmark, f"attrsub-{dim}"), (benchmark, f"{other}-{dim}")} <= set(rows)
    ]
    found["fewer"] = []
    for benchmark in study.benchmarks:
        mined = [row for (b, _), row in rows.items() if b == benchmark and row["group"] == "main"]
        cores = [row for row in mined if row["method"] == "attrsub"]
        for one in cores:
            for other in (row for row in mined if row["method"] == "lora"):
                if other["trainable"] >= 4 * one["trainable"]:
                    found["fewer"].append(_against(rows, benchmark, one["label"], other["label"]))
    found["oracle"] = [
        _against(rows, benchmark, f"{one}-{dim}", f"{other}-{dim}")
        for benchmark in study.benchmarks
        for dim in study.oracle_dims
        for one in ("oracle", "foreign")
        for other in ("attrsub", "psv", "random")
        if {(benchmark, f"{one}-{dim}"), (benchmark, f"{other}-{dim}")} <= set(rows)
    ]
    found["ablations"] = [
        _against(rows, row["benchmark"], row["label"], reference(study).label)
        for row in result["rows"]
        if row["group"] not in ("main", "oracle") and (row["benchmark"], reference(study).label) in rows
    ]
    for name in ("same_size", "fewer", "oracle", "ablations"):
        found[f"{name}_tally"] = {part: _tally(found[name], part) for part in SETS}
    return found


def _against(rows: Mapping[tuple[str, str], Row], benchmark: str, label: str, other: str) -> dict[str, Any]:
    one, two = rows[benchmark, label], rows[benchmark, other]
    found = {"benchmark": benchmark, "one": label, "other": other}
    found["fewer_times"] = two["trainable"] / one["trainable"] if one["trainable"] else None
    return found | {"verdicts": compare(one, two)}


def _tally(comparisons: Sequence[Row], part: str) -> dict[str, int]:
    return tally([v["verdict"] for one in comparisons for v in one["verdicts"] if v["set"] == part])


def _apart(bases: Mapping[str, Row | None]) -> dict[str, Any]:
    """Per basis and side: pairs of attributes that overlap no more than random subspaces, and the medians."""
    found = {}
    for name in ("default", "shared"):
        pairs = (bases.get(name) or {}).get("pairs") or []
        for side in ("output", "input"):
            own = [row for row in pairs if row["side"] == side and "shared" not in (row["attribute"], row["other"])]
            if own:
                found[f"{name} {side}"] = {
                    "pairs": len(own),
                    "like_random": sum(row["median"] >= row["null_low"] for row in own),
                    "smallest": sum(row["median"] for row in own) / len(own),
                    "null": sum(row["null_median"] for row in own) / len(own),
                }
    return found
