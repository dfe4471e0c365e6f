"""The scale of examples/vggt/demo.py follows from the measured speed, and the time left is honest."""

from __future__ import annotations

import importlib
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .training_tools import on_path


@pytest.fixture(scope="module")
def demo() -> SimpleNamespace:
    on_path()
    names = ("estimate", "machine", "plan", "scales", "show", "runner")
    return SimpleNamespace(**{name: importlib.import_module(f"demonstration.{name}") for name in names})


def plans(demo: SimpleNamespace, out: Path = Path("out")) -> dict[str, list[Any]]:
    return {name: demo.plan.plan(out, "m", 80, scale) for name, scale in demo.scales.SCALES.items()}


def speeds(demo: SimpleNamespace, factor: float) -> dict[str, float]:
    return {name: factor * value for name, value in demo.estimate.MEASURED.items()}


# --- the scale ---------------------------------------------------------------------------------------------------


def test_a_slower_machine_does_less(demo: SimpleNamespace) -> None:
    """Over all speeds: laptop where it is expected within the budget, small below, and never back."""
    known, chosen = plans(demo), []
    for number in range(40):
        forecast = demo.estimate.Forecast(speeds(demo, 0.3 * 1.08**number), 2)
        scale, why, seconds = demo.estimate.choose_scale(forecast, known, None)
        assert (scale == "laptop") == (seconds["laptop"] <= demo.scales.BUDGET)
        assert demo.estimate.spoken(seconds[scale]) in why and f"scale is {scale}" in why
        assert f"{forecast.speeds['step']:.2f} s" in why
        assert seconds["toy"] < 0.6 * seconds["small"] and seconds["small"] < 0.8 * seconds["laptop"]
        chosen.append(scale)
    assert chosen == sorted(chosen) and set(chosen) == {"laptop", "small"}
    assert demo.estimate.choose_scale(forecast, known, "laptop")[0] == "laptop"


def test_a_machine_of_half_the_speed_stays_within_six_minutes(demo: SimpleNamespace) -> None:
    for factor in (1.0, 1.5, 2.0, 2.4):
        forecast = demo.estimate.Forecast(speeds(demo, factor), 2)
        scale, _, seconds = demo.estimate.choose_scale(forecast, plans(demo), None)
        assert seconds[scale] < 360, (factor, scale)


# --- the time left -----------------------------------------------------------------------------------------------


def simulate(
    demo: SimpleNamespace, steps: list[Any], taken: dict[str, float], workers: int, forecast: Any
) -> list[tuple[float, float, float]]:
    """(now, estimate of the time left, share of the bar) every 2 seconds of a run in which commands take `taken`, of
    which the first quarter shows no progress; the runner's rule."""
    seen, done, running, now = [], {}, {}, 0.0
    first: dict[str, tuple[float, float]] = {}
    while len(done) < len(steps):
        for step in steps:
            free = len(running) < workers and step.name not in done and step.name not in running
            if free and set(done).issuperset(step.after):
                running[step.name] = now
        jobs = {}
        for step in (step for step in steps if step.name in running):
            seconds = now - running[step.name]
            share = max(0.0, (seconds / taken[step.name] - 0.25) / 0.75) if step.parts else 0.0
            if share > 0:
                first.setdefault(step.name, (seconds, share))
            jobs[step.name] = demo.estimate.Job(seconds, min(1.0, share), first.get(step.name))
        if round(now * 10) % 20 == 0:
            seen.append((now, forecast.left(steps, done, jobs), forecast.share(steps, done, jobs)))
        now += 0.1
        for name in [name for name, start in running.items() if now - start >= taken[name]]:
            done[name] = now - running.pop(name)
    return [(at, left - (now - at), share) for at, left, share in seen] + [(now, 0.0, 1.0)]


@pytest.mark.parametrize(("workers", "slower"), [(1, 1.0), (2, 1.0), (2, 1.6), (3, 0.7)])
def test_the_time_left_is_honest_and_the_bar_never_falls(demo: SimpleNamespace, workers: int, slower: float) -> None:
    """Commands take `slower` times what was measured, each up to a quarter more or less."""
    steps = plans(demo)["laptop"]
    forecast = demo.estimate.Forecast(speeds(demo, 1.0), workers)
    draw = random.Random(7 * workers)
    taken = {step.name: slower * draw.uniform(0.75, 1.25) * forecast.seconds(step) for step in steps}
    seen = simulate(demo, steps, taken, workers, forecast)
    end = seen[-1][0]
    shares = [share for _, _, share in seen]
    assert shares == sorted(shares) and shares[0] < 0.05
    for now, error, share in seen:
        # Before anything was seen of a slower machine the error is that of the measurement; then it shrinks.
        allowed = abs(1 - 1 / slower) + 0.15 if now < end / 4 else 0.15 + 0.6 * abs(1 - 1 / slower)
        assert abs(error) < allowed * end, (now, error, end)
        assert abs(share - now / end) < 0.2, (now, share)


def test_a_command_that_is_overdue_is_not_said_to_be_over(demo: SimpleNamespace) -> None:
    step = demo.plan.Step("a", "a", ("a",), Path("a"), effort={"start": 1})
    forecast = demo.estimate.Forecast(speeds(demo, 1.0), 1)
    for seconds in (1.0, 5.0, 50.0, 500.0):
        assert forecast.left([step], {}, {"a": demo.estimate.Job(seconds, 0.0)}) >= max(0.5, 0.1 * seconds)


# --- what is shown -----------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(demo: SimpleNamespace, out: Path, factor: float) -> None:
    more = {"parameters": 5_000_000, "precision": "fp32", "processor": "cpu", "instructions": "AVX2", "torch": "2"}
    (out / "speed").mkdir(parents=True)
    (out / "speed" / "speed.json").write_text(json.dumps(speeds(demo, factor) | more))


def a_show(demo: SimpleNamespace, out: Path, settings: dict[str, Any], clock: Clock) -> tuple[Any, list[str]]:
    said: list[str] = []
    return demo.show.Show(out, settings, 2, said.append, clock), said


@pytest.mark.parametrize(("factor", "scale"), [(0.8, "laptop"), (2.2, "small")])
def test_the_scale_is_chosen_said_stored_and_kept(
    demo: SimpleNamespace, tmp_path: Path, factor: float, scale: str
) -> None:
    settings = {"model": "vggt-mini", "scale": None, "image_size": 80}
    show, said = a_show(demo, tmp_path, settings, Clock())
    assert [step.name for step in show.steps] == ["speed", "scenes"]
    measured(demo, tmp_path, factor)
    more = show.finished(show.steps[0], 12.0)
    assert len(more) == len(plans(demo)[scale]) - 2 and len(said) == 1 and f"scale is {scale}" in said[0]
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["scale"] == scale and record["why"] == said[0]
    assert record["speed"]["step"] == pytest.approx(speeds(demo, factor)["step"])
    assert set(record["estimated_seconds"]) == {"laptop", "small"}

    # Another day, another speed: the folder keeps its scale, and nothing is chosen again.
    (tmp_path / "speed" / "speed.json").write_text(json.dumps(record["speed"] | speeds(demo, 10.0)))
    again, said = a_show(demo, tmp_path, record, Clock())
    again.know_speed()
    assert again.settings["scale"] == scale and said == [] and len(again.steps) == len(plans(demo)[scale])


def test_time_is_that_of_all_calls_and_lines_come_now_and_then(demo: SimpleNamespace, tmp_path: Path) -> None:
    settings = {"model": "vggt-mini", "scale": "small", "image_size": 80}
    measured(demo, tmp_path, 1.0)
    clock = Clock()
    show, said = a_show(demo, tmp_path, settings, clock)
    show.bar.disable = True
    show.know_speed()
    pages, said[:] = set(), []
    for _ in range(700):
        clock.now += 0.1
        show.update()
        pages.add((tmp_path / "index.html").stat().st_mtime_ns)
    assert len(said) == 3 and all("0 %, about 2 min left" in text for text in said)
    assert 13 <= len(pages) <= 16
    # The call is killed here: what the last page knew is kept.
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["calls"] == [pytest.approx(70, abs=5.1)]
    later = Clock()
    show, _ = a_show(demo, tmp_path, record, later)
    later.now += 30
    show.close("It was stopped.")
    assert show.total == pytest.approx(record["calls"][0] + 30)
    assert json.loads((tmp_path / "demo.json").read_text())["calls"][1] == 30


# --- the machine -------------------------------------------------------------------------------------------------


def test_as_many_commands_as_cores_and_memory_hold(
    demo: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    files = {"proc/meminfo": f"MemAvailable: {13 * 2**19} kB\n", "proc/self/cgroup": "0::/box\n"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert [demo.machine.workers(most, str(tmp_path)) for most in (4, 64)] == [4, 6]
    box = tmp_path / "sys/fs/cgroup/box"
    box.mkdir(parents=True)
    for memory, quota, count in (
        ("max", "max", 6),
        (f"{5 * 2**29}", "max", 2),
        ("1000", "max", 1),
        ("max", "300000", 3),
    ):
        (box / "memory.max").write_text(f"{memory}\n")
        (box / "memory.current").write_text("0\n")
        (box / "cpu.max").write_text(f"{quota} 100000\n")
        assert demo.machine.workers(64, str(tmp_path)) == count
