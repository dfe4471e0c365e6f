"""Who is to blame for a failed case: the same case under stock LoRA tells."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .subjects import Subject

#: What a failed assertion, a wrong answer and a missing `pytest.raises` end in.
_FAILURES = (Exception, pytest.fail.Exception)


def judged(case: Callable[..., None]) -> Callable[..., None]:
    """A case that is skipped, with the reason, where stock LoRA fails in it by the same kind of error.

    Only a failure runs the case a second time. `tmp_path` is then another folder.
    """

    @functools.wraps(case)
    def run(self: Any, subject: Subject, **fixtures: Any) -> None:
        try:
            case(self, subject, **fixtures)
        except _FAILURES as ours:
            again = dict(fixtures)
            if "tmp_path" in again:
                again["tmp_path"] = Path(again["tmp_path"], "stock")
                again["tmp_path"].mkdir()
            try:
                case(self, subject.stock(), **again)
            except _FAILURES as theirs:
                if type(theirs) is type(ours):
                    pytest.skip(
                        f"stock LoRA fails as well: {type(theirs).__name__}: {str(theirs)[:300]} at {where(theirs)}"
                    )
            raise

    return run


def where(error: BaseException) -> str:
    """The line of the case that raised."""
    lines = [entry for entry in traceback.extract_tb(error.__traceback__) if "conformance" in entry.filename]
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno}"


class Judged:
    """A class whose test methods all take a subject and are `judged`, but for those marked `ours_alone`."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name, case in list(vars(cls).items()):
            if name.startswith("test_") and not getattr(case, "ours_alone", False):
                setattr(cls, name, judged(case))


def ours_alone(case: Callable[..., None]) -> Callable[..., None]:
    """Mark a case that stock LoRA has no counterpart of."""
    case.ours_alone = True
    return case
