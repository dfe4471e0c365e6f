"""ClearPose: its files, split and frames, the direction of its poses, the cache of its cameras, what can be wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from peft_attrsub.datasets.clearpose import ClearPoseDataset, spaced, transparent
from peft_attrsub.datasets.clearpose_cameras import read_metadata

from .clearpose_files import (
    FRAMES,
    HEIGHT,
    WIDTH,
    K,
    camera,
    pictures,
    planar_depth,
    write_pictures,
    write_scene,
)
from .invariants import check_sample, reprojection_error

#: The published folder, as its authors list it.
PUBLISHED = {
    1: (1, 2, 3, 4, 5),
    2: (1, 3, 4, 5, 6),
    3: (1, 3, 4, 8, 11),
    **dict.fromkeys((4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6)),
    9: (7, 8, 9, 10, 11, 12),
}


def only(root: Path, name: str = "set3/scene1", **options: Any) -> ClearPoseDataset:
    return ClearPoseDataset(root, "all", {name: list(FRAMES)}, **options)


def test_split_of_the_published_folder_is_32_and_19(tmp_path: Path) -> None:
    for group, scenes in PUBLISHED.items():
        for scene in scenes:
            (tmp_path / f"set{group}/scene{scene}").mkdir(parents=True)
    (tmp_path / "model" / "bottle_1").mkdir(parents=True)
    train, test = (ClearPoseDataset(tmp_path, split) for split in ("train", "test"))
    everything = ClearPoseDataset(tmp_path, "all")
    assert (len(train), len(test), len(everything)) == (32, 19, 51)
    assert train.absent == test.absent == everything.absent == ()
    assert (
        everything.names[:5] == tuple(f"set1/scene{n}" for n in range(1, 6)) and everything.names[-1] == "set9/scene12"
    )

    # The rule of the release: of sets 1 to 7 the last scene by its letters, and sets 8 and 9 as a whole.
    expected = set()
    for group in range(1, 8):
        expected.add(f"set{group}/" + sorted(f"scene{scene}" for scene in PUBLISHED[group])[-1])
    expected |= {f"set{group}/scene{scene}" for group in (8, 9) for scene in PUBLISHED[group]}
    assert set(test.names) == expected and "set3/scene8" in expected
    assert set(train.names) | set(test.names) == set(everything.names) and not set(train.names) & set(test.names)
    assert (len(ClearPoseDataset(tmp_path, "authors-train")), len(ClearPoseDataset(tmp_path, "authors-test"))) == (
        24,
        27,
    )


def test_scenes_that_are_not_on_disk_are_named(written: Path) -> None:
    data = ClearPoseDataset(written)
    assert data.names == ("set3/scene8", "set8/scene1")
    assert len(data.absent) == 17 and "set1/scene5" in data.absent
    assert ClearPoseDataset(written, "train").names == ("set3/scene1", "set3/scene3", "set3/scene11")


def test_every_scene_agrees_with_itself(written: Path) -> None:
    data = ClearPoseDataset(written, "all")
    for number, name in enumerate(data.names):
        sample = data[number]
        check_sample(sample)
        assert sample.name == name and sample.unit == "m"
        assert tuple(sample.images.shape) == (len(sample), 3, HEIGHT, WIDTH)


def test_depth_is_that_of_the_first_surface_in_metres(written: Path) -> None:
    sample = only(written)[0]
    for view, depth in enumerate(sample.depths.numpy()):
        true = planar_depth(camera(view))[0].min(0)
        hole = np.zeros((HEIGHT, WIDTH), bool)
        hole[:3] = sample.labels[view, :3].numpy() == 0  # type: ignore[index]
        assert np.abs(depth - np.where(hole, 0, true)).max() < 0.00051
        np.testing.assert_array_equal(sample.point_masks[view].numpy(), ~hole)
        np.testing.assert_allclose(sample.intrinsics[view], K)
        np.testing.assert_allclose(
            sample.images[view].permute(1, 2, 0).numpy() * 255, pictures(camera(view))["color"], atol=1e-4
        )


def test_extrinsics_are_camera_from_world(written: Path) -> None:
    sample = only(written)[0]
    assert sample.extrinsics is not None
    for view, extrinsic in enumerate(sample.extrinsics.numpy()):
        np.testing.assert_allclose(extrinsic, np.linalg.inv(camera(view))[:3], atol=1e-12)
    back = torch.from_numpy(np.stack([camera(view)[:3] for view in range(3)]))
    assert not reprojection_error(replace(sample, extrinsics=back), 0, 1) < 0.01  # as the file has it: it is noticed


def test_objects_stand_still_in_the_world(written: Path) -> None:
    for name in ("set3/scene1", "set3/scene11", "set3/scene8"):
        cameras = ClearPoseDataset(written, "all").cameras(name)
        assert cameras.spread() < 1e-9
        inverse = np.array([np.linalg.inv(np.vstack([pose, [0, 0, 0, 1]]))[:3] for pose in cameras.world_from_camera])
        assert replace(cameras, world_from_camera=inverse).spread() > 0.05


def test_raw_depth_sees_through_the_glass(written: Path) -> None:
    true, raw = only(written)[0], only(written, depth="depth")[0]
    glass = transparent(true)
    assert bool(glass.any()) and bool((true.labels == 201).any())  # type: ignore[union-attr]
    assert set(true.labels[glass].tolist()) == {5}  # type: ignore[index]
    both = glass & raw.point_masks
    assert bool(both.any()) and bool((raw.depths[both] >= true.depths[both]).all())
    rest = (true.labels == 0) & raw.point_masks
    assert torch.equal(raw.depths[rest], true.depths[rest])


def test_transparent_needs_labels_and_valid_depth(root: Path) -> None:
    sample = only(root)[0]
    expected = sample.point_masks & (sample.labels == 5)  # type: ignore[operator]
    assert torch.equal(transparent(sample), expected)
    assert not bool(transparent(replace(sample, point_masks=torch.zeros_like(sample.point_masks))).any())
    (root / "set3/scene1/000100-label.png").unlink()
    without = only(root)[0]
    assert without.labels is None
    with pytest.raises(ValueError, match="set3/scene1 has no labels"):
        transparent(without)


def test_both_spellings_and_another_factor(root: Path) -> None:
    np.testing.assert_allclose(read_metadata(root / "set3/scene3/metadata.mat").intrinsics, np.stack([K] * 3))
    write_scene(root, "set1/scene1", factor=2000)
    sample, half = only(root)[0], only(root, "set1/scene1")[0]
    torch.testing.assert_close(half.depths * 2, sample.depths)


def test_frames_without_a_file_or_a_pose_are_left_out(root: Path) -> None:
    data = ClearPoseDataset(root, "all")
    assert data.frames("set8/scene1") == ["000000", "000200"]
    assert data.left_out("set8/scene1") == {"000100": "no color.png"}
    records = write_scene(root, "set1/scene1", ("000000", "000100", "000200", "000300"))
    records["000100"]["rotation_translation_matrix"] = np.full((3, 4), np.nan)
    del records["000300"]
    scipy.io.savemat(root / "set1/scene1/metadata.mat", records)
    (root / "set1/scene1/000200-depth_true.png").unlink()
    data = ClearPoseDataset(root, "all")
    assert data.frames("set1/scene1") == ["000000"]
    reasons = {"000100": "no pose", "000200": "no depth_true.png", "000300": "not in metadata.mat"}
    assert data.left_out("set1/scene1") == reasons
    with pytest.raises(ValueError, match="no frame '000100'"):
        data.read("set1/scene1", ["000100"])


def test_twelve_frames_of_a_test_scene_and_all_to_train(tmp_path: Path) -> None:
    frames = tuple(f"{number:06d}" for number in range(0, 3000, 50))
    write_scene(tmp_path, "set3/scene8", frames)
    shutil.copytree(tmp_path / "set3/scene8", tmp_path / "set3/scene1")
    kept = [frame for frame in frames if frame.endswith("00")]
    data = ClearPoseDataset(tmp_path)
    assert data.frames("set3/scene8") == kept and len(kept) == 30
    expected = [kept[int(i / 11 * 29)] for i in range(12)]
    assert data.default_frames("set3/scene8") == expected
    assert data.read("set3/scene8", [0, 100]).frames == ("000000", "000100")
    train = ClearPoseDataset(tmp_path, "train")
    assert train.default_frames("set3/scene1") == kept
    assert ClearPoseDataset(tmp_path, "train", views=3).default_frames("set3/scene1") == [kept[0], kept[14], kept[29]]
    assert ClearPoseDataset(tmp_path, views=0, every=50).default_frames("set3/scene8") == list(frames)


@given(st.integers(1, 40), st.integers(1, 200))
def test_spaced_numbers_are_increasing_and_reach_both_ends(count: int, total: int) -> None:
    chosen = spaced(count, total)
    assert len(chosen) == min(count, total) and chosen == sorted(set(chosen))
    assert chosen[0] == 0 and (chosen[-1] == total - 1 or count == 1)
    if 1 < count < total:
        assert chosen == [int(i / (count - 1) * (total - 1)) for i in range(count)]


def test_training_drops_the_farthest_pixels(written: Path) -> None:
    whole, part = only(written)[0], only(written, nearer_than=0.9)[0]
    assert torch.equal(whole.depths, part.depths)
    for view in range(3):
        kept, gone = part.point_masks[view], whole.point_masks[view] & ~part.point_masks[view]
        assert 0.05 < float(gone.sum() / whole.point_masks[view].sum()) <= 0.1  # a row has one depth: ties are kept
        assert whole.depths[view][gone].min() > whole.depths[view][kept].max()
    assert {"images", "depths", "extrinsics", "intrinsics", "point_masks"} < set(part.training())


# --- what can be wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "no split 'val' of ClearPose: give one of train, test"),
        ({"every": 0}, "every is 0"),
        ({"views": -1}, "views -1"),
        ({"depth": "raw"}, "depth is 'raw'"),
        ({"nearer_than": 0.0}, r"nearer_than is 0\.0"),
    ],
)
def test_wrong_arguments(written: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClearPoseDataset(written, **arguments)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        ClearPoseDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"set1/scene1/metadata\.mat"):
        ClearPoseDataset(tmp_path)


def test_scene_without_metadata_or_frames(root: Path) -> None:
    (root / "set3/scene1/metadata.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"set3/scene1/metadata\.mat is missing"):
        only(root)[0]
    for path in (root / "set3/scene8").glob("*-color.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"set3/scene8 has no frame to read \(000000: no color.png\)"):
        ClearPoseDataset(root).read("set3/scene8")


def test_damaged_pictures(root: Path) -> None:
    folder = root / "set3/scene1"
    (folder / "000100-depth_true.png").write_bytes(b"\x89PNG cut")
    with pytest.raises(ValueError, match=r"000100-depth_true\.png is not a readable picture"):
        only(root)[0]
    Image.new("L", (10, 10)).save(folder / "000100-depth_true.png")
    with pytest.raises(ValueError, match=r"000100-depth_true\.png is \(10, 10\) pixels and the colour \(48, 64\)"):
        only(root)[0]
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "000100-depth_true.png")
    with pytest.raises(ValueError, match=r"000100-depth_true\.png has the shape"):
        only(root)[0]
    small = {kind: array[:20, :20] for kind, array in pictures(camera(1)).items()}
    write_pictures(folder, "000100", small)
    with pytest.raises(ValueError, match=r"000100-color\.png has another size"):
        only(root)[0]
