"""The precision of a study: chosen once for this machine's CPU, kept by the folder of the study."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from peft_attrsub.vggt.precision import AUTO, Precision, choose_precision, keep_precision, parse_precision

from .files import STUDY, write_json
from .settings import Study

FILE = "precision.json"


def settle(study: Study, out: Path) -> tuple[Study, Precision, str]:
    """The study with a precision in place of "auto", how it was chosen, and the line to print.

    The folder of a study that has begun decides; another precision that is asked for by name stays in the settings,
    where `keep_study` refuses it. A folder of an older version has no precision.json: its settings name the precision.
    """
    requested = parse_precision(study.precision)
    if not (out / STUDY).exists():
        chosen = choose_precision("cpu", requested)
        return replace(study, precision=chosen.name), chosen, str(chosen)
    kept = Precision.kept(out / FILE, json.loads((out / STUDY).read_text(encoding="utf-8"))["precision"])
    name = kept.name if requested == AUTO else requested
    return replace(study, precision=name), kept, keep_precision(kept, "cpu")


def keep(out: Path, chosen: Precision) -> None:
    """Store how the precision was chosen, with the settings of the study."""
    if not (out / FILE).exists():
        write_json(out / FILE, chosen.record())
