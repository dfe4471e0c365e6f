"""Damage of every kind is found and named, and repairing renders no more than what is broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_attrsub.scenes import generate as module
from peft_attrsub.scenes.agreement import contradictions
from peft_attrsub.scenes.check import check_dataset, repair_dataset
from peft_attrsub.scenes.dataset import Dataset
from peft_attrsub.scenes.sheet import contact_sheet
from peft_attrsub.scenes.storage import SceneWriter, json_bytes, read_scene
from tests.scenes import tiny
from tests.scenes.test_generate import control, lines, make, tree  # noqa: F401  (a fixture)

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("master") / "data"
    assert make(folder, scenes=3, workers=1).status == 0
    return folder


@pytest.fixture
def data(master: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(master, tmp_path / "data"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    # what to do to the scene: what the check says, and the views that are rendered again
    "flipped bit": (lambda f: flip(f / "images/00001.png"), "images/00001.png has other bytes than", [1]),
    "cut short": (lambda f: os.truncate(f / "depth/00002.png", 20), "depth/00002.png has 20 bytes, its manifest", [2]),
    "lost file": (lambda f: (f / "masks/00000.png").unlink(), "masks/00000.png is missing", [0]),
    "lost cameras": (lambda f: (f / "transforms.json").unlink(), "transforms.json is missing", []),
    "strange file": (lambda f: (f / "images/x.png").touch(), "images/x.png does not belong there", []),
    "lost manifest": (lambda f: (f / "manifest.json").unlink(), "it is not finished", [0, 1, 2]),
    "bad manifest": (lambda f: (f / "manifest.json").write_text("{"), "its manifest cannot be read", [0, 1, 2]),
    "lost scene": (shutil.rmtree, "it is not finished", [0, 1, 2]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_only_it_is_mended(kind: str, data: Path, master: Path, control: Path) -> None:  # noqa: F811
    damage, sentence, views = DAMAGE[kind]
    damage(data / "scene_00001")
    problems = check_dataset(data)
    assert str(problems[0]).startswith("scene_00001: ") and sentence in str(problems[0])
    assert {problem.scene for problem in problems} <= {1, None}
    assert repair_dataset(data, workers=1) == []
    assert lines(control / "rendered") == [f"1 {view}" for view in views]
    assert tree(data) == tree(master)


def test_a_whole_dataset_has_no_problem_and_nothing_to_repair(data: Path, control: Path) -> None:  # noqa: F811
    before = tree(data)
    assert check_dataset(data) == [] and repair_dataset(data) == []
    assert tree(data) == before and not lines(control / "tried")


def test_several_broken_scenes(data: Path, master: Path, control: Path) -> None:  # noqa: F811
    flip(data / "scene_00000/depth/00000.png")
    flip(data / "scene_00000/images/00002.png")
    shutil.rmtree(data / "scene_00002")
    assert len(check_dataset(data)) == 4  # the digest is missed, too
    assert repair_dataset(data, workers=2) == []
    assert sorted(lines(control / "rendered")) == ["0 0", "0 2", "2 0", "2 1", "2 2"]
    assert tree(data) == tree(master)


def test_a_manifest_that_lies_costs_the_whole_scene(data: Path, master: Path, control: Path) -> None:  # noqa: F811
    path = data / "scene_00001/manifest.json"
    record = json.loads(path.read_text())
    record["files"]["images/00001.png"]["sha256"] = "0" * 64
    path.write_bytes(json_bytes(record))
    assert repair_dataset(data, workers=1) == []
    assert lines(control / "rendered") == ["1 1", "1 0", "1 1", "1 2"]
    assert tree(data) == tree(master)


def test_what_is_wrong_with_the_dataset_itself(data: Path) -> None:
    record = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(record | {"digest": "0" * 64}))
    (data / "scene_00007").mkdir()
    texts = [str(problem) for problem in check_dataset(data)]
    assert len(texts) == 2
    assert "scene_00007 does not belong to the 3 scenes" in texts[0] and "its digest is not theirs" in texts[1]
    (data / "scene_00007").rmdir()
    assert repair_dataset(data) == []
    del record["checksum"]  # as in datasets of older versions
    (data / "dataset.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        check_dataset(data)
    (data / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="format None"):
        check_dataset(data)
    with pytest.raises(FileNotFoundError, match="this is no dataset"):
        check_dataset(data / "logs")


def test_a_scene_of_another_plan_is_found(data: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", scenes=2, workers=1, recipe=tiny.TinyRecipe(seed=8))
    shutil.rmtree(data / "scene_00001")
    shutil.copytree(tmp_path / "other/scene_00001", data / "scene_00001")
    assert "made by another plan" in str(check_dataset(data)[0])
    assert repair_dataset(data, workers=1) == []


def rewrite(data: Path, change) -> None:
    """Scene 1 with other pixels or cameras, and manifests that agree with them."""
    dataset, folder = Dataset.open(data), data / "scene_00001"
    scene = tiny.sample(tiny.TinyRecipe(), 1)
    shown, views = change(scene, [tiny.TinyRenderer(scene).render(index) for index in range(3)])
    shutil.rmtree(folder)
    writer = SceneWriter(folder, shown, tag=dataset.tag)
    for index, view in enumerate(views):
        writer.add(index, view)
    writer.finish()
    dataset.close()


def test_depth_and_cameras_that_do_not_fit_are_found(data: Path, master: Path) -> None:
    def lifted(scene, views):
        pose = np.array(scene.cameras[1].pose)
        pose[2, 3] += 0.3
        cameras = [scene.cameras[0], replace(scene.cameras[1], pose=pose.tolist()), scene.cameras[2]]
        return replace(scene, cameras=cameras), views

    rewrite(data, lifted)
    problems = check_dataset(data)
    assert problems and all("contradict each other" in str(problem) for problem in problems)
    assert {problem.scene for problem in problems} == {1}
    assert check_dataset(data, pairs=0) == []
    assert repair_dataset(data, workers=1) == []
    assert tree(data) == tree(master)


def contradictions_slowly(depth, extrinsic, intrinsic, stride) -> float:
    """One point at a time, by 4 x 4 matrices."""
    _, height, width = depth.shape
    inside = wrong = 0
    for row in range(0, height, stride):
        for column in range(0, width, stride):
            z = float(depth[0, row, column])
            if z == 0:
                continue
            k = intrinsic[0]
            local = [(column + 0.5 - k[0, 2]) / k[0, 0] * z, (row + 0.5 - k[1, 2]) / k[1, 1] * z, z, 1.0]
            point = np.linalg.inv(np.vstack([extrinsic[0], [0, 0, 0, 1]])) @ local
            x, y, far = extrinsic[1] @ point
            if far <= 1e-6:
                continue
            u = intrinsic[1][0, 0] * x / far + intrinsic[1][0, 2]
            v = intrinsic[1][1, 1] * y / far + intrinsic[1][1, 2]
            if not (0 <= u < width and 0 <= v < height):
                continue
            inside += 1
            near = [
                depth[1, r, c] or np.inf
                for r in range(int(v) - 1, int(v) + 2)
                for c in range(int(u) - 1, int(u) + 2)
                if 0 <= r < height and 0 <= c < width
            ]
            wrong += min(near) > far * 1.01 + 0.002
    return wrong / inside if inside >= 50 else 0.0


@pytest.mark.parametrize("order", [[0, 1], [2, 0]])
@pytest.mark.parametrize("wrong", [False, True])
def test_contradictions_against_one_point_at_a_time(data: Path, order: list[int], wrong: bool) -> None:
    found = read_scene(data / "scene_00000", order)
    depth, extrinsic, intrinsic = (found[key].copy() for key in ("depth", "extrinsic", "intrinsic"))
    if wrong:
        extrinsic[1, :, 3] += [0.3, 0.1, -0.2]
    share = contradictions(depth, extrinsic, intrinsic, stride=2)
    assert share == pytest.approx(contradictions_slowly(depth, extrinsic, intrinsic, 2))
    assert share > 0.05 if wrong else share < 0.02
    assert contradictions(depth, extrinsic, intrinsic, stride=6) == 0  # only 16 points
    nothing = np.zeros(depth.shape[1:], bool)
    assert contradictions(depth, extrinsic, intrinsic, nothing) == 0.0


def test_a_repair_that_is_killed_is_continued(data: Path, master: Path, control: Path) -> None:  # noqa: F811
    for index in range(3):
        flip(data / f"scene_0000{index}/images/00002.png")
        flip(data / f"scene_0000{index}/images/00001.png")
    (control / "slow").write_text("0.3")
    code = (
        "import runpy, sys; sys.path[:0] = [sys.argv[1]]\n"
        "runpy.run_path(sys.argv[1] + '/peft_attrsub/scenes/worker.py')['stand_in'](sys.argv[1] + '/peft_attrsub')\n"
        "from peft_attrsub.scenes.check import repair_dataset\n"
        "assert repair_dataset(sys.argv[2], workers=1) == []"
    )
    root = str(Path(module.__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", code, root, str(data)])
    while len(lines(control / "tried")) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {problem.scene for problem in check_dataset(data)} == {1, 2}
    assert repair_dataset(data, workers=1) == []
    assert tree(data) == tree(master)


def test_contact_sheet(data: Path, tmp_path: Path) -> None:
    sheet = contact_sheet(data, tmp_path / "sheet.png", scenes=2, views=3, cell=40)
    with Image.open(sheet) as picture:
        found = np.asarray(picture)
    first = read_scene(data / "scene_00000")["images"]
    second = read_scene(data / "scene_00001")["images"]
    repeated = (np.arange(40) + 0.5) * 24 // 40  # 24 pixels fill a cell of 40
    shown = [view[np.ix_(repeated.astype(int), repeated.astype(int))] for view in (*first, *second)]
    corners = [  # of the pictures, in reading order
        (row, column)
        for row in range(found.shape[0] - 39)
        for column in range(found.shape[1] - 39)
        if any((found[row : row + 40, column : column + 40] == view).all() for view in shown)
    ]
    assert len(corners) == 6 and len({row for row, _ in corners}) == 2
    assert contact_sheet(data, tmp_path / "sheet.jpg").read_bytes()[:2] == b"\xff\xd8"
    with pytest.raises(ValueError, match="0 scenes"):
        contact_sheet(data, scenes=0)
    for path in data.glob("scene_*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="no finished scene yet"):
        contact_sheet(data)


def damaged(path: Path, kind: str, rng: np.random.Generator) -> None:
    """One random fault of a file: shorter, empty, other bytes, gone, a folder in its place, JSON of another type."""
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "truncate":
        path.write_bytes(content[: rng.integers(1, len(content))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "type":
        path.write_text("[1, 2]")
    else:
        for place in rng.integers(0, len(content), 3):
            content[place] ^= 1 << rng.integers(0, 8)
        path.write_bytes(content)


KINDS = ("delete", "folder", "truncate", "empty", "type", "flip")


def test_random_damage_is_always_named_and_never_raises(master: Path, tmp_path: Path) -> None:
    """All files of a dataset but dataset.json, one after the other, by faults of all kinds."""
    rng = np.random.default_rng(5)
    names = sorted(tree(master))
    names.remove("dataset.json")
    for number, name in enumerate([*names, *names]):
        data = Path(shutil.copytree(master, tmp_path / str(number)))
        before = (data / name).read_bytes()
        damaged(data / name, KINDS[number % len(KINDS)], rng)
        if (data / name).is_file() and (data / name).read_bytes() == before:
            continue  # flipped twice at one place
        texts = [str(problem) for problem in check_dataset(data)]
        scene, _, rest = name.rpartition("scene_")[2].partition("/")
        word = f"scene_{scene}: " if rest else name
        assert any(text.startswith(word) for text in texts), (name, KINDS[number % len(KINDS)], texts)
        assert not [text for text in texts if text.startswith("scene_") and not text.startswith(word)]
        shutil.rmtree(data)


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_of_many_files_is_mended(kind: str, data: Path, master: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    names = sorted(set(tree(master)) - {"dataset.json"})
    for name in rng.choice(names, 4, replace=False):
        damaged(data / name, kind, rng)
    assert repair_dataset(data, workers=1) == []
    assert tree(data) == tree(master)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_plan_is_refused_and_made_again(kind: str, data: Path, master: Path) -> None:
    path, rng = data / "dataset.json", np.random.default_rng(9)
    for _ in range(20 if kind == "flip" else 1):
        if path.is_dir():
            path.rmdir()
        shutil.copy(master / "dataset.json", path)
        damaged(path, kind, rng)
        try:
            assert check_dataset(data), path.read_text()  # what is not refused is named: the digest, a space
        except (OSError, ValueError) as error:
            assert "dataset.json" in str(error) and "\n" not in str(error)
    plan = Dataset.open(master).plan
    with pytest.raises(ValueError, match=r"cannot be made again: its scenes were made with other arguments"):
        Dataset.restore(data, plan | {"depth": "npy"}, 3)
    flip(data / "scene_00001/manifest.json")
    Dataset.restore(data, plan, 3)
    assert repair_dataset(data, workers=1) == []
    assert tree(data) == tree(master)
