"""The benchmarks of benchmarks/mini_study.py: subjects stand where they are said to, and pictures can be looked at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = list(sys.path)
    for folder in ("examples/vggt", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield
    sys.path[:] = before


def cameras(count: int = 4) -> list[Any]:
    """Some that look about, as a scene has them."""
    from peft_attrsub.scenes.recipes import AttributeRecipe
    from peft_attrsub.scenes.sampling import sample_scene

    return sample_scene(AttributeRecipe("mixed", 5, size=32, views=count, triangles=500), 3).cameras


def poses(found: list[Any]) -> np.ndarray:
    return np.array([camera.pose for camera in found])


def test_a_slant_keeps_place_and_direction() -> None:
    from standins.stages import ROLL, rolled

    known = cameras()
    before, after = poses(known), poses(rolled(known, np.random.default_rng(0), 2.0))
    np.testing.assert_allclose(after[:, :3, 2:], before[:, :3, 2:], atol=1e-12)
    angles = np.degrees(np.arccos((before[:, :3, 0] * after[:, :3, 0]).sum(1)))
    assert np.ptp(angles) < 1e-6 and ROLL[0] <= angles[0] <= ROLL[1]
    assert np.linalg.det(after[:, :3, :3]) == pytest.approx(np.ones(len(after)))


def test_cameras_below_the_ceiling_look_down_and_keep_their_distances() -> None:
    from standins.stages import BELOW, PITCH, above

    known = cameras()
    before, after = poses(known), poses(above(known, np.random.default_rng(0), 2.0))
    assert after[:, 2, 3].max() == pytest.approx(2.0 - BELOW)
    np.testing.assert_allclose(after[1:, :3, 3] - after[:1, :3, 3], before[1:, :3, 3] - before[:1, :3, 3], atol=1e-12)
    turned = np.degrees(np.arccos((before[:, :3, 2] * after[:, :3, 2]).sum(1)))
    assert np.ptp(turned) < 1e-6 and PITCH[0] <= turned[0] <= PITCH[1]
    assert (after[:, 2, 2] < before[:, 2, 2]).all()  # forward, further down


def test_subjects_stand_on_the_floor_where_their_pixels_are() -> None:
    pytest.importorskip("open3d")
    from standins.stages import CLEAR, find_stage, rolled
    from standins.subjects import portrait

    from peft_attrsub.scenes.recipes import AttributeRecipe

    recipe = AttributeRecipe("mixed", 11, size=48, views=3, triangles=800)
    made, views = find_stage(recipe, [4, 2], lambda rng: [portrait(k, rng) for k in range(3)], rolled, 32)
    again, _ = find_stage(recipe, [4, 2], lambda rng: [portrait(k, rng) for k in range(3)], rolled, 32)
    np.testing.assert_array_equal(made.mesh.vertices, again.mesh.vertices)
    room = next(shape for shape in made.scene.shapes if shape.kind == "room")
    pose = np.array(room.pose)
    half = np.abs(pose[:3, :3]).sum(1)
    eyes = poses(made.scene.cameras)[:, :3, 3]
    assert len(made.ids) == 3
    for number in made.ids:
        triangles = made.mesh.triangles[made.mesh.object_id == number]
        own = made.mesh.vertices[np.unique(triangles)]
        assert 0.5 <= own[:, 2].min() - (pose[2, 3] - half[2]) <= 1.0
        assert (np.abs(own[:, :2] - pose[:2, 3]) < half[:2]).all()
        assert np.linalg.norm(own[:, None, :2].mean(0) - eyes[:, :2], axis=-1).min() > CLEAR
        for view, camera in zip(views, made.scene.cameras, strict=True):
            rows, columns = np.nonzero(view.ids == number)
            z = view.depth[rows, columns]
            x, y = (columns + 0.5 - camera.cx) / camera.fx * z, (rows + 0.5 - camera.cy) / camera.fy * z
            at = np.stack([x, y, z, np.ones_like(z)], 1) @ np.array(camera.pose).T
            assert (at[:, :3] > own.min(0) - 0.01).all() and (at[:, :3] < own.max(0) + 0.01).all()


def test_a_scene_that_shows_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open3d")
    from standins import stages
    from standins.subjects import portrait

    from peft_attrsub.scenes.recipes import AttributeRecipe

    monkeypatch.setattr(stages, "SEEN", 1.1)
    monkeypatch.setattr(stages, "SCENES", 2)
    recipe = AttributeRecipe("mixed", 11, size=16, views=2, triangles=200)
    with pytest.raises(ValueError, match="none of 2 scenes"):
        stages.find_stage(recipe, [4, 2], lambda rng: [portrait(0, rng)], stages.rolled, 16)


def test_units_of_a_stage_that_is_written_and_read(tmp_path: Path) -> None:
    pytest.importorskip("open3d")
    from standins.stages import above, find_stage, write_stage
    from standins.subjects import portrait

    from peft_attrsub.datasets import open_benchmark
    from peft_attrsub.scenes.recipes import AttributeRecipe

    recipe = AttributeRecipe("mixed", 11, size=48, views=3, triangles=800)
    made, views = find_stage(recipe, [4, 2], lambda rng: [portrait(k, rng) for k in range(3)], above, 32)
    write_stage(tmp_path / "0000", made, views, unit=2.0, digits=3, masks=False)
    sample = open_benchmark("human", tmp_path, views=None).read("0000")
    assert bool(sample.point_masks.all())
    for number, view in enumerate(views):
        np.testing.assert_allclose(sample.depths[number].numpy(), view.depth / 2, rtol=1e-3)
    assert sample.extrinsics is not None
    centres = [-(m[:, :3].T @ m[:, 3]).numpy() for m in sample.extrinsics]
    np.testing.assert_allclose(np.array(centres), poses(made.scene.cameras)[:, :3, 3] / 2, atol=1e-5)


def test_rooms_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both kinds are read as their benchmarks; another seed is another set; what is there stays."""
    pytest.importorskip("open3d")
    import prepare_rooms

    from peft_attrsub.datasets import open_benchmark

    few = ["--scenes", "2", "--views", "2", "--size", "32", "--triangles", "500", "--texture-size", "16"]
    for what, reader in (("people", "human"), ("prints", "face")):
        out = tmp_path / what
        assert prepare_rooms.main([what, "--out", str(out), "--detail", "24", *few]) == 0
        data = open_benchmark(reader, out, views=None)
        first, second = (data.read(name) for name in data.names)
        assert bool(first.point_masks.all()) and first.images.shape == (2, 3, 32, 32)
        assert not torch.equal(first.images, second.images)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "prints").rglob("*.*")}
    assert prepare_rooms.main(["prints", "--out", str(tmp_path / "prints"), *few]) == 0
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "prints").rglob("*.*")}
    assert prepare_rooms.main(["prints", "--out", str(tmp_path / "other"), "--seed", "1", *few]) == 0
    frame = "00_00/theta0.00_phi0.00_d0.30/renderings/00000000_rgba.png"
    assert (tmp_path / "other" / frame).read_bytes() != (tmp_path / "prints" / frame).read_bytes()
    capsys.readouterr()
    assert prepare_rooms.main(["prints", "--out", str(tmp_path / "none"), "--views", "0"]) == 2
    assert (
        capsys.readouterr().err == "prepare_rooms: --views 0: give 1 or more.\n" and not (tmp_path / "none").exists()
    )


def test_cameras_of_a_table_see_its_middle_from_their_heights() -> None:
    from study.tables import AWAY, ELEVATION, ROLL, path

    slants = []
    for seed in range(20):
        for pose in path(np.random.default_rng(seed), 5, ELEVATION):
            rotation, eye = pose[:3, :3], pose[:3, 3]
            np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
            assert np.linalg.det(rotation) == pytest.approx(1.0)
            along = (0.05 - eye[2]) / rotation[2, 2]  # how far ahead the height of the aim is met
            place = eye + along * rotation[:, 2]
            assert along > 0 and np.abs(place[:2]).max() <= 0.12 + 1e-9
            away = np.linalg.norm(eye - place * [1, 1, 0])
            assert AWAY[0] * 0.9 < away < AWAY[1] * 1.1
            assert ELEVATION[0] - 4 < np.degrees(np.arcsin(eye[2] / away)) < ELEVATION[1] + 4
            level = np.cross(rotation[:, 2], [0, 0, 1.0])
            slants.append(np.degrees(np.arccos(level @ rotation[:, 0] / np.linalg.norm(level))))
    assert max(slants) <= ROLL + 1e-6 and np.std(slants) > 5


def test_others_pictures_are_the_next_ones_and_cost_who_looks_at_them() -> None:
    from study.measuring import OtherPictures

    from peft_attrsub.datasets.sample import Sample

    class Made:
        names = ("a", "b", "c")

        def read(self, name: str) -> Sample:
            level = 1.0 + self.names.index(name)
            depths = torch.full((1, 4, 4), level)
            images = torch.full((1, 3, 4, 4), level / 4)
            return Sample(name, ("0",), images, depths, depths > 0, torch.eye(3, dtype=torch.float64)[None])

    other = OtherPictures(Made())
    assert [float(other.read(name).images[0, 0, 0, 0]) * 4 for name in other.names] == [2.0, 3.0, 1.0]
    assert [float(other.read(name).depths[0, 0, 0]) for name in other.names] == [1.0, 2.0, 3.0]

    class Uneven:
        names = Made.names

        def read(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(images=torch.zeros(1, 3, 4, 4 + self.names.index(name)))

    with pytest.raises(ValueError, match="another size"):
        OtherPictures(Uneven()).read("a")
