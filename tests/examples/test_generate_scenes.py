"""examples/vggt/generate_scenes.py: a dataset with textures of one's own, moved, checked and mended."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
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
