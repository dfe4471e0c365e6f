"""Bundles of the two burst apps: turned upright with their cameras, in metres, and never unpickled without leave."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.datasets.bundles import portrait_intrinsic, read_bundle, read_hndr, read_soap, unpack_bundle

from .burst_files import HIGH, MATRIX, WIDE, hndr_record, soap_record, turn, write_bundle


@given(
    st.floats(5, 40),
    st.floats(5, 40),
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.integers(0, WIDE - 1),
    st.integers(0, HIGH - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_point_falls_on_its_pixel_of_the_upright_picture(
    fx: float, fy: float, off_x: float, off_y: float, u: int, v: int
) -> None:
    matrix = np.array([[fx, 0, WIDE / 2 + off_x], [0, fy, HIGH / 2 + off_y], [0, 0, 1]])
    sensor = np.zeros((HIGH, WIDE), np.uint8)
    sensor[v, u] = 1
    ((row, column),) = np.argwhere(turn(sensor))
    x, y, z = np.linalg.inv(matrix) @ [u, v, 1]
    # Held upright, what was right on the sensor is below, and what was above is right.
    seen = portrait_intrinsic(matrix, (WIDE, HIGH), (WIDE, HIGH)) @ [-y, x, z]
    np.testing.assert_allclose(seen, [column, row, 1], atol=1e-9)


def test_the_reference_size_of_an_intrinsic_may_be_another_one_than_the_array(tmp_path: Path) -> None:
    frame = read_soap(write_bundle(tmp_path, soap_record(2, 2)), trust_pickle=True).frames[1]
    assert frame.image.shape == (WIDE, HIGH, 3) and frame.depth.shape == (WIDE // 2, HIGH // 2)
    expected = [[14, 0, HIGH - 1 - 5.8], [0, 15, 7.1], [0, 0, 1]]
    np.testing.assert_allclose(frame.image_intrinsic, expected, atol=1e-5)
    # A point in the middle of a depth pixel is in the middle of six by six reference pixels.
    reference = [[42, 0, 3 * HIGH - 1 - 3 * 5.8], [0, 45, 3 * 7.1], [0, 0, 1]]
    for pixel in ((0, 0), (2, 5)):
        point = np.linalg.inv(frame.intrinsic) @ [*pixel, 1]
        np.testing.assert_allclose((np.array(reference) @ point)[:2], np.array(pixel) * 6 + 2.5, atol=1e-4)
    assert frame.extrinsic is None


def test_intrinsics_in_the_standard_layout_are_recognised(tmp_path: Path) -> None:
    record = soap_record(1, 1)
    usual = read_soap(write_bundle(tmp_path / "a", record), trust_pickle=True).frames[0]
    record["rgb_0"]["intrinsics"] = record["rgb_0"]["intrinsics"].T
    other = read_soap(write_bundle(tmp_path / "b", record), trust_pickle=True).frames[0]
    np.testing.assert_array_equal(usual.image_intrinsic, other.image_intrinsic)
    record["rgb_0"]["intrinsics"] = np.ones((3, 3))
    with pytest.raises(ValueError, match=r"rgb_0.*no camera matrix"):
        _ = read_soap(write_bundle(tmp_path / "c", record), trust_pickle=True).frames[0]


@pytest.mark.parametrize(("level", "encoding"), [(0.4, "metric"), (2.5, "inverse")])
def test_the_encoding_of_depth_is_decided_by_its_median_and_logged(
    tmp_path: Path, level: float, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    record = soap_record(3, 3, level)
    with caplog.at_level(logging.INFO):
        bundle = read_soap(write_bundle(tmp_path, record), trust_pickle=True)
    assert bundle.depth_encoding == encoding and encoding in caplog.text
    stored = record["depth_2"]["depth"].astype(np.float32)
    expected = stored if encoding == "metric" else 1 / stored
    np.testing.assert_allclose(bundle.frames[2].depth, expected, rtol=1e-6)
    assert bundle.frames[2].depth.dtype == np.float32


@pytest.mark.parametrize(("level", "words"), [(1.0, "would both be"), (20.0, "neither"), (0.0, "no depth at all")])
def test_an_encoding_that_cannot_be_told_must_be_given(tmp_path: Path, level: float, words: str) -> None:
    path = write_bundle(tmp_path, soap_record(2, 2, level))
    with pytest.raises(ValueError, match=words):
        read_soap(path, trust_pickle=True)
    for encoding in ("metric", "inverse"):
        bundle = read_soap(path, trust_pickle=True, depth_encoding=encoding)
        assert bundle.depth_encoding == encoding
        if level == 20.0:
            assert abs(float(np.median(bundle.frames[0].depth)) - (20 if encoding == "metric" else 0.05)) < 3
    with pytest.raises(ValueError, match="'auto', 'metric', 'inverse'"):
        read_soap(path, trust_pickle=True, depth_encoding="meters")


@pytest.mark.parametrize("encoding", ["metric", "inverse"])
def test_what_is_no_depth_becomes_zero(tmp_path: Path, encoding: str) -> None:
    record = soap_record(1, 1, 0.5)
    depth = record["depth_0"]["depth"]
    depth[0, :5] = [np.nan, np.inf, -np.inf, -1, 0]
    depth[1, 0] = 1e-6 if encoding == "inverse" else 101  # farther than any phone sees
    frame = read_soap(write_bundle(tmp_path, record), trust_pickle=True, depth_encoding=encoding).frames[0]
    assert (frame.depth[0, :5] == 0).all() and frame.depth[1, 0] == 0
    assert (frame.depth > 0).sum() == depth.size - 6 and (frame.valid == (frame.depth > 0)).all()


@pytest.mark.parametrize(("colours", "depths", "delay"), [(42, 20, 0.0), (10, 23, 0.0), (8, 8, 0.11)])
def test_images_get_the_depth_that_is_nearest_in_time(
    tmp_path: Path, colours: int, depths: int, delay: float, caplog: pytest.LogCaptureFixture
) -> None:
    record = soap_record(colours, depths, depth_delay=delay)
    with caplog.at_level(logging.WARNING):
        bundle = read_soap(write_bundle(tmp_path, record), trust_pickle=True)
    assert ("paired by time" in caplog.text) == (colours != depths)
    assert len(bundle.frames) == colours
    for index, frame in enumerate(bundle.frames):
        gaps = [
            abs(record[f"depth_{other}"]["timestamp"] - record[f"rgb_{index}"]["timestamp"]) for other in range(depths)
        ]
        np.testing.assert_array_equal(frame.depth, record[f"depth_{int(np.argmin(gaps))}"]["depth"])
        assert frame.gap == pytest.approx(min(gaps))


def test_numbers_may_be_missing_between_the_frames(tmp_path: Path) -> None:
    # The app's converter leaves out broken frames, but counts them.
    record = soap_record(12, 12)
    del record["rgb_3"], record["depth_7"]
    bundle = read_soap(write_bundle(tmp_path, record), trust_pickle=True)
    assert len(bundle.frames) == 11 and len(bundle.frames[2:4]) == 2
    np.testing.assert_array_equal(bundle.frames[3].image, record["rgb_4"]["rgb"][..., :3])
    np.testing.assert_array_equal(bundle.frames[-1].image, record["rgb_11"]["rgb"][..., :3])
    with pytest.raises(IndexError):
        bundle.frames[11]


class _Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled_without_leave(tmp_path: Path) -> None:
    record = soap_record(1, 1) | {"depth_0": np.array(_Evil(tmp_path / "broken in"), dtype=object)}
    path = write_bundle(tmp_path / "bundle", record)
    with pytest.raises(ValueError, match=r"depth_0 is a pickled dictionary.*any code.*trust_pickle=True"):
        read_soap(path)
    hndr = write_bundle(tmp_path / "hndr", hndr_record(1, 1))
    with pytest.raises(ValueError, match=r"info_0 is a pickled dictionary"):
        _ = read_hndr(hndr).frames[0]
    for read in (read_bundle, lambda path: unpack_bundle(path, tmp_path / "out")):
        with pytest.raises(ValueError, match="trust_pickle"):
            read(path)
    assert not (tmp_path / "broken in").exists() and not (tmp_path / "out").exists()


def test_damage_is_told_by_file_and_key(tmp_path: Path) -> None:
    good = soap_record(2, 2)
    with pytest.raises(FileNotFoundError, match=r"frame_bundle\.npz does not exist"):
        read_bundle(tmp_path)
    path = tmp_path / "frame_bundle.npz"
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"frame_bundle\.npz is no npz file"):
        read_bundle(tmp_path)
    write_bundle(tmp_path, {"num_rgb_frames": 0})
    with pytest.raises(ValueError, match="no key rgb_0"):
        read_bundle(tmp_path, trust_pickle=True)
    write_bundle(tmp_path, good | {"depth_1": np.zeros(3)})
    with pytest.raises(ValueError, match=r"depth_1 is an array of shape \(3,\), expected a dictionary"):
        read_bundle(tmp_path, trust_pickle=True)
    lame = {key: value for key, value in good["rgb_1"].items() if key != "rgb"}
    write_bundle(tmp_path, good | {"rgb_1": lame})
    with pytest.raises(ValueError, match="rgb_1 has no 'rgb': it has frame_count"):
        _ = read_bundle(tmp_path, trust_pickle=True).frames[1]
    write_bundle(tmp_path, good | {"rgb_0": good["rgb_0"] | {"rgb": np.zeros((HIGH, WIDE, 4), np.uint8)}})
    with pytest.raises(ValueError, match=r"rgb_0 has shape \(12, 16, 3\): a portrait picture"):
        _ = read_bundle(tmp_path, trust_pickle=True).frames[0]
    data = bytearray(write_bundle(tmp_path, good).read_bytes())
    at = data.find(b"depth_0.npy") + 60
    data[at : at + 40] = bytes(40)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="depth_0 cannot be read"):
        read_bundle(tmp_path, trust_pickle=True)


def test_unpacking_gives_back_every_picture_and_depth(tmp_path: Path) -> None:
    record = soap_record(5, 4)
    path = write_bundle(tmp_path / "bundle", record)
    steps: list[tuple[int, int]] = []
    out = unpack_bundle(
        path, tmp_path / "out", trust_pickle=True, image="png", progress=lambda *step: steps.append(step)
    )
    assert steps == [(number, 5) for number in range(1, 6)]
    assert sorted(file.name for file in out.iterdir()) == ["cameras.json", "depths", "images"]
    cameras = json.loads((out / "cameras.json").read_bytes())
    assert (cameras["kind"], cameras["unit"], cameras["depth_encoding"]) == ("soap", "m", "metric")
    pillow = pytest.importorskip("PIL.Image")
    for index, frame in enumerate(read_soap(path, trust_pickle=True).frames):
        name = f"{index:06d}"
        np.testing.assert_array_equal(np.asarray(pillow.open(out / f"images/{name}.png")), frame.image)
        np.testing.assert_array_equal(np.load(out / f"depths/{name}.npy"), frame.depth)
        camera = cameras["frames"][index]
        assert camera["frame"] == name and camera["extrinsic"] is None
        np.testing.assert_allclose(camera["intrinsic"], frame.intrinsic)
        assert camera["depth_size"] == [HIGH // 2, WIDE // 2] and camera["image_size"] == [HIGH, WIDE]


def test_unpacking_leaves_nothing_half_done_and_nothing_overwritten(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "bundle", soap_record(3, 3))

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack_bundle(path, tmp_path / "to" / "out", trust_pickle=True, progress=stop)
    assert list((tmp_path / "to").iterdir()) == []
    unpack_bundle(path, tmp_path / "to" / "out", trust_pickle=True)
    with pytest.raises(FileExistsError, match="out is there already"):
        unpack_bundle(path, tmp_path / "to" / "out", trust_pickle=True)
    with pytest.raises(ValueError, match='"jpg" or "png"'):
        unpack_bundle(path, tmp_path / "other", trust_pickle=True, image="bmp")


def test_an_hndr_bundle_has_poses_and_confidence(tmp_path: Path) -> None:
    record = hndr_record(3, 1)
    bundle = read_bundle(write_bundle(tmp_path, record), trust_pickle=True)
    assert (bundle.kind, bundle.depth_encoding, len(bundle.frames)) == ("hndr", "metric", 3)
    frame = bundle.frames[2]
    np.testing.assert_array_equal(frame.depth, record["depth_2"])
    np.testing.assert_array_equal(frame.valid, record["conf_2"] == 2)
    assert frame.extrinsic is not None
    # The camera's place does not depend on which way its axes point.
    place = -frame.extrinsic[:, :3].T @ frame.extrinsic[:, 3]
    np.testing.assert_allclose(place, record["info_2"]["world_pose"][:3, 3], atol=1e-6)
    # Held upright, below in the picture is the right of the sensor.
    np.testing.assert_allclose(frame.extrinsic[1, :3], record["info_2"]["world_pose"][:3, 0], atol=1e-6)
    np.testing.assert_allclose(frame.extrinsic[2, :3], -record["info_2"]["world_pose"][:3, 2], atol=1e-6)
    with pytest.raises(ValueError, match="depth is metric"):
        read_bundle(tmp_path, trust_pickle=True, depth_encoding="inverse")


def test_an_hndr_bundle_without_some_of_its_parts(tmp_path: Path) -> None:
    record = hndr_record(2, 1)
    whole = read_hndr(write_bundle(tmp_path, record), trust_pickle=True).frames[1]
    del record["info_1"]["world_pose"], record["conf_1"]
    less = read_hndr(write_bundle(tmp_path, record), trust_pickle=True).frames[1]
    assert whole.extrinsic is not None and less.extrinsic is not None
    np.testing.assert_allclose(less.extrinsic, whole.extrinsic, atol=1e-6)
    assert less.valid.all() and not whole.valid.all()
    del record["info_1"]["world_to_camera"]
    with pytest.raises(ValueError, match="info_1 has neither world_pose nor world_to_camera"):
        _ = read_hndr(write_bundle(tmp_path, record), trust_pickle=True).frames[1]
    record = hndr_record(1, 1) | {"conf_0": np.zeros((2, 2), np.uint8)}
    with pytest.raises(ValueError, match=r"confidence is \(2, 2\)"):
        _ = read_hndr(write_bundle(tmp_path, record), trust_pickle=True).frames[0]


def test_the_fixture_is_what_the_facts_say() -> None:
    record = soap_record()
    assert record["rgb_0"]["rgb"].shape == (16, 12, 4) and record["depth_0"]["depth"].shape == (8, 6)
    assert record["depth_0"]["depth"].dtype == np.float16
    assert record["rgb_0"]["intrinsics"][2, 0] == pytest.approx(MATRIX[0, 2])
