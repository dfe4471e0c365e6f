"""Prints in rooms, stand-ins and unpacked bursts: made by the script, read back by the readers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.datasets.bursts import BurstDataset
from peft_attrsub.datasets.rendered import RenderedDataset
from peft_attrsub.datasets.splits import face_sequence_map
from peft_attrsub.scenes.storage import read_json

from ..datasets.invariants import check_sample

HERE = Path(__file__).resolve().parents[2] / "examples" / "vggt"
TINY = ["--size", "40", "--frames", "3", "--texture-size", "64", "--supersample", "1"]
MIDDLE = "00_00|theta0.00_phi0.00_d0.30"
pytest.importorskip("open3d")
pytest.importorskip("OpenEXR")
pillow = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, with its neighbours importable as when it is run."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location("prepare_faces", HERE / "prepare_faces.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules["prepare_faces"] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def standins(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("standins")
    assert script.main(["standin", "--out", str(root), "--scenes", "1", "--views", "2", *TINY]) == 0
    return root


def card_points(sample: Any, index: int) -> np.ndarray:
    """World points (N, 3) of the pixels that count."""
    k, e = sample.intrinsics[index].numpy(), sample.extrinsics[index].numpy()
    rows, columns = np.nonzero(sample.point_masks[index].numpy())
    z = sample.depths[index].double().numpy()[rows, columns]
    camera = np.linalg.inv(k) @ np.stack([columns * z, rows * z, z])
    return np.asarray((e[:, :3].T @ (camera - e[:, 3:])).T)


def off_plane(points: np.ndarray) -> np.ndarray:
    """Distances of points from the plane that fits them best."""
    centred = points - points.mean(0)
    return np.asarray(np.abs(centred @ np.linalg.svd(centred, full_matrices=False)[2][2]))


def test_the_stand_ins_open_as_what_they_stand_for(standins: Path) -> None:
    for kind in ("face", "face-relief"):
        dataset = RenderedDataset(standins / kind, masks=True)
        assert set(dataset.names) <= set(face_sequence_map()) and dataset.names[-1] == MIDDLE and len(dataset) == 2
        for sample in dataset:
            assert len(sample) == 3 and sample.images.shape[-2:] == (40, 40)
            assert (sample.depths > 0).all()  # a closed room
            share = sample.point_masks.float().mean()
            assert 0.03 < share < 0.4
            check_sample(sample)
    burst = BurstDataset(standins / "face-real", stride=1)[0]
    assert burst.images.shape == (3, 3, 40, 30) and burst.depths.shape == (3, 20, 15)
    check_sample(burst)


def test_a_print_is_flat_and_a_relief_is_not(standins: Path) -> None:
    flat, relief = (RenderedDataset(standins / kind).read(MIDDLE) for kind in ("face", "face-relief"))
    every = np.concatenate([card_points(flat, index) for index in range(3)])
    assert off_plane(every).max() < 1e-5  # all views see the same card
    heights = off_plane(card_points(relief, 0))
    # An eighth to a twelfth of a card 0.15 to 0.18 wide, of which the rim is seen too.
    assert 0.003 < heights.max() < 0.025
    assert flat.extrinsics is not None and relief.extrinsics is not None
    torch.testing.assert_close(flat.extrinsics, relief.extrinsics)  # the same camera looks at both
    assert not flat.images.equal(relief.images)


def test_the_first_camera_stands_before_the_middle_of_the_print(standins: Path) -> None:
    from _prints import DISTANCE  # type: ignore[import-not-found]

    sample = RenderedDataset(standins / "face", masks=False).read(MIDDLE)
    middle = sample.depths[0, 19:21, 19:21].mean()
    assert float(middle) == pytest.approx(DISTANCE, rel=0.01)
    assert sample.extrinsics is not None
    moved = torch.linalg.norm(sample.extrinsics[:, :, 3].diff(dim=0), dim=-1)
    assert bool((moved < 0.2).all()) and bool((moved > 0).all())


def test_a_phone_sees_what_the_renderer_saw(standins: Path) -> None:
    burst = BurstDataset(standins / "face-real", stride=1)[0]
    # 1 % noise and float16: the card is the nearest thing, and stands at 0.3.
    assert float(burst.depths[0, 10, 7]) == pytest.approx(0.30, rel=0.05)
    cameras = read_json(standins / "face-real/SoaP/datasets/face_00/cameras.json")["frames"][0]
    image, depth = np.array(cameras["image_intrinsic"]), np.array(cameras["intrinsic"])
    np.testing.assert_allclose(image[:2, 2], [14.5, 19.5], atol=1e-5)  # the middle of 30 x 40 pixels
    np.testing.assert_allclose(depth[:2, 2], [7, 9.5], atol=1e-5)
    np.testing.assert_allclose(depth[0, 0] * 2, image[0, 0], rtol=1e-6)


def test_unpacking_asks_for_trust(
    script: ModuleType, standins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_ = ["unpack", str(standins / "bundles"), "--out", str(tmp_path), "--depth-encoding", "auto"]
    assert script.main(given_) == 1
    assert "--trust-pickle" in capsys.readouterr().err and not list(tmp_path.rglob("*.npy"))
    assert script.main([*given_, "--trust-pickle"]) == 0
    ours, theirs = BurstDataset(tmp_path)[0], BurstDataset(standins / "face-real")[0]
    assert ours.name == theirs.name == "face_00" and ours.depths.equal(theirs.depths)
    assert script.main([*given_, "--trust-pickle"]) == 0 and "unpacked already" in capsys.readouterr().out
    assert script.main(["unpack", str(tmp_path / "SoaP"), "--out", str(tmp_path)]) == 2
    assert "no frame_bundle.npz" in capsys.readouterr().err
    twice = tmp_path / "twice" / "processed-face_00"
    twice.mkdir(parents=True)
    (twice / "frame_bundle.npz").write_bytes(b"")
    assert script.main([*given_[:2], str(twice), *given_[2:]]) == 2
    assert "would both be called face_00" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A red and a blue picture of different proportions, and masks: the upper half, the left half."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    for name, size, colour, part in (
        ("a", (30, 40), (250, 10, 10), np.s_[:5]),
        ("b", (40, 30), (10, 10, 250), np.s_[:, :4]),
    ):
        pillow.new("RGB", size, colour).save(tmp_path / "photos" / f"{name}.png")
        mask = np.zeros((10, 8), np.uint8)
        mask[part] = 255
        pillow.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path / "photos"


def test_a_folder_of_faces_is_printed(script: ModuleType, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given_ = ["render", "--faces", str(photos), "--out", str(out), "--views", "1", "--depth", "npy", *TINY]
    assert script.main(given_) == 0
    assert read_json(out / "faces.json") == {"00_00": "a", "01_00": "b"}
    masked = tmp_path / "masked"
    given_[4] = str(masked)
    assert script.main([*given_, "--mask-dir", str(tmp_path / "masks")]) == 0
    whole, part = RenderedDataset(out, masks=True), RenderedDataset(masked, masks=True)
    for index, channel in ((0, 0), (1, 2)):
        card, half = whole[index], part[index]
        check_sample(card)
        assert card.images.equal(half.images)
        mean = torch.stack([card.images[:, colour][card.point_masks].mean() for colour in range(3)])
        assert int(mean.argmax()) == channel and float(mean[channel]) > 2 * float(mean.sort().values[1])
        assert off_plane(card_points(card, 0)).max() < 1e-5
        rows, columns = np.nonzero(card.point_masks[0].numpy())
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert (height / width) == pytest.approx(4 / 3 if index == 0 else 3 / 4, abs=0.12)
        upper, left = half.point_masks[0].numpy().nonzero()
        assert not bool((half.point_masks & ~card.point_masks).any())
        assert len(upper) == pytest.approx(len(rows) / 2, rel=0.12)
        assert (upper.max() < rows.mean() + 1) if index == 0 else (left.max() < columns.mean() + 1)


def test_a_stopped_run_goes_on_where_it_was(
    script: ModuleType, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from peft_attrsub.scenes.raycast import RaycastRenderer

    given_ = ["render", "--faces", str(photos), "--views", "1", "--depth", "npy", *TINY]
    real, made = RaycastRenderer.render, []

    def stops(self: Any, index: int) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(index)
        return real(self, index)

    monkeypatch.setattr(RaycastRenderer, "render", stops)
    assert script.main([*given_, "--out", str(tmp_path / "out")]) == 130
    assert RenderedDataset(tmp_path / "out").names == (MIDDLE,)  # the second one is not there yet
    made.clear()
    assert script.main([*given_, "--out", str(tmp_path / "out")]) == 0
    assert made == [1, 2]
    made.clear()
    assert script.main([*given_, "--out", str(tmp_path / "out")]) == 0 and made == []
    monkeypatch.setattr(RaycastRenderer, "render", real)
    assert script.main([*given_, "--out", str(tmp_path / "fresh")]) == 0
    ways = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("out", "fresh")]
    assert [path.read_bytes() for path in ways[0]] == [path.read_bytes() for path in ways[1]]
    assert script.main([*given_, "--out", str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "was made otherwise" in capsys.readouterr().err


def test_processes_share_the_sequences(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    args = script.parser().parse_args(["standin", "--out", "x", "--views", "9"])
    names = [name for *_, name, _ in script.sequences(args, 50)]
    assert len(names) == 450 and {name.replace("/", "|") for name in names} == set(face_sequence_map())
    monkeypatch.setenv("WORLD_SIZE", "4")
    shares = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        shares.append([name for *_, name, _ in script.sequences(args, 50)])
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_wrong_arguments_are_sentences(
    script: ModuleType, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), *TINY]
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong, words in (
        (["render", "--faces", str(tmp_path / "nowhere"), *out], "nowhere is no folder"),
        (["render", "--faces", str(empty), *out], "empty holds no"),
        (["render", "--faces", str(photos), "--mask-dir", str(empty), *out], "a.png does not exist"),
        (["render", "--faces", str(photos), *out, "--views", "10"], "--views 10"),
        (["standin", *out, "--scenes", "0"], "--scenes 0"),
        (["standin", *out, "--frames", "1"], "--frames 1"),
        (["standin", *out, "--texture-size", "100"], "a power of two for the texture"),
    ):
        assert script.main(wrong) == 2
        assert words in capsys.readouterr().err
    (photos / "a.png").write_bytes(b"broken")
    assert script.main(["render", "--faces", str(photos), *out]) == 2
    assert "a.png is not a readable picture" in capsys.readouterr().err


def test_folders_of_maps_are_faces_too(script: ModuleType, tmp_path: Path) -> None:
    for name in ("01", "00"):
        (tmp_path / "imgs" / name).mkdir(parents=True)
        pillow.new("RGB", (30, 40), (200, 180, 20)).save(tmp_path / "imgs" / name / "basecolor.png")
        pillow.new("L", (30, 40), 120).save(tmp_path / "imgs" / name / "roughness.png")
    faces = script.find_faces(tmp_path / "imgs")
    assert [face.name for face in faces] == ["00", "01"] and faces[0].maps == tmp_path / "imgs" / "00"
    out = tmp_path / "out"
    assert script.main(["render", "--faces", str(tmp_path / "imgs"), "--out", str(out), "--views", "1", *TINY]) == 0
    sample = RenderedDataset(out, masks=True)[1]
    red, green, blue = (float(sample.images[:, index][sample.point_masks].mean()) for index in range(3))
    assert red > 2 * blue and green > 2 * blue


@given(st.integers(0, 2**32), st.integers(2, 60))
@settings(max_examples=25, deadline=None)
def test_a_camera_trembles_as_the_protocol_says(script: ModuleType, seed: int, frames: int) -> None:
    from _prints import natural_spline, tremble
    from scipy.interpolate import CubicSpline
    from scipy.spatial.transform import Rotation, Slerp

    rng = np.random.default_rng(seed)
    start = np.eye(4)
    start[:3, :3], start[:3, 3] = Rotation.random(random_state=seed % 2**31).as_matrix(), rng.normal(size=3)
    poses = np.stack(tremble(start, np.random.default_rng(seed), frames))
    np.testing.assert_allclose(poses[0], start, atol=1e-12)
    # Nine samples between control points hold the control points themselves.
    dense = np.stack(tremble(start, np.random.default_rng(seed), 82))
    controls, times = dense[::9], np.linspace(0, 9, frames)
    steps = np.linalg.norm(np.diff(controls[:, :3, 3], axis=0), axis=1)
    turns = Rotation.from_matrix(controls[1:, :3, :3] @ controls[:-1, :3, :3].swapaxes(1, 2)).magnitude()
    assert (steps <= 0.01 + 1e-12).all() and (turns <= np.radians(1) + 1e-9).all() and steps.max() > 0
    spline = CubicSpline(np.arange(10), controls[:, :3, 3], bc_type="natural")
    np.testing.assert_allclose(poses[:, :3, 3], spline(times), atol=1e-9)
    np.testing.assert_allclose(natural_spline(controls[:, :3, 3], times), spline(times), atol=1e-9)
    slerp = Slerp(np.arange(10), Rotation.from_matrix(controls[:, :3, :3]))
    np.testing.assert_allclose(poses[:, :3, :3], slerp(times).as_matrix(), atol=1e-9)


def test_portraits_are_drawn_the_same_way_twice(script: ModuleType) -> None:
    from standins.portraits import draw_portrait  # type: ignore[import-not-found]

    one, again, other = draw_portrait(3, 48), draw_portrait(3, 48), draw_portrait(4, 48)
    assert one.image.shape == (64, 48, 3) and one.image.dtype == np.uint8
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).mean() > 0.5
    for portrait in (one, other):
        assert 0.15 < portrait.mask.mean() < 0.45 and 0.08 <= portrait.height.max() <= 0.12
        assert portrait.height[~portrait.mask].max() < 0.5 * portrait.height.max()
        assert portrait.height[0].max() == 0 and portrait.image.std() > 20
    with pytest.raises(ValueError, match="give 16 or more"):
        draw_portrait(0, 8)
