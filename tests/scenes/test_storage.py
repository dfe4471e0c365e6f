"""One scene on disk: every array comes back, the conventions are those of nerfstudio and OpenCV, nothing is half."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from peft_attrsub.scenes import pixels, storage
from peft_attrsub.scenes.description import Camera, Scene
from peft_attrsub.scenes.storage import SceneFormat, SceneWriter, read_manifest, read_scene, write_scene
from peft_attrsub.scenes.view import View
from tests.scenes.tiny import TinyRecipe, TinyRenderer, sample

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")


def scene(views: int = 3, size: int = 24) -> Scene:
    return replace(sample(TinyRecipe(views=views, size=size), 0), width=size + 5)


def views_of(scene: Scene) -> list[View]:
    return [TinyRenderer(scene).render(index) for index in range(len(scene.cameras))]


@pytest.mark.parametrize("jpeg", [None, 90, 98])
@pytest.mark.parametrize("depth", ["png", "npy", "exr"])
def test_what_is_written_is_read_again(tmp_path: Path, jpeg: int | None, depth: str) -> None:
    if depth == "exr":
        pytest.importorskip("OpenEXR", reason="EXR depth maps need OpenEXR")
    given, folder = scene(), tmp_path / "scene"
    views = views_of(given)
    manifest = write_scene(folder, given, views, SceneFormat(jpeg, depth), tag="abc")
    assert read_manifest(folder) == manifest and manifest["tag"] == "abc" and manifest["views"] == 3
    found = read_scene(folder)
    assert {key: (value.shape, value.dtype.name) for key, value in found.items()} == {
        "images": ((3, 24, 29, 3), "uint8"),
        "depth": ((3, 24, 29), "float32"),
        "ids": ((3, 24, 29), "uint16"),
        "extrinsic": ((3, 3, 4), "float64"),
        "intrinsic": ((3, 3, 3), "float64"),
    }
    for index, view in enumerate(views):
        np.testing.assert_array_equal(found["ids"][index], view.ids)
        np.testing.assert_allclose(found["depth"][index], view.depth, rtol=0, atol=0.00051 if depth == "png" else 0)
        np.testing.assert_array_equal(found["depth"][index] > 0, view.depth > 0)
        error = np.abs(found["images"][index].astype(int) - view.rgb)
        assert error.max() == 0 if jpeg is None else error.mean() < 20
    assert Scene.from_json((folder / "scene.json").read_text()) == given
    two = read_scene(folder, [2, 0])
    for key, value in two.items():
        np.testing.assert_array_equal(value, found[key][[2, 0]])


def test_the_manifest_has_the_size_and_the_hash_of_every_file(tmp_path: Path) -> None:
    manifest = write_scene(tmp_path / "scene", scene(), views_of(scene()))
    files = {path.relative_to(tmp_path / "scene").as_posix() for path in (tmp_path / "scene").rglob("*.*")}
    assert files - {"manifest.json"} == set(manifest["files"]) and len(files) == 12
    for name, entry in manifest["files"].items():
        data = (tmp_path / "scene" / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["bytes"] == sum(entry["bytes"] for entry in manifest["files"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["scene"]


def test_the_same_scene_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_scene(tmp_path / name, scene(), views_of(scene()))
        os.utime(tmp_path / name / "images" / "00000.png", (1, 1))
    trees = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("a", "b")]
    assert trees[0] == trees[1]


def test_pictures_are_what_other_programs_expect(tmp_path: Path) -> None:
    given = scene()
    write_scene(tmp_path / "scene", given, views_of(given))
    with Image.open(tmp_path / "scene/depth/00000.png") as picture:
        millimetres = np.asarray(picture)
        assert picture.mode.startswith("I") and millimetres.max() > 1000
    np.testing.assert_allclose(millimetres / 1000, views_of(given)[0].depth, atol=0.00051)
    with Image.open(tmp_path / "scene/images/00000.png") as picture:
        assert (picture.mode, picture.size, picture.info) == ("RGB", (29, 24), {})  # no time stamp, no gamma


@given(
    arrays.arrays(
        np.float32, (3, 4), elements=st.one_of(st.just(0.0), st.floats(2**-12, 65.5, width=32), st.just(2.0**-20))
    )
)
def test_depth_in_millimetres_is_exact_to_half_of_one(depth: np.ndarray) -> None:
    found = pixels.decode_depth(pixels.encode_depth(depth, "png"), Path("depth.png"))
    for (row, column), metres in np.ndenumerate(depth):
        if metres == 0:
            assert found[row, column] == 0
        else:
            assert found[row, column] == pytest.approx(max(round(float(metres) * 1000), 1) / 1000, rel=1e-6)
            assert abs(float(found[row, column]) - float(metres)) <= (0.00051 if metres > 0.0005 else 0.001)


def test_depth_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"65\.536 m does not fit a 16-bit PNG"):
        pixels.encode_depth(np.full((2, 2), 65.536, np.float32), "png")
    assert pixels.decode_depth(pixels.encode_depth(np.full((2, 2), 70, np.float32), "npy"), Path("d.npy")).max() == 70
    for value in (np.nan, np.inf, -1.0):
        with pytest.raises(ValueError, match="negative or not finite"):
            pixels.encode_depth(np.array([[value]], np.float32), "npy")


def project_opengl(frame: dict, point: np.ndarray) -> tuple[float, float, float]:
    """nerfstudio's reading: camera to world, x right, y up, looking along -z; returns u, v, planar depth."""
    local = np.linalg.solve(np.array(frame["transform_matrix"]), [*point, 1.0])
    depth = -local[2]
    return frame["fl_x"] * local[0] / depth + frame["cx"], frame["cy"] - frame["fl_y"] * local[1] / depth, depth


def test_both_conventions_see_the_point_that_the_depth_map_shows(tmp_path: Path) -> None:
    given = scene()
    write_scene(tmp_path / "scene", given, views_of(given), SceneFormat(depth="npy"))
    record = json.loads((tmp_path / "scene/transforms.json").read_text())
    found = read_scene(tmp_path / "scene")
    for index, frame in enumerate(record["frames"]):
        pose, camera = np.array(given.cameras[index].pose), given.cameras[index]
        for row, column in ((12, 12), (20, 3), (23, 28)):
            z = float(found["depth"][index, row, column])
            assert z > 0
            ray = [(column + 0.5 - camera.cx) / camera.fx, (row + 0.5 - camera.cy) / camera.fy, 1.0]
            point = pose[:3, :3] @ (np.array(ray) * z) + pose[:3, 3]
            assert project_opengl(frame, point) == pytest.approx((column + 0.5, row + 0.5, z), abs=1e-6)
            local = found["extrinsic"][index] @ [*point, 1.0]
            u, v, w = found["intrinsic"][index] @ local
            assert (u / w, v / w, w) == pytest.approx((column + 0.5, row + 0.5, z), abs=1e-6)
            assert point[2] == pytest.approx(0, abs=1e-4) or found["ids"][index, row, column] == 2


def test_what_nerfstudio_reads(tmp_path: Path) -> None:
    given = scene()
    record = storage.transforms(given, SceneFormat())
    assert record["camera_model"] == "OPENCV" and (record["w"], record["h"]) == (29, 24)
    assert record["fl_x"] == given.cameras[0].fx and record["k1"] == record["p2"] == 0
    assert all("mask_path" not in frame for frame in record["frames"])  # it would mean: pixels to leave out
    assert [frame["depth_file_path"] for frame in record["frames"]] == [f"depth/0000{i}.png" for i in range(3)]
    # cv2 in nerfstudio has no OpenEXR: a depth it cannot read would stop it.
    for depth in ("npy", "exr"):  # nerfstudio would take its meters for millimeters, or cannot read it
        frames = storage.transforms(given, SceneFormat(depth=depth))["frames"]
        assert all("depth_file_path" not in f and f["depth_path"].endswith(depth) for f in frames)

    zoomed = replace(given, cameras=[*given.cameras[:2], replace(given.cameras[2], fx=99.0)])
    record = storage.transforms(zoomed, SceneFormat())
    assert "fl_x" not in record  # nerfstudio would take it for all frames
    assert [frame["fl_x"] for frame in record["frames"]] == [camera.fx for camera in zoomed.cameras]


def test_a_pose_that_is_no_pose_is_refused() -> None:
    good = scene().cameras[0]
    bad = [np.diag([2.0, 2.0, 2.0, 1.0]), np.diag([1.0, 1.0, -1.0, 1.0]), np.full((4, 4), math.nan), np.eye(3)]
    for pose in bad:
        with pytest.raises(ValueError, match="pose"):
            storage.extrinsic(Camera(pose.tolist(), good.fx, good.fy, good.cx, good.cy))


def test_views_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    given = scene()
    view = views_of(given)[0]
    writer = SceneWriter(tmp_path / "scene", given)
    for wrong in (
        replace(view, rgb=view.rgb[1:]),
        replace(view, rgb=view.rgb.astype(np.float32)),
        replace(view, depth=view.depth.astype(np.float64)),
        replace(view, ids=view.ids[..., None]),
    ):
        with pytest.raises(ValueError, match=r"view 0: .* expected .* a fault of the renderer"):
            writer.add(0, wrong)
    writer.add(0, view)
    with pytest.raises(ValueError, match=r"depth/00001.png is missing \(6 files\)"):
        writer.finish()
    with pytest.raises(FileNotFoundError, match="the scene is not finished"):
        read_scene(tmp_path / "scene")


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    given = scene()

    def views():
        yield views_of(given)[0]
        assert not (tmp_path / "scene").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scene(tmp_path / "scene", given, views())
    assert not list(tmp_path.iterdir())


def test_write_atomically_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    storage.write_atomically(path, b"old")

    def fail(source: object, target: object) -> None:
        assert Path(str(source)).read_bytes() == b"new" and path.read_bytes() == b"old"
        raise OSError("power cut")

    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        storage.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_finished_scene_is_not_replaced_unless_it_is_asked_for(tmp_path: Path) -> None:
    given = scene()
    write_scene(tmp_path / "scene", given, views_of(given), tag="first")
    write_scene(tmp_path / "scene", given, views_of(given), tag="second")
    assert read_manifest(tmp_path / "scene")["tag"] == "first"

    write_scene(tmp_path / "better", given, views_of(given), tag="third")
    storage.publish(tmp_path / "better", tmp_path / "scene", replace=True)
    assert read_manifest(tmp_path / "scene")["tag"] == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["scene"]
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="only a finished scene gets its name"):
        storage.publish(tmp_path / "half", tmp_path / "other")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    given, folder = scene(), tmp_path / "scene"
    write_scene(folder, given, views_of(given))
    (folder / "depth/00001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"depth/00001\.png is not a readable picture"):
        read_scene(folder)
    (folder / "depth/00001.png").write_bytes(pixels.encode_grey(np.zeros((3, 3), np.uint16)))
    with pytest.raises(ValueError, match=r"depth/00001\.png has the shape \(3, 3\)"):
        read_scene(folder)
    with pytest.raises(ValueError, match="views 0 to 2"):
        read_scene(folder, [3])
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no record"):
        read_manifest(folder)
    (folder / "manifest.json").write_text('{"files": {}, "views": 3, "format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        read_manifest(folder)
