"""Jobs at Slurm: one array through submitit, each element requeued on preemption and at its time limit.

Slurm sends SIGUSR2 `grace` seconds before the time limit (submitit's `--signal`). The wrapper then asks the command to
save (SIGTERM), waits until all its processes have ended, and has Slurm requeue the element under the same id; there
the same command runs again and continues. SIGTERM (preemption with a GraceTime, or `scancel --signal=TERM`) does the
same, unless Slurm says that the element was cancelled. Node failures requeue by themselves (`--requeue`).
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_attrsub._extras import require

from .jobs import Attempt, Job, read_state, write_json, write_state

if TYPE_CHECKING:
    from .launcher import LauncherOptions

LATE = 15  # seconds of the grace that are kept for the wrapper itself
ENDED = ("CANCELLED", "COMPLETING", "COMPLETED", "TIMEOUT", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")


class SlurmCommand:
    """What an element of the array runs. submitit calls `checkpoint` on SIGUSR2 and requeues with what it returns.

    grace: seconds between SIGUSR2 and Slurm's kill.
    """

    def __init__(self, job: Job, grace: float) -> None:
        self.job, self.grace = job, grace
        self.attempt: Attempt | None = None

    def __call__(self) -> str:
        """The final state's name; RuntimeError with the reason where the job failed, so that Slurm sees it too."""
        from submitit.core.job_environment import JobEnvironment

        number = int(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
        terminated: list[float] = []
        signal.signal(signal.SIGTERM, lambda *_: terminated.append(time.monotonic()))
        # Some clusters signal every process of the step: the command must see the one request of the wrapper only.
        self.attempt = Attempt(self.job, ignore=number, patience=60.0)
        while (state := self.attempt.poll()) is None:
            # Others signal the wrapper alone: whoever has not begun to end after a while was not told.
            if terminated and time.monotonic() - terminated[0] > 2:
                self.attempt.ask()
            time.sleep(0.1)
        if state.state == "stopped":
            if over := ended_as(environment_id()):
                write_state(
                    self.job,
                    replace(state, state="failed", reason=f"cancelled at Slurm, or over its limit ({over.lower()})"),
                )
                return over
            os.kill(os.getpid(), number)  # submitit's own way: count, checkpoint, requeue, exit
            time.sleep(60)
        if state.state == "failed":
            raise RuntimeError(f"{self.job.name}: {state.reason}")
        return state.state

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        if self.attempt is not None:
            state = self.attempt.stop(max(1.0, self.grace - LATE))
            write_state(self.job, replace(state, state="pending", reason="requeued"))
        return DelayedSubmission(SlurmCommand(self.job, self.grace))


def environment_id() -> str:
    """This element's id as squeue writes it: 12_3, or 12 outside an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def ended_as(identity: str) -> str:
    """Slurm's state where it has closed this job (scancel, time limit) and it is not to be requeued; "" elsewhere."""
    done = _ask(["scontrol", "show", "job", "-o", identity])
    states = re.findall(r"\bJobState=(\S+)", done.stdout)
    return next((state for state in states if state in ENDED), "")


def _ask(command: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """What one of Slurm's commands answers, whatever the locale."""
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=timeout
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container that runs under a number without a name
        return str(os.getuid())


@dataclass(frozen=True)
class Queued:
    """One line of squeue: Slurm's state (PENDING, RUNNING, COMPLETING, ...) and the reason for waiting."""

    state: str
    reason: str


def queue() -> dict[str, Queued] | None:
    """All of this user's elements in the queue, by id (12_3, or 12 outside an array); None where squeue does not
    answer, which says nothing about the jobs."""
    # squeue, not sacct: it also answers on clusters without an accounting database.
    command = ["squeue", "--noheader", "--array", "--user", _user(), "--format", "%i|%T|%r"]
    try:
        done = _ask(command, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    out = {}
    for line in done.stdout.splitlines():
        identity, state, reason = line.strip().split("|", 2)
        out[identity] = Queued(state, "" if reason == "None" else reason)
    return out


def minutes(text: str) -> int:
    """Slurm's time limits, "90", "MM:SS", "HH:MM:SS", "D-HH", "D-HH:MM", "D-HH:MM:SS", in minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"the time limit {text!r} is none of Slurm's: give minutes, HH:MM:SS or D-HH:MM:SS.")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, mins, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, mins, seconds = (0, *parts, 0)[:3]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    if total < 1:
        raise ValueError(f"the time limit {text!r} is nothing: give minutes, HH:MM:SS or D-HH:MM:SS.")
    return -(-total // 60)


def parameters(options: LauncherOptions, name: str, count: int) -> dict[str, Any]:
    """submitit's parameters, which are sbatch's with underscores."""
    source = Path(__file__).resolve().parents[1]
    out: dict[str, Any] = {
        "job_name": name,
        "time": minutes(options.time),
        "signal_delay_s": options.grace,
        "array_parallelism": options.parallel or count,
        "additional_parameters": {"requeue": True},
        # The nodes unpickle the wrapper: they must find this folder's modules.
        "setup": [
            *(options.setup or []),
            f"export PYTHONPATH={shlex.quote(str(source))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ],
    }
    for key, value in (
        ("partition", options.partition),
        ("gres", options.gres),
        ("gpus_per_node", None if options.gres else options.gpus),
        ("cpus_per_task", options.cpus),
        ("mem", options.mem),
        ("account", options.account),
        ("qos", options.qos),
        ("constraint", options.constraint),
    ):
        if value is not None:
            out[key] = value
    return out


def describe(options: LauncherOptions, name: str, jobs: Sequence[Job]) -> str:
    """What `submit` would hand to sbatch, for --dry-run; needs neither submitit nor Slurm."""
    flags = parameters(options, name, len(jobs))
    setup, extra = flags.pop("setup"), flags.pop("additional_parameters")
    at_once, delay = flags.pop("array_parallelism"), flags.pop("signal_delay_s")
    if len(jobs) > 1:
        flags["array"] = f"0-{len(jobs) - 1}%{min(at_once, len(jobs))}"
    flags |= {"signal": f"USR2@{delay}", "open_mode": "append"} | extra
    lines = [f"sbatch, {len(jobs)} job{'s' * (len(jobs) != 1)}:"]
    for key in sorted(flags):
        value = "" if flags[key] is True else f"={flags[key]}"
        lines.append(f"  --{key.replace('_', '-')}{value}")
    lines += [f"  {line}" for line in setup]
    lines += [f"{index}: {job.name}: {shlex.join(job.command)}" for index, job in enumerate(jobs)]
    return "\n".join(lines)


def check_slurm() -> None:
    """ImportError or ValueError with a sentence where nothing can be submitted from here."""
    require("submitit", "slurm", "--launcher slurm")
    missing = [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]
    if missing:
        raise ValueError(f"--launcher slurm: {missing[0]} is not found. Run this on a login node of the cluster.")


def submit(jobs: Sequence[Job], options: LauncherOptions, name: str, folder: Path) -> list[str]:
    """One array (one job: no array); the ids at Slurm, also in every job's submitted.json.

    Raises ValueError with sbatch's own words where it refuses.
    """
    check_slurm()
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    place = folder / "submitit"
    place.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        # Before sbatch: an element may start before this process gets any further.
        write_state(job, replace(read_state(job), state="pending", reason="", command=job.command))
    executor = submitit.SlurmExecutor(folder=place, max_num_timeout=options.requeues)
    executor.update_parameters(**parameters(options, name, len(jobs)))
    try:
        elements = executor.submit_array([SlurmCommand(job, options.grace) for job in jobs])
    except (FailedJobError, FailedSubmissionError) as error:
        said = [line for line in str(error).splitlines() if line.startswith("sbatch: error")]
        words = "; ".join(line.removeprefix("sbatch: error: ") for line in said) or str(error).strip()
        raise ValueError(f"sbatch refused the jobs: {words}") from error
    ids = [element.job_id for element in elements]
    for job, identity in zip(jobs, ids, strict=True):
        write_json(job.folder / "submitted.json", {"id": identity, "time": time.time(), "command": list(job.command)})
    return ids
