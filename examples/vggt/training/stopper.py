"""Signals that ask a run to stop after the step it is in."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Stopper:
    """SIGTERM, SIGINT and SIGUSR2 ask for a stop after the step in work; a second Ctrl-C is not waited for. Other
    signals may come twice, from a launcher and from its group, and are one wish."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        names = ("SIGTERM", "SIGINT", "SIGUSR2")  # Windows lacks the last
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.asked = self.asked or number
