"""examples/vggt/prepare_clearpose.py: stand-in, subset of a download, cameras; stopped, wrong and repeated runs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.io
from PIL import Image

from peft_attrsub.datasets.clearpose import ClearPoseDataset, transparent
from tests.datasets.clearpose_files import camera, write_root, write_scene
from tests.datasets.invariants import check_sample

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "vggt" / "prepare_clearpose.py"
SMALL = ("--views", "3", "--size", "96", "72", "--supersample", "1")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module; it finds its standins/ beside it."""
    spec = importlib.util.spec_from_file_location("prepare_clearpose", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.insert(0, str(SCRIPT.parent))
    import standins.glasses  # noqa: F401

    sys.path.pop(0)
    return module


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def drawn(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("standin")
    assert script.main(["standin", "--out", str(out), "--test", "2", "--train", "1", *SMALL]) == 0
    return out


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- the stand-in --------------------------------------------------------------------------------------------------


def test_standin_is_read_as_clearpose(drawn: Path) -> None:
    test, train = ClearPoseDataset(drawn), ClearPoseDataset(drawn, "train")
    assert test.names == ("set1/scene5", "set2/scene6") and train.names == ("set1/scene1",)
    for data in (test, train):
        for number, name in enumerate(data.names):
            sample = data[number]
            assert sample.frames == ("000000", "000100", "000200") and not data.left_out(name)
            check_sample(sample)
            np.testing.assert_allclose(sample.extrinsics[0], np.eye(4)[:3], atol=1e-9)  # type: ignore[index]
            assert data.cameras(name).spread() < 1e-9
            assert float(sample.point_masks.float().mean()) > 0.95
            assert 0.01 < float(transparent(sample).float().mean()) < 0.5


def test_standin_has_the_errors_of_a_depth_camera(drawn: Path) -> None:
    true, raw = ClearPoseDataset(drawn), ClearPoseDataset(drawn, depth="depth")
    for a, b in zip((true[0], true[1]), (raw[0], raw[1]), strict=True):
        glass = transparent(a)
        for view in range(3):
            holes = float((b.depths[view][glass[view]] == 0).float().mean())
            assert 0.04 < holes < 0.21
        both = glass & b.point_masks
        deeper = (b.depths - a.depths)[both]
        assert float(deeper.min()) > -0.006 and float(deeper.median()) > 0.01  # noise, and the glass in front
        table = a.point_masks & (a.labels == 0)  # type: ignore[operator]
        assert bool((a.depths == b.depths)[table].all())
        hole = (b.depths == 0) & (a.labels == 0)  # type: ignore[operator]
        assert not bool(a.point_masks[hole].any())


def test_standin_files_are_clearposes(drawn: Path) -> None:
    folder = drawn / "set1/scene5"
    kinds = {"color": ("RGB", 3), "normal_true": ("RGB", 3), "label": ("L", 2), "depth": ("I;16", 2)}
    for kind, (mode, dims) in (*kinds.items(), ("depth_true", kinds["depth"])):
        with Image.open(folder / f"000100-{kind}.png") as picture:
            assert (picture.mode, picture.size, np.asarray(picture).ndim) == (mode, (96, 72), dims)
    record = scipy.io.loadmat(folder / "metadata.mat")["000100"]
    assert record.shape == (1, 1)
    fields = "cls_indexes center factor_depth intrinsic_matrix poses rotation_translation_matrix bbox"
    assert record.dtype.names == tuple(fields.split())
    entry = record[0, 0]
    count = len(entry["cls_indexes"])
    assert entry["factor_depth"].tolist() == [[1000]] and entry["poses"].shape == (3, 4, count)
    labels = np.asarray(Image.open(folder / "000100-label.png"))
    normals = np.asarray(Image.open(folder / "000100-normal_true.png"))
    assert set(np.unique(labels)) - {0} <= set(entry["cls_indexes"].ravel().tolist())
    for label, (left, top, right, bottom) in zip(entry["cls_indexes"].ravel(), entry["bbox"], strict=True):
        rows, columns = np.nonzero(labels == label)
        if len(rows):
            assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max(), rows.max())
    n = normals[labels > 0] / 255 * 2 - 1
    np.testing.assert_allclose(np.linalg.norm(n, axis=1), 1, atol=0.02)
    assert (normals[labels == 0] == 127).all()


def test_standin_is_repeatable_and_goes_on_where_it_was(script: ModuleType, drawn: Path, tmp_path: Path) -> None:
    command = ["standin", "--out", str(tmp_path), "--test", "1", *SMALL]
    # Killed while it drew the last view, of which two pictures were written.
    partial = tmp_path / "set1/.scene5.partial"
    shutil.copytree(drawn / "set1/scene5", partial, ignore=shutil.ignore_patterns("*.mat", "*.npz"))
    for kind in ("label", "depth_true", "normal_true"):
        (partial / f"000200-{kind}.png").unlink()
    (partial / ".000200-depth_true.png.1.tmp").write_bytes(b"half")
    kept = (partial / "000000-color.png").stat().st_mtime_ns
    assert script.main(command) == 0
    assert not partial.exists() and ClearPoseDataset(tmp_path).names == ("set1/scene5",)
    assert (tmp_path / "set1/scene5/000000-color.png").stat().st_mtime_ns == kept
    expected = files(drawn / "set1/scene5")
    expected.pop("cameras.npz", None)
    found = files(tmp_path / "set1/scene5")
    old, new = expected.pop("metadata.mat"), found.pop("metadata.mat")  # its header holds the time
    assert found == expected and old[128:] == new[128:]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert script.main(command) == 0  # nothing left to do
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_standin_of_other_settings(
    script: ModuleType, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["standin", "--out", str(drawn), "--test", "1", *SMALL, "--seed", "1"]) == 2
    assert "set1/scene5 holds another scene" in capsys.readouterr().err
    partial = tmp_path / "set1/.scene5.partial"
    shutil.copytree(drawn / "set1/scene5", partial)
    assert script.main(["standin", "--out", str(tmp_path), "--test", "1", *SMALL, "--seed", "1"]) == 0
    again = files(tmp_path / "set1/scene5")
    assert again["000000-color.png"] != files(drawn / "set1/scene5")["000000-color.png"]  # thrown away, drawn anew
    check_sample(ClearPoseDataset(tmp_path)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test", "20"], "--test is 20: ClearPose has 19"),
        (["--train", "-1"], "--train is -1"),
        (["--views", "0"], "0 views"),
        (["--supersample", "0"], "--supersample 0"),
        (["--size", "4", "4"], "4 x 4 pixels"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_standin_refuses(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert script.main(["standin", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


# --- the subset ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """set3 and set8 of the fixtures, and a scene of every 50th frame."""
    root = write_root(tmp_path_factory.mktemp("download"))
    write_scene(root, "set1/scene5", tuple(f"{number:06d}" for number in range(0, 450, 50)))
    return root


@pytest.mark.parametrize("link", [None, "hard", "soft"])
def test_subset_holds_what_is_read(
    script: ModuleType, download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str | None
) -> None:
    out = tmp_path / "out"
    command = ["subset", str(download), "--out", str(out), *(["--link", link] if link else [])]
    assert script.main(command) == 0
    said = capsys.readouterr()
    assert "6 of 6 scenes are ready" in said.out
    assert "45 of 51 scenes are not in" in said.err and "000100: no color.png" in said.err
    whole, part = ClearPoseDataset(download, "all"), ClearPoseDataset(out, "all")
    assert part.names == whole.names
    for name in part.names:
        a, b = whole.read(name), part.read(name)
        assert a.frames == b.frames and bool((a.depths == b.depths).all()) and bool((a.images == b.images).all())
    pictures = sorted(path.name for path in (out / "set1/scene5").glob("*-color.png"))
    assert pictures == [f"{number:06d}-color.png" for number in range(0, 450, 100)]
    one = out / "set1/scene5/000100-color.png"
    assert one.is_symlink() == (link == "soft")
    assert (one.stat().st_ino == (download / "set1/scene5/000100-color.png").stat().st_ino) == (link is not None)
    assert not list(out.rglob(".*"))

    # The cameras were cached there: metadata.mat is not read again.
    stamp = (out / "set1/scene5/cameras.npz").stat().st_mtime_ns
    ClearPoseDataset(out).cameras("set1/scene5")
    assert (out / "set1/scene5/cameras.npz").stat().st_mtime_ns == stamp


def test_subset_goes_on_and_refuses_another_one(
    script: ModuleType, download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ["--split", "test"]
    assert script.main(["subset", str(download), "--out", str(whole), *options]) == 0
    # Killed within a scene, at a time when every frame was asked for.
    shutil.copytree(whole / "set3", out / "set3")
    partial = out / "set1/.scene5.partial"
    partial.mkdir(parents=True)
    for frame in ("000000", "000050"):
        shutil.copy(download / f"set1/scene5/{frame}-color.png", partial)
    (partial / "000100-color.png").write_bytes(b"half a picture")
    for frame in ("000050", "000100"):
        (partial / f".{frame}-depth.png.tmp").write_bytes(b"half")
    assert script.main(["subset", str(download), "--out", str(out), *options]) == 0
    a, b = files(out), files(whole)
    assert {key: value for key, value in a.items() if not key.endswith("npz")} == {
        key: value for key, value in b.items() if not key.endswith("npz")
    }

    capsys.readouterr()
    assert script.main(["subset", str(download), "--out", str(out), *options, "--every", "50"]) == 1
    said = capsys.readouterr()
    assert "set1/scene5 was not made with --every 50" in said.err and "0 of 3 scenes" in said.out
    assert files(out) == a


def test_subset_names_what_fails_and_does_the_rest(
    script: ModuleType, download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "download", tmp_path / "out"
    shutil.copytree(download, root, ignore=shutil.ignore_patterns("*.npz"))
    (root / "set3/scene1/metadata.mat").unlink()
    (root / "set3/scene3/metadata.mat").write_bytes(b"cut off")
    for path in (root / "set3/scene11").glob("*-depth_true.png"):
        path.unlink()
    assert script.main(["subset", str(root), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "3 of 6 scenes are ready" in said.out
    assert "set3/scene1/metadata.mat is missing" in said.err
    assert "set3/scene3/metadata.mat is no readable MATLAB file" in said.err
    assert "set3/scene11 has no frame that can be read" in said.err
    assert ClearPoseDataset(out, "all").names == ("set1/scene5", "set3/scene8", "set8/scene1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "out"], "nowhere is no folder"),
        ([".", "--out", "out"], "holds no scene of the split 'all': expected set1/scene1/metadata.mat"),
        ([".", "--out", "out", "--split", "val"], "no split 'val'"),
        ([".", "--out", "out", "--every", "0"], "--every is 0"),
        ([".", "--out", "."], "--out is the download itself"),
    ],
)
def test_subset_refuses(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["subset", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- the cameras ---------------------------------------------------------------------------------------------------


def test_cameras_are_cached_in_place_and_looked_at(
    script: ModuleType, download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "download"
    shutil.copytree(download, root, ignore=shutil.ignore_patterns("*.npz"))
    records = write_scene(root, "set2/scene6")
    for index, entry in enumerate(records.values()):
        entry["rotation_translation_matrix"] = np.linalg.inv(camera(index))[:3]  # the wrong direction
    scipy.io.savemat(root / "set2/scene6/metadata.mat", records)
    assert script.main(["cameras", str(root)]) == 0
    said = capsys.readouterr()
    assert "7 of 7 scenes are ready" in said.out and "set2/scene6: its objects seem to move by 0." in said.err
    assert said.err.count("seem to move") == 1
    assert len(list(root.rglob("cameras.npz"))) == 7

    cache = tmp_path / "cache"
    assert script.main(["cameras", str(root), "--cache", str(cache), "--split", "test"]) == 0
    (root / "set3/scene8/metadata.mat").unlink()
    (root / "set3/scene8/cameras.npz").unlink()
    assert script.main(["cameras", str(root), "--split", "test"]) == 1
    assert "set3/scene8/metadata.mat is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), "standin", "--out", str(tmp_path), "--test", "1", *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a stand-in, not the real ClearPose" in done.stdout
    assert json.loads((tmp_path / "set1/scene5/standin.json").read_text())["size"] == [72, 96]
