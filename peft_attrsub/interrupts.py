"""How a command ends when it is told to stop: SIGTERM like Ctrl-C, with one sentence, and 128 + n as exit status."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

_active: list[str] = []
CONTINUES = "stopped; the same command continues"


def say_stopped(name: str, sentence: str = CONTINUES) -> None:
    """Print "name: sentence" to standard error, on a line of its own."""
    print(f"{name}: {sentence}", file=sys.stderr, flush=True)


def until_stopped(
    name: str, work: Callable[[], int], sentence: str = CONTINUES, signals: Sequence[str] = ("SIGTERM",)
) -> int:
    """The exit status of `work()`, or 128 + n where signal n stopped it: SIGINT (130), or one of `signals`.

    They raise KeyboardInterrupt in `work`, as Ctrl-C does, so that it is cleaned up by the same code; then
    "name: sentence" is printed instead of a traceback. Code within `work` may set handlers of its own. Outside the
    main thread, where Python allows no handlers, only KeyboardInterrupt is handled. Within the `work` of another call
    it just works: the outer one speaks. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    if _active:
        return work()
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, one) for one in signals if hasattr(signal, one)] if main_thread else []
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    _active.append(name)
    try:
        return work()
    except KeyboardInterrupt:
        say_stopped(name, sentence)
        return 128 + (received[0] if received else signal.SIGINT)
    except SystemExit:
        if not received:
            raise
        return 128 + received[0]  # the command turned the interrupt into an exit status itself
    finally:
        _active.clear()
        for number, handler in before.items():
            # None: a handler that was not set from Python and cannot be set again from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
