"""How long each kind of work takes on this machine, measured by doing a little of it; the plan with these times.

Times are of the processor, children included: on a machine that others use too, the plan says what quiet cores take.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .data import draw
from .files import write_json
from .plan import Done, Job, jobs
from .pool import clock, seconds_of
from .settings import STAGES, Study
from .training import Base, build_model, fit, make_batches, pixels

RATES = "rates.json"
#: Sequences that are drawn (after one that pays for imports), and steps that are taken, for the measurement.
DRAWN, STEPS = 2, 3


def rates(study: Study, out: Path, keep: bool = True) -> dict[str, float]:
    """Kind of work -> seconds of one core; measured once for a folder and, with `keep`, stored there."""
    path = out / RATES
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    print("measuring how long a little of each kind of work takes ...", flush=True)
    found = measure(study)
    if keep:
        write_json(path, found)
    return found


def _spent() -> float:
    """Seconds of the processor so far, of this process and of the children that ended."""
    return sum(os.times()[:4])


def measure(study: Study) -> dict[str, float]:
    """Draw two sequences of every kind, train three steps on the scenes among them, measure these."""
    from dataclasses import replace

    from peft_attrsub.datasets import open_benchmark

    from .measuring import evaluate

    torch.set_num_threads(1)
    config = Base.get(study.model).config
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for what in ("generic", *study.benchmarks):
            seconds = []
            for count in (1, 1 + DRAWN):
                place, start = Path(scratch) / f"{what}-{count}" / "set", _spent()
                little = replace(study, scenes=count, generic=count, test=count)
                draw(little, place, what, "test", 0, pixels(study, config), config.patch_size)
                seconds.append(_spent() - start)
            if what == "generic":
                # Every dataset has a process of its own, whose start takes longer than a scene.
                each = max(seconds[1] - seconds[0], 0.0) / DRAWN
                found |= {"draw scenes": each, "dataset": max(seconds[0] - each, 0.0)}
            else:
                found[f"draw {what}"] = seconds[1] / (1 + DRAWN)
        drawn = Path(scratch) / f"generic-{1 + DRAWN}" / "set"
        dataset = open_benchmark("scenes", drawn)
        for kind, images, options in (
            ("source step", study.source_images, {"method": "lora", "rank": study.source_rank}),
            ("step", study.images, {"method": "random", "dim": [str(study.ablation_dim)]}),
        ):
            built = build_model(study, options, 0, STEPS)
            shown = make_batches(dataset, dataset.names, study, config, seed=0, images=images, aspect=1.0)
            fit(built, shown, study, steps=1, lr=1e-6, seed=0)  # the first step is slower
            built.model.train()
            start = _spent()
            fit(built, shown, study, steps=STEPS, lr=1e-6, seed=0)
            found[kind] = (_spent() - start) / STEPS
        start = _spent()
        few = open_benchmark(
            "scenes",
            drawn,
            sequences={name: dataset.frames(name)[: study.views_tuned] for name in dataset.names},
        )
        evaluate(built.base, few, study)
        found["measure"] = (_spent() - start) / len(few)
    # Mining takes about that long for forty adapters of a small model.
    found["mine"] = 10.0
    return {kind: round(value, 3) for kind, value in found.items()}


def told(study: Study, done: Done, measured: Mapping[str, float], workers: int) -> str:
    """The plan: jobs and minutes by stage, of all and of those that are left."""
    rows: dict[str, list[Job]] = defaultdict(list)
    for job in jobs(study, done):
        rows[job.stage].append(job)
    lines = [f"{'stage':10} {'jobs':>6} {'left':>6} {'all':>14} {'left':>14}   ({workers} processes)"]
    totals = [0, 0, 0.0, 0.0]
    for stage in STAGES:
        left = [job for job in rows[stage] if job.name not in done]
        times = [sum(seconds_of(job, measured) for job in part) / max(1, workers) for part in (rows[stage], left)]
        counts: list[Any] = [len(rows[stage]), len(left)]
        lines.append(f"{stage:10} {counts[0]:6} {counts[1]:6} {clock(times[0]):>14} {clock(times[1]):>14}")
        totals = [a + b for a, b in zip(totals, [*counts, *times], strict=True)]
    lines.append(f"{'all':10} {totals[0]:6} {totals[1]:6} {clock(totals[2]):>14} {clock(totals[3]):>14}")
    lines.append("seconds of one core: " + ", ".join(f"{kind} {value:g}" for kind, value in measured.items()))
    lines.append("A sweep whose best rate lies on its border adds up to two runs at that end.")
    return "\n".join(lines)
