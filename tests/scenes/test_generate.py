"""Datasets made by real processes that are killed, stopped, starved of disk and made to fail."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from peft_attrsub.scenes import generate as module
from peft_attrsub.scenes.agreement import contradictions
from peft_attrsub.scenes.check import CONTRADICTIONS, check_dataset, check_scene
from peft_attrsub.scenes.dataset import Dataset
from peft_attrsub.scenes.description import Scene
from peft_attrsub.scenes.generate import Report, generate
from peft_attrsub.scenes.storage import read_scene
from tests.scenes import tiny
from tests.scenes.tiny import TinyRecipe

DRIVE = Path(__file__).with_name("drive.py")
SCENES = 8

pytest.importorskip("PIL", reason="pictures need Pillow")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that the dataset is made of: all but the logs and the workplace."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(("logs/", ".work/"))}


def make(folder: Path, scenes: int = SCENES, workers: int = 2, recipe: TinyRecipe | None = None, **more) -> Report:
    names = {"renderer": f"{tiny.HERE}:TinyRenderer", "sampler": f"{tiny.HERE}:sample"}
    return generate(folder, recipe or TinyRecipe(), scenes, workers=workers, **(names | more))


def drive(folder: Path, workers: int = 2, scenes: int = SCENES, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(DRIVE), str(folder), str(scenes), str(workers)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    assert make(folder).status == 0
    return tree(folder)


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "control"
    folder.mkdir()
    monkeypatch.setenv("TINY_CONTROL", str(folder))
    return folder


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_makes_everything_and_a_second_one_nothing(tmp_path: Path, control: Path) -> None:
    folder = tmp_path / "data"
    report = make(folder, scenes=3)
    assert (report.status, report.done, report.rendered, report.failed) == (0, 3, 3, [])
    assert sorted(lines(control / "rendered")) == [f"{scene} {view}" for scene in range(3) for view in range(3)]
    assert check_dataset(folder) == []
    before = tree(folder)
    assert {"dataset.json", "contact_sheet.png", "scene_00002/manifest.json"} <= set(before)
    assert "failures.json" not in before

    record = json.loads(before["dataset.json"])
    assert record["seeds"]["dataset"] == 7 and record["scenes"] == 3 and len(record["digest"]) == 64
    assert record["versions"]["numpy"] == np.__version__

    again = make(folder, scenes=3)
    assert (again.status, again.done, again.rendered) == (0, 3, 0)
    assert len(lines(control / "rendered")) == 9
    assert tree(folder) == before

    more = make(folder, scenes=4)
    assert (more.done, more.rendered) == (4, 1)
    assert len(lines(control / "rendered")) == 12


def test_the_pictures_are_those_of_the_renderer(tmp_path: Path) -> None:
    make(tmp_path / "data", scenes=2, recipe=TinyRecipe(seed=3), views=2)
    scene = tiny.sample(TinyRecipe(seed=3, views=2), 1)
    arrays = read_scene(tmp_path / "data" / "scene_00001")
    for index in range(2):
        view = tiny.TinyRenderer(scene).render(index)
        np.testing.assert_array_equal(arrays["images"][index], view.rgb)
        np.testing.assert_array_equal(arrays["ids"][index], view.ids)
        np.testing.assert_allclose(arrays["depth"][index], view.depth, atol=0.00051)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, undisturbed: dict[str, bytes], workers: int) -> None:
    assert make(tmp_path / "data", workers=workers, recycle=2).status == 0
    assert tree(tmp_path / "data") == undisturbed


def test_a_worker_is_replaced_after_its_share_and_has_a_log(tmp_path: Path, control: Path) -> None:
    make(tmp_path / "data", scenes=5, workers=1, recycle=2)
    processes = [line.split()[1] for line in lines(control / "tried")]
    assert [processes.count(number) for number in dict.fromkeys(processes)] == [2, 2, 1]
    assert "scene 4" in (tmp_path / "data" / "logs" / "rank0-worker-0.log").read_text()


def whole(folder: Path) -> int:
    """How many scenes carry their final name; every one of them must be whole, whenever one looks."""
    dataset = Dataset.open(folder)
    found = sorted(folder.glob("scene_*"))
    for path in found:
        assert check_scene(dataset, int(path.name[-5:]), pairs=0) == []
    return len(found)


def test_kill_the_whole_run_again_and_again(tmp_path: Path, control: Path, undisturbed: dict[str, bytes]) -> None:
    folder, rng = tmp_path / "data", np.random.default_rng(1)
    (control / "slow").write_text("0.2")
    kills = 0
    for _ in range(5):
        before = len(lines(control / "tried"))
        process = drive(folder)
        while len(lines(control / "tried")) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.4 * rng.random())
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        whole(folder)
    assert kills >= 2  # the last ones may have found nothing left to do
    (control / "slow").unlink()
    assert make(folder).status == 0
    assert tree(folder) == undisturbed
    assert not list((folder / ".work").rglob("scene_*"))


def test_a_dataset_in_which_things_move_survives_a_kill(tmp_path: Path, control: Path) -> None:
    recipe = TinyRecipe("motion")
    assert make(tmp_path / "whole" / "data", recipe=recipe).status == 0
    folder = tmp_path / "data"
    (control / "tried").unlink()
    (control / "slow").write_text("0.2")
    process = drive(folder, TINY_ATTRIBUTE="motion")
    while len(lines(control / "tried")) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and whole(folder) < SCENES
    (control / "slow").unlink()
    assert make(folder, recipe=recipe).status == 0
    assert tree(folder) == tree(tmp_path / "whole" / "data")
    assert check_dataset(folder) == []
    frames = json.loads((folder / "scene_00001" / "transforms.json").read_text())["frames"]
    scene = Scene.from_json((folder / "scene_00001" / "scene.json").read_text())
    assert [frame["object_poses"] for frame in frames] == scene.motion
    assert scene.motion[1] != scene.motion[0]
    # Only the leave that the check gives to what moves lets these views pass.
    pairs = [read_scene(folder / f"scene_{index:05d}", [0, 1]) for index in range(SCENES)]
    shares = [contradictions(one["depth"], one["extrinsic"], one["intrinsic"]) for one in pairs]
    assert max(shares) > 2 * CONTRADICTIONS


def children(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_kill_workers(tmp_path: Path, control: Path, undisturbed: dict[str, bytes]) -> None:
    folder, rng = tmp_path / "data", np.random.default_rng(2)
    (control / "slow").write_text("0.05")
    process = drive(folder)
    killed = 0
    while process.poll() is None:
        time.sleep(0.1 + 0.3 * rng.random())
        if killed < 4 and (workers := children(process.pid)):
            try:
                os.kill(workers[int(rng.integers(len(workers)))], signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
    assert process.stderr is not None
    process.stderr.close()
    assert killed >= 1
    assert process.returncode in (0, 1)  # 1: the same scene was hit twice
    assert make(folder).status == 0
    assert tree(folder) == undisturbed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
def test_workers_die_with_the_run(tmp_path: Path, control: Path) -> None:
    (control / "slow").write_text("60")
    process = drive(tmp_path / "data")
    while len(lines(control / "tried")) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    workers = [int(line.split()[1]) for line in lines(control / "tried")]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_view(
    tmp_path: Path, control: Path, undisturbed: dict[str, bytes], number: signal.Signals
) -> None:
    folder = tmp_path / "data"
    (control / "slow").write_text("0.2")
    process = drive(folder)
    while len(lines(control / "tried")) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == 128 + number
    assert whole(folder) < SCENES
    assert not list((folder / ".work").rglob("scene_*"))
    assert json.loads((folder / "dataset.json").read_text())["digest"] is None
    (control / "slow").unlink()
    assert make(folder).status == 0
    assert tree(folder) == undisturbed


def test_two_processes_share_the_scenes(tmp_path: Path, control: Path, undisturbed: dict[str, bytes]) -> None:
    folder = tmp_path / "data"
    runs = [drive(folder, workers=1, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in runs:
        process.communicate()
        assert process.returncode == 0
    assert tree(folder) == undisturbed
    assert len(lines(control / "tried")) == SCENES


def test_a_rank_outside_the_world_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK is '2' and WORLD_SIZE '2'"):
        make(tmp_path / "data")


def test_a_scene_that_fails_once_is_tried_again(tmp_path: Path, control: Path, undisturbed: dict[str, bytes]) -> None:
    (control / "fail-3-once").touch()
    report = make(tmp_path / "data")
    assert (report.status, report.failed) == (0, [])
    assert [line.split()[0] for line in lines(control / "tried")].count("3") == 2
    assert tree(tmp_path / "data") == undisturbed


def test_a_scene_that_always_fails_is_recorded_and_skipped(
    tmp_path: Path, control: Path, undisturbed: dict[str, bytes]
) -> None:
    folder = tmp_path / "data"
    (control / "fail-3").touch()
    (control / "kill-5").touch()
    report = make(folder)
    assert (report.status, report.failed, report.done) == (1, [3, 5], SCENES - 2)
    assert [line.split()[0] for line in lines(control / "tried")].count("3") == 2
    record = json.loads((folder / "failures.json").read_text())
    assert list(record) == ["scene_00003", "scene_00005"]
    assert "RuntimeError: scene 3 never works" in record["scene_00003"]["traceback"]
    assert "misbehave" in record["scene_00003"]["traceback"]
    assert "killed by SIGKILL" in record["scene_00005"]["error"]
    assert json.loads((folder / "dataset.json").read_text())["digest"] is None
    texts = [str(problem) for problem in check_dataset(folder)]
    assert texts[0] == "scene_00003: it failed: RuntimeError: scene 3 never works" and len(texts) == 2

    (control / "fail-3").unlink()
    (control / "kill-5").unlink()
    again = make(folder)
    assert (again.status, again.rendered) == (0, 2)
    assert tree(folder) == undisturbed


def test_a_disk_that_fills_up_stops_the_run(tmp_path: Path, control: Path, undisturbed: dict[str, bytes]) -> None:
    folder = tmp_path / "data"
    (control / "full-4").touch()
    with pytest.raises(OSError, match="is full: make room and run the same command again"):
        make(folder)
    assert not (folder / "failures.json").exists()
    assert not list((folder / ".work").rglob("scene_*"))
    assert 3 <= whole(folder) < SCENES
    (control / "full-4").unlink()
    assert make(folder).status == 0
    assert tree(folder) == undisturbed


Usage = namedtuple("Usage", ["total", "used", "free"])


def test_the_disk_is_looked_at_before(tmp_path: Path, control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 300 << 20))
    with pytest.raises(OSError, match=r"200 scenes need about 9.1 GB .* only 314.6 MB are"):
        make(tmp_path / "data", scenes=200, recipe=TinyRecipe(size=518, views=100))
    assert not lines(control / "tried")


def test_the_disk_is_looked_at_after_every_scene(
    tmp_path: Path, control: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    folder = tmp_path / "data"

    def free(path: Path) -> Usage:
        return Usage(1 << 40, 0, (1 << 30) if len(list(folder.glob("scene_*"))) < 3 else (256 << 20) + 100)

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", free)
        with pytest.raises(OSError, match=r"are free for .*data"):
            make(folder, workers=1)
    assert whole(folder) == 3
    assert make(folder).status == 0
    assert tree(folder) == undisturbed


def test_a_missing_package_stops_the_run(tmp_path: Path, control: Path) -> None:
    (control / "missing").touch()
    with pytest.raises(ImportError, match="this needs embree: pip install"):
        make(tmp_path / "data")
    assert len(lines(control / "tried")) <= 2
    with pytest.raises(ImportError, match="NoSuchRenderer"):
        make(tmp_path / "other", renderer=f"{tiny.HERE}:NoSuchRenderer")


def test_a_missing_device_stops_the_run(tmp_path: Path, control: Path) -> None:
    (control / "no-gpu").touch()
    with pytest.raises(ValueError, match=r"no scene can be made: .*no such device: check the driver"):
        make(tmp_path / "data")
    assert len(lines(control / "tried")) <= 2
    assert not (tmp_path / "data" / "failures.json").exists()
    (control / "no-gpu").unlink()
    assert make(tmp_path / "data").status == 0


@pytest.mark.parametrize(
    ("cores", "workers", "scenes", "options", "told"),
    [
        (8, 1, 2, {}, "0"),  # alone: the renderer's own choice, all cores
        (8, 2, 2, {}, "4"),
        (2, 4, 4, {}, "1"),
        (8, 4, 1, {}, "0"),  # one scene is left: its worker has the machine
        (8, 2, 2, {"threads": 3}, "3"),  # asked for
    ],
)
def test_workers_share_the_cores(
    tmp_path: Path,
    control: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    workers: int,
    scenes: int,
    options: dict[str, int],
    told: str,
) -> None:
    monkeypatch.setattr(module, "cores_per_process", lambda: cores)
    folder = tmp_path / "data"
    make(folder, scenes, workers, renderer=f"{tiny.HERE}:ThreadedRenderer", options=options)
    assert lines(control / "threads") == [told] * scenes
    assert json.loads((folder / "dataset.json").read_text())["plan"]["options"] == options  # no trace of the machine


def test_another_recipe_is_kept_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    make(folder, scenes=2)
    before = tree(folder)
    with pytest.raises(ValueError, match="was made with another recipe"):
        make(folder, scenes=2, recipe=TinyRecipe(seed=8))
    with pytest.raises(ValueError, match="was made with another options"):
        make(folder, scenes=2, options={"bright": 0.5})
    with pytest.raises(ValueError, match="is a dataset of 2 scenes, 1 were asked for"):
        make(folder, scenes=1)
    assert tree(folder) == before
    shutil.rmtree(folder / "scene_00001")
    (folder / "dataset.json").unlink()
    with pytest.raises(ValueError, match="made by another recipe"):
        make(folder, scenes=2, recipe=TinyRecipe(seed=8))


def test_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    make(folder, scenes=1)
    with (
        Dataset.open(folder).workplace(0, 1),
        pytest.raises(BlockingIOError, match="another run is writing"),
    ):
        make(folder, scenes=2)
    assert make(folder, scenes=2).status == 0


def test_textures_reach_the_sampler(tmp_path: Path) -> None:
    make(tmp_path / "data", scenes=1, textures=["wood", "stone"])
    assert json.loads((tmp_path / "data/scene_00000/scene.json").read_text())["materials"][0]["maps"] == "wood"


@dataclass
class NotImportable:
    seed: int = 0


def test_arguments_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give an AttributeRecipe"):
        make(tmp_path, recipe="texture")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 scenes"):
        make(tmp_path, scenes=0)
    with pytest.raises(ValueError, match="write it as module:attribute"):
        make(tmp_path, renderer="povray")
    with pytest.raises(ValueError, match="JPEG quality is 0"):
        make(tmp_path, jpeg=0)
    with pytest.raises(ValueError, match="depth format is 'tiff'"):
        make(tmp_path, depth="tiff")
    monkeypatch.setattr(NotImportable, "__module__", "__main__")
    with pytest.raises(ValueError, match="a module that can be imported"):
        make(tmp_path, recipe=NotImportable())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_progress_is_one_line() -> None:
    progress = module.Progress("texture_00", 200, 37, 3_210_000_000, 100)
    assert progress.line() == "texture_00  37/200 scenes  3.2 GB on disk"
    progress.start -= 100
    progress.done, progress.rendered, progress.failed = 47, 10, 1
    assert progress.line() == "texture_00  47/200 scenes  10.0 images/s  ETA 0:25:20  3.2 GB on disk  1 failed"


def test_every_local_rank_sees_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with module.visible_device({"device": "optix"}):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    with module.visible_device({"device": "cpu"}):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with module.visible_device({"device": "cuda"}):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def example() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "vggt" / "generate_scenes.py"
    spec = importlib.util.spec_from_file_location("generate_scenes", path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_example_makes_checks_and_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = example().main
    given = ["--attribute", "texture", "--datasets", "2", "--out", str(tmp_path), "--workers", "1"]
    made = ["--scenes", "1", "--views", "2", "--size", "16", "--renderer", f"{tiny.HERE}:HallRenderer"]
    assert main([*given, *made, "--depth", "npy", "--jpeg", "90"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texture_00", "texture_01"]
    arrays = read_scene(tmp_path / "texture_01" / "scene_00000")
    assert arrays["images"].shape == (2, 16, 16, 3)
    assert (tmp_path / "texture_01/scene_00000/images/00001.jpg").exists()
    assert (tmp_path / "texture_00/dataset.json").read_text() != (tmp_path / "texture_01/dataset.json").read_text()

    (tmp_path / "texture_01/scene_00000/depth/00001.npy").unlink()
    capsys.readouterr()
    assert main([*given, "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "texture_00: no problems",
        "texture_01: scene_00000: depth/00001.npy is missing.",
        "texture_01: 1 problem",
    ]
    assert main([*given, "--repair"]) == 0
    assert main([*given, "--check"]) == 0

    assert main([*given, *made]) == 2  # another format in the same folder
    assert "was made with another depth, jpeg (npy, now png)" in capsys.readouterr().err
    assert main(["--attribute", "all", "--out", str(tmp_path / "none"), "--check"]) == 2
    assert "this is no dataset" in capsys.readouterr().err
