"""The writer of rendered sequences: what is written is read again, and nothing half-written carries the name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from peft_attrsub.datasets.rendered import RenderedDataset
from peft_attrsub.datasets.writing import RenderedWriter, is_finished
from tests.datasets.invariants import check_sample
from tests.datasets.world import farthest_from_surfaces, scene, views, world_to_camera

pytest.importorskip("PIL.Image", reason="pictures need Pillow")


def add(writer: RenderedWriter, index: int, mask: np.ndarray | None = None) -> None:
    given, view = scene(), views()[index]
    camera = given.cameras[index]
    alpha = np.where(view.depth > 0, 255, 0).astype(np.uint8)
    rgba = np.concatenate([view.rgb, alpha[..., None]], -1)
    w2c = world_to_camera(given, index)
    writer.add(index, rgba, view.depth, w2c, camera.fx, camera.fy, camera.cx, camera.cy, mask)


def write(folder: Path, depth: str = "npy", tag: str = "") -> None:
    with RenderedWriter(folder, depth=depth, tag=tag) as writer:
        for index in range(3):
            if not writer.has(index):
                add(writer, index)
        assert writer.finish() == folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("digits", "depth"), [(3, "exr"), (8, "exr"), (3, "npy"), (8, "npy")])
def test_what_is_written_is_read_again(tmp_path: Path, digits: int, depth: str) -> None:
    if depth == "exr":
        pytest.importorskip("OpenEXR", reason="EXR depth maps need OpenEXR")
    folder = tmp_path / "0007"
    masks = [np.arange(64 * 69).reshape(64, 69) % (index + 2) == 0 for index in range(3)]
    with RenderedWriter(folder, digits, depth) as writer:
        for index in (2, 0, 1):
            assert not writer.has(index) and not folder.exists()
            add(writer, index, masks[index])
            assert writer.has(index)
        assert writer.finish() == folder and is_finished(folder)
    assert os.listdir(tmp_path) == ["0007"]
    stem = "0" * (digits - 1)
    assert sorted(os.listdir(folder)) == ["opencv_cameras.json", "renderings"]
    assert sorted(os.listdir(folder / "renderings")) == sorted(
        f"{stem}{index}_{part}" for index in range(3) for part in ("rgba.png", f"depth.{depth}", "mask.npy")
    )
    sample = RenderedDataset(tmp_path, masks=True).read("0007")
    check_sample(sample)
    assert farthest_from_surfaces(sample) < 1e-5
    for index, view in enumerate(views()):
        np.testing.assert_array_equal(sample.depths[index], view.depth)
        np.testing.assert_array_equal(sample.point_masks[index], (view.depth > 0) & masks[index])
        shown = np.where(view.depth[..., None] > 0, view.rgb, 255).astype(np.float32) / 255
        np.testing.assert_allclose(sample.images[index].permute(1, 2, 0), shown, atol=1e-6)


def test_the_cameras_file_is_the_published_one(tmp_path: Path) -> None:
    write(tmp_path / "a", tag="ring")
    record = json.loads((tmp_path / "a" / "opencv_cameras.json").read_text())
    assert record["tag"] == "ring" and len(record["frames"]) == 3
    given = scene()
    for index, frame in enumerate(record["frames"]):
        camera, w2c = given.cameras[index], world_to_camera(given, index)
        assert set(frame) == {"w", "h", "fx", "fy", "cx", "cy", "w2c", "file_path", "blender_camera_location"}
        assert (frame["w"], frame["h"], frame["cx"], frame["cy"]) == (69, 64, camera.cx, camera.cy)
        assert frame["file_path"] == f"renderings/00{index}_rgba.png"
        np.testing.assert_array_equal(frame["w2c"], w2c)
        np.testing.assert_allclose(frame["blender_camera_location"], np.array(camera.pose)[:3, 3], atol=1e-12)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    writer = RenderedWriter(folder, depth="npy", tag="ring")
    add(writer, 0)
    add(writer, 2)
    writer.close()
    assert not folder.exists() and not is_finished(folder)
    with pytest.raises(ValueError, match="holds no sequence"):
        RenderedDataset(tmp_path)  # the unfinished one is not seen
    again = RenderedWriter(folder, depth="npy", tag="ring")
    assert [again.has(index) for index in range(4)] == [True, False, True, False]
    with pytest.raises(ValueError, match=r"no frame 1 \(1 are missing\)"):
        again.finish()
    add(again, 1)
    again.finish()
    write(tmp_path / "b", tag="ring")
    assert contents(folder) == contents(tmp_path / "b")


@pytest.mark.parametrize("change", [{"tag": "other"}, {"digits": 8}, {"depth": "exr"}])
def test_frames_of_another_protocol_are_thrown_away(tmp_path: Path, change: dict[str, str]) -> None:
    before = {"digits": 3, "depth": "npy", "tag": "ring"}
    with RenderedWriter(tmp_path / "a", **before) as writer:  # type: ignore[arg-type]
        add(writer, 0)
    with RenderedWriter(tmp_path / "a", **before) as writer:  # type: ignore[arg-type]
        assert writer.has(0)
    with RenderedWriter(tmp_path / "a", **{**before, **change}) as writer:  # type: ignore[arg-type]
        assert not writer.has(0)
        assert not list((tmp_path / ".a.partial").rglob("*_rgba.png"))


def test_a_kill_at_any_moment_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write and rename in turn is the one that never happens, and the one that stops in the middle."""
    write(tmp_path / "whole")
    steps, done = 0, False
    while not done:
        steps += 1
        folder, left = tmp_path / f"a{steps}", [steps]

        def die_in_time(original, torn, left=left):  # type: ignore[no-untyped-def]
            def call(*args, **options):  # type: ignore[no-untyped-def]
                left[0] -= 1
                if left[0] == 0:
                    if torn:
                        args[0].open("wb").write(args[1][: len(args[1]) // 2])
                    raise KeyboardInterrupt
                return original(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "rename"), (Path, "write_bytes"), (Path, "unlink")):
                patch.setattr(owner, name, die_in_time(getattr(owner, name), name == "write_bytes"))
            try:
                write(folder)
                done = left[0] > 0
            except KeyboardInterrupt:
                pass
        if not is_finished(folder):
            assert not folder.exists()
            write(folder)
        assert contents(folder) == contents(tmp_path / "whole"), f"after a kill at step {steps}"
    assert steps > 15


def test_a_frame_that_is_written_again_counts_only_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with RenderedWriter(tmp_path / "a", depth="npy") as writer:
        add(writer, 0, np.ones((64, 69), bool))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", die)
            with pytest.raises(KeyboardInterrupt):
                add(writer, 0)
        assert not writer.has(0)
        for index in range(3):
            add(writer, index)
        writer.finish()
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")  # the mask of the first attempt is gone, too


def test_what_a_kill_after_the_rename_left_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cameras of frames whose pictures were moved away: once the folder is deleted, there is nothing of them."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        write(tmp_path / "a")
    assert (tmp_path / ".a.partial").exists()
    shutil.rmtree(tmp_path / "a")
    with RenderedWriter(tmp_path / "a", depth="npy") as writer:
        assert not writer.has(0)
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_stands_there_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"a holds a finished sequence: delete it"):
        RenderedWriter(tmp_path / "a")
    (tmp_path / "b").mkdir()
    write(tmp_path / "b")  # an empty folder is no harm
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"c exists and is not empty"):
        RenderedWriter(tmp_path / "c")
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with RenderedWriter(tmp_path / "a") as writer:
        with pytest.raises(BlockingIOError, match="another process is writing"):
            RenderedWriter(tmp_path / "a")
        add(writer, 0)
    with RenderedWriter(tmp_path / "a") as writer:
        assert writer.has(0)
    with pytest.raises(ValueError, match="is closed"):
        add(writer, 1)


def test_what_no_reader_could_read_is_refused(tmp_path: Path) -> None:
    rgba, depth, w2c = np.zeros((4, 6, 4), np.uint8), np.ones((4, 6), np.float32), np.eye(4)
    with RenderedWriter(tmp_path / "a", depth="npy") as writer:
        with pytest.raises(ValueError, match="has no frames"):
            writer.finish()
        for change, words in (
            ({"index": -1}, "counted from 0"),
            ({"rgba": rgba[..., :3]}, r"rgba is uint8 \(4, 6, 3\), expected uint8 \(4, 6, 4\)"),
            ({"depth": depth.astype(np.float64)}, "depth is float64"),
            ({"depth": depth.T}, "depth is float32"),
            ({"depth": -depth}, "negative or not finite"),
            ({"mask": np.ones((4, 6), np.uint8)}, "mask is uint8"),
            ({"fx": 0.0}, "focal lengths greater than 0"),
            ({"cy": np.nan}, "finite pixels"),
            ({"w2c": np.eye(4)[:3]}, "finite 4 x 4"),
            ({"w2c": 1.7 * np.eye(4)}, "finite 4 x 4"),
            ({"w2c": np.diag([1.7, 1.7, 1.7, 1.0])}, "no rotation and translation"),
            ({"w2c": np.diag([1.0, -1.0, 1.0, 1.0])}, "no rotation and translation"),
        ):
            given = {"index": 0, "rgba": rgba, "depth": depth, "w2c": w2c, "fx": 5.0, "fy": 5.0, "cx": 3.0, "cy": 2.0}
            with pytest.raises(ValueError, match=words):
                writer.add(**{**given, **change})  # type: ignore[arg-type]
            assert not writer.has(0)
    with pytest.raises(ValueError, match="the depth format is 'png': give one of exr, npy"):
        RenderedWriter(tmp_path / "b", depth="png")
    with pytest.raises(ValueError, match="file names with 0 digits"):
        RenderedWriter(tmp_path / "b", digits=0)
    assert not (tmp_path / ".b.partial").exists()
