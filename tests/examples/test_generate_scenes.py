"""examples/vggt/generate_scenes.py: a dataset with textures of one's own, moved, checked and mended."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("open3d", reason="the ray caster needs it")
image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

FOLDER = Path(__file__).parents[2] / "examples" / "vggt"
SMALL = [
    "--attribute",
    "texture",
    "--datasets",
    "1",
    "--scenes",
    "2",
    "--views",
    "2",
    "--size",
    "32",
    "--workers",
    "1",
]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("generate_scenes")
    sys.path.remove(str(FOLDER))


def write_textures(root: Path) -> Path:
    for number, name in enumerate(("bricks", "wood/oak")):
        (root / name).mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        image.fromarray(pixels).save(root / name / "basecolor.png")
    return root


def tree(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if "logs/" not in name and ".work/" not in name}


@pytest.fixture(scope="module")
def two(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    assert script.main([*TINY, "--out", str(out)]) == 0
    return out


TINY = ["--attribute", "texture", "--datasets", "2", "--scenes", "1", "--views", "2", "--size", "16"]
TINY += ["--renderer", "tests.scenes.tiny:HallRenderer", "--workers", "1"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\x00", None])
def test_one_damaged_plan_keeps_nobody_from_checking_and_mending_the_others(
    content: bytes | None, script: ModuleType, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = Path(shutil.copytree(two, tmp_path / "out"))
    path = out / "texture_00" / "dataset.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (out / "texture_01/scene_00000/images/00001.png").unlink()
    given = ["--attribute", "texture", "--datasets", "3", "--out", str(out)]
    assert script.main([*given, "--check"]) == 1
    told = capsys.readouterr().out
    assert "texture_00: " in told and "dataset.json" in told and "texture_00: 1 problem\n" in told
    assert "texture_01: scene_00000: images/00001.png is missing." in told
    assert "texture_02: " in told and "does not exist" in told

    assert script.main([*given[:3], "2", *given[4:], "--repair"]) == 1  # not the arguments of the generation
    told = capsys.readouterr().out
    assert "cannot be made again: its scenes were made with other arguments" in told
    assert "texture_01: no problems" in told
    assert script.main([*TINY, "--out", str(out), "--repair"]) == 0
    assert tree(out) == tree(two)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("action", [[], ["--repair"], ["--check"]])
def test_both_signals_end_a_run_alike(number: signal.Signals, action: list[str], two: Path, tmp_path: Path) -> None:
    out, control = Path(shutil.copytree(two, tmp_path / "out")), tmp_path / "control"
    control.mkdir()
    (control / "slow").write_text("0.5")
    shutil.rmtree(out / "texture_01" / "scene_00000")
    command = [sys.executable, str(FOLDER / "generate_scenes.py"), *TINY, "--out", str(out), *action]
    root = str(FOLDER.parents[1])
    environment = os.environ | {"TINY_CONTROL": str(control), "PYTHONPATH": root}
    if action == ["--check"]:  # a pipe for a picture holds the check up for as long as nobody writes
        os.mkfifo(tmp_path / "pipe")
        (out / "texture_00/scene_00000/images/00000.png").unlink()
        (out / "texture_00/scene_00000/images/00000.png").symlink_to(tmp_path / "pipe")
    process = subprocess.Popen(
        command, env=environment, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if action == ["--check"]:
        with (tmp_path / "pipe").open("wb"):  # opens once the check reads it
            process.send_signal(number)
            time.sleep(0.2)
    else:
        while not (control / "tried").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert said.splitlines()[-1] == "generate_scenes: stopped; the same command continues" and "Traceback" not in said


def test_textures_may_lie_anywhere(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = []
    for place in ("here", "there/deeper"):
        textures, out = write_textures(tmp_path / place / "textures"), tmp_path / place / "data"
        assert script.main([*SMALL, "--out", str(out), "--textures", str(textures)]) == 0
        made.append(tree(out / "texture_00"))
    assert made[0] == made[1]
    record = json.loads(made[0]["dataset.json"])
    assert (
        record["plan"]["textures"] == ["bricks", "wood/oak"] and str(tmp_path).encode() not in made[0]["dataset.json"]
    )

    out, textures = tmp_path / "here" / "data", tmp_path / "here" / "textures"
    shutil.move(textures, tmp_path / "moved")
    victim = out / "texture_00" / "scene_00001" / "images" / "00001.png"
    victim.unlink()
    capsys.readouterr()
    assert script.main([*SMALL, "--out", str(out), "--check"]) == 1
    assert "scene_00001: images/00001.png is missing." in capsys.readouterr().out
    assert script.main([*SMALL, "--out", str(out), "--repair", "--textures", str(tmp_path / "moved")]) == 0
    assert tree(out / "texture_00") == made[0]
