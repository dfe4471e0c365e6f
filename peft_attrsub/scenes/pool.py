"""The parent's side of the workers: starts them, hands out scenes, survives their deaths.

A worker is a fresh process (never a fork: Blender and Embree hold threads) with a log of its own. It is replaced
after `recycle` scenes, after a failure, and when it dies.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTEMPTS = 2  # a failing scene is tried again once, with the same seed
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One scene to make: in the folder `partial`, renamed to `final`; redo, replace: see `worker.SceneMaker.make`."""

    index: int
    partial: str
    final: str
    redo: list[int] | None = None
    replace: bool = False


@dataclass(frozen=True)
class Result:
    """What became of a job. kind: "done", "error" (raised), "died" (the process ended), "disk" (full), "missing"
    (a package, a class), "no device" (a GPU that is not there), "stopped" (by a signal)."""

    index: int
    kind: str
    bytes: int = 0
    error: str = ""
    traceback: str = ""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    job: Job | None = None
    scenes: int = 0
    buffer: bytes = b""


@dataclass
class Pool:
    """`run(jobs)` yields one Result per job that ended, in any order.

    setup: what a worker is told first ("plan", "tag", "threads"). workers: how many processes. logs: folder of
    `<name>-<number>.log`. environment: for the workers, over this process's. stopping: set from a signal handler, it
    ends the run after the views in work; a second time (`kill`) at once. draining: no further job is handed out,
    those in work end normally.
    """

    setup: dict[str, Any]
    workers: int
    logs: Path
    name: str = "worker"
    recycle: int = 50
    environment: dict[str, str] = field(default_factory=dict)
    stopping: bool = False
    kill: bool = False
    draining: bool = False
    _slots: list[_Worker | None] = field(default_factory=list)

    def run(self, jobs: Iterable[Job]) -> Generator[Result, None, None]:
        if os.name == "nt":
            raise OSError("scenes are rendered by worker processes, which need Linux or macOS: use WSL on Windows.")
        waiting, attempts = deque(jobs), dict[int, int]()
        self._slots = [None] * max(1, min(self.workers, len(waiting)))
        self.logs.mkdir(parents=True, exist_ok=True)
        told = False
        try:
            while True:
                for number in range(len(self._slots)):
                    if waiting and not (self.stopping or self.draining):
                        self._give(number, waiting)
                if not any(worker and worker.job for worker in self._slots):
                    return
                if self.stopping and (self.kill or not told):
                    told = True
                    for worker in filter(None, self._slots):
                        worker.process.kill() if self.kill else worker.process.terminate()
                for number, job, result in self._listen():
                    if result.kind in ("error", "died") and not (self.stopping or self.draining):
                        self._end(number)
                        attempts[result.index] = attempts.get(result.index, 0) + 1
                        if attempts[result.index] < ATTEMPTS:
                            waiting.appendleft(job)
                            continue
                    elif self.stopping and result.kind == "died":
                        continue
                    yield result
        finally:
            for number in range(len(self._slots)):
                self._end(number, at_once=True)

    def _give(self, number: int, waiting: deque[Job]) -> None:
        """Hand the next job to worker `number` if it is free, replacing it where that is due."""
        worker = self._slots[number]
        if worker and worker.job:
            return
        if worker and worker.scenes >= self.recycle:
            self._end(number)
        for _ in range(ATTEMPTS):
            worker = self._slots[number] = self._slots[number] or self._start(number)
            assert worker.process.stdin is not None
            try:
                worker.process.stdin.write(json.dumps(vars(waiting[0])).encode() + b"\n")
                worker.process.stdin.flush()
            except OSError:  # it died while it had nothing to do
                self._end(number)
                continue
            worker.job = waiting.popleft()
            return
        raise OSError(f"no worker can be started: see the end of {self._log(number)}.")

    def _start(self, number: int) -> _Worker:
        environment = os.environ | self.environment
        # One arena: arrays that several threads allocate otherwise leave holes, and memory creeps up scene by scene.
        environment.setdefault("MALLOC_ARENA_MAX", "1")
        if self.workers > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")  # processes instead of threads, not both
        # -P: the folder of the script stays off the path, where its modules would hide those of other packages.
        with self._log(number).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", str(HERE / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        worker = _Worker(process)
        # "" on the path means the folder of the parent's start, which is also the worker's.
        setup = self.setup | {"parent": os.getpid(), "path": sys.path, "package": str(HERE.parent)}
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(setup).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            pass  # seen again, and handled, when it is given its first job
        return worker

    def _listen(self) -> list[tuple[int, Job, Result]]:
        """Wait up to half a second, so that signals are noticed, for results and for deaths."""
        found = []
        with selectors.DefaultSelector() as selector:
            for number, worker in enumerate(self._slots):
                if worker and worker.process.stdout:
                    selector.register(worker.process.stdout, selectors.EVENT_READ, number)
            for key, _ in selector.select(timeout=0.5):
                number = key.data
                worker = self._slots[number]
                assert worker is not None
                data = os.read(key.fd, 1 << 16)
                worker.buffer += data
                *lines, worker.buffer = worker.buffer.split(b"\n")
                for line in lines:
                    if worker.job:
                        found.append((number, worker.job, Result(**json.loads(line))))
                        worker.job, worker.scenes = None, worker.scenes + 1
                if not data:
                    job = worker.job
                    self._end(number)
                    if job:
                        found.append((number, job, self._death(job, worker.process.returncode, number)))
        return found

    def _death(self, job: Job, status: int, number: int) -> Result:
        if status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
            how = f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        else:
            how = f"ended with status {status}"
        return Result(job.index, "died", error=f"the worker {how}: see the end of logs/{self._log(number).name}.")

    def _end(self, number: int, at_once: bool = False) -> None:
        """Let worker `number` go: it leaves by itself when its standard input ends, and is killed otherwise."""
        worker, self._slots[number] = self._slots[number], None
        if worker is None:
            return
        process = worker.process
        if at_once and worker.job:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with suppress(OSError):  # what was still in its buffer has no reader any more
                    pipe.close()
        try:
            process.wait(timeout=None if at_once and worker.job else 30)  # Blender takes its time to tidy up
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _log(self, number: int) -> Path:
        return self.logs / f"{self.name}-{number}.log"
