"""A Slurm of one node on loopback, for tests: its own munge, controller and daemon in a folder, and nothing elsewhere.

Needs Debian's packages slurm-wlm and munge (no service of theirs must run) and root, because slurmd starts jobs as
their user.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=3
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: a requeued job waits at least that long, two minutes by default; less than 5 is ignored.


def reason_to_skip() -> str:
    """Why no cluster can be started here; "" where one can."""
    missing = [name for name in (*DAEMONS, *CLIENTS) if _find(name) is None]
    if missing:
        return f"{missing[0]} is missing: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root to start jobs"


@dataclass(frozen=True)
class Cluster:
    """A running cluster. config: what SLURM_CONF must be for its clients; `run` sets it."""

    folder: Path
    config: Path

    def run(self, *command: str) -> str:
        """A client's output; CalledProcessError where it fails."""
        environment = {**os.environ, "SLURM_CONF": str(self.config)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """What squeue says of every element in the queue, by id."""
        lines = self.run("squeue", "--noheader", "--array", "--format", "%i %T").splitlines()
        return dict(line.split() for line in lines)


@contextmanager
def cluster(folder: Path, cpus: int = 4) -> Iterator[Cluster]:
    """Started, with its node idle; ended with all its jobs. `folder` must have a short path (munge's socket)."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o700)
    key, config = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    controller, daemon = _free_ports(2)
    host = socket.gethostname().split(".")[0]
    config.write_text(
        CONFIG.format(
            host=host, controller=controller, daemon=daemon, user=getpass.getuser(), folder=folder, cpus=cpus
        )
    )
    parts = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
    munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={parts['socket']}"]
    munge += [f"--{kind}-file={parts[kind]}" for kind in ("pid", "log", "seed")]
    started: list[subprocess.Popen[bytes]] = []
    it = Cluster(folder, config)
    try:
        started.append(_start("munged", munge, folder, config))
        _wait(parts["socket"].exists, "munged opens its socket", folder)
        started.append(_start("slurmctld", ["-D", "-c"], folder, config))
        started.append(_start("slurmd", ["-D", "-c"], folder, config))
        _wait(lambda: _idle(it), "the node is idle", folder)
        yield it
    finally:
        if len(started) == 3:
            _end_jobs(it)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _find(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _start(name: str, arguments: Sequence[str], folder: Path, config: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "SLURM_CONF": str(config)}
    with (folder / f"{name}.output").open("wb") as output:
        command = [str(_find(name)), *arguments]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _idle(it: Cluster) -> bool:
    try:
        return it.run("sinfo", "--noheader", "--format", "%T") == "idle"
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False


def _end_jobs(it: Cluster) -> None:
    """Cancel everything and wait until no process of a job is left."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            if not it.states():
                return
            it.run("scancel", "--user", getpass.getuser())
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return
        time.sleep(0.3)


def _wait(ready: Callable[[], bool], what: str, folder: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if ready():
            return
        time.sleep(0.1)
    logs = "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in folder.glob("*.output"))
    raise RuntimeError(f"no cluster: waited 30 s until {what}.\n{logs}")
