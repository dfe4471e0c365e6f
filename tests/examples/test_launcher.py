"""examples/vggt/training/launcher.py: jobs on this machine, stopped, killed, continued; what would go to Slurm."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import HfArgumentParser

from tests.examples.test_evaluate import arguments, files, model, people  # noqa: F401 (fixtures)
from tests.slurm import toy

FOLDER = Path(__file__).parents[2] / "examples" / "vggt"

# A launch in a process of its own, for signals: SCRIPTS ROOT STEPS SECONDS PARALLEL
LAUNCH = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training.launcher import Job, LauncherOptions, launch
root, toy = Path(sys.argv[2]), sys.argv[3]
jobs = [Job(f"job-{n}", (sys.executable, toy, str(root / f"job-{n}"), sys.argv[4], sys.argv[5]),
            root / "jobs" / f"job-{n}", root / f"job-{n}" / "result") for n in range(3)]
raise SystemExit(launch(jobs, LauncherOptions(launcher="local", parallel=int(sys.argv[6])), root / "jobs"))
"""


@pytest.fixture(scope="module")
def launcher() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("training.launcher")
    sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def toy_job(launcher: ModuleType, root: Path, name: str, steps: int = 2, seconds: float = 0, mode: str = "") -> Any:
    out = root / name
    command = (sys.executable, toy.__file__, str(out), str(steps), str(seconds), mode)
    return launcher.Job(name, command, root / "jobs" / name, out / "result")


def start(root: Path, steps: int, seconds: float, parallel: int) -> subprocess.Popen[str]:
    words = [str(FOLDER), str(root), toy.__file__, str(steps), str(seconds), str(parallel)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", LAUNCH, *words], **pipes)


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def said(job: Any) -> dict[str, Any]:
    return json.loads((job.folder / "state.json").read_text())


def test_done_jobs_are_left_alone_and_failed_ones_go_again(
    launcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = ["", "fail", "die", ""]
    jobs = [toy_job(launcher, tmp_path, f"job-{n}", mode=mode) for n, mode in enumerate(modes)]
    options = launcher.LauncherOptions(launcher="local", parallel=2)
    assert launcher.launch(jobs, options, tmp_path / "jobs") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["job", "state", "attempts", "reason", "log"]
    assert "exit status 2: toy: this data cannot be read." in lines[2] and str(jobs[1].log) in lines[2]
    assert "killed by SIGKILL (out of memory?)" in lines[3] and lines[-1] == "2 done, 2 failed"

    assert launcher.launch(jobs, options, tmp_path / "jobs") == 0
    assert [state.attempts for state in launcher.states(jobs)] == [1, 2, 2, 1]
    assert capsys.readouterr().out.splitlines()[-1] == "4 done"
    assert jobs[1].log.read_text().count("# attempt") == 2

    # Done means: by this command, with its result in place.
    (tmp_path / "job-0" / "result").unlink()
    longer = [jobs[0], launcher.Job("job-3", (*jobs[3].command[:3], "4", "0"), jobs[3].folder, jobs[3].result)]
    assert [state.reason.split(",")[0].split(" /")[0] for state in launcher.states(longer)] == [
        "done before",
        "done before",
    ]
    assert launcher.launch(longer, options, tmp_path / "jobs") == 0
    assert [state.attempts for state in launcher.states(longer)] == [2, 2]
    assert (tmp_path / "job-3" / "chain").read_text().startswith("4 ")


def test_a_command_that_is_not_there_and_a_result_that_never_comes_are_failures(
    launcher: ModuleType, tmp_path: Path
) -> None:
    jobs = [
        launcher.Job("missing", (str(tmp_path / "nothing"),), tmp_path / "a"),
        launcher.Job("empty", (sys.executable, "-c", ""), tmp_path / "b", tmp_path / "result"),
        launcher.Job("silent", (sys.executable, "-c", "raise SystemExit(3)"), tmp_path / "c"),
    ]
    assert launcher.launch(jobs, launcher.LauncherOptions(launcher="local"), tmp_path) == 1
    reasons = [state.reason for state in launcher.states(jobs)]
    assert "cannot be started" in reasons[0] and "nothing" in reasons[0]
    assert reasons[1].endswith("result is not there") and reasons[2] == "exit status 3: it said nothing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_launch_saves_and_the_same_command_continues(
    launcher: ModuleType, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, 12, 0.05, 2)
    chains = [tmp_path / f"job-{n}" / "chain" for n in range(2)]
    wait_until(lambda: all(chain.exists() for chain in chains))
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "3 stopped" in out.splitlines()[-1]
    assert not (tmp_path / "job-2").exists(), "a job was started after the signal"
    assert not any((tmp_path / f"job-{n}" / "result").exists() for n in range(3))
    process = start(tmp_path, 12, 0, 3)
    assert process.communicate(timeout=60)[0].splitlines()[-1] == "3 done" and process.returncode == 0
    results = {(tmp_path / f"job-{n}" / "result").read_text() for n in range(3)}
    log = (tmp_path / "jobs" / "job-0" / "log.txt").read_text().splitlines()
    assert len(results) == 1 and "asked 1 times to stop" in log
    assert [line for line in log if line.startswith("step")] == [f"step {n + 1}" for n in range(12)]


def test_jobs_outlive_a_killed_launch_and_are_not_started_twice(launcher: ModuleType, tmp_path: Path) -> None:
    process = start(tmp_path, 1000, 0.02, 1)
    wait_until(lambda: (tmp_path / "job-0" / "chain").exists())
    process.kill()
    process.communicate()
    job = launcher.Job("job-0", tuple(said_command(tmp_path)), tmp_path / "jobs" / "job-0")
    assert launcher.states([job])[0].state == "running"
    assert launcher.launch([job], launcher.LauncherOptions(launcher="local"), tmp_path / "jobs") == 1
    assert job.log.read_text().count("# attempt") == 1
    os.kill(pid_of(tmp_path / "job-0"), signal.SIGKILL)
    wait_until(lambda: launcher.states([job])[0].state == "stopped")
    assert "without a word" in launcher.states([job])[0].reason


def said_command(root: Path) -> list[str]:
    return json.loads((root / "jobs" / "job-0" / "state.json").read_text())["command"]


def pid_of(out: Path) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        words = (entry / "cmdline").read_bytes().split(b"\0") if (entry / "cmdline").exists() else []
        if toy.__file__.encode() in words and str(out).encode() in words:
            return int(entry.name)
    raise AssertionError("the job does not run")


def test_never_more_jobs_at_a_time_than_asked_for_and_gpus_are_shared_out(
    launcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; from time import sleep, time; t = time(); sleep(0.15); "
    code += "print(t, time(), os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    jobs = [launcher.Job(f"{n}", (sys.executable, "-c", code), tmp_path / f"{n}") for n in range(5)]
    assert launcher.launch(jobs, launcher.LauncherOptions(launcher="local", gpus=2), tmp_path) == 0
    spans = [job.log.read_text().splitlines()[1].split() for job in jobs]
    assert {span[2] for span in spans} == {"3,5", "6,7"}
    for begin, end, gpus in spans:
        others = [span for span in spans if float(span[0]) < float(end) and float(begin) < float(span[1])]
        assert len(others) <= 2 and sum(span[2] == gpus for span in others) == 1


def test_damaged_states_and_wrong_options_are_sentences(
    launcher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = toy_job(launcher, tmp_path, "job")
    for text in ("{", "[]", "{}", '{"command": [], "state": "odd"}'):
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "state.json").write_text(text)
        with pytest.raises(ValueError, match=r"state\.json .*remove it and launch again"):
            launcher.states([job])
    local: Callable[..., Any] = lambda **more: launcher.LauncherOptions(launcher="local", **more)  # noqa: E731
    for options, words in (
        (local(parallel=0), "--parallel is 0"),
        (local(grace=5), "--grace is 5"),
        (local(requeues=-1), "--requeues is -1"),
        (local(time="soon"), "time limit 'soon'"),
    ):
        with pytest.raises(ValueError, match=words):
            launcher.launch([job], options, tmp_path)
    with pytest.raises(ValueError, match="no jobs"):
        launcher.launch([], local(), tmp_path)
    with pytest.raises(ValueError, match="share a name"):
        launcher.launch([job, job], local(), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run this script with python"):
        launcher.launch([job], local(), tmp_path)


def test_slurms_time_limits(launcher: ModuleType) -> None:
    minutes = importlib.import_module("training.slurm_job").minutes
    for text, want in (
        ("90", 90),
        ("1:30", 2),
        ("24:00:00", 1440),
        ("0:0:1", 1),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("1-0:0:30", 1441),
    ):
        assert minutes(text) == want
    for text in ("", "1h", "1:2:3:4", "-5", "0", "0:00:00"):
        with pytest.raises(ValueError, match="time limit"):
            minutes(text)


def test_a_dry_run_prints_what_sbatch_would_get_and_does_nothing(
    launcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [toy_job(launcher, tmp_path, f"job-{n}") for n in range(3)]
    options = launcher.LauncherOptions(
        launcher="slurm", dry_run=True, partition="gpu", gpus=2, mem="64G", cpus=8, time="1-0", parallel=2
    )
    options.setup = ["module load cuda"]
    assert launcher.launch(jobs, options, tmp_path / "jobs", "mine") == 0
    out = capsys.readouterr().out
    for flag in ("array=0-2%2", "partition=gpu", "gpus-per-node=2", "mem=64G", "cpus-per-task=8", "time=1440"):
        assert f"--{flag}\n" in out
    assert "--requeue\n" in out and "--signal=USR2@120\n" in out and "job-name=mine" in out
    assert "module load cuda\n" in out and f"2: job-2: {sys.executable}" in out
    assert not tmp_path.joinpath("jobs").exists() or not list(tmp_path.rglob("state.json"))
    options.launcher = "local"
    assert launcher.launch(jobs, options, tmp_path / "jobs") == 0
    assert "3 jobs on this machine, 2 at a time" in capsys.readouterr().out
    assert not list(tmp_path.rglob("result"))


def test_the_dry_run_says_what_submitit_writes(launcher: ModuleType, tmp_path: Path) -> None:
    slurm = pytest.importorskip("submitit.slurm.slurm")
    module = importlib.import_module("training.slurm_job")
    jobs = [toy_job(launcher, tmp_path, f"job-{n}") for n in range(3)]
    options = launcher.LauncherOptions(launcher="slurm", gres="gpu:1", qos="long", account="me", parallel=2)
    described = [line.strip() for line in module.describe(options, "mine", jobs).splitlines()]
    text = slurm._make_sbatch_string("x", tmp_path, map_count=3, **module.parameters(options, "mine", 3))
    written = {line.removeprefix("#SBATCH ").replace("'", "") for line in text.splitlines() if "#SBATCH" in line}
    ours = {line for line in described if line.startswith("--")}
    assert ours <= written
    # What the dry run leaves out: submitit's paths and its own defaults.
    assert {line.split("=")[0] for line in written - ours} == {"--output", "--error", "--nodes", "--wckey"}


def test_options_from_either_parser_and_the_scripts_own_arguments(launcher: ModuleType) -> None:
    words = ["--launcher", "slurm", "--partition", "gpu", "--no-wait", "--setup", "module load a", "b", "--gpus", "4"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    launcher.add_options(parser)
    parser.add_argument("--out")
    parser.add_argument("--names", nargs="+")
    ours = launcher.options_of(parser.parse_args(["--out", "x", *words]))
    (theirs,) = HfArgumentParser(launcher.LauncherOptions).parse_args_into_dataclasses([*words[:4], *words[5:]])
    assert ours.wait is False and ours.setup == ["module load a", "b"] and ours.gpus == 4
    theirs.wait = False
    assert ours == theirs
    mixed = ["--names", "a", "b", *words[:4], "--out", "-x y", "--no-wait", "--flag", "--seed=3", *words[5:]]
    assert launcher.without_options(mixed) == ["--names", "a", "b", "--out", "-x y", "--flag", "--seed=3"]
    assert launcher.options_of(parser.parse_args([])).launcher is None
    with pytest.raises(ValueError, match="--dry-run is about jobs"):
        launcher.options_of(parser.parse_args(["--dry-run"]))
    command = launcher.script_command("s.py", ["--a"], ours)
    assert command[1:3] == ("-m", "accelerate.commands.launch") and command[-1] == "--a" and "4" in command


def test_generate_scenes_gives_one_job_per_dataset(
    launcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("generate_scenes")
    words = ["--attribute", "all", "--datasets", "2", "--seed", "3", "--out", str(tmp_path)]
    assert script.main([*words, "--launcher", "slurm", "--cpus", "6", "--dry-run"]) == 0
    out = capsys.readouterr().out
    names = [f"{kind}_{n:02d}" for kind in ("texture", "geometry", "camera", "lighting") for n in range(2)]
    told = [line for line in out.splitlines() if "generate_scenes.py" in line]
    assert [line.split(": ")[1] for line in told] == names
    assert told[3].endswith("--attribute geometry --only 1") and "--workers 6" in told[3]
    assert "--launcher" not in told[3] and "--cpus" not in told[3]
    # The last --attribute counts: exactly that dataset.
    args = script.parser().parse_args(told[3].split("generate_scenes.py ")[1].split())
    assert list(script.datasets(args)) == [(tmp_path / "geometry_01", "geometry", 3001)]
    assert script.main([*words, "--check", "--launcher", "local"]) == 2
    assert script.main([*words, "--only", "2"]) == 2
    assert "give 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_scenes_as_local_jobs_makes_the_same_bytes(
    launcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    pytest.importorskip("open3d", reason="the ray caster needs it")
    script = importlib.import_module("generate_scenes")
    small = ["--attribute", "texture", "--datasets", "2", "--scenes", "1", "--views", "2", "--size", "32"]
    made = []
    for name, more in (("alone", []), ("jobs", ["--launcher", "local"])):
        assert script.main([*small, "--workers", "1", "--out", str(tmp_path / name), *more]) == 0
        folders = [tmp_path / name / f"texture_{n:02d}" for n in range(2)]
        found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        made.append(
            {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in found if "logs" not in str(path)}
        )
    assert made[0] == made[1] and len(made[0]) > 8
    assert capsys.readouterr().out.splitlines()[-1] == "2 done"


def test_evaluate_shares_its_sequences_among_jobs(
    launcher: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("evaluate")
    words = ["--benchmark", "human", "--data", "people", "--out", str(tmp_path)]
    assert script.main([*words, "--launcher", "slurm", "--jobs", "3", "--dry-run"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "evaluate.py" in line]
    shares = [script.share(script.parser().parse_args(line.split("evaluate.py ")[1].split())) for line in told]
    assert shares == [(0, 3), (1, 3), (2, 3)]
    for wrong in ("3/3", "x", "1"):
        assert script.main([*words, "--share", wrong]) == 2
    assert script.main([*words, "--share", "1/2", "--launcher", "local"]) == 2
    assert "say --jobs N instead" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_that_share_an_evaluation_give_the_table_of_one_process(
    launcher: ModuleType,
    people: Path,  # noqa: F811
    model: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    script = importlib.import_module("evaluate")
    assert script.main(arguments(people, model, tmp_path / "one", "--label", "it")) == 0
    one = capsys.readouterr().out
    more = ["--label", "it", "--launcher", "local", "--jobs", "2", "--parallel", "2"]
    assert script.main(arguments(people, model, tmp_path / "two", *more)) == 0
    out = capsys.readouterr().out
    assert "2 done" in out and out.endswith(one)
    assert files(tmp_path / "one")["sequences.csv"] == files(tmp_path / "two")["sequences.csv"]
