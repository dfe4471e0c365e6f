"""Summaries on disk: a job is done when its folder holds one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_attrsub.evaluation.files import write_atomically

SUMMARY, STUDY = "summary.json", "study.json"
#: Keys that say how long something took: they differ between two runs of the same study.
TIMES = ("seconds", "minutes", "date", "load_at_start")


def write_json(path: Path, record: Any) -> None:
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def read_summary(out: Path, name: str) -> dict[str, Any] | None:
    """What a job found, or None where it is not done."""
    path = out / name / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def keep_study(out: Path, record: Mapping[str, Any]) -> None:
    """Store the settings of the study in its folder; ValueError where it holds another study."""
    path = out / STUDY
    if not path.exists():
        write_json(path, record)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for key in sorted(set(before) | set(record)):
        if before.get(key) != record.get(key):
            raise ValueError(
                f"{out} holds a study with {key} = {before.get(key)!r}, and this one has {record.get(key)!r}: give "
                "another --out, or remove that folder."
            )


def without_times(record: Any) -> Any:
    """The same without the keys that say how long something took."""
    if isinstance(record, Mapping):
        return {key: without_times(value) for key, value in record.items() if key not in TIMES}
    return [without_times(value) for value in record] if isinstance(record, list) else record
