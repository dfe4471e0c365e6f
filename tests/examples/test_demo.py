"""examples/vggt/demo.py: commands that run once and in order, stop, and go on; a toy demo from end to end."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .test_demo_page import SECTIONS, self_contained
from .training_tools import FOLDER, on_path, tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = FOLDER / "demo.py"


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    on_path()
    names = ("estimate", "plan", "runner", "scales", "show")
    return SimpleNamespace(**{name: importlib.import_module(f"demonstration.{name}") for name in names})


# --- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["laptop", "small", "toy"])
def test_the_plan_is_in_an_order_that_can_be_run(demo: SimpleNamespace, scale: str) -> None:
    steps = demo.plan.plan(Path("out"), "vggt-mini", 84, demo.scales.SCALES[scale])
    seen: set[str] = set()
    for step in steps:
        assert seen.issuperset(step.after), step.name
        assert step.name not in seen
        seen.add(step.name)
    scripts = {step.words[0] for step in steps} - {"peft-attrsub"}
    assert all((FOLDER / script).is_file() for script in scripts)
    assert all(step.effort and step.effort.keys() <= demo.estimate.KINDS.keys() for step in steps)


def test_what_is_started_before_the_scale_is_chosen_fits_each_choice(demo: SimpleNamespace) -> None:
    scales = [demo.scales.SCALES[name] for name in demo.scales.AUTOMATIC]
    first = demo.plan.opening(Path("out"), "m", 84, scales[0])
    assert all(demo.plan.plan(Path("out"), "m", 84, scale)[: len(first)] == first for scale in scales)
    settings = [demo.plan.training_settings(84, scale) for scale in scales]
    assert all(one == settings[0] for one in settings)


def test_people_are_learnt_from_or_measured_on_never_both(demo: SimpleNamespace) -> None:
    steps = {step.name: step for step in demo.plan.plan(Path("out"), "m", 84, demo.scales.SCALES["laptop"])}
    words = [steps[name].words for name in ("people", "people-held-out")]
    learnt, held = ((row[row.index("--seed") + 1], int(row[row.index("--scenes") + 1])) for row in words)
    # Persons and rooms of two seeds share nothing as long as there are fewer than a thousand of them.
    assert learnt[0] != held[0] and max(learnt[1], held[1]) < 1000
    for method in ("lora", "cores"):
        words = steps[f"tune-{method}"].words
        assert words[words.index("--data") + 1] == str(Path("out/people"))


def test_a_star_becomes_what_a_shell_makes_of_it(demo: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("b", "a", ".runs"):
        (tmp_path / name).mkdir()
    step = demo.plan.Step("x", "x", ("peft-attrsub", "build-basis", f"{tmp_path}/*", "-o", "basis"), tmp_path)
    assert step.typed == f"peft-attrsub build-basis {tmp_path}/* -o basis"
    assert step.command[3:] == ["build-basis", str(tmp_path / "a"), str(tmp_path / "b"), "-o", "basis"]


def test_settings_are_written_once(demo: SimpleNamespace, tmp_path: Path) -> None:
    from training.settings import parse

    demo.plan.write_settings(tmp_path, 84, demo.scales.SCALES["laptop"])
    path = tmp_path / demo.plan.SETTINGS
    before = path.stat().st_mtime_ns
    demo.plan.write_settings(tmp_path, 84, demo.scales.SCALES["laptop"])
    assert path.stat().st_mtime_ns == before
    model, data, train = parse(["--config", str(path), "--method", "lora", "--data", "x", "--out", "y"])
    assert (model.heads, data.image_size, data.views_max, train.eval_every) == ("frozen", 84, 4, 0)
    assert (data.frames, data.window) == ("nearby", 2.0)


def test_what_is_measured_is_every_second_view_of_the_held_out_rooms(demo: SimpleNamespace) -> None:
    for scale in demo.scales.SCALES.values():
        found = demo.plan.measured_views(scale)
        assert [int(name) for name in found] == list(range(scale.held_out))
        for frames in found.values():
            assert [int(frame) for frame in frames] == list(range(0, scale.shots, 2)) and len(frames) > 1


# --- running -----------------------------------------------------------------------------------------------------


class Listener:
    """A watcher that keeps what it is told, and has no further steps."""

    def __init__(self, more: dict[str, list[Any]] | None = None) -> None:
        self.said: list[str] = []
        self.say, self.more = self.said.append, more or {}

    def finished(self, step: Any, seconds: float) -> list[Any]:
        return self.more.get(step.name, [])

    def tick(self, running: Any) -> None:
        pass

    @property
    def started(self) -> list[str]:
        return [line for line in self.said if line.startswith("$")]


def made_step(demo: SimpleNamespace, out: Path, name: str, code: str, after: tuple[str, ...] = ()) -> Any:
    """A step that runs a line of Python which is to make the file `name`."""

    class Line(demo.plan.Step):  # type: ignore[misc,name-defined]
        @property
        def command(self) -> list[str]:
            return [sys.executable, "-c", self.words[1]]

    return Line(name, name, ("python", code), out / name, after)


def touching(out: Path, name: str, more: str = "pass") -> str:
    return f"import os, time, pathlib; {more}; pathlib.Path({str(out / name)!r}).write_text('done')"


def test_steps_run_once_and_after_what_they_need(demo: SimpleNamespace, tmp_path: Path) -> None:
    steps = [
        made_step(
            demo,
            tmp_path,
            "last",
            touching(tmp_path, "last", f"assert os.path.exists({str(tmp_path / 'first')!r})"),
            ("first",),
        ),
        made_step(demo, tmp_path, "first", touching(tmp_path, "first")),
    ]
    told = Listener()
    assert demo.runner.run_steps(tmp_path, steps, 2, told) is True
    assert told.started == [f"$ {steps[1].typed}", f"$ {steps[0].typed}"]
    assert demo.runner.run_steps(tmp_path, steps, 2, told) is False
    (tmp_path / "first").unlink()
    assert demo.runner.run_steps(tmp_path, steps, 2, told) is True
    assert len(told.started) == 3  # what depends on it stands


def test_steps_that_become_known_on_the_way_are_run(demo: SimpleNamespace, tmp_path: Path) -> None:
    first, second, third = (made_step(demo, tmp_path, name, touching(tmp_path, name)) for name in ("a", "b", "c"))
    demo.runner.run_steps(tmp_path, [second], 1, Listener())
    told = Listener({"a": [second, third]})
    demo.runner.run_steps(tmp_path, [first], 1, told)
    assert told.started == [f"$ {first.typed}", f"$ {third.typed}"]
    record = demo.runner.record_of(tmp_path, third)
    assert record["seconds"] > 0 and record["cpu_seconds"] >= 0


def test_a_changed_command_runs_again(demo: SimpleNamespace, tmp_path: Path) -> None:
    first, second = (made_step(demo, tmp_path, "a", touching(tmp_path, "a", f"x = {n}")) for n in (1, 2))
    demo.runner.run_steps(tmp_path, [first], 1, Listener())
    assert demo.runner.record_of(tmp_path, first) is not None
    assert demo.runner.record_of(tmp_path, second) is None


@pytest.mark.parametrize("code", ["print('what is wrong'); raise SystemExit(3)", "print('what is wrong')"])
def test_a_step_that_fails_or_leaves_nothing_ends_the_demo(demo: SimpleNamespace, tmp_path: Path, code: str) -> None:
    steps = [
        made_step(demo, tmp_path, "bad", code),
        made_step(demo, tmp_path, "next", touching(tmp_path, "next"), ("bad",)),
    ]
    with pytest.raises(demo.runner.StepError, match=r"what is wrong.*bad\.log"):
        demo.runner.run_steps(tmp_path, steps, 1, Listener())
    assert demo.runner.record_of(tmp_path, steps[0]) is None
    assert not (tmp_path / "next").exists()


def test_a_failure_stops_the_commands_beside_it(demo: SimpleNamespace, tmp_path: Path) -> None:
    slow = made_step(
        demo,
        tmp_path,
        "slow",
        touching(
            tmp_path, "slow", f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
        ),
    )
    wait = (
        f"import os, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\nraise SystemExit(1)"
    )
    with pytest.raises(demo.runner.StepError):
        demo.runner.run_steps(tmp_path, [slow, made_step(demo, tmp_path, "bad", wait)], 2, Listener())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_how_far_a_command_is(demo: SimpleNamespace, tmp_path: Path) -> None:
    """By the logs of all kinds of commands, a bar at a time; other bars and lines say nothing."""
    step = demo.plan.Step("x", "x", ("x",), tmp_path, parts=("texture_00", "texture_01"))
    log = tmp_path / "log"
    log.write_text("")
    job = demo.runner.Running(step, None, log)
    for text, share in (
        ("loading: 100%|##| 9/9\n", 0),
        ("texture_00:  10%|#  | 3/30 [00:01<00:09, loss 1.2]", 0.05),
        ("\rtexture_00:  40%|##  | 12/30 [00:04<00:06, loss 1.1]\r", 0.2),
        ("texture_00: 100%|####| 30/30 [00:12]\nout/texture_00: 30 steps, 240 images\n", 0.5),
        ("texture_01: done already\n", 1.0),
    ):
        with log.open("a") as file:
            file.write(text)
        assert job.share() == pytest.approx(share)
    log.write_text("texture_00  1/8 scenes  2 images/s\ntexture_00  6/8 scenes  ETA 0:00:15\n")
    job = demo.runner.Running(step, None, log)
    assert job.share() == pytest.approx(0.375)
    # A command that begins again, or two nested bars, do not take back what was done.
    log.write_text(log.read_text() + "\rtexture_00:   0%|   | 0/8 [00:00<?]\n")
    assert job.share() == pytest.approx(0.375)


# --- the script --------------------------------------------------------------------------------------------------


def run(*arguments: str | Path, cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def test_wrong_arguments_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep me")
    done = run("--out", tmp_path, "--fresh", cwd=tmp_path)
    assert done.returncode == 2
    assert f"demo: {tmp_path} holds files that this script did not write" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "keep me"


def test_another_model_is_another_demo_and_the_scale_is_kept(tmp_path: Path) -> None:
    on_path()
    script, out = importlib.import_module("demo"), tmp_path / "out"
    script.prepare_folder(out, False)
    (out / "demo.json").write_text(json.dumps({"model": "a", "scale": "toy", "image_size": 56}))
    for asked in ("toy", "auto"):
        found = script.settings_of(out, "a", asked)
        assert (found["scale"], found["image_size"]) == ("toy", 56)
    with pytest.raises(ValueError, match="a demo with model a, and b is asked for"):
        script.settings_of(out, "b", "toy")
    with pytest.raises(ValueError, match="a demo with scale toy, and laptop"):
        script.settings_of(out, "a", "laptop")
    # Stopped before the scale was chosen: it may still be given.
    (out / "demo.json").write_text(json.dumps({"model": "a", "scale": None, "image_size": 56}))
    assert script.settings_of(out, "a", "small")["scale"] == "small"
    assert script.settings_of(out, "a", "auto")["scale"] is None
    runner = importlib.import_module("demonstration.runner")
    with runner.working(out, print), pytest.raises(ValueError, match="another demo is at work"):
        script.prepare_folder(out, True)
    script.prepare_folder(out, True)
    assert not (out / "demo.json").exists()
    assert script.settings_of(out, "vggt-mini", "auto") == {"model": "vggt-mini", "scale": None, "image_size": 80}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_stops_all_and_says_how_to_go_on(tmp_path: Path, number: int, status: int) -> None:
    """The page says that it was stopped, and the commands are gone."""
    with subprocess.Popen(
        command("--out", "out"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        page = tmp_path / "out" / "index.html"
        assert process.stdout is not None
        assert process.stdout.readline() == f"The page is {page}: open it now, it grows with what is done.\n"
        wait_until(lambda: (tmp_path / "out" / "steps" / "scenes.log").exists(), process)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode == status
    assert said.splitlines()[-1] == "demo: stopped; the same command continues"
    assert "It was stopped. The same command continues." in self_contained(page.read_text(encoding="utf-8")).words
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["calls"][0] > 0
    # The lock is free once the last command has ended.
    import fcntl

    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def mtimes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the demo ended too early"
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_toy_runs_is_killed_goes_on_and_then_rests(tmp_path: Path) -> None:
    pytest.importorskip("open3d", reason="scenes are ray cast: pip install peft-attrsub[demo]")
    pytest.importorskip("plotly", reason="the report is drawn with plotly: pip install peft-attrsub[demo]")
    tiny_model().save_pretrained(tmp_path / "model")
    arguments = ("--out", "out", "--model", "model", "--scale", "toy", "--workers", "2")
    out = tmp_path / "out"
    with subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until((out / "steps" / "people-held-out.json").exists, process)
        process.send_signal(signal.SIGKILL)
    before = mtimes(out / "people-held-out")
    assert self_contained((out / "index.html").read_text(encoding="utf-8")).sections == ["progress", *SECTIONS]
    first = json.loads((out / "demo.json").read_text())["calls"]
    assert len(first) == 1 and first[0] > 0

    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "prepare_rooms.py people --out out/people-held-out --scenes" not in done.stdout  # not again
    assert mtimes(out / "people-held-out") == before
    assert f"Open this page: {out / 'index.html'}" in done.stdout
    reader = self_contained((out / "index.html").read_text(encoding="utf-8"))
    assert reader.sections == SECTIONS and "toy scale" in reader.words and "Trainings computed in " in reader.words
    record = json.loads((out / "demo.json").read_text())
    assert record["calls"][0] == first[0] and len(record["calls"]) == 2
    assert f"{sum(record['calls']):.0f} seconds in 2 calls" in done.stdout
    assert "\nContinued at the scale toy: " in done.stdout
    assert record["scale"] == "toy" and record["speed"]["step"] > 0 and record["why"] in done.stdout + reader.words
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["methods"]) == {"base", "lora", "cores"}
    assert summary["methods"]["cores"]["trainable"] > 0 and summary["adapters"] == 8
    for sentence in summary["says"]:
        assert sentence in done.stdout and sentence in reader.words
    for step in summary["steps"]:
        assert step["command"] in reader.words and step["seconds"] > 0
    assert (out / "report.html").is_file()

    before = mtimes(out)
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 0 and "done already" in again.stdout
    assert mtimes(out) == before
