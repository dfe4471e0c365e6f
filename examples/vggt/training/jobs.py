"""A job is one command in a folder that remembers how it went; the same for both launchers.

    FOLDER/state.json       what the job last said of itself: running, done, failed, stopped; attempts, host, times
    FOLDER/submitted.json   what the launcher gave it: the id at Slurm
    FOLDER/log.txt          all its output, one attempt below the other
    FOLDER/lock             held (flock) while its processes live, so that no two of them work in one place

Commands must be such that running one again continues it, and does nothing where all is done.
Remove FOLDER to have a job that is done run once more.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft_attrsub._files import lock, write_atomically

STATES = ("done", "running", "pending", "stopped", "failed")
STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit statuses of a wish


@dataclass(frozen=True)
class Job:
    """name: unique among the jobs of a launch. command: as for exec. folder: where the state is kept. result: a path
    that must exist for the job to count as done (None: its exit status alone decides)."""

    name: str
    command: tuple[str, ...]
    folder: Path
    result: Path | None = None

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


@dataclass(frozen=True)
class State:
    """state: one of STATES. reason: one line, empty where there is nothing to say. attempts: how often it was started.
    started, ended: seconds since 1970, of the last attempt."""

    state: str = "pending"
    reason: str = ""
    attempts: int = 0
    command: tuple[str, ...] = ()
    host: str = ""
    started: float | None = None
    ended: float | None = None


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Written beside and renamed; a reader sees the old record or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file; ValueError where it is not a record."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): remove it and launch again.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no record: remove it and launch again.")
    return record


def read_state(job: Job) -> State:
    """What the job last said; "pending" where it never ran, or where its command or its result is another."""
    record = read_json(job.folder / "state.json")
    if record is None:
        return State()
    try:
        state = State(**(record | {"command": tuple(record["command"])}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{job.folder / 'state.json'} is not a job's state: remove it and launch again.") from error
    if state.state not in STATES:
        raise ValueError(f"{job.folder / 'state.json'} says {state.state!r}: remove it and launch again.")
    if state.state == "done" and state.command != job.command:
        return replace(state, state="pending", reason="done before, with other arguments")
    if state.state == "done" and job.result is not None and not job.result.exists():
        return replace(state, state="pending", reason=f"done before, but {job.result} is gone")
    return state


def write_state(job: Job, state: State) -> None:
    write_json(job.folder / "state.json", asdict(state))


def at_work(job: Job) -> bool:
    """Whether some process on this machine (or this file system, where it shares locks) holds the job's lock."""
    try:
        descriptor = _lock(job, patience=0.0)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


class Attempt:
    """One run of a job's command, in a process group of its own.

        attempt = Attempt(job);  while attempt.poll() is None: ...     (or attempt.stop(grace) from anywhere)

    ignore: a signal that the command never sees, because the wrapper that started it is the one to act on it.
    environment: over this process's. patience: seconds to wait for an earlier attempt's processes to end.
    Raises OSError where the lock stays taken. A command that cannot be started counts as a failed attempt.
    """

    def __init__(
        self,
        job: Job,
        environment: dict[str, str] | None = None,
        ignore: int | None = None,
        patience: float = 0.0,
    ) -> None:
        if not hasattr(os, "killpg"):
            raise OSError(errno.ENOSYS, f"{job.name}: jobs run in process groups, which Windows lacks; use WSL")
        self.job, self.asked = job, False
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            held = _lock(job, patience)
        except BlockingIOError:
            raise OSError(errno.EBUSY, f"{job.name}: another process is at work on it, see {job.log}") from None
        before = read_state(job).attempts
        self.state = State("running", "", before + 1, job.command, socket.gethostname(), time.time())
        write_state(job, self.state)
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        # Child processes keep the lock: it is free when the last of them is gone, whatever became of this one.
        keep = () if held is None else (held,)
        self.process: subprocess.Popen[bytes] | None = None
        with job.log.open("ab") as log:
            line = f"# attempt {before + 1}, {when}, {self.state.host}: {shlex.join(job.command)}\n"
            log.write(line.encode("utf-8", "surrogateescape"))  # as Python has names beyond its locale
            log.flush()
            try:
                self.process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                    pass_fds=keep,
                    preexec_fn=None if ignore is None else lambda: _ignore(ignore),
                )
            except OSError as error:
                self._end("failed", f"cannot be started: {error}")
        if held is not None:
            os.close(held)

    def poll(self) -> State | None:
        """The final state once the command has ended, None before."""
        if self.state.state != "running" or self.process is None:
            return self.state
        status = self.process.poll()
        if status is None:
            return None
        if self.asked or status in STOPPED:
            self._end(
                "stopped", f"stopped by {_signal_name(status)}" if status in STOPPED else "stopped when asked to"
            )
        elif status == 0 and self.job.result is not None and not self.job.result.exists():
            self._end("failed", f"ended without an error, but {self.job.result} is not there")
        elif status == 0:
            self._end("done", "")
        elif status < 0:
            memory = " (out of memory?)" if status == -signal.SIGKILL else ""
            self._end("failed", f"killed by {_signal_name(status)}{memory}")
        else:
            self._end("failed", f"exit status {status}: {_last_line(self.job.log)}")
        return self.state

    def signal(self, number: int) -> None:
        """To the command and everything it started."""
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):  # all gone already
                os.killpg(self.process.pid, number)

    def ask(self) -> None:
        """SIGTERM: save and end. Whatever the exit status then is, the job counts as stopped."""
        if not self.asked:
            self.asked = True
            self.signal(signal.SIGTERM)

    def stop(self, grace: float) -> State:
        """Ask; after `grace` seconds, SIGKILL. Returns when the command and all its processes have ended."""
        self.ask()
        end = time.monotonic() + grace
        while self._alive() and time.monotonic() < end:
            self.poll()
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        return self.poll() or self.state

    def _alive(self) -> bool:
        """Whether the command or one of its descendants runs: only then is it safe to start the job elsewhere."""
        if self.process is None:
            return False
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _end(self, state: str, reason: str) -> None:
        self.state = replace(self.state, state=state, reason=reason, ended=time.time())
        write_state(self.job, self.state)


def _ignore(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)


def _lock(job: Job, patience: float) -> int | None:
    """A descriptor that holds the job's lock; None where the file system has no locks; BlockingIOError: taken."""
    end = time.monotonic() + patience
    job.folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    while True:
        try:
            if lock(descriptor):
                return descriptor
            os.close(descriptor)
            return None
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(descriptor)
                raise
            time.sleep(0.2)


def _signal_name(status: int) -> str:
    number = -status if status < 0 else status - 128
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _last_line(log: Path) -> str:
    """The last line that says something: of a script its error, of a traceback the exception."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    said = [line for line in lines if line and not line.startswith("# attempt")]
    return said[-1][:300] if said else "it said nothing"
