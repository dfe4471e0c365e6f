"""until_stopped: SIGTERM and Ctrl-C end a command alike, whatever it is doing, and leave no handler behind."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from peft_attrsub.interrupts import until_stopped


def stop_by(number: int) -> int:
    os.kill(os.getpid(), number)
    threading.Event().wait(5)  # the handler runs here
    return 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_sentence_and_a_status(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    def work() -> int:
        try:
            return until_stopped("inner", lambda: stop_by(number))
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert until_stopped("script", work) == 128 + number and cleaned
    assert capsys.readouterr().err == "script: stopped; the same command continues\n"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_command_that_makes_a_status_of_the_interrupt_itself() -> None:
    def work() -> int:
        try:
            return stop_by(signal.SIGTERM)
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    assert until_stopped("script", work) == 143
    with pytest.raises(SystemExit):
        until_stopped("script", lambda: (_ for _ in ()).throw(SystemExit(2)))


def test_results_and_errors_pass_and_threads_work() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(until_stopped("script", lambda: 7)))
    thread.start()
    thread.join()
    assert found == [7] and until_stopped("script", lambda: 3) == 3
    with pytest.raises(ValueError, match="wrong"):
        until_stopped("script", lambda: int("wrong"))
