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
    names = ("plan", "runner")
    return SimpleNamespace(**{name: importlib.import_module(f"demonstration.{name}") for name in names})


# --- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["laptop", "toy"])
def test_the_plan_is_in_an_order_that_can_be_run(demo: SimpleNamespace, scale: str) -> None:
    steps = demo.plan.plan(Path("out"), "vggt-mini", 84, demo.plan.SCALES[scale])
    seen: set[str] = set()
    for step in steps:
        assert seen.issuperset(step.after), step.name
        assert step.name not in seen
        seen.add(step.name)
    scripts = {step.words[0] for step in steps} - {"peft-attrsub"}
    assert all((FOLDER / script).is_file() for script in scripts)


def test_people_are_learnt_from_or_measured_on_never_both(demo: SimpleNamespace) -> None:
    steps = {step.name: step for step in demo.plan.plan(Path("out"), "m", 84, demo.plan.SCALES["laptop"])}
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

    demo.plan.write_settings(tmp_path, 84, demo.plan.SCALES["laptop"])
    path = tmp_path / demo.plan.SETTINGS
    before = path.stat().st_mtime_ns
    demo.plan.write_settings(tmp_path, 84, demo.plan.SCALES["laptop"])
    assert path.stat().st_mtime_ns == before
    model, data, train = parse(["--config", str(path), "--method", "lora", "--data", "x", "--out", "y"])
    assert (model.heads, data.image_size, data.views_max, train.eval_every) == ("frozen", 84, 4, 0)
    assert (data.frames, data.window) == ("nearby", 2.0)


def test_what_is_measured_is_every_second_view_of_the_held_out_rooms(demo: SimpleNamespace) -> None:
    for scale in demo.plan.SCALES.values():
        found = demo.plan.measured_views(scale)
        assert [int(name) for name in found] == list(range(scale.held_out))
        for frames in found.values():
            assert [int(frame) for frame in frames] == list(range(0, scale.shots, 2)) and len(frames) > 1


# --- running -----------------------------------------------------------------------------------------------------


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
    said: list[str] = []
    assert demo.runner.run_steps(tmp_path, steps, 2, said.append) is True
    assert [line for line in said if line.startswith("$")] == [f"$ {steps[1].typed}", f"$ {steps[0].typed}"]
    assert demo.runner.run_steps(tmp_path, steps, 2, said.append) is False
    (tmp_path / "first").unlink()
    assert demo.runner.run_steps(tmp_path, steps, 2, said.append) is True
    assert len([line for line in said if line.startswith("$")]) == 3  # what depends on it stands


def test_a_changed_command_runs_again(demo: SimpleNamespace, tmp_path: Path) -> None:
    first, second = (made_step(demo, tmp_path, "a", touching(tmp_path, "a", f"x = {n}")) for n in (1, 2))
    demo.runner.run_steps(tmp_path, [first], 1, str)
    assert demo.runner.record_of(tmp_path, first) is not None
    assert demo.runner.record_of(tmp_path, second) is None


@pytest.mark.parametrize("code", ["print('what is wrong'); raise SystemExit(3)", "print('what is wrong')"])
def test_a_step_that_fails_or_leaves_nothing_ends_the_demo(demo: SimpleNamespace, tmp_path: Path, code: str) -> None:
    steps = [
        made_step(demo, tmp_path, "bad", code),
        made_step(demo, tmp_path, "next", touching(tmp_path, "next"), ("bad",)),
    ]
    with pytest.raises(demo.runner.StepError, match=r"what is wrong.*bad\.log"):
        demo.runner.run_steps(tmp_path, steps, 1, str)
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
        demo.runner.run_steps(tmp_path, [slow, made_step(demo, tmp_path, "bad", wait)], 2, str)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_how_far_a_command_is(demo: SimpleNamespace, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = demo.runner.Running(None, None, log)
    for text, share in (
        ("", ""),
        ("loading\n", ""),
        ("a:  10%|#  | 1/10\ra:  40%|##  | 4/10", " 40 %"),
        ("loading: 100%|##| 9/9\n", ""),
        ("texture_00  5/8 scenes  2 images/s", " 62 %"),
    ):
        log.write_text(text)
        assert job.share() == share


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


def test_another_model_is_another_demo(demo: SimpleNamespace, tmp_path: Path) -> None:
    script = importlib.import_module("demo")
    script.prepare_folder(tmp_path / "out", False)
    (tmp_path / "out" / "demo.json").write_text(
        json.dumps({"model": "a", "scale": "toy", "image_size": 56, "parameters": 1})
    )
    assert script.settings_of(tmp_path / "out", "a", "toy")["image_size"] == 56
    with pytest.raises(ValueError, match="a demo with model a, and b is asked for"):
        script.settings_of(tmp_path / "out", "b", "toy")
    with pytest.raises(ValueError, match="a demo with scale toy, and laptop"):
        script.settings_of(tmp_path / "out", "a", "laptop")
    script.prepare_folder(tmp_path / "out", True)
    assert not (tmp_path / "out" / "demo.json").exists()


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
        wait_until((out / "steps" / "people.json").exists, process)
        process.send_signal(signal.SIGKILL)
    before = mtimes(out / "people")

    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "prepare_rooms.py people --out out/people --scenes" not in done.stdout  # not again
    assert mtimes(out / "people") == before
    assert f"Open this page: {out / 'index.html'}" in done.stdout
    reader = self_contained((out / "index.html").read_text(encoding="utf-8"))
    assert reader.sections == SECTIONS and "toy scale" in reader.words
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
