"""Many independent jobs, on this machine or at Slurm; each is resumable, so the same command continues a launch.

    options = options_of(args)                                     # of a parser that went through add_options
    jobs = [Job(name, script_command(SCRIPT, arguments, options), folder / name) for name, arguments in ...]
    raise SystemExit(launch(jobs, options, folder, "my-jobs"))     # 0 all done, 1 some failed, 130/143 stopped

Jobs that are done are not started again, and those that wait or run at Slurm already are only watched.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from .jobs import STATES, Attempt, Job, State, at_work, read_json, read_state, write_state
from .slurm_job import Queued, check_slurm, describe, minutes, queue, submit

__all__ = [
    "Job",
    "LauncherOptions",
    "State",
    "add_options",
    "launch",
    "options_of",
    "script_command",
    "states",
    "table",
    "without_options",
]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class LauncherOptions:
    """Where and how jobs run. Also fit for HfArgumentParser."""

    launcher: Literal["local", "slurm"] | None = _option(None, "run as jobs: on this machine, or as an array at Slurm")
    dry_run: bool = _option(False, "only print what would be started or submitted")
    states: bool = _option(False, "only print the table of the jobs' states")
    wait: bool = _option(True, "slurm: stay until all jobs have ended (Ctrl-C leaves them to Slurm)")
    parallel: int | None = _option(None, "jobs at a time (default: local, one or one per share of GPUs; slurm, all)")
    gpus: int | None = _option(None, "GPUs per job, more than one through accelerate (default: local, 1 where any)")
    partition: str | None = _option(None, "slurm: name of the partition")
    gres: str | None = _option(None, "slurm: such as gpu:a100:1, instead of --gpus")
    cpus: int | None = _option(None, "slurm: cores per job")
    mem: str | None = _option(None, "slurm: memory per job, such as 64G")
    time: str = _option("24:00:00", "slurm: limit of one attempt; jobs that need longer are requeued and continue")
    account: str | None = _option(None, "slurm: who pays")
    qos: str | None = _option(None, "slurm: quality of service")
    constraint: str | None = _option(None, "slurm: features that the node must have")
    setup: list[str] | None = field(
        default=None, metadata={"help": "slurm: shell lines before each job, such as 'module load cuda'"}
    )
    grace: int = _option(120, "seconds that a job has for saving before it is killed")
    requeues: int = _option(1000, "slurm: how often a job may reach its time limit")

    def check(self) -> None:
        """ValueError for numbers that make no sense, or inside another launcher."""
        for name in ("parallel", "gpus", "cpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}: give 1 or more.")
        if self.grace < 30:
            raise ValueError(f"--grace is {self.grace}: give 30 seconds or more, so that jobs can save.")
        if self.requeues < 0:
            raise ValueError(f"--requeues is {self.requeues}: give 0 or more.")
        minutes(self.time)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError("--launcher starts processes itself: run this script with python, not accelerate launch.")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The fields of LauncherOptions as a group of the parser's options."""
    group = parser.add_argument_group("as jobs")
    for item in dataclasses.fields(LauncherOptions):
        flag, text = f"--{item.name.replace('_', '-')}", item.metadata["help"]
        if item.name == "launcher":
            group.add_argument(flag, choices=("local", "slurm"), help=text)
        elif isinstance(item.default, bool):
            action: Any = argparse.BooleanOptionalAction if item.default else "store_true"
            group.add_argument(flag, action=action, default=item.default, help=text)
        elif item.name == "setup":
            group.add_argument(flag, nargs="+", metavar="LINE", help=text)
        else:
            kind = int if "int" in str(item.type) else str
            default = "" if item.default is None else f" (default: {item.default})"
            group.add_argument(
                flag, type=kind, default=item.default, metavar="N" if kind is int else "X", help=text + default
            )


def options_of(args: argparse.Namespace) -> LauncherOptions:
    """From the parsed arguments; `launcher` is None where the script is to do the work itself."""
    names = [item.name for item in dataclasses.fields(LauncherOptions)]
    options = LauncherOptions(**{name: getattr(args, name) for name in names})
    if options.launcher is None:
        given = [name for name in ("dry_run", "states") if getattr(options, name)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} is about jobs: give --launcher local or slurm as well.")
    return options


def without_options(arguments: Sequence[str]) -> list[str]:
    """A script's arguments without the launcher's: what every job is started with."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser)
    return parser.parse_known_args(list(arguments))[1]


def script_command(script: str | Path, arguments: Sequence[str], options: LauncherOptions) -> tuple[str, ...]:
    """This Python and the script; with several GPUs per job, by `accelerate launch` with a process for each."""
    launcher: tuple[str, ...] = ()
    if (options.gpus or 1) > 1:
        launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(options.gpus))
        launcher += (
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        )
    return (sys.executable, *launcher, str(Path(script).resolve()), *arguments)


def launch(jobs: Sequence[Job], options: LauncherOptions, folder: Path, name: str = "jobs") -> int:
    """Run what is not done; print the table of all; 0 all done, 1 some are not, 130 or 143 stopped by a signal.

    folder: where submitit keeps its files. name: of the array at Slurm. With --no-wait, 0 once all are submitted.
    Raises ValueError for options that do not fit, names that are not unique, or where sbatch refuses.
    """
    options.check()
    if not jobs:
        raise ValueError("there are no jobs to launch.")
    twice = sorted({job.name for job in jobs if sum(job.name == other.name for other in jobs) > 1})
    if twice or len({job.folder for job in jobs}) < len(jobs):
        raise ValueError(f"two jobs share a name or a folder: {', '.join(twice) or 'see their folders'}.")
    slurm = options.launcher == "slurm"
    before = states(jobs)
    if options.states:
        print(table(jobs, before))
        return _status(before)
    left = [job for job, state in zip(jobs, before, strict=True) if not _taken(job, state)]
    if options.dry_run:
        print(f"{len(jobs) - len(left)} of {len(jobs)} jobs are done or at work already.")
        if left:
            print(describe(options, name, left) if slurm else _describe_local(options, left))
        return 0
    if slurm:
        check_slurm()
        if left:
            ids = submit(left, options, name, folder)
            print(f"{len(left)} jobs submitted: {ids[0]}{f' to {ids[-1]}' if len(ids) > 1 else ''}", flush=True)
        if not options.wait:
            print(table(jobs, states(jobs)))
            return 0
        status = _watch(jobs)
    else:
        status = _run_here(left, options)
    after = states(jobs)
    print(table(jobs, after))
    return status or _status(after)


def states(jobs: Sequence[Job]) -> list[State]:
    """How each job stands, by its own word and Slurm's: what claims to run but does not, failed without a word."""
    told = [read_state(job) for job in jobs]
    submitted = any((job.folder / "submitted.json").exists() for job in jobs)
    lines = queue() if submitted else {}
    return [_settle(job, state, lines) for job, state in zip(jobs, told, strict=True)]


def table(jobs: Sequence[Job], found: Sequence[State]) -> str:
    """One line per job (name, state, attempts, reason, log), then how many are in which state."""
    rows = [("job", "state", "attempts", "reason", "log")]
    for job, state in zip(jobs, found, strict=True):
        log = str(job.log) if job.log.exists() else ""
        rows.append((job.name, state.state, str(state.attempts), state.reason, log))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    counts = {state: sum(entry.state == state for entry in found) for state in STATES}
    return "\n".join([line.rstrip() for line in lines] + [", ".join(f"{n} {s}" for s, n in counts.items() if n)])


def _status(found: Sequence[State]) -> int:
    return int(any(state.state != "done" for state in found))


def _taken(job: Job, state: State) -> bool:
    """Whether the job is done, at work, or waiting at Slurm, so that it must not be started (again)."""
    return state.state in ("done", "running") or (state.state == "pending" and _identity(job) is not None)


def _identity(job: Job) -> str | None:
    """The job's id at Slurm, None where it was not submitted, or with another command."""
    given = read_json(job.folder / "submitted.json")
    return given["id"] if given is not None and given.get("command") == list(job.command) else None


def _settle(job: Job, state: State, lines: dict[str, Queued] | None) -> State:
    if state.state not in ("running", "pending"):
        return state
    identity = _identity(job)
    if identity is None:
        if state.state == "running" and not at_work(job):
            return replace(state, state="stopped", reason="ended without a word: killed, or the machine went down")
        return state
    if lines is None:
        return replace(state, reason=state.reason or "squeue does not answer")
    line = lines.get(identity)
    if line is None:
        # It may have ended between the reading of its state and squeue's answer.
        again = read_state(job)
        if again.state in ("running", "pending"):
            return replace(again, state="failed", reason=f"left the queue of Slurm without a word ({identity})")
        return again
    if line.state == "PENDING":
        return replace(state, state="pending", reason=": ".join(part for part in (state.reason, line.reason) if part))
    return state if state.state == "running" else replace(state, reason=f"Slurm: {line.state.lower()}")


def _watch(jobs: Sequence[Job], every: float = 2.0) -> int:
    """Until no job runs or waits, a line for each change; 130 on Ctrl-C, which leaves the jobs to Slurm."""
    shown: dict[str, tuple[str, int]] = {}
    try:
        while True:
            found = states(jobs)
            for job, state in zip(jobs, found, strict=True):
                if shown.get(job.name) != (state.state, state.attempts):
                    shown[job.name] = state.state, state.attempts
                    _tell(job, state)
            if not any(state.state in ("running", "pending") for state in found):
                return 0
            time.sleep(every)
    except KeyboardInterrupt:
        print("The jobs go on; the same command watches them again, scancel ends them.", file=sys.stderr)
        return 130


def _run_here(jobs: Sequence[Job], options: LauncherOptions) -> int:
    """At most `parallel` at a time, each with its share of the GPUs; 0, or 128 + n where signal n stopped it."""
    waiting, devices = list(jobs), _devices()
    each = min(options.gpus or 1, len(devices)) if devices else 0
    slots = options.parallel or (max(1, len(devices) // each) if each else 1)
    busy: dict[int, Attempt] = {}
    with _signals() as seen:
        while busy or (waiting and not seen):
            for slot in range(slots):
                if slot not in busy and waiting and not seen:
                    job = waiting.pop(0)
                    (job.folder / "submitted.json").unlink(missing_ok=True)  # it is this machine's now
                    try:
                        busy[slot] = Attempt(job, _share(devices, slot, each))
                    except OSError as error:
                        print(error, file=sys.stderr, flush=True)
                        continue
                    _tell(job, busy[slot].state)
            for slot, attempt in list(busy.items()):
                if seen:
                    attempt.ask()
                if len(seen) > 1 or (seen and time.monotonic() - seen[0][1] > options.grace):
                    attempt.signal(signal.SIGKILL)
                if (state := attempt.poll()) is not None:
                    _tell(attempt.job, state)
                    del busy[slot]
            time.sleep(0.05)
    if seen:
        for job in waiting:
            write_state(job, replace(read_state(job), state="stopped", reason="not started", command=job.command))
        return 128 + seen[0][0]
    return 0


@contextmanager
def _signals() -> Iterator[list[tuple[int, float]]]:
    """While open, SIGINT and SIGTERM are noted, with the time, and do nothing else."""
    seen: list[tuple[int, float]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: seen.append((n, time.monotonic()))) for number in numbers]
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _devices() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part for part in given.split(",") if part not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _share(devices: Sequence[str], slot: int, each: int) -> dict[str, str]:
    """What a slot's jobs see: its own GPUs; slots beyond the last GPU begin again with the first."""
    if not devices:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[(slot * each + k) % len(devices)] for k in range(each))}


def _describe_local(options: LauncherOptions, jobs: Sequence[Job]) -> str:
    lines = [f"{len(jobs)} jobs on this machine, {options.parallel or 'one per share of GPUs'} at a time:"]
    return "\n".join([*lines, *(f"{job.name}: {shlex.join(job.command)}" for job in jobs)])


def _tell(job: Job, state: State) -> None:
    attempt = f", attempt {state.attempts}" if state.attempts > 1 else ""
    print(f"{job.name}: {state.state}{attempt}{': ' * bool(state.reason)}{state.reason}", file=sys.stderr, flush=True)
