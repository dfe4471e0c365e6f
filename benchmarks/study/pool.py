"""Worker processes of one thread each that take jobs from the plan, and the line that says how far it is."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from .files import read_summary
from .plan import Job, jobs, startable
from .settings import STAGES, Study


class Failed(RuntimeError):
    """Jobs that raised; names to sentences."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        first, reason = next(iter(self.reasons.items()))
        super().__init__(f"{len(self.reasons)} jobs failed, the first was {first}: {reason}")


def work(
    study: Study,
    out: Path,
    workers: int,
    rates: Mapping[str, float],
    stages: tuple[str, ...] = STAGES,
) -> dict[str, dict[str, Any]]:
    """Do all jobs of these stages that are left; name -> summary of all that is done.

    workers: processes, 0 for this one. A job that fails is named, and the rest goes on; Failed is raised at the end.
    """
    done = found_on_disk(study, out)
    progress = Progress(workers, rates)
    failures: dict[str, str] = {}
    record = study.record()
    if workers == 0:
        prepare(None, None)
        while chosen := startable(jobs(study, done), done, set(failures), stages):
            job = chosen[0]
            _take(job, lambda job=job: _perform(str(out), record, *_words(job)), done, failures)
            progress.show(jobs(study, done), done, job, stages)
        return _checked(done, failures)
    running: dict[Future[dict[str, Any]], Job] = {}
    keep_memory()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=prepare, initargs=(str(out / "logs"), os.getpid())
    )
    try:
        while True:
            busy = {job.name for job in running.values()} | set(failures)
            waiting = startable(jobs(study, done), done, busy, stages)
            for job in waiting[: workers - len(running)]:
                running[pool.submit(_perform, str(out), record, *_words(job))] = job
            if not running:
                pool.shutdown()
                return _checked(done, failures)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                _take(job, future.result, done, failures)
                progress.show(jobs(study, done), done, job, stages)
    except BaseException:
        # What is left in work is made anew by the next run: nobody is to wait for it.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def found_on_disk(study: Study, out: Path) -> dict[str, dict[str, Any]]:
    """What earlier runs have done. The plan grows with what is found, so it is asked until it does not."""
    done: dict[str, dict[str, Any]] = {}
    while True:
        names = [job.name for job in jobs(study, done) if job.name not in done]
        found = {name: summary for name in names if (summary := read_summary(out, name)) is not None}
        if not found:
            return done
        done |= found


def keep_memory() -> None:
    """Processes started from here on keep the memory they free: glibc would give every step's tensors back to the
    system and fetch them again, which takes a tenth of the time. Other systems do not read these."""
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(8 << 30))


def prepare(logs: str | None, parent: int | None) -> None:
    """Make a process ready for jobs: one thread, and what it prints goes to a file. logs: None prints as usual."""
    import torch

    from peft_attrsub._machine import print_anything

    print_anything()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if logs is None or parent is None:
        return
    Path(logs).mkdir(parents=True, exist_ok=True)
    log = (Path(logs) / f"worker-{os.getpid()}.log").open("a", buffering=1, encoding="utf-8")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())

    def watch() -> None:
        # A killed study must not leave workers that write beside the next one.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _words(job: Job) -> tuple[str, str, dict[str, Any]]:
    return job.name, job.action, job.options


def _perform(out: str, record: dict[str, Any], name: str, action: str, options: dict[str, Any]) -> dict[str, Any]:
    from .actions import perform

    try:
        return perform(Path(out), record, name, action, options)
    except Exception:
        traceback.print_exc()
        raise


def _take(job: Job, result: Any, done: dict[str, dict[str, Any]], failures: dict[str, str]) -> None:
    """The summary of a job to `done`, or why there is none to `failures`."""
    try:
        done[job.name] = result()
    except BrokenProcessPool as error:
        raise Failed({job.name: "its process was killed, perhaps for want of memory"}) from error
    except Exception as error:
        failures[job.name] = f"{type(error).__name__}: {error}"
        print(f"{job.name} failed: {failures[job.name]}", file=sys.stderr, flush=True)


def _checked(done: dict[str, dict[str, Any]], failures: dict[str, str]) -> dict[str, dict[str, Any]]:
    if failures:
        raise Failed(failures)
    return done


class Progress:
    """A line per job: what is done, and the time that the rest will take at the speed so far."""

    def __init__(self, workers: int, rates: Mapping[str, float]) -> None:
        self.workers, self.rates = max(1, workers), rates
        self.expected = self.taken = 0.0
        self.stage = ""

    def show(self, known: list[Job], done: Mapping[str, Mapping[str, Any]], job: Job, stages: tuple[str, ...]) -> None:
        chosen = [one for one in known if one.stage in stages]
        if (summary := done.get(job.name)) is not None:
            self.expected += seconds_of(job, self.rates)
            self.taken += float(summary.get("seconds", 0.0))
        left = sum(seconds_of(one, self.rates) for one in chosen if one.name not in done) / self.workers
        # The plan's guess, corrected by how long jobs took so far.
        left *= self.taken / self.expected if self.expected > 0 and self.taken > 0 else 1.0
        number = sum(one.name in done for one in chosen)
        print(f"{number}/{len(chosen)} jobs, {clock(left)} left: {job.name}", flush=True)


def seconds_of(job: Job, rates: Mapping[str, float]) -> float:
    """What a job is expected to take; a kind of work that was not measured counts as a second each."""
    return sum(amount * rates.get(kind, 1.0) for kind, amount in job.cost.items())


def clock(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s"
