"""Commands side by side, each in its own process with its own log; what is done is not done again.

OUT/steps/<name>.json   the command of a step and the seconds it took, written when it has ended well
OUT/steps/<name>.log    what it printed
OUT/.lock               held while a demo, or a command that it started, is at work in OUT
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from peft_attrsub.evaluation.files import write_atomically

from .plan import Step, read_json

STEPS, LOCK, POLL = "steps", ".lock", 0.1
#: The last bar that a command drew: its share in percent.
_PERCENT = re.compile(rb"(\d{1,3})%\|")
_COUNTED = re.compile(rb"(\d+)/(\d+) scenes")


class StepError(RuntimeError):
    """A command failed; the message names it and its log."""


@dataclass
class Running:
    """A command at work. start: time.monotonic."""

    step: Step
    process: subprocess.Popen[bytes]
    log: Path
    start: float = field(default_factory=time.monotonic)

    def share(self) -> str:
        """How far it says it is, such as " 40 %", or nothing."""
        with self.log.open("rb") as file:
            file.seek(max(0, os.path.getsize(self.log) - 2000))
            tail = file.read()
        shares = [int(found) for found in _PERCENT.findall(tail)]
        shares = shares or [100 * int(done) // max(1, int(total)) for done, total in _COUNTED.findall(tail)]
        # A bar that is full is of what came before, such as the loading of weights.
        return f" {shares[-1]} %" if shares and shares[-1] < 100 else ""


def record_of(out: Path, step: Step) -> dict[str, Any] | None:
    """What is known of a finished step; None where it is still to be done, or was done by another command."""
    path = out / STEPS / f"{step.name}.json"
    if not path.is_file() or not step.product.exists():
        return None
    record = read_json(path)
    return record if record["command"] == step.typed else None


def run_steps(out: Path, steps: Sequence[Step], workers: int, say: Any = print) -> bool:
    """Run what is not done, at most `workers` commands at a time; whether anything was.

    Raises StepError for the first command that fails, after the others were stopped, and KeyboardInterrupt or
    SystemExit(143) where a signal asks for it. Trainings save where they are, so the next run continues them.
    """
    done = {step.name for step in steps if record_of(out, step) is not None}
    left = [step for step in steps if step.name not in done]
    if not left:
        return False
    (out / STEPS).mkdir(exist_ok=True)
    at_work: list[Running] = []
    with _working(out, say) as lock, _terminable(), _bar(len(steps), len(done)) as bar:
        try:
            while left or at_work:
                for step in [step for step in left if done.issuperset(step.after)]:
                    if len(at_work) < workers:
                        left.remove(step)
                        _write(bar, say, f"$ {step.typed}")
                        at_work.append(_start(out, step, lock))
                for job in [job for job in at_work if job.process.poll() is not None]:
                    at_work.remove(job)
                    _finish(out, job)
                    done.add(job.step.name)
                    _write(bar, say, f"  {job.step.title}: done in {time.monotonic() - job.start:.0f} s")
                    bar.update()
                bar.set_description_str(", ".join(f"{job.step.title}{job.share()}" for job in at_work))
                time.sleep(POLL)
        finally:
            _stop(at_work)
    return True


def _start(out: Path, step: Step, lock: int) -> Running:
    log = out / STEPS / f"{step.name}.log"
    # Commands stand beside each other, so each keeps to one core; nothing here needs a network.
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | dict(os.environ)
    with log.open("wb") as file:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),  # so that the lock outlives a killed demo as long as its commands
            start_new_session=True,  # Ctrl-C reaches the demo, which asks its commands to save
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    return Running(step, process, log)


def _end_with_parent() -> None:
    """Have Linux ask a command to stop when the demo is killed; elsewhere it works to its end."""
    with contextlib.suppress(OSError, AttributeError, ImportError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _finish(out: Path, job: Running) -> None:
    """Record a step that has ended well; StepError for one that has not."""
    step, status = job.step, job.process.returncode
    if status != 0 or not step.product.exists():
        lines = [line.strip() for line in re.split(r"[\r\n]", job.log.read_text(errors="replace")) if line.strip()]
        said = lines[-1] if lines else "it said nothing"
        raise StepError(f"{step.title}: the command ended with status {status} ({said}); all of it is in {job.log}.")
    record = {"command": step.typed, "seconds": round(time.monotonic() - job.start, 1)}
    write_atomically(out / STEPS / f"{step.name}.json", (json.dumps(record, indent=1) + "\n").encode())


def _stop(at_work: Sequence[Running]) -> None:
    """Ask the commands to save and stop, and see to it that they do."""
    for job in at_work:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGTERM)
    for job in at_work:
        try:
            job.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


@contextlib.contextmanager
def _working(out: Path, say: Any) -> Iterator[int]:
    """The lock of OUT, as a file's number; waits for the commands of a demo that was killed."""
    import fcntl

    number = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another demo, or a command of one that was stopped, is at work in {out}: waiting for it")
            fcntl.flock(number, fcntl.LOCK_EX)
        yield number
    finally:
        os.close(number)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM leaves by the same door as Ctrl-C, with status 143."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bar(total: int, done: int) -> Any:
    """A bar over the steps on a terminal; elsewhere the lines of `_write` are all."""
    style = "{bar:20} {n_fmt}/{total_fmt} [{elapsed}] {desc}"
    return tqdm(
        total=total, initial=done, bar_format=style, dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty()
    )


def _write(bar: Any, say: Any, text: str) -> None:
    if bar.disable:
        say(text)
    else:
        bar.write(text)
