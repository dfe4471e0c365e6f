"""Signals and standard output around a call into a library that handles neither well."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_signals(clean_up: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block ends, then deliver the first of them to whoever handles it.

    clean_up: called before that, where the signal's default action would end the process without a word. Outside
    the main thread, where Python allows no handlers, the block just runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            if clean_up is not None and before[signal.Signals(arrived[0])] in (None, signal.SIG_DFL):
                clean_up()
            signal.raise_signal(arrived[0])


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send the process's file descriptor 1 to nowhere in the block, so that C code cannot print; stderr stays."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
