"""The jobs of a study: what is known now, given what is done. A sweep decides its next rate from its results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .data import SETS, dataset_name
from .entries import Entry, entries, oracle_basis
from .mining import needed, variants
from .settings import EXTENSIONS, STEP, Study
from .statistics import choose_rate

Done = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """name: its folder below the study's. action: a function of `actions`, called with `options`. needs: names of jobs
    that come before. cost: kind of work -> how much of it (see `rates`). ready: False while its options are open."""

    name: str
    stage: str
    action: str
    options: dict[str, Any] = field(hash=False)
    needs: tuple[str, ...] = ()
    cost: dict[str, float] = field(default_factory=dict, hash=False)
    ready: bool = True


def jobs(study: Study, done: Done) -> list[Job]:
    """Every job that is known, in the order in which they are best started."""
    found = [*_data(study), *_sources(study), *_bases(study)]
    for benchmark in study.benchmarks:
        found += [*_tuning(study, benchmark, done), *_explaining(study, benchmark, done)]
    return found


def _data(study: Study) -> list[Job]:
    found = []

    def add(name: str, what: str, part: str, index: int, kind: str, count: int) -> None:
        options = {"what": what, "part": part, "index": index}
        found.append(
            Job(f"data/{name}", "data", "draw", options, cost={kind: count, "dataset": kind == "draw scenes"})
        )

    # What takes longest first, so that no process is left alone with it at the end.
    for benchmark in study.benchmarks:
        for part in SETS:
            add(f"{benchmark}-{part}", benchmark, part, 0, f"draw {benchmark}", getattr(study, part))
    add("generic", "generic", "test", 0, "draw scenes", study.generic)
    for attribute in study.attributes:
        for index in range(study.datasets):
            add(f"{attribute}-{index:02d}", attribute, "train", index, "draw scenes", study.scenes)
    return found


def source_name(attribute: str, index: int, rank: int) -> str:
    return f"sources/rank-{rank}/{dataset_name(attribute, index)}"


def _sources(study: Study) -> list[Job]:
    wanted = [one for variant in variants(study) for one in needed(study, variant)]
    found = []
    for attribute, index, rank in dict.fromkeys(wanted):
        options = {"attribute": attribute, "index": index, "rank": rank}
        needs = (f"data/{attribute}-{index:02d}",)
        cost = {"source step": study.source_steps}
        found.append(Job(source_name(attribute, index, rank), "sources", "train_source", options, needs, cost))
    return found


def _bases(study: Study) -> list[Job]:
    main = tuple(source_name(*one) for one in needed(study, "default"))
    found = [Job("diagnosis", "diagnosis", "diagnose", {}, main, {"mine": 1})]
    for variant in variants(study):
        needs = tuple(source_name(*one) for one in needed(study, variant))
        if variant == "default":
            needs = ("diagnosis", *needs)
        found.append(Job(f"bases/{variant}", "mine", "mine", {"variant": variant}, needs, {"mine": 1}))
    return found


def sweep_name(benchmark: str, label: str, rate: float) -> str:
    return f"tuning/{benchmark}/{_slug(label)}/rate-{rate:g}"


def seed_name(benchmark: str, label: str, seed: int) -> str:
    return f"tuning/{benchmark}/{_slug(label)}/seed-{seed}"


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label.lower())


def swept(study: Study, benchmark: str, entry: Entry, done: Done) -> dict[float, float | None]:
    """Rate -> score of the runs of a sweep that are done, in the order in which they were decided on."""
    first = study.rates(entry.family)
    scores: dict[float, float | None] = {}
    wanted = list(first)
    while wanted:
        rate = wanted.pop(0)
        summary = done.get(sweep_name(benchmark, entry.label, rate))
        if summary is None:
            continue
        scores[rate] = summary["score"]
        if len(scores) >= len(first) and not wanted:
            step, further, _ = choose_rate(scores, STEP, EXTENSIONS, first)
            if step == "try":
                wanted.append(further)
    return scores


def decision(study: Study, benchmark: str, entry: Entry, done: Done) -> tuple[str, float, bool] | None:
    """What the sweep of an entry does next, or None while a run of it is out."""
    scores = swept(study, benchmark, entry, done)
    first = study.rates(entry.family)
    if any(rate not in scores for rate in first):
        return None
    return choose_rate(scores, STEP, EXTENSIONS, first)


def _tuning(study: Study, benchmark: str, done: Done) -> list[Job]:
    rows = entries(study, benchmark)
    by_label = {entry.label: entry for entry in rows}
    sets = tuple(f"data/{benchmark}-{part}" for part in ("test", "cross"))
    measured = (*sets, "data/generic")
    count = study.test + study.cross + study.generic
    options = {"benchmark": benchmark}
    found = [Job(f"tuning/{benchmark}/none", "tune", "measure_base", options, measured, {"measure": count})]
    for entry in rows:
        own = entry.like is None
        leader = entry if own else by_label[str(entry.like)]
        basis = (f"bases/{entry.basis}",) if entry.basis else ()
        learnt = (f"data/{benchmark}-train", *basis)
        choice = decision(study, benchmark, leader, done)
        if own:
            rates = list(study.rates(entry.family))
            tried = swept(study, benchmark, entry, done)
            rates += [rate for rate in tried if rate not in rates]
            if choice is not None and choice[0] == "try":
                rates.append(choice[1])
            for rate in rates:
                needs, cost = (*learnt, f"data/{benchmark}-validation"), _cost(study, study.validation)
                name = sweep_name(benchmark, entry.label, rate)
                found.append(_run(benchmark, entry, name, rate, 0, None, needs, cost, swept=True))
        chosen = choice[1] if choice is not None and choice[0] == "take" else None
        for seed in range(study.seeds):
            state, cost = None, _cost(study, count)
            if seed == 0 and own:
                cost = {"measure": count}
                state = None if chosen is None else sweep_name(benchmark, entry.label, chosen)
            name, needs = seed_name(benchmark, entry.label, seed), (*learnt, *measured)
            found.append(_run(benchmark, entry, name, chosen, seed, state, needs, cost, swept=False))
    return found


def _explaining(study: Study, benchmark: str, done: Done) -> list[Job]:
    """What follows from full fine-tuning's update once its rate is chosen: how much of it the bases hold, and the
    oracle."""
    full = next((entry for entry in entries(study, benchmark) if entry.label == "full"), None)
    if full is None:
        return []
    choice = decision(study, benchmark, full, done)
    chosen = sweep_name(benchmark, full.label, choice[1]) if choice is not None and choice[0] == "take" else None
    needs, ready = () if chosen is None else (chosen,), chosen is not None
    found = [
        Job(
            explained_name(benchmark),
            "tune",
            "explain",
            {"state": chosen},
            ("bases/default", *needs),
            {"mine": 1},
            ready,
        )
    ]
    if study.oracle_dims:
        options = {"benchmark": benchmark, "state": chosen}
        found.append(Job(oracle_name(benchmark), "tune", "make_oracle", options, needs, {"mine": 1}, ready))
    return found


def explained_name(benchmark: str) -> str:
    return f"tuning/{benchmark}/explained"


def oracle_name(benchmark: str) -> str:
    return f"bases/{oracle_basis(benchmark)}"


def _run(
    benchmark: str,
    entry: Entry,
    name: str,
    rate: float | None,
    seed: int,
    state: str | None,
    needs: tuple[str, ...],
    cost: dict[str, float],
    swept: bool,
) -> Job:
    options = {"name": name, "benchmark": benchmark, "label": entry.label, "rate": rate, "seed": seed}
    options |= {"state": state, "swept": swept}
    return Job(name, "tune", "tune", options, needs, cost, ready=rate is not None)


def _cost(study: Study, sequences: int) -> dict[str, float]:
    return {"step": study.steps, "measure": sequences}


def startable(known: list[Job], done: Done, busy: set[str], stages: tuple[str, ...]) -> list[Job]:
    """Jobs that can begin now: of these stages, not done, not begun, and all that they need is there."""
    return [
        job
        for job in known
        if job.ready and job.stage in stages and job.name not in done and job.name not in busy
        if all(need in done for need in job.needs)
    ]
