"""What a job does, by name, in whichever process it runs; its summary is written last."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from . import data, explaining, mining, sources, tuning
from .files import SUMMARY, read_summary, write_json
from .settings import Study
from .training import Base, pixels


def perform(out: Path, record: dict[str, Any], name: str, action: str, options: dict[str, Any]) -> dict[str, Any]:
    """Do one job and write its summary; one that is done is not done again."""
    if (known := read_summary(out, name)) is not None:
        return known
    study, start = Study.of(record), time.monotonic()
    found = ACTIONS[action](study, out, name, options)
    summary = found | {"job": {"action": action, **options}, "seconds": round(time.monotonic() - start, 2)}
    if "seconds" in found:  # of the part that the job itself timed, such as the training
        summary["trained"] = {"seconds": found["seconds"]}
    write_json(out / name / SUMMARY, summary)
    return summary


def _draw(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    config = Base.get(study.model).config
    place = out / name / "set"
    found = data.draw(study, place, **options, size=pixels(study, config), patch=config.patch_size)
    shutil.rmtree(place.with_name("meshes"), ignore_errors=True)
    shutil.rmtree(place.with_name("bundles"), ignore_errors=True)
    return found


def _train_source(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return sources.train_source(study, out, **options)


def _diagnose(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return sources.diagnose(study, out)


def _mine(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return mining.mine(study, out, **options)


def _tune(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return tuning.tune(study, out, **options)


def _measure_base(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return tuning.measure_base(study, out, **options)


def _explain(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return explaining.explain(study, out, **options)


def _make_oracle(study: Study, out: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return explaining.make_oracle(study, out, **options)


ACTIONS = {
    "draw": _draw,
    "train_source": _train_source,
    "diagnose": _diagnose,
    "mine": _mine,
    "tune": _tune,
    "measure_base": _measure_base,
    "explain": _explain,
    "make_oracle": _make_oracle,
}
