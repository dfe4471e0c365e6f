"""The unpacked layout of bursts: which frames, what sizes, which cameras, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_attrsub.datasets.bundles import unpack_bundle
from peft_attrsub.datasets.bursts import BurstDataset

from .burst_files import HIGH, WIDE, hndr_record, soap_record, write_bundle
from .invariants import check_sample


def unpacked(root: Path, name: str = "face", frames: int = 6, image: str = "png") -> Path:
    """root/name, from a bundle of the tests."""
    path = write_bundle(root / f".{name}.bundle", soap_record(frames, frames))
    return unpack_bundle(path, root / name, trust_pickle=True, image=image)


def test_every_second_of_42_frames_is_read(tmp_path: Path) -> None:
    unpacked(tmp_path / "SoaP" / "datasets", "b", 42)
    unpacked(tmp_path / "SoaP" / "datasets", "a", 3)
    dataset = BurstDataset(tmp_path)
    assert dataset.names == ("a", "b")
    sample = dataset[1]
    assert sample.frames == tuple(f"{index:06d}" for index in range(0, 42, 2)) and len(sample) == 21
    assert sample.extrinsics is None and sample.unit == "m" and sample.name == "b"
    assert sample.images.shape == (21, 3, WIDE, HIGH) and sample.depths.shape == (21, WIDE // 2, HIGH // 2)
    check_sample(sample)
    record = soap_record(42, 42)
    np.testing.assert_array_equal(sample.depths[3], record["depth_6"]["depth"].astype(np.float32))
    np.testing.assert_allclose(
        sample.images[3].permute(1, 2, 0), record["rgb_6"]["rgb"][..., :3] / np.float32(255), atol=1e-6
    )
    assert len(BurstDataset(tmp_path, stride=1)[1]) == 42
    assert dataset.read("b", [1, 40]).frames == ("000001", "000040")
    chosen = BurstDataset(tmp_path / "SoaP" / "datasets", {"b": [0, 5]})
    assert chosen.names == ("b",) and chosen[0].frames == ("000000", "000005")


def test_a_burst_with_poses_agrees_with_itself(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / ".bundle", hndr_record())
    unpack_bundle(path, tmp_path / "walk", trust_pickle=True)
    sample = BurstDataset(tmp_path, stride=1)[0]
    assert len(sample) == 4 and sample.extrinsics is not None
    assert bool((~sample.point_masks[:, :, -1]).all())  # no confidence there
    assert bool(sample.point_masks[:, :, :-2].all())
    check_sample(sample)
    assert sample.views([0, 3]).extrinsics is not None


def test_masks_leave_pixels_out(tmp_path: Path) -> None:
    folder = unpacked(tmp_path)
    (folder / "masks").mkdir()
    mask = np.zeros((WIDE // 2, HIGH // 2), bool)
    mask[2:4, 1:3] = True
    np.save(folder / "masks" / "000002.npy", mask)
    sample = BurstDataset(tmp_path)[0]
    assert sample.point_masks.sum((1, 2)).tolist() == [48, 4, 48]
    assert bool((sample.depths > 0).all())
    np.save(folder / "masks" / "000002.npy", mask[1:])
    with pytest.raises(ValueError, match=r"000002\.npy is \(7, 6\), the depth map of its frame \(8, 6\)"):
        _ = BurstDataset(tmp_path)[0]


def test_images_are_made_smaller_and_depth_is_not(tmp_path: Path) -> None:
    unpacked(tmp_path)
    whole, small = BurstDataset(tmp_path, longest=None)[0], BurstDataset(tmp_path, longest=8)[0]
    assert whole.images.shape[-2:] == (WIDE, HIGH) and small.images.shape[-2:] == (8, 6)
    assert BurstDataset(tmp_path, longest=16)[0].images.equal(whole.images)
    means = [sample.images.double().mean() for sample in (whole, small)]
    assert abs(means[0] - means[1]) < 0.02
    assert small.depths.equal(whole.depths) and small.intrinsics.equal(whole.intrinsics)
    for wrong in ({"stride": 0}, {"longest": 0}, {"fov": 180.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BurstDataset(tmp_path, **wrong)  # type: ignore[arg-type]


def test_bursts_that_others_unpacked_need_a_field_of_view(tmp_path: Path) -> None:
    folder = unpacked(tmp_path, image="jpg")
    (folder / "cameras.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cameras\.json does not exist: .* give fov"):
        _ = BurstDataset(tmp_path)[0]
    sample = BurstDataset(tmp_path, fov=90.0)[0]
    expected = [[3, 0, 2.5], [0, 3, 3.5], [0, 0, 1]]
    torch.testing.assert_close(sample.intrinsics[1], torch.tensor(expected, dtype=torch.float64))
    check_sample(sample)


def test_depth_that_is_no_number_counts_as_none(tmp_path: Path) -> None:
    folder = unpacked(tmp_path)
    depth = np.load(folder / "depths" / "000000.npy").astype(np.float64)
    depth[0, :4] = [np.nan, np.inf, -1, 0]
    np.save(folder / "depths" / "000000.npy", depth)
    sample = BurstDataset(tmp_path)[0]
    assert (sample.depths[0] == 0).sum() == 4 and not bool(sample.point_masks[0, 0, :4].any())
    assert sample.depths.dtype == torch.float32


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no sequence that BurstDataset can read"):
        BurstDataset(tmp_path)
    folder = unpacked(tmp_path)
    cameras = json.loads((folder / "cameras.json").read_bytes())

    def rewritten(**changes: object) -> BurstDataset:
        record = json.loads(json.dumps(cameras))
        record["frames"][2] |= changes
        (folder / "cameras.json").write_text(json.dumps(record))
        return BurstDataset(tmp_path)

    assert len(rewritten()[0]) == 3
    with pytest.raises(ValueError, match=r"frame 000002 is damaged"):
        _ = rewritten(intrinsic=[1, 2])[0]
    with pytest.raises(ValueError, match=r"frame 000002 is \(8, 6\).*says \(9, 6\)"):
        _ = rewritten(depth_size=[6, 9])[0]
    stretched = (2 * np.eye(4)[:3]).tolist()
    frames = [frame | {"extrinsic": stretched} for frame in cameras["frames"]]
    (folder / "cameras.json").write_text(json.dumps(cameras | {"frames": frames}))
    with pytest.raises(ValueError, match="no rotation and translation"):
        _ = BurstDataset(tmp_path)[0]
    # Poses of some frames alone are of no use to a sequence.
    assert rewritten(extrinsic=np.eye(4)[:3].tolist())[0].extrinsics is None
    (folder / "cameras.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cameras\.json is damaged"):
        _ = BurstDataset(tmp_path)[0]
    rewritten()
    np.save(folder / "depths" / "000004.npy", np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"depth map of frame 000004 is \(4, 3\)"):
        _ = BurstDataset(tmp_path)[0]
    (folder / "depths" / "000004.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000004\.npy"):
        _ = BurstDataset(tmp_path)[0]
    (folder / "depths" / "000004.npy").unlink()
    with pytest.raises(ValueError, match=r"frame 000004 has a picture but no depth map"):
        BurstDataset(tmp_path).frames("face")
