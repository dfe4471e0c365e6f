"""One row of a table for one seed: fine-tune, then measure on the test, the cross-domain and the generic scenes."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from .data import ASPECT, open_set
from .entries import Entry, entries
from .measuring import OtherPictures, evaluate, score
from .settings import Study
from .training import Base, build_model, fit, load_state, make_batches, save_state

STATE = "state.safetensors"
SETS = ("test", "cross", "generic")


def subset(names: tuple[str, ...], study: Study, benchmark: str, seed: int) -> list[str]:
    """The part of the training set that a seed learns from."""
    count = max(1, round(study.share * len(names)))
    rng = np.random.default_rng([seed, crc32(benchmark.encode())])
    return [names[i] for i in sorted(rng.permutation(len(names))[:count])]


def find_entry(study: Study, benchmark: str, label: str) -> Entry:
    return next(entry for entry in entries(study, benchmark) if entry.label == label)


def tune(
    study: Study,
    out: Path,
    name: str,
    benchmark: str,
    label: str,
    rate: float,
    seed: int,
    state: str | None,
    swept: bool,
) -> dict[str, Any]:
    """Train one row with one learning rate, or take up what a sweep has trained; measure it.

    swept: a run of a sweep: it is measured on the validation set and its state is kept. state: the run of the sweep
    that trained with this rate and seed already.
    """
    entry = find_entry(study, benchmark, label)
    built = build_model(study, entry.settings(out), seed, study.steps)
    kept = use_raw_columns(built, out, entry, study) if entry.raw else None
    found: dict[str, Any] = {"trainable": built.trainable, "rate": rate, "seed": seed}
    if kept is not None:
        found["orthonormal_modules"] = kept
    if state is None:
        dataset = open_set(out, benchmark, "train", study)
        names = subset(dataset.names, study, benchmark, seed)
        batches = make_batches(
            dataset,
            names,
            study,
            built.base.config,
            seed=seed,
            images=study.images,
            aspect=ASPECT[benchmark],
        )
        found |= {"scenes": len(names)} | fit(built, batches, study, steps=study.steps, lr=rate, seed=seed)
    else:
        load_state(built, out / state / STATE)
    if swept:
        found["validation"] = evaluate(built.base, open_set(out, benchmark, "validation", study), study)
        value = score(found["validation"]["mean"])
        found["score"] = value if math.isfinite(value) else None
        save_state(built, out / name / STATE)
    else:
        found["sets"] = measure_all(built.base, study, out, benchmark)
        if seed == 0:
            found["blind"] = blind(built.base, study, out, benchmark)
    return found


def blind(model: Any, study: Study, out: Path, benchmark: str) -> dict[str, float]:
    """Means over the test set with the pictures of other sequences."""
    return evaluate(model, OtherPictures(open_set(out, benchmark, "test", study)), study)["mean"]


def measure_all(model: Any, study: Study, out: Path, benchmark: str) -> dict[str, Any]:
    """Every set of a benchmark, and the generic scenes that show what was forgotten."""
    start, found = time.monotonic(), {}
    for part in SETS:
        what = "generic" if part == "generic" else benchmark
        found[part] = evaluate(model, open_set(out, what, part, study), study)
    return found | {"seconds": round(time.monotonic() - start, 2)}


def measure_base(study: Study, out: Path, benchmark: str) -> dict[str, Any]:
    """The row "none"."""
    model = copy.deepcopy(Base.get(study.model))
    sets = measure_all(model, study, out, benchmark)
    return {"trainable": 0, "sets": sets, "blind": blind(model, study, out, benchmark)}


def use_raw_columns(built: Any, out: Path, entry: Entry, study: Study) -> int:
    """Put the attributes' own columns side by side, [U_1 .. U_k] and [V_1 .. V_k], in the place of the orthonormal A
    and B; how many modules keep these, since a direction was dropped there and the core has no place for it.

    The tuner has no such setting: its A and B are overwritten in the study alone. M = 0, so nothing else changes.
    """
    from peft_attrsub.basis import Basis

    basis = Basis.from_pretrained(out / "bases" / str(entry.basis) / "basis")
    basis = basis.select(None, int(entry.options["dim"][0]))
    kept = 0
    for module in basis.modules:
        layer = built.base.get_submodule(module)
        rows = [basis.factors(module, name) for name in basis.attributes]
        with torch.no_grad():
            pairs = [(layer.attrsub_A, [u for u, _, _ in rows]), (layer.attrsub_B, [v for _, _, v in rows])]
            columns = [(store["default"], torch.cat(parts, 1)) for store, parts in pairs]
            if any(held.shape != raw.shape for held, raw in columns):
                kept += 1
                continue
            for held, raw in columns:
                held.copy_(raw)
    return kept
