"""Our own generated datasets: every finished scene, with its cameras where the contract wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from peft_attrsub.datasets.scenes import SceneDataset
from peft_attrsub.scenes.dataset import Dataset, make_plan
from peft_attrsub.scenes.storage import MANIFEST, SceneFormat, write_scene
from tests.datasets.invariants import check_sample
from tests.datasets.world import farthest_from_surfaces, scene, views
from tests.scenes.tiny import HERE, TinyRecipe

pytest.importorskip("PIL.Image", reason="pictures need Pillow")


def generate(folder: Path, scenes: int = 2, depth: str = "npy", made: int | None = None) -> None:
    plan = make_plan(TinyRecipe(size=64), f"{HERE}:sample", f"{HERE}:TinyRenderer", depth=depth)
    dataset = Dataset.start(folder, plan, scenes)
    for index in range(scenes if made is None else made):
        write_scene(
            dataset.scene(index), scene(index=index), views(index=index), SceneFormat(None, depth), dataset.tag
        )
    dataset.close()


@pytest.mark.parametrize("depth", ["png", "npy", "exr"])
def test_a_scene_is_a_sample(tmp_path: Path, depth: str) -> None:
    if depth == "exr":
        pytest.importorskip("OpenEXR", reason="EXR depth maps need OpenEXR")
    generate(tmp_path, depth=depth)
    dataset = SceneDataset(tmp_path)
    assert dataset.names == ("scene_00000", "scene_00001") and len(dataset) == 2
    for index in range(2):
        sample = dataset[index]
        check_sample(sample)
        assert sample.frames == ("00000", "00001", "00002") and sample.unit == "m"
        # Millimetres on disk may lie half of one off; an intrinsic without its half pixel lies centimetres off.
        assert farthest_from_surfaces(sample) < (0.001 if depth == "png" else 1e-5)
        assert sample.labels is not None
        for place, view in enumerate(views(index=index)):
            np.testing.assert_array_equal(sample.labels[place], view.ids)
            np.testing.assert_array_equal(sample.point_masks[place], view.depth > 0)
            np.testing.assert_array_equal((sample.images[place] * 255).round().permute(1, 2, 0), view.rgb)
            np.testing.assert_allclose(sample.depths[place], view.depth, rtol=0, atol=0.00051)


def test_chosen_frames_in_their_order(tmp_path: Path) -> None:
    generate(tmp_path, scenes=1)
    dataset = SceneDataset(tmp_path, {"scene_00000": [2, 0]})
    whole, part = dataset.read("scene_00000", range(3)), dataset[0]
    assert part.frames == ("00002", "00000")
    for key in ("images", "depths", "point_masks", "intrinsics", "extrinsics", "labels"):
        assert torch.equal(getattr(part, key), getattr(whole, key)[[2, 0]]), key
    assert dataset.read("scene_00000", ["00001"]).frames == ("00001",)
    with pytest.raises(ValueError, match="no frame '3': it has '00000' to '00002'"):
        dataset.read("scene_00000", [3])


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    generate(tmp_path / "texture_00")
    generate(tmp_path / "more" / "light_01", scenes=1)
    generate(tmp_path / "texture_00" / "copy", scenes=1)  # what is inside of a dataset is the dataset's own matter
    generate(tmp_path / ".trash", scenes=1)
    names = ("more/light_01/scene_00000", "texture_00/scene_00000", "texture_00/scene_00001")
    dataset = SceneDataset(tmp_path)
    assert dataset.names == names
    assert [dataset[index].name for index in range(3)] == list(names)


def test_unfinished_scenes_are_left_out(tmp_path: Path) -> None:
    generate(tmp_path, scenes=3, made=2)
    (tmp_path / "scene_00000" / MANIFEST).unlink()
    assert SceneDataset(tmp_path).names == ("scene_00001",)
    (tmp_path / "scene_00001" / MANIFEST).unlink()
    with pytest.raises(
        ValueError, match=r"holds no sequence that SceneDataset can read: expected a folder with dataset"
    ):
        SceneDataset(tmp_path)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    generate(tmp_path, scenes=1)
    path = tmp_path / "scene_00000" / "images" / "00001.png"
    path.write_bytes(path.read_bytes()[:40])
    dataset = SceneDataset(tmp_path)
    assert len(dataset.read("scene_00000", [0, 2])) == 2
    with pytest.raises(ValueError, match=r"images/00001\.png is not a readable picture"):
        dataset[0]
    with pytest.raises(FileNotFoundError, match="is no folder"):
        SceneDataset(tmp_path / "nowhere")
