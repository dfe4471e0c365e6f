"""The rendered layout of faces and humans, written here by hand as the release has it, read by `RenderedDataset`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.datasets.rendered import RenderedDataset
from tests.datasets.invariants import check_sample
from tests.datasets.world import farthest_from_surfaces, scene, views, world_to_camera

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
VIEW = "theta-5.00_phi0.00_d0.30"
SCALE = (1.7, 1.7, 0.6)  # of the columns of R, as a scaled scene leaves them in the cameras file


def save_exr(path: Path, channels: dict[str, np.ndarray]) -> None:
    exr = pytest.importorskip("OpenEXR", reason="EXR depth maps need OpenEXR")
    header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
    with exr.File(header, channels) as file:
        file.write(str(path))


def save_depth(path: Path, depth: np.ndarray) -> None:
    depth = depth.astype(np.float32)
    if path.suffix == ".npy":
        np.save(path, depth)
    else:
        save_exr(path, {"ViewLayer.Combined.R": np.zeros_like(depth), "ViewLayer.Depth.Z": depth})


def write(
    folder: Path,
    count: int = 3,
    digits: int = 3,
    suffix: str = "exr",
    background: float = 1e10,
    change: Callable[[list[dict[str, Any]]], Any] | None = None,
) -> None:
    """One sequence of the world; change: what is done to the frames of the cameras file before it is written."""
    (folder / "renderings").mkdir(parents=True)
    given, frames = scene(count), []
    for index, view in enumerate(views(count)):
        camera, w2c = given.cameras[index], world_to_camera(given, index)
        stem = folder / "renderings" / f"{index:0{digits}d}"
        alpha = np.where(view.depth > 0, 255, 0).astype(np.uint8)
        Image.fromarray(np.concatenate([view.rgb, alpha[..., None]], -1)).save(f"{stem}_rgba.png")
        save_depth(Path(f"{stem}_depth.{suffix}"), np.where(view.depth > 0, view.depth, background))
        w2c[:3, :3] *= SCALE
        frames.append(
            {
                "w": given.width,
                "h": given.height,
                **{key: getattr(camera, key) for key in ("fx", "fy", "cx", "cy")},
                "w2c": w2c.tolist(),
                "file_path": f"renderings/{index:0{digits}d}_rgba.png",
                "blender_camera_location": np.array(camera.pose)[:3, 3].tolist(),
            }
        )
    if change is not None:
        frames = change(frames) or frames
    (folder / "opencv_cameras.json").write_text(json.dumps({"frames": frames}))


@pytest.mark.parametrize("background", [0.0, 1e10, np.inf, np.nan, -1.0])
@pytest.mark.parametrize(("name", "digits", "suffix"), [(f"00_00|{VIEW}", 8, "npy"), ("2345", 3, "exr")])
def test_both_layouts(tmp_path: Path, name: str, digits: int, suffix: str, background: float) -> None:
    write(tmp_path.joinpath(*name.split("|")), digits=digits, suffix=suffix, background=background)
    dataset = RenderedDataset(tmp_path, unit="height")
    assert dataset.names == (name,)
    sample = dataset[0]
    assert sample.name == name and sample.unit == "height" and sample.labels is None
    assert sample.frames == tuple(f"{index:0{digits}d}" for index in range(3))
    check_sample(sample)
    assert farthest_from_surfaces(sample) < 1e-5  # half a pixel, or the scale, would be centimetres
    for index, view in enumerate(views()):
        np.testing.assert_array_equal(sample.depths[index], view.depth)
        np.testing.assert_array_equal(sample.point_masks[index], view.depth > 0)


def test_colour_is_laid_on_white(tmp_path: Path) -> None:
    write(tmp_path / "a")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 64, 69, 4)).astype(np.uint8)
    for index, rgba in enumerate(pictures[:2]):
        Image.fromarray(rgba).save(tmp_path / "a" / "renderings" / f"00{index}_rgba.png")
    Image.fromarray(pictures[2][..., :3]).save(tmp_path / "a" / "renderings" / "002_rgba.png")  # without alpha
    images = RenderedDataset(tmp_path)[0].images.numpy()
    for index in range(3):
        for v, u in ((0, 0), (5, 60), (63, 68), (20, 3)):
            r, g, b, a = (float(value) / 255 for value in pictures[index, v, u])
            a = a if index < 2 else 1.0
            expected = [a * value + (1 - a) * 1.0 for value in (r, g, b)]
            np.testing.assert_allclose(images[index, :, v, u], expected, atol=1e-6)


def test_what_counts_as_a_depth(tmp_path: Path) -> None:
    write(tmp_path / "a", suffix="npy")
    path = tmp_path / "a" / "renderings" / "001_depth.npy"
    depth = np.load(path)
    depth[0, :8] = [0.5e-4, 1.5e-4, 0.9e9, 1.1e9, 1e10, 0, -2, np.nan]
    np.save(path, depth)
    sample = RenderedDataset(tmp_path).read("a", [1])
    assert sample.point_masks[0, 0, :8].tolist() == [False, True, True, False, False, False, False, False]
    np.testing.assert_array_equal(sample.depths[0, 0, :8], np.float32([0, 1.5e-4, 0.9e9, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize("kind", ["bool", "uint8", "float", "logits", "sam", "sam-last"])
def test_masks(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a" / "b", digits=8)
    wanted = np.random.default_rng(1).random((3, 64, 69)) < 0.5
    made = {
        "bool": wanted,
        "uint8": wanted.astype(np.uint8) * 255,
        "float": wanted.astype(np.float32),
        "logits": np.where(wanted, 0.3, -2.0),
        "sam": wanted[:, None],
        "sam-last": wanted[..., None],
    }[kind]
    for index in range(3):
        np.save(tmp_path / "a" / "b" / "renderings" / f"0000000{index}_mask.npy", made[index])
    depths = np.stack([view.depth for view in views()])
    for masks, expected in ((True, wanted), (None, wanted), (False, np.ones_like(wanted))):
        sample = RenderedDataset(tmp_path, masks=masks)[0]
        np.testing.assert_array_equal(sample.point_masks, (depths > 0) & expected)
        np.testing.assert_array_equal(sample.depths, depths)  # what is outside of a mask still has its depth


def test_a_missing_mask_is_never_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", digits=8)
    assert bool(RenderedDataset(tmp_path)[0].point_masks.any())
    with pytest.raises(FileNotFoundError, match=r"00000000_mask\.npy does not exist: make the masks, or read with"):
        RenderedDataset(tmp_path, masks=True)[0]
    np.save(tmp_path / "a" / "b" / "renderings" / "00000000_mask.npy", np.ones((64, 69), bool))
    dataset = RenderedDataset(tmp_path)
    assert len(dataset.read("a|b", [0])) == 1
    with pytest.raises(FileNotFoundError, match=r"00000001_mask\.npy does not exist"):
        dataset[0]
    np.save(tmp_path / "a" / "b" / "renderings" / "00000001_mask.npy", np.ones((64, 68), bool))
    with pytest.raises(ValueError, match=r"00000001_mask\.npy has the shape \(64, 68\), its depth map \(64, 69\)"):
        dataset.read("a|b", [1])


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [
        (42, 7, [0, 6, 12, 18, 24, 30, 36]),
        (96, 8, [0, 12, 24, 36, 48, 60, 72, 84]),
        (8, 8, list(range(8))),
        (3, 8, [0, 1, 2]),
        (5, None, list(range(5))),
        (10, 4, [0, 2, 5, 7]),
    ],
)
def test_default_frames(tmp_path: Path, count: int, wanted: int | None, expected: list[int]) -> None:
    frame = {"w": 4, "h": 4, "fx": 4, "fy": 4, "cx": 2, "cy": 2, "w2c": np.eye(4).tolist()}
    frames = [{**frame, "file_path": f"renderings/{index:08d}_rgba.png"} for index in range(count)]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "opencv_cameras.json").write_text(json.dumps({"frames": frames}))
    found = RenderedDataset(tmp_path, views=wanted).default_frames("a")
    assert found == [f"{index:08d}" for index in expected]


def test_a_sequence_map_fixes_the_frames(tmp_path: Path) -> None:
    for name in ("00_00", "01_00"):
        write(tmp_path / name / VIEW, digits=8)
    path = tmp_path / "map.json"
    path.write_text(json.dumps({f"01_00|{VIEW}": [2, 0]}))
    dataset = RenderedDataset(tmp_path, path, views=1)
    assert dataset.names == (f"01_00|{VIEW}",)
    assert dataset[0].frames == ("00000002", "00000000")
    np.testing.assert_array_equal(dataset[0].depths[0], views()[2].depth)
    with pytest.raises(ValueError, match=r"has no sequence '02_00\|x' \(1 of 2 are missing\)"):
        RenderedDataset(tmp_path, {f"01_00|{VIEW}": [0], "02_00|x": [0]})


@pytest.mark.parametrize(
    "paths",
    [
        lambda index: f"/home/someone/renderings/{index:08d}_rgba.png",
        lambda index: f"C:\\data\\renderings\\{index:08d}_rgba.png",
        lambda index: "renderings/picture.png",
        lambda index: None,
    ],
)
def test_frames_are_found_whatever_the_file_paths(tmp_path: Path, paths: Callable[[int], str | None]) -> None:
    def change(frames: list[dict[str, Any]]) -> None:
        for index, frame in enumerate(frames):
            frame["file_path"] = paths(index)

    write(tmp_path / "a" / "b", digits=8, change=change)
    dataset = RenderedDataset(tmp_path)
    assert dataset.frames("a|b") == ["00000000", "00000001", "00000002"]
    assert farthest_from_surfaces(dataset[0]) < 1e-5


def test_cameras_belong_to_their_pictures(tmp_path: Path) -> None:
    """Out of order, and with one frame that is not listed: the file's name says which picture a camera is of."""
    write(tmp_path / "a", change=lambda frames: [frames[2], frames[0]])
    dataset = RenderedDataset(tmp_path)
    assert dataset.frames("a") == ["002", "000"]
    assert farthest_from_surfaces(dataset[0]) < 1e-5


def test_depth_at_a_size_of_its_own(tmp_path: Path) -> None:
    """Every third pixel of a map, beginning with the second, is the map at a third of its size."""
    write(tmp_path / "a", suffix="npy")
    for index, view in enumerate(views()):
        small = view.depth[1:63:3, 1:69:3]
        np.save(tmp_path / "a" / "renderings" / f"00{index}_depth.npy", small)
    path = tmp_path / "a" / "opencv_cameras.json"
    record = json.loads(path.read_text())
    for index, frame in enumerate(record["frames"]):  # pictures without their last row: 63 x 69 is 3 x (21 x 23)
        frame["h"] = 63
        picture = tmp_path / "a" / "renderings" / f"00{index}_rgba.png"
        Image.open(picture).crop((0, 0, 69, 63)).save(picture)
    path.write_text(json.dumps(record))
    sample = RenderedDataset(tmp_path)[0]
    assert sample.images.shape == (3, 3, 63, 69) and sample.depths.shape == (3, 21, 23)
    assert farthest_from_surfaces(sample) < 1e-5


@pytest.mark.parametrize("names", [["V"], ["Z"], ["R", "G", "B"], ["Layer.Normal.Z", "Layer.Depth.V"], ["what"]])
def test_the_channel_of_depth(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path / "a", suffix="exr")
    depth = np.where(views()[0].depth > 0, views()[0].depth, 1e10).astype(np.float32)
    wrong = np.full_like(depth, 3)
    channels = {name: wrong if "Normal" in name else depth for name in names}
    save_exr(tmp_path / "a" / "renderings" / "000_depth.exr", channels)
    np.testing.assert_array_equal(RenderedDataset(tmp_path).read("a", [0]).depths[0], views()[0].depth)


def test_an_exr_without_depth_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path / "a", suffix="exr")
    flat = np.ones((64, 69), np.float32)
    save_exr(tmp_path / "a" / "renderings" / "000_depth.exr", {"one": flat, "two": flat})
    with pytest.raises(ValueError, match=r"000_depth\.exr has the channels one, two"):
        RenderedDataset(tmp_path)[0]


def edit(key: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(frames: list[dict[str, Any]]) -> None:
        frames[1].pop(key) if value is None else frames[1].update({key: value})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("fx", None), r"opencv_cameras\.json: frame 001 is damaged \(KeyError\('fx'\)\)"),
        (edit("w2c", "none"), "frame 001 is damaged"),
        (edit("w2c", [[1, 0], [0, 1]]), "frame 001 has no finite 4 x 4 w2c"),
        (edit("w2c", np.full((4, 4), np.nan).tolist()), "frame 001 has no finite 4 x 4 w2c"),
        (edit("w2c", np.zeros((4, 4)).tolist()), "not greater than 0"),
        (edit("w2c", np.diag([1.0, -1.0, 1.0, 1.0]).tolist()), "is no rotation and translation"),
        (edit("w2c", [[1, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "is no rotation and translation"),
        (edit("fy", -1.0), "not greater than 0"),
        (edit("w", 70), r"001_rgba\.png has 64 x 69 pixels, opencv_cameras\.json says 64 x 70"),
        (edit("file_path", "renderings/007_rgba.png"), r"007_rgba\.png does not exist"),
        (lambda frames: ["frame"], "is damaged"),
        (lambda frames: [{}], "is damaged"),
    ],
)
def test_damaged_cameras_are_named(tmp_path: Path, change: Callable[..., Any], words: str) -> None:
    write(tmp_path / "a", suffix="npy", change=change)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        RenderedDataset(tmp_path)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"frames": []}', '{"frames": {}}', "\x00\xff"])
def test_no_cameras_file_at_all(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a", suffix="npy")
    (tmp_path / "a" / "opencv_cameras.json").write_text(text)
    with pytest.raises(ValueError, match=r"opencv_cameras\.json (holds no cameras|has no frames)"):
        RenderedDataset(tmp_path)[0]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["000_rgba.png", "000_depth.exr", "000_mask.npy"]), st.binary(max_size=200), st.booleans())
def test_a_damaged_file_is_named(tmp_path_factory: pytest.TempPathFactory, name: str, junk: bytes, cut: bool) -> None:
    """Torn off, or something else altogether: a sentence with the name of the file, never an array."""
    folder = tmp_path_factory.mktemp("damaged")
    write(folder / "a")
    np.save(folder / "a" / "renderings" / "000_mask.npy", np.ones((64, 69), bool))
    path = folder / "a" / "renderings" / name
    path.write_bytes(path.read_bytes()[: len(junk)] if cut else junk)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        RenderedDataset(folder).read("a", [0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.stem):
        RenderedDataset(folder, masks=True).read("a", [0])


def test_pickles_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", suffix="npy")
    np.save(tmp_path / "a" / "renderings" / "000_depth.npy", np.array({"depth": 1}, object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"000_depth\.npy is no readable array"):
        RenderedDataset(tmp_path)[0]


def test_what_a_folder_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected <scene>/<view>/opencv_cameras\.json \(faces\)"):
        RenderedDataset(tmp_path)
    write(tmp_path / ".a.partial" / "sequence", suffix="npy")
    with pytest.raises(ValueError, match="holds no sequence"):
        RenderedDataset(tmp_path)
    with pytest.raises(ValueError, match="0 views of each sequence"):
        RenderedDataset(tmp_path, views=0)


def test_pictures_of_two_sizes(tmp_path: Path) -> None:
    write(tmp_path / "a", suffix="npy", change=edit("w", 60))
    picture = tmp_path / "a" / "renderings" / "001_rgba.png"
    Image.open(picture).crop((0, 0, 60, 64)).save(picture)
    with pytest.raises(ValueError, match="pictures of different sizes"):
        RenderedDataset(tmp_path)[0]
    assert len(RenderedDataset(tmp_path).read("a", [0, 2])) == 2


def test_workers_of_a_data_loader(tmp_path: Path) -> None:
    for name in ("0", "1", "2"):
        write(tmp_path / name, suffix="npy")
    loader = torch.utils.data.DataLoader(RenderedDataset(tmp_path), batch_size=None, num_workers=2)
    assert [sample.name for sample in loader] == ["0", "1", "2"]
