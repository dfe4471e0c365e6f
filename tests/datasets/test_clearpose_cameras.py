"""Cameras of a ClearPose scene: what metadata.mat may hold, its cache, and files that are something else."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from peft_attrsub.datasets import clearpose_cameras
from peft_attrsub.datasets.clearpose import ClearPoseDataset
from peft_attrsub.datasets.clearpose_cameras import cache_paths, read_metadata, scene_cameras

from .clearpose_files import camera, write_scene
from .invariants import check_sample


def test_one_object_with_or_without_its_last_dimension(root: Path) -> None:
    stored = read_metadata(root / "set3/scene11/metadata.mat")
    assert stored.poses.shape == (3, 3, 4) and stored.objects.tolist() == [5, 5, 5]
    records = write_scene(root, "set1/scene1", balls=1)
    for entry in records.values():
        entry["poses"] = entry["poses"][..., 0]
    scipy.io.savemat(root / "set1/scene1/metadata.mat", records)
    np.testing.assert_array_equal(read_metadata(root / "set1/scene1/metadata.mat").poses, stored.poses)


def test_no_object_at_all(root: Path) -> None:
    records = write_scene(root, "set1/scene1")
    for entry in records.values():
        entry["cls_indexes"], entry["poses"] = np.zeros((0, 1)), np.zeros((3, 4, 0))
    scipy.io.savemat(root / "set1/scene1/metadata.mat", records)
    cameras = read_metadata(root / "set1/scene1/metadata.mat")
    assert len(cameras.poses) == 0 and cameras.spread() == 0


def same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(getattr(a, key), getattr(b, key), equal_nan=key == "world_from_camera") for key in vars(a)
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which metadata.mat are read from now on."""
    reads: list[Path] = []
    real = clearpose_cameras.read_metadata
    monkeypatch.setattr(clearpose_cameras, "read_metadata", lambda path: (reads.append(path), real(path))[1])
    return reads


def test_metadata_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reads = root / "set3/scene1", counted(monkeypatch)
    first = scene_cameras(folder)
    assert same(scene_cameras(folder), first) and len(reads) == 1
    assert (folder / "cameras.npz").is_file() and not list(folder.glob(".*"))

    (folder / "cameras.npz").write_bytes(b"PK\x03\x04 cut off")
    assert same(scene_cameras(folder), first) and len(reads) == 2  # damaged: made again
    assert same(scene_cameras(folder), first) and len(reads) == 2

    records = {frame: {**entry} for frame, entry in write_scene(root, "set1/scene1", shift=1.0).items()}
    scipy.io.savemat(folder / "metadata.mat", records)
    os.utime(folder / "metadata.mat", ns=(0, 0))
    assert not same(scene_cameras(folder), first) and len(reads) == 3  # another file: not the old cache

    (folder / "metadata.mat").unlink()
    np.testing.assert_allclose(scene_cameras(folder).world_from_camera[0], camera(0, 1.0)[:3], atol=1e-12)
    (folder / "cameras.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"set3/scene1/metadata\.mat is missing"):
        scene_cameras(folder)


def test_data_that_cannot_be_written_is_cached_elsewhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reads = root / "set3/scene1", counted(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    real = clearpose_cameras.write_atomically

    def refuse(path: Path, data: bytes) -> None:
        if path.parent == folder:
            raise PermissionError(f"{path} is read-only")
        real(path, data)

    monkeypatch.setattr(clearpose_cameras, "write_atomically", refuse)
    first = scene_cameras(folder)
    assert [path.is_file() for path in cache_paths(folder)] == [False, True]
    assert same(scene_cameras(folder), first) and len(reads) == 1

    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "set3/scene1/metadata.mat"))  # no folder can be there either
    assert same(scene_cameras(folder), first) and len(reads) == 2


def test_a_cache_folder_of_ones_own(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(monkeypatch)
    for _ in range(2):
        data = ClearPoseDataset(root, "all", cache=tmp_path / "cache")
        assert len(data.cameras("set3/scene1").frames) == len(data.cameras("set3/scene8").frames) == 3
    assert len(reads) == 2 and len(list((tmp_path / "cache").iterdir())) == 2
    assert not list(root.rglob("*.npz"))


def test_several_at_once(root: Path) -> None:
    folder = root / "set3/scene1"
    expected = read_metadata(folder / "metadata.mat")
    with ThreadPoolExecutor(8) as pool:
        assert all(same(found, expected) for found in pool.map(scene_cameras, [folder] * 16))
    assert same(scene_cameras(folder), expected)
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".png") == ["cameras.npz", "metadata.mat"]


@pytest.mark.parametrize("content", [b"", b"no MATLAB file at all, just words" * 9])
def test_damaged_metadata(root: Path, content: bytes) -> None:
    (root / "set3/scene1/metadata.mat").write_bytes(content)
    with pytest.raises(ValueError, match=r"set3/scene1/metadata\.mat is no readable MATLAB file"):
        scene_cameras(root / "set3/scene1")


def test_cut_metadata(root: Path) -> None:
    path = root / "set3/scene1/metadata.mat"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"set3/scene1/metadata\.mat"):
        scene_cameras(root / "set3/scene1")


def changed(key: str, value: Any) -> Any:
    return lambda entry: entry.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("rotation_translation_matrix", np.diag([1.0, 1, -1, 1])[:3]), "no rotation and translation"),
        (changed("rotation_translation_matrix", 1.7 * np.eye(4)[:3]), "no rotation and translation"),
        (changed("rotation_translation_matrix", np.eye(3)), r"rotation_translation_matrix has the shape \(3, 3\)"),
        (changed("intrinsic_matrix", np.eye(4)), r"intrinsic_matrix has the shape \(4, 4\)"),
        (changed("intrinsic_matrix", np.zeros((3, 3))), "the intrinsics are"),
        (changed("factor_depth", np.array([[0]])), "factor_depth is 0"),
        (changed("poses", np.zeros((3, 4, 3))), r"poses has the shape \(3, 4, 3\), expected \(3, 4, 2\)"),
        (lambda entry: entry.pop("intrinsic_matrix"), "camera_intrinsics"),
        (lambda entry: entry.pop("poses"), "poses"),
    ],
)
def test_metadata_of_another_kind(root: Path, change: Any, message: str) -> None:
    records = write_scene(root, "set1/scene1")
    change(records["000100"])
    scipy.io.savemat(root / "set1/scene1/metadata.mat", records)
    with pytest.raises(ValueError, match=rf"set1/scene1/metadata\.mat, frame 000100: .*{message}"):
        read_metadata(root / "set1/scene1/metadata.mat")


def test_metadata_without_frames(root: Path) -> None:
    scipy.io.savemat(root / "set3/scene1/metadata.mat", {"poses": np.eye(3)})
    with pytest.raises(ValueError, match="holds no frame"):
        scene_cameras(root / "set3/scene1")


def test_a_pose_of_single_precision_becomes_a_rotation(root: Path) -> None:
    records = write_scene(root, "set1/scene1")
    for entry in records.values():
        entry["rotation_translation_matrix"] = np.round(entry["rotation_translation_matrix"], 5)
    scipy.io.savemat(root / "set1/scene1/metadata.mat", records)
    assert np.abs(records["000100"]["rotation_translation_matrix"] - camera(1)[:3]).max() > 1e-6
    for pose in scene_cameras(root / "set1/scene1").world_from_camera:
        np.testing.assert_allclose(pose[:, :3] @ pose[:, :3].T, np.eye(3), atol=1e-12)
    check_sample(ClearPoseDataset(root, "all").read("set1/scene1"))
