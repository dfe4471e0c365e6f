"""Pixel centers and the image's corner, over random cameras; and matrices that are not rotations, at every entry."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from peft_attrsub.evaluation.alignment import Similarity
from peft_attrsub.vggt import cameras as C
from peft_attrsub.vggt.batch import normalise_scene

SEEDS = st.integers(0, 2**31)


def draw(seed: int, views: int = 3) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Extrinsics, intrinsics with the principal point in the middle (integers at pixel centers), depths and size."""
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(1, 40, 2))
    fov = rng.uniform(0.05, math.pi - 0.3, (2, views))
    k = np.zeros((views, 3, 3))
    k[:, 0, 0], k[:, 1, 1] = width / 2 / np.tan(fov[0] / 2), height / 2 / np.tan(fov[1] / 2)
    k[:, 0, 2], k[:, 1, 2], k[:, 2, 2] = (width - 1) / 2, (height - 1) / 2, 1
    rotation = Rotation.random(views, random_state=seed).as_matrix()
    extrinsics = np.concatenate([rotation, rng.normal(size=(views, 3, 1))], -1)
    depths = rng.uniform(0.1, 9, (views, height, width))
    return torch.from_numpy(extrinsics), torch.from_numpy(k), torch.from_numpy(depths), (height, width)


@given(SEEDS)
@settings(max_examples=100)
def test_a_camera_survives_its_encoding(seed: int) -> None:
    extrinsics, k, depths, size = draw(seed)
    e, corner = C.decode_pose(C.encode_pose(extrinsics, k, size), size)
    found, truth = C.unproject(depths, C.to_pixel_centers(corner), e), C.unproject(depths, k, extrinsics)
    assert (found - truth).abs().max() < 1e-11 * truth.abs().max()
    # Taken as it comes, it is off by half a pixel in both directions, in the axes of the camera.
    wrong = C.unproject(depths, corner) - C.unproject(depths, k)
    f = torch.stack([k[:, 0, 0], k[:, 1, 1]], -1)[:, None, None]
    torch.testing.assert_close(wrong[..., :2], -0.5 * depths[..., None] / f, rtol=1e-9, atol=1e-9)


@given(SEEDS, st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=100)
def test_decoding_at_another_size_is_resizing(seed: int, height: int, width: int) -> None:
    """The pose encoding decoded at the size of the truth is the camera of a resized image."""
    from peft_attrsub.datasets.resizing import resize_intrinsics

    extrinsics, k, _, size = draw(seed)
    _, corner = C.decode_pose(C.encode_pose(extrinsics, k, size), (height, width))
    torch.testing.assert_close(
        C.to_pixel_centers(corner), resize_intrinsics(k, size, (height, width)), rtol=1e-9, atol=1e-9
    )


@given(SEEDS)
@settings(max_examples=30)
def test_the_conversions_undo_each_other_and_change_nothing_else(seed: int) -> None:
    _, k, _, (height, width) = draw(seed)
    for given_, close in ((k, torch.testing.assert_close), (k.numpy(), np.testing.assert_allclose)):
        before = given_.clone() if isinstance(given_, Tensor) else given_.copy()
        corner = C.to_image_corner(given_)
        assert type(corner) is type(given_) and corner.dtype == given_.dtype
        close(C.to_pixel_centers(corner), given_)
        close(given_, before)
        assert corner[0, 0, 2] == pytest.approx(width / 2) and corner[0, 1, 2] == pytest.approx(height / 2)
    # The image's corner is half a pixel before the center of the first pixel.
    corner_point = torch.linalg.solve(C.to_image_corner(k), torch.tensor([0.0, 0, 1], dtype=torch.float64))
    pixels, _ = C.project(corner_point[:, None], k)
    torch.testing.assert_close(pixels, torch.full_like(pixels, -0.5))


def test_conversions_differentiate_batch_and_refuse() -> None:
    k = torch.rand(2, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(C.to_pixel_centers, (k,))
    assert torch.equal(torch.func.vmap(C.to_image_corner)(k), C.to_image_corner(k))
    assert C.to_pixel_centers(k.bfloat16()).dtype == torch.float32  # half a pixel of 500 is lost in bfloat16
    assert C.to_pixel_centers(np.eye(3, dtype=int))[0, 2] == -0.5
    with pytest.raises(ValueError, match=r"intrinsics has shape \(3, 4\)"):
        C.to_pixel_centers(torch.eye(3, 4))


# What is not a rotation ---------------------------------------------------------------------------------------------

K, SIZE = torch.eye(3, dtype=torch.float64), (4, 5)
#: Every public function that takes a rotation, on extrinsics (2, 3, 4).
ENTRIES: dict[str, Callable[[Tensor], object]] = {
    "encode_pose": lambda e: C.encode_pose(e, K.expand(2, 3, 3), SIZE),
    "matrix_to_quaternion": lambda e: C.matrix_to_quaternion(e[..., :3]),
    "invert_extrinsics": C.invert_extrinsics,
    "relative_to_first": C.relative_to_first,
    "transform": lambda e: C.transform(torch.zeros(2, 7, 3), e),
    "unproject": lambda e: C.unproject(torch.ones(2, *SIZE), K.expand(2, 3, 3), e),
    "project": lambda e: C.project(torch.ones(2, 7, 3), K.expand(2, 3, 3), e),
    "check_extrinsics": C.check_extrinsics,
    "normalise_scene": lambda e: normalise_scene(
        {"depths": torch.ones(1, 2, *SIZE), "extrinsics": e[None], "intrinsics": K.expand(1, 2, 3, 3)}
    ),
}


def spoiled(kind: str, seed: int) -> Tensor:
    """Two cameras, of which the second is no rigid motion."""
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(2, random_state=seed).as_matrix()
    change = np.eye(3)
    if kind == "reflection":
        axis = rng.normal(size=(3, 1))
        change -= 2 * axis @ axis.T / (axis**2).sum()
    elif kind == "scale":
        change *= rng.choice([0.1, 0.9, 1.01, 30])
    elif kind == "shear":
        change[0, 1] = rng.choice([-1, 1]) * rng.uniform(0.01, 1)
    else:
        change[:] = 0
    rotation[1] = rotation[1] @ change
    return torch.from_numpy(np.concatenate([rotation, rng.normal(size=(2, 3, 1))], -1))


@pytest.mark.parametrize("name", ENTRIES)
@given(kind=st.sampled_from(["reflection", "scale", "shear", "zeros"]), seed=SEEDS, single=st.booleans())
@settings(max_examples=20)
def test_what_is_not_a_rotation_is_refused(name: str, kind: str, seed: int, single: bool) -> None:
    extrinsics = spoiled(kind, seed)
    extrinsics = extrinsics.float() if single else extrinsics
    reason = "is a reflection" if kind == "reflection" else "is not a rotation"
    with pytest.raises(ValueError, match=rf"(extrinsics|matrix)\[(0, )?1\] {reason}.*Expected a rotation R"):
        ENTRIES[name](extrinsics)
    ENTRIES[name](spoiled("reflection", seed)[:1].expand(2, 3, 4).contiguous())  # the good one


def test_rounding_gradients_nan_and_transforms_pass() -> None:
    good = torch.from_numpy(Rotation.random(50, random_state=0).as_matrix())
    extrinsics = torch.cat([good, torch.zeros(50, 3, 1, dtype=torch.float64)], -1)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        C.check_extrinsics(extrinsics.to(dtype))
    C.check_extrinsics(extrinsics[:0])
    assert C.invert_extrinsics(nn.Parameter(extrinsics)).requires_grad
    assert C.relative_to_first(extrinsics * torch.nan).isnan().all()
    # No values can be read here: nothing is checked, and nothing breaks.
    k = K.expand(50, 3, 3).contiguous()
    encode = torch.func.vmap(lambda e, k: C.encode_pose(e, k, SIZE))
    assert torch.equal(encode(extrinsics, k), C.encode_pose(extrinsics, k, SIZE))
    compiled = torch.compile(lambda e: C.encode_pose(e, k, SIZE), fullgraph=True, backend="eager")
    assert torch.equal(compiled(extrinsics), C.encode_pose(extrinsics, k, SIZE))


def test_a_similarity_has_a_rotation() -> None:
    for rotation, words in ((np.diag([1.0, 1, -1]), "determinant is -1"), (2 * np.eye(3), "differs from I by 3")):
        with pytest.raises(ValueError, match=words):
            Similarity(1.0, rotation, np.zeros(3))
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="a scale greater than 0"):
            Similarity(scale, np.eye(3), np.zeros(3))
