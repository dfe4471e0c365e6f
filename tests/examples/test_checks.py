"""examples/vggt/training/checks.py: one sentence for each fault of a dataset, none for a good one; adapters' bases."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.datasets import MultiViewDataset, RenderedDataset, RenderedWriter, Sample, open_benchmark
from peft_attrsub.scenes.dataset import Dataset, make_plan
from peft_attrsub.scenes.storage import write_scene
from peft_attrsub.vggt import VggtModel, vggt_targets
from tests.datasets import world
from tests.datasets.test_scenes import generate
from tests.examples.training_tools import on_path, tiny_config, tiny_model
from tests.scenes.tiny import HERE, TinyRecipe

on_path()
from training.checks import check_adapter_base, check_data, check_sample  # noqa: E402

pytest.importorskip("PIL.Image", reason="pictures need Pillow")


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Two sequences of three views in the layout of rendered people."""
    for number, name in enumerate(("0000", "0001")):
        scene, views = world.scene(index=number), world.views(index=number)
        with RenderedWriter(tmp_path / name, depth="npy") as writer:
            for index, (view, camera) in enumerate(zip(views, scene.cameras, strict=True)):
                rgba = np.dstack([view.rgb, np.where(view.ids > 0, 255, 0).astype(np.uint8)])
                lens = (camera.fx, camera.fy, camera.cx, camera.cy)
                writer.add(index, rgba, view.depth, world.world_to_camera(scene, index), *lens)
            writer.finish()
    return tmp_path


INVERTED, OPENGL = "inverted (camera to world", "OpenGL axes"
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
MILLIMETERS = np.array([[1, 1, 1, 1000]] * 3 + [[1, 1, 1, 1]])
#: How a file's poses, world to camera (4, 4), go wrong, and what the sentence must and must not say of it.
WRONG: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...], tuple[str, ...]]] = {
    "inverted": (np.linalg.inv, (INVERTED,), (OPENGL,)),
    "opengl": (lambda w: FLIP @ w, (OPENGL,), (INVERTED,)),
    "inverted opengl": (lambda w: np.linalg.inv(FLIP @ w), (OPENGL, INVERTED), ()),
    "millimeters": (
        lambda w: np.c_[w[:, :3], w[:, 3:] * [[1000], [1000], [1000], [1]]],
        ("1000 times too large",),
        (INVERTED,),
    ),
}
SCENES, VIEWS = 2, 6


def write_rendered(folder: Path, index: int, change: Callable[[np.ndarray], np.ndarray], masks: bool) -> None:
    scene, views = world.scene(VIEWS, index=index), world.views(VIEWS, index=index)
    with RenderedWriter(folder, digits=8 if masks else 3, depth="npy") as writer:
        for view, (shown, camera) in enumerate(zip(views, scene.cameras, strict=True)):
            rgba = np.dstack([shown.rgb, np.where(shown.ids > 0, 255, 0).astype(np.uint8)])
            lens = (camera.fx, camera.fy, camera.cx, camera.cy)
            extra = {"mask": shown.ids > 0} if masks else {}
            writer.add(view, rgba, shown.depth, world.world_to_camera(scene, view), *lens, **extra)
        writer.finish()
    path = folder / "opencv_cameras.json"
    record = json.loads(path.read_text())
    for frame in record["frames"]:
        frame["w2c"] = change(np.array(frame["w2c"], np.float64)).tolist()
    path.write_text(json.dumps(record))


def write_benchmark(name: str, root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Sequences of a benchmark in its own layout; `change` is done to every stored pose, seen as world to camera."""
    for index in range(SCENES):
        if name == "scenes":
            folder = root / f"texture_{index:02d}"
            plan = make_plan(TinyRecipe(size=64, views=VIEWS), f"{HERE}:sample", f"{HERE}:TinyRenderer")
            dataset = Dataset.start(folder, plan, 1)
            write_scene(
                dataset.scene(0), world.scene(VIEWS, index=index), world.views(VIEWS, index=index), tag=dataset.tag
            )
            path = folder / "scene_00000" / "transforms.json"
            record = json.loads(path.read_text())
            for frame in record["frames"]:
                frame["extrinsic"] = change(np.vstack([frame["extrinsic"], [0, 0, 0, 1]]))[:3].tolist()
            path.write_text(json.dumps(record))
        elif name == "clearpose":
            clearpose = pytest.importorskip("tests.datasets.clearpose_files", reason="ClearPose needs scipy")
            frames = tuple(f"{100 * view:06d}" for view in range(VIEWS))
            folder = root / f"set1/scene{index + 1}"
            records = clearpose.write_scene(root, f"set1/scene{index + 1}", frames, shift=2.0 * index)
            for record in records.values():  # world from camera
                pose = np.vstack([record["rotation_translation_matrix"], [0, 0, 0, 1]])
                record["rotation_translation_matrix"] = np.linalg.inv(change(np.linalg.inv(pose)))[:3]
            clearpose.scipy.io.savemat(folder / "metadata.mat", records)
        else:
            write_rendered(
                root / (f"a/{index:04d}" if name == "face" else f"{index:04d}"), index, change, name == "face"
            )


READERS = ("scenes", "human", "face", "clearpose")


@pytest.mark.parametrize("name", READERS)
def test_right_poses_raise_no_alarm(name: str, tmp_path: Path) -> None:
    write_benchmark(name, tmp_path, lambda pose: pose)
    options = {"split": "all"} if name == "clearpose" else {}
    assert check_data(lambda: open_benchmark(name, tmp_path, **options), views_min=VIEWS) == []


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", READERS)
def test_poses_of_another_convention_are_found_and_named(name: str, wrong: str, tmp_path: Path) -> None:
    change, words, others = WRONG[wrong]
    write_benchmark(name, tmp_path, change)
    options = {"split": "all"} if name == "clearpose" else {}
    found = check_data(lambda: open_benchmark(name, tmp_path, **options))
    assert len(found) == SCENES, found
    for problem in found:
        assert all(word in problem for word in words) and not any(word in problem for word in others), problem
        assert "contradict each other in" in problem or "share no surface" in problem


def check_people(root: Path, **options: object) -> list[str]:
    return check_data(lambda: RenderedDataset(root, unit="height"), **options)  # type: ignore[arg-type]


def change_cameras(root: Path, change: Callable[[dict], object], name: str = "0000") -> None:
    path = root / name / "opencv_cameras.json"
    record = json.loads(path.read_text())
    change(record["frames"][1])
    path.write_text(json.dumps(record))


def depth_file(root: Path, frame: int = 1, name: str = "0000") -> Path:
    return sorted((root / name / "renderings").glob("*_depth.npy"))[frame]


def test_good_data_has_no_problems(people: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    seen = []
    assert check_people(people, views_min=3, progress=lambda steps: (seen.append(one) or one for one in steps)) == []
    assert seen == [[], []]
    assert check_people(people, workers=2) == []
    scenes = tmp_path_factory.mktemp("scenes")
    generate(scenes)
    assert check_data(lambda: open_benchmark("scenes", scenes), views_min=3) == []


def test_no_scenes(tmp_path: Path) -> None:
    (found,) = check_data(lambda: open_benchmark("scenes", tmp_path))
    assert str(tmp_path) in found and "holds no sequence" in found
    (found,) = check_data(lambda: open_benchmark("scenes", tmp_path / "nowhere"))
    assert "is no folder" in found and "\n" not in found


def test_too_few_views(people: Path) -> None:
    found = check_people(people, views_min=4)
    assert [problem[:4] for problem in found] == ["0000", "0001"]
    assert "has 3 views, a batch takes 4 or more" in found[0]
    assert len(check_people(people, views_min=4, names=["0001"])) == 1


def test_unreadable_pictures_are_all_named_and_the_rest_is_read(people: Path) -> None:
    broken = sorted((people / "0000" / "renderings").glob("*_rgba.png"))
    broken[0].write_bytes(b"no picture")
    broken[2].unlink()
    depth_file(people, 0, "0001").write_bytes(b"")
    found = check_people(people)
    assert len(found) == 3 == len(check_people(people, workers=1))
    assert f"{broken[0]} is not a readable picture" in found[0]
    assert f"{broken[2]} does not exist" in found[1]
    assert f"{depth_file(people, 0, '0001')} is no readable array" in found[2]


def test_cameras_that_are_no_rotations(people: Path) -> None:
    change_cameras(people, lambda frame: frame["w2c"][0].__setitem__(1, 0.7))
    found = check_people(people)
    assert found and all("0000" in problem for problem in found)
    assert "an extrinsic is no rotation and translation" in found[0]


def test_a_camera_file_that_cannot_be_read_is_one_problem(people: Path) -> None:
    (people / "0000" / "opencv_cameras.json").write_text("{")
    (found,) = check_people(people)
    assert "opencv_cameras.json holds no cameras" in found


def test_depth_of_another_size(people: Path) -> None:
    depth = np.load(depth_file(people))
    np.save(depth_file(people), depth[:, :40])
    found = check_people(people)
    assert len(found) == 2 and all("0000" in problem for problem in found)
    assert any("its pictures are 64 x 69 pixels, its depth maps 64 x 40" in problem for problem in found)
    for frame in range(3):  # all of a sensor's own size and of the same shape: that is allowed
        np.save(depth_file(people, frame), np.load(depth_file(people, frame, "0001")).repeat(2, 0).repeat(2, 1))
    assert check_people(people) == []


def test_views_without_depth(people: Path) -> None:
    np.save(depth_file(people), np.zeros((64, 69), np.float32))
    (found,) = check_people(people)
    assert "0000: 1 of its 3 views have fewer than 100 measured pixels, frame " in found


def test_a_principal_point_of_another_picture(people: Path) -> None:
    change_cameras(people, lambda frame: frame.update(cx=64.0))
    (found,) = check_people(people)
    assert "0000: frame " in found and "has its principal point at (64.0, 32.0) of 69 x 64 pixels" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, extrinsics=None), "world has no poses"),
        (lambda s: replace(s, images=2 * s.images), "world: its pictures have values outside of"),
        (lambda s: replace(s, intrinsics=-s.intrinsics), "world: frame 0 has no focal lengths greater than 0"),
        (lambda s: replace(s, intrinsics=s.intrinsics * torch.nan), "frame 0 has no focal lengths"),
        (lambda s: replace(s, extrinsics=s.extrinsics / torch.tensor([1, 1, 1, 0.0])), "a translation is not finite"),
    ],
)
def test_what_a_reader_lets_through(change: Callable[[Sample], Sample], words: str) -> None:
    sample = world.make_sample()
    assert check_sample(sample) == []
    (found,) = check_sample(change(sample))
    assert words in found


def test_a_long_sequence_is_read_in_parts(tmp_path: Path) -> None:
    calls = []

    class Long(MultiViewDataset):
        def _find(self) -> list[str]:
            return ["long"]

        def frames(self, name: str) -> list[str]:
            return [str(index) for index in range(40)]

        def _read(self, name: str, frames: list[str]) -> Sample:
            calls.append(len(frames))
            if "33" in frames:
                raise OSError("frame 33 is gone")
            return world.make_sample(1).views([0] * len(frames))

    assert check_data(lambda: Long(tmp_path)) == ["long: frame 33 is gone"]
    assert calls == [16, 16, 8] + [1] * 8


def adapters(folder: Path) -> dict[str, Path]:
    """One saved adapter of each kind on the tiny model."""
    config = tiny_config()
    some, heads = vggt_targets("aggregator", config)[:4], vggt_targets("heads", config)
    kinds = {
        "lora": LoraConfig(r=2, target_modules=[*some, *heads]),
        "adalora": AdaLoraConfig(target_modules=some, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1),
        "cores": AttrSubspaceConfig(basis="random", dim=3, target_modules=some, lora_modules=heads, lora_rank=2),
    }
    for name, kind in kinds.items():
        get_peft_model(tiny_model(), kind).save_pretrained(folder / name)
    return {name: folder / name for name in kinds}


def test_adapters_fit_their_own_base_and_no_other(tmp_path: Path) -> None:
    wide = VggtModel(tiny_config(embed_dim=64))
    shallow = tiny_model()
    shallow.aggregator.frame_blocks = shallow.aggregator.frame_blocks[:0]
    for name, folder in adapters(tmp_path).items():
        check_adapter_base(folder, tiny_model())
        with pytest.raises(ValueError, match=rf"{name} was made for another base \(.*\): its .* has"):
            check_adapter_base(folder, wide)
        with pytest.raises(ValueError, match=r"it adapts aggregator\.frame_blocks\.0.*, which the model has not"):
            check_adapter_base(folder, shallow)


@pytest.mark.parametrize(
    ("kind", "sides", "words"),
    [
        ("lora", (32, 100), r"its B of (\S*) has 96 rows, the weight has 100"),
        ("lora", (30, 96), r"its A of (\S*) has 32 columns, the weight has 30"),
        ("adalora", (32, 100), r"its B of (\S*) has 96 rows, the weight has 100"),
        ("cores", (32, 100), r"its basis has 96 rows for (\S*), a side of whose weight has 100"),
        ("cores", (30, 96), r"its basis has 32 rows for (\S*), a side of whose weight has 30"),
    ],
)
def test_one_matrix_of_other_sides(tmp_path: Path, kind: str, sides: tuple[int, int], words: str) -> None:
    model = tiny_model()
    model.aggregator.frame_blocks[0].attn.qkv = torch.nn.Linear(*sides)
    with pytest.raises(ValueError, match=words) as caught:
        check_adapter_base(adapters(tmp_path)[kind], model)
    assert "aggregator.frame_blocks.0.attn.qkv" in str(caught.value)


def test_cores_that_are_larger_than_their_matrix(tmp_path: Path) -> None:
    """An adapter whose basis lies elsewhere says no more of the base than the sizes of its cores."""
    folder = adapters(tmp_path)["cores"]
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "attrsub_M" in k}, folder / "adapter_model.safetensors")
    check_adapter_base(folder, tiny_model())
    model = tiny_model()
    model.aggregator.frame_blocks[0].attn.qkv = torch.nn.Linear(2, 96)
    with pytest.raises(ValueError, match=r"its core of \S*qkv is 3 x 3, the weight 96 x 2"):
        check_adapter_base(folder, model)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder of an adapter"):
        check_adapter_base(tmp_path / "nowhere", tiny_model())
    folder = adapters(tmp_path)["lora"]
    tensors = folder / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        check_adapter_base(folder, tiny_model())
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"adapter_config.json is no readable JSON"):
        check_adapter_base(folder, tiny_model())


def test_the_cluster_checks_every_dataset_and_trains_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = importlib.import_module("train_lora_cluster")
    write_benchmark("scenes", tmp_path / "data", np.linalg.inv)
    given = ["--datasets", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--workers", "0", "--check"]
    assert cluster.main(given) == 1
    told = capsys.readouterr().out
    assert told.count("read as inverted") == SCENES and "texture_00:\n" in told and "texture_01:\n" in told
    assert not (tmp_path / "out").exists()
