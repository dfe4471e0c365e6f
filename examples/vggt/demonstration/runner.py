"""Commands side by side, each in its own process with its own log; what is done is not done again.

OUT/steps/<name>.json   the command of a step and the seconds it took, written when it has ended well
OUT/steps/<name>.log    what it printed
OUT/.lock               held while a demo, or a command that it started, is at work in OUT

For Linux and macOS: process groups and locks of files are POSIX.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from peft_attrsub._files import lock as lock_file
from peft_attrsub.evaluation.files import write_atomically

from .estimate import Job
from .plan import Step, read_json

STEPS, LOCK, POLL = "steps", ".lock", 0.1
_COUNTED = re.compile(r"(\d+)/(\d+)")


class StepError(RuntimeError):
    """A command failed; the message names it and its log."""


class Watcher(Protocol):
    """Who is told of what happens. Every call may take a moment, but commands that end meanwhile wait for it."""

    def say(self, text: str) -> None:
        """A line for people."""

    def finished(self, step: Step, seconds: float) -> Sequence[Step]:
        """A step is done; returns steps that have become known by it."""

    def tick(self, running: Sequence[Running]) -> None:
        """Called some times a second."""


@dataclass
class Running:
    """A command at work. start: time.monotonic; cpu: CPU seconds, once it has ended."""

    step: Step
    process: subprocess.Popen[bytes]
    log: Path
    start: float = field(default_factory=time.monotonic)
    cpu: float = 0.0
    _read: int = 0
    _parts: dict[str, float] = field(default_factory=dict)
    _first: tuple[float, float] | None = None

    def share(self) -> float:
        """The share of its work that is done, by what it has printed of its parts; it never falls."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            lines = re.split(rb"[\r\n]", file.read())
        # The last line may be half printed.
        self._read += sum(len(line) + 1 for line in lines[:-1])
        for line in lines[:-1] + ([lines[-1]] if lines[-1].endswith(b"]") else []):
            self._note(line.decode(errors="replace").strip())
        return sum(self._parts.values()) / max(1, len(self.step.parts))

    def _note(self, line: str) -> None:
        for part in self.step.parts:
            if not line.startswith((f"{part}:", f"{part} ")):
                continue
            count = _COUNTED.search(line, len(part))
            share = float("done" in line) if count is None else int(count[1]) / max(1, int(count[2]))
            self._parts[part] = max(self._parts.get(part, 0.0), min(1.0, share))

    def job(self) -> Job:
        """For the forecast."""
        seconds, share = time.monotonic() - self.start, self.share()
        if self._first is None and share > 0:
            self._first = (seconds, share)
        return Job(seconds, share, self._first)


def record_of(out: Path, step: Step) -> dict[str, Any] | None:
    """What is known of a finished step; None where it is still to be done, or was done by another command."""
    path = out / STEPS / f"{step.name}.json"
    if not path.is_file() or not step.product.exists():
        return None
    record = read_json(path)
    return record if record["command"] == step.typed else None


def run_steps(out: Path, steps: Sequence[Step], workers: int, watcher: Watcher, lock: int | None = None) -> bool:
    """Run what is not done, at most `workers` commands at a time; whether anything was. lock: of `working`, where it
    is held already.

    Raises StepError for the first command that fails, after the others were stopped; whatever else is raised, such as
    KeyboardInterrupt, stops them too. Trainings save where they are, so the next run continues them.
    """
    done = {step.name for step in steps if record_of(out, step) is not None}
    left = [step for step in steps if step.name not in done]
    if not left:
        return False
    (out / STEPS).mkdir(exist_ok=True)
    at_work: list[Running] = []
    with working(out, watcher.say) if lock is None else contextlib.nullcontext(lock) as held:
        try:
            while left or at_work:
                for step in [step for step in left if done.issuperset(step.after)]:
                    if len(at_work) < workers:
                        left.remove(step)
                        watcher.say(f"$ {step.typed}")
                        with _undisturbed():
                            at_work.append(_start(out, step, held))
                for job in [job for job in at_work if _ended(job)]:
                    at_work.remove(job)
                    seconds = _finish(out, job)
                    done.add(job.step.name)
                    watcher.say(f"  {job.step.title}: done in {seconds:.0f} s")
                    for step in watcher.finished(job.step, seconds):
                        if record_of(out, step) is None:
                            left.append(step)
                        else:
                            done.add(step.name)
                watcher.tick(at_work)
                if len(at_work) == workers or not any(done.issuperset(step.after) for step in left):
                    time.sleep(POLL)
        finally:
            with _undisturbed():
                _stop(at_work)
    return True


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals take effect at the end: a command that is being started must not be lost, nor one that is stopped."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


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
            preexec_fn=_end_with_parent(),
        )
    return Running(step, process, log)


def _end_with_parent() -> Callable[[], Any] | None:
    """What has Linux ask a command to stop when the demo is killed; elsewhere the command works to its end.

    The function is looked up here, since after a fork nothing may be imported.
    """
    if sys.platform != "linux":
        return None
    import ctypes

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return None if prctl is None else lambda: prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def _ended(job: Running) -> bool:
    """Whether a command has ended; it is then reaped, by which its CPU time becomes known."""
    before = os.times()
    if job.process.poll() is None:
        return False
    after = os.times()
    job.cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return True


def _finish(out: Path, job: Running) -> float:
    """Record a step that has ended well, and return its seconds; StepError for one that has not."""
    step, status = job.step, job.process.returncode
    if status != 0 or not step.product.exists():
        lines = [
            line.strip()
            for line in re.split(r"[\r\n]", job.log.read_text(encoding="utf-8", errors="replace"))
            if line.strip()
        ]
        said = lines[-1] if lines else "it said nothing"
        raise StepError(f"{step.title}: the command ended with status {status} ({said}); all of it is in {job.log}.")
    seconds = time.monotonic() - job.start
    record = {"command": step.typed, "seconds": round(seconds, 1), "cpu_seconds": round(job.cpu, 1)}
    write_atomically(out / STEPS / f"{step.name}.json", (json.dumps(record, indent=1) + "\n").encode())
    return seconds


def _stop(at_work: Sequence[Running]) -> None:
    """Ask the commands to save and stop, and see to it that they do."""
    for job in at_work:
        _signal(job, signal.SIGTERM)
    for job in at_work:
        try:
            job.process.wait(30)
        except subprocess.TimeoutExpired:
            _signal(job, signal.SIGKILL)
            job.process.wait()


def _signal(job: Running, number: int) -> None:
    """To the command and all that it has started."""
    # macOS says that it is not permitted where all of the group have ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, number)


@contextlib.contextmanager
def working(out: Path, say: Callable[[str], None]) -> Iterator[int]:
    """The lock of OUT, as a file's number; waits for the commands of a demo that was killed."""
    number = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waiting = False
        while True:
            try:
                lock_file(number)
                break
            except BlockingIOError:
                if not waiting:
                    say(f"another demo, or a command of one that was stopped, is at work in {out}: waiting for it")
                waiting = True
                time.sleep(0.2)
        yield number
    finally:
        os.close(number)


def in_use(out: Path) -> bool:
    """Whether a demo, or a command of one, is at work in OUT."""
    if not (out / LOCK).is_file():
        return False
    with (out / LOCK).open("r+b") as file:
        try:
            lock_file(file.fileno())
        except BlockingIOError:
            return True
    return False
