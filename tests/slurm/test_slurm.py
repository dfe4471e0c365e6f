"""The launcher at a real Slurm of one node: an array, signals, requeues, and the bytes of an undisturbed run."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.slurm import cluster, toy

pytest.importorskip("submitit", reason="jobs go to Slurm through submitit")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cluster.reason_to_skip()), reason=cluster.reason_to_skip() or "there is a Slurm"),
]

EXAMPLES = Path(__file__).parents[2] / "examples" / "vggt"


@pytest.fixture(scope="module")
def slurm() -> Iterator[cluster.Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own paths are too long for munge's socket
    try:
        with cluster.cluster(folder) as it, pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(it.config))
            yield it
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def launcher() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("training.launcher")
    sys.path.remove(str(EXAMPLES))


def toy_job(launcher: ModuleType, root: Path, name: str, steps: int, seconds: float, mode: str = "") -> object:
    out = root / name
    command = (sys.executable, toy.__file__, str(out), str(steps), str(seconds), mode)
    return launcher.Job(name, command, root / "jobs" / name, out / "result")


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def slurm_id(job: object) -> str:
    return json.loads((job.folder / "submitted.json").read_text())["id"]


def wrapper_of(out: Path) -> int:
    """The process that started the toy job of that folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        words = (entry / "cmdline").read_bytes().split(b"\0") if (entry / "cmdline").exists() else []
        if toy.__file__.encode() in words and str(out).encode() in words:
            return int(re.search(r"^PPid:\s*(\d+)", (entry / "status").read_text(), re.MULTILINE)[1])
    raise AssertionError("the job does not run")


def undisturbed(steps: int, root: Path) -> bytes:
    subprocess.run([sys.executable, toy.__file__, str(root / "alone"), str(steps), "0"], check=True)
    return (root / "alone" / "result").read_bytes()


def test_an_array_runs_and_the_table_tells(
    slurm: cluster.Cluster, launcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [toy_job(launcher, tmp_path, f"job-{n}", 3, 0.05, "fail" if n == 1 else "") for n in range(3)]
    options = launcher.LauncherOptions(launcher="slurm", partition="main", time="10", mem="1", cpus=1)
    assert launcher.launch(jobs, options, tmp_path / "jobs", "three") == 1
    told = capsys.readouterr()
    assert "job-1: failed: exit status 2: toy: this data cannot be read." in told.err
    assert told.out.splitlines()[-1] == "2 done, 1 failed"
    first = {slurm_id(job).split("_")[0] for job in jobs}
    assert len(first) == 1 and [slurm_id(job).split("_")[1] for job in jobs] == ["0", "1", "2"]

    # The same command: only the failed one goes again, alone and so without an array, and is through now.
    assert launcher.launch(jobs, options, tmp_path / "jobs", "three") == 0
    assert "_" not in slurm_id(jobs[1]) and slurm_id(jobs[0]).split("_")[0] in first
    assert [state.attempts for state in launcher.states(jobs)] == [1, 2, 1]
    assert all((tmp_path / f"job-{n}" / "result").read_bytes() == undisturbed(3, tmp_path) for n in range(3))


@pytest.mark.parametrize("number", ["USR2", "TERM"])
def test_a_job_that_gets_a_signal_is_requeued_and_ends_with_the_same_bytes(
    slurm: cluster.Cluster, launcher: ModuleType, tmp_path: Path, number: str
) -> None:
    jobs = [toy_job(launcher, tmp_path, f"job-{n}", 30, 0.1) for n in range(2)]
    options = launcher.LauncherOptions(launcher="slurm", time="10", wait=False)
    assert launcher.launch(jobs, options, tmp_path / "jobs", "signalled") == 0
    victim = jobs[0]
    wait_until(lambda: (tmp_path / "job-0" / "chain").exists())
    wait_until(lambda: int((tmp_path / "job-0" / "chain").read_text().split()[0]) >= 3)
    identity = slurm_id(victim)
    slurm.run("scancel", f"--signal={number}", identity)
    wait_until(lambda: launcher.states([victim])[0].state == "pending" or launcher.states([victim])[0].attempts == 2)
    assert not (tmp_path / "job-0" / "result").exists(), "it was to be disturbed in mid-work"

    # Launched again while it waits or runs, nothing is submitted twice: the jobs are watched to their end.
    assert launcher.launch(jobs, launcher.LauncherOptions(launcher="slurm", time="10"), tmp_path / "jobs") == 0
    assert slurm_id(victim) == identity
    assert [state.attempts for state in launcher.states(jobs)] == [2, 1]
    log = victim.log.read_text()
    assert "asked 1 times to stop" in log and log.count("# attempt") == 2
    steps = [line for line in log.splitlines() if line.startswith("step")]
    assert steps == [f"step {n + 1}" for n in range(30)], "no step is lost or done twice"
    want = undisturbed(30, tmp_path)
    assert (tmp_path / "job-0" / "result").read_bytes() == (tmp_path / "job-1" / "result").read_bytes() == want


def test_a_cancelled_job_is_not_requeued(slurm: cluster.Cluster, launcher: ModuleType, tmp_path: Path) -> None:
    job = toy_job(launcher, tmp_path, "job", 1000, 0.05)
    options = launcher.LauncherOptions(launcher="slurm", time="10", wait=False)
    launcher.launch([job], options, tmp_path / "jobs")
    wait_until(lambda: (tmp_path / "job" / "chain").exists())
    slurm.run("scancel", slurm_id(job))
    wait_until(lambda: launcher.states([job])[0].state == "failed")
    wait_until(lambda: not slurm.states())
    state = launcher.states([job])[0]
    assert state.attempts == 1 and "cancelled at Slurm" in state.reason


def test_a_job_whose_wrapper_is_killed_is_told_and_submitted_again(
    slurm: cluster.Cluster, launcher: ModuleType, tmp_path: Path
) -> None:
    job = toy_job(launcher, tmp_path, "job", 40, 0.05)
    waiting = launcher.LauncherOptions(launcher="slurm", time="10", wait=False)
    launcher.launch([job], waiting, tmp_path / "jobs")
    wait_until(lambda: (tmp_path / "job" / "chain").exists())
    os.kill(wrapper_of(tmp_path / "job"), signal.SIGKILL)
    wait_until(lambda: launcher.states([job])[0].state == "failed")
    assert "left the queue of Slurm without a word" in launcher.states([job])[0].reason
    assert launcher.launch([job], launcher.LauncherOptions(launcher="slurm", time="10"), tmp_path / "jobs") == 0
    assert launcher.states([job])[0].attempts == 2
    assert (tmp_path / "job" / "result").read_bytes() == undisturbed(40, tmp_path)


def test_what_sbatch_refuses_is_a_sentence(slurm: cluster.Cluster, launcher: ModuleType, tmp_path: Path) -> None:
    options = launcher.LauncherOptions(launcher="slurm", partition="nowhere")
    with pytest.raises(ValueError, match=r"sbatch refused the jobs: .*invalid partition specified: nowhere"):
        launcher.launch([toy_job(launcher, tmp_path, "job", 1, 0)], options, tmp_path / "jobs")


def test_generate_scenes_disturbed_at_slurm_makes_the_bytes_of_an_undisturbed_run(
    slurm: cluster.Cluster, launcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open3d", reason="the ray caster needs it")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parents[1]))
    script = importlib.import_module("generate_scenes")
    small = ["--attribute", "texture", "--datasets", "2", "--scenes", "6", "--views", "6", "--size", "64"]
    small += ["--workers", "1"]
    assert script.main([*small, "--out", str(tmp_path / "alone")]) == 0
    words = [*small, "--out", str(tmp_path / "jobs"), "--launcher", "slurm", "--time", "10"]
    assert script.main([*words, "--no-wait"]) == 0
    wait_until(lambda: any((tmp_path / "jobs" / "texture_00").glob("scene_*")))
    state = tmp_path / "jobs" / ".jobs" / "texture_00"
    slurm.run("scancel", "--signal=USR2", json.loads((state / "submitted.json").read_text())["id"])
    assert script.main(words) == 0
    assert json.loads((state / "state.json").read_text())["attempts"] == 2
    for number in range(2):
        made = [scenes(tmp_path / name / f"texture_{number:02d}") for name in ("alone", "jobs")]
        assert made[0] == made[1] and len(made[0]) > 6 * 12


def scenes(folder: Path) -> dict[str, bytes]:
    """All bytes of a dataset but its logs."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in named.items() if not name.startswith(("logs/", ".work/"))}
