"""Cameras: pose encodings, quaternions against SciPy, projection, and all of it in float32 and through autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from peft_attrsub.vggt import cameras as C

SIZE = (42, 56)  # height, width
ARRAY = NDArray[np.float64]


def random_extrinsics(*shape: int, seed: int = 0) -> Tensor:
    count = math.prod(shape)
    rotation = Rotation.random(count, random_state=seed).as_matrix()
    translation = np.random.default_rng(seed).normal(size=(count, 3, 1))
    return torch.from_numpy(np.concatenate([rotation, translation], -1)).reshape(*shape, 3, 4)


def random_intrinsics(*shape: int, seed: int = 0, centred: bool = False) -> Tensor:
    rng = np.random.default_rng(seed)
    k = np.zeros((*shape, 3, 3))
    k[..., 0, 0], k[..., 1, 1] = rng.uniform(30, 90, shape), rng.uniform(30, 90, shape)
    shift = 0 if centred else rng.normal(size=(2, *shape))
    k[..., 0, 2], k[..., 1, 2] = np.array([SIZE[1] / 2, SIZE[0] / 2]).reshape(2, *[1] * len(shape)) + shift
    k[..., 2, 2] = 1
    return torch.from_numpy(k)


def four(extrinsic: ARRAY) -> ARRAY:
    """[R | t] as a 4 x 4 matrix."""
    return np.concatenate([extrinsic, [[0.0, 0.0, 0.0, 1.0]]])


def half_turns() -> ARRAY:
    """Rotations by exactly 180 degrees, about the axes, their diagonals, and at random: 2 n n^T - I."""
    axes = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, -1], [0, 1, 1], [1, 1, 1], [-1, 1, 1]]
    n = np.concatenate([np.array(axes, float), np.random.default_rng(1).normal(size=(50, 3))])
    n /= np.linalg.norm(n, axis=-1, keepdims=True)
    return 2 * n[:, :, None] * n[:, None, :] - np.eye(3)


def same_up_to_sign(found: Tensor, expected: ARRAY, tolerance: float) -> bool:
    q = found.double().numpy()
    return bool(np.minimum(np.abs(q - expected).max(-1), np.abs(q + expected).max(-1)).max() < tolerance)


# Quaternions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_matrix_to_quaternion_is_scipys(dtype: torch.dtype, tolerance: float) -> None:
    rotation = Rotation.random(2000, random_state=3)
    q = C.matrix_to_quaternion(torch.from_numpy(rotation.as_matrix()).to(dtype))
    assert q.dtype == dtype
    assert (q[:, 3] >= 0).all()
    assert np.abs(q.numpy() - rotation.as_quat(canonical=True)).max() < tolerance
    # All four branches were taken: each component is the largest somewhere.
    assert set(q.abs().argmax(-1).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_half_turns(dtype: torch.dtype, tolerance: float) -> None:
    turns = half_turns()
    q = C.matrix_to_quaternion(torch.from_numpy(turns).to(dtype))
    assert same_up_to_sign(q, Rotation.from_matrix(turns).as_quat(), tolerance)
    assert np.abs(C.quaternion_to_matrix(q).numpy() - turns).max() < 4 * tolerance


@pytest.mark.parametrize("angle", [1e-7, 1e-4, math.pi - 1e-4, math.pi - 1e-7])
def test_small_turns_and_nearly_half_turns_in_float32(angle: float) -> None:
    axes = np.random.default_rng(2).normal(size=(200, 3))
    rotation = Rotation.from_rotvec(angle * axes / np.linalg.norm(axes, axis=-1, keepdims=True))
    q = C.matrix_to_quaternion(torch.from_numpy(rotation.as_matrix()).float())
    assert same_up_to_sign(q, rotation.as_quat(), 1e-6)


def test_the_identity_is_exact() -> None:
    assert C.matrix_to_quaternion(torch.eye(3)).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert torch.equal(C.quaternion_to_matrix(torch.tensor([0.0, 0.0, 0.0, 1.0])), torch.eye(3))


def test_quaternion_to_matrix_is_scipys_for_any_length_and_sign() -> None:
    q = np.random.default_rng(0).normal(size=(500, 4)) * np.geomspace(1e-3, 1e3, 500)[:, None]
    expected = Rotation.from_quat(q).as_matrix()
    assert np.abs(C.quaternion_to_matrix(torch.from_numpy(q)).numpy() - expected).max() < 1e-13
    assert np.abs(C.quaternion_to_matrix(torch.from_numpy(-q).float()).numpy() - expected).max() < 2e-6


def test_the_zero_quaternion_is_the_identity_and_has_a_finite_gradient() -> None:
    q = torch.zeros(2, 4, requires_grad=True)
    matrix = C.quaternion_to_matrix(q)
    assert torch.equal(matrix, torch.eye(3).expand(2, 3, 3))
    matrix.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: sum(x * x for x in q) > 1e-3))
def test_quaternions_come_back(q: list[float]) -> None:
    expected = np.array(q) / np.linalg.norm(q)
    found = C.matrix_to_quaternion(C.quaternion_to_matrix(torch.tensor(q, dtype=torch.float64)))
    assert same_up_to_sign(found[None], expected[None], 1e-7)
    assert found[3] >= 0


def test_quaternion_gradients_are_the_numerical_ones_in_every_branch() -> None:
    w = np.eye(4) + 0.1 * np.random.default_rng(0).normal(size=(4, 4))  # one for each branch
    matrices = torch.from_numpy(Rotation.from_quat(w).as_matrix()).requires_grad_()
    assert torch.autograd.gradcheck(C.matrix_to_quaternion, (matrices,))
    assert torch.autograd.gradcheck(C.quaternion_to_matrix, (torch.from_numpy(w).requires_grad_(),))


def test_quaternion_gradients_are_finite_at_half_turns_and_at_the_identity() -> None:
    matrices = torch.from_numpy(np.concatenate([half_turns(), np.eye(3)[None]])).float().requires_grad_()
    C.matrix_to_quaternion(matrices).square().sum().backward()
    assert matrices.grad is not None and matrices.grad.isfinite().all() and matrices.grad.any()


# Pose encodings -----------------------------------------------------------------------------------------------------


def test_encode_pose_element_by_element() -> None:
    extrinsics, intrinsics = random_extrinsics(2, 3), random_intrinsics(2, 3)
    found = C.encode_pose(extrinsics, intrinsics, SIZE).numpy()
    assert found.shape == (2, 3, 9)
    for b in range(2):
        for s in range(3):
            e, k = extrinsics[b, s].numpy(), intrinsics[b, s].numpy()
            quaternion = Rotation.from_matrix(e[:, :3]).as_quat(canonical=True)
            fov = [2 * math.atan(SIZE[0] / 2 / k[1, 1]), 2 * math.atan(SIZE[1] / 2 / k[0, 0])]
            np.testing.assert_allclose(found[b, s], [*e[:, 3], *quaternion, *fov], atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_poses_come_back(dtype: torch.dtype, tolerance: float) -> None:
    extrinsics, intrinsics = random_extrinsics(4, 5).to(dtype), random_intrinsics(4, 5, centred=True).to(dtype)
    e, k = C.decode_pose(C.encode_pose(extrinsics, intrinsics, SIZE), SIZE)
    assert (e - extrinsics).abs().max() < tolerance
    assert ((k - intrinsics).abs() / intrinsics.abs().clamp(min=1)).max() < tolerance


def test_the_principal_point_comes_back_as_the_centre() -> None:
    _, k = C.decode_pose(C.encode_pose(random_extrinsics(3), random_intrinsics(3), SIZE), SIZE)
    assert k[:, :2, 2].tolist() == [[SIZE[1] / 2, SIZE[0] / 2]] * 3
    assert k[:, 2].tolist() == [[0.0, 0.0, 1.0]] * 3


def test_a_decoded_quaternion_may_have_any_length_and_sign() -> None:
    encoded = C.encode_pose(random_extrinsics(3), random_intrinsics(3), SIZE)
    scaled = encoded.clone()
    scaled[:, 3:7] *= -2.5
    for ours, theirs in zip(C.decode_pose(scaled, SIZE), C.decode_pose(encoded, SIZE), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_decoding_an_encoding_of_zeros_is_finite() -> None:
    """What a camera head gives before it was trained: its fields of view pass through a ReLU."""
    encoded = torch.zeros(2, 9, requires_grad=True)
    extrinsics, intrinsics = C.decode_pose(encoded, SIZE)
    (extrinsics.sum() + intrinsics.sum()).backward()
    assert extrinsics.isfinite().all() and intrinsics.isfinite().all()
    assert encoded.grad is not None and encoded.grad.isfinite().all()
    assert intrinsics[0, 0, 0] > intrinsics.new_tensor(SIZE[1])


def test_pose_gradients_are_the_numerical_ones() -> None:
    inputs = random_extrinsics(3).requires_grad_(), random_intrinsics(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda e, k: C.encode_pose(e, k, SIZE), inputs)
    encoded = C.encode_pose(*inputs, SIZE).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: C.decode_pose(x, SIZE), (encoded,))


# Extrinsics ---------------------------------------------------------------------------------------------------------


def test_invert_extrinsics() -> None:
    extrinsics = random_extrinsics(2, 3)
    inverse = C.invert_extrinsics(extrinsics)
    for e, i in zip(extrinsics.reshape(-1, 3, 4).numpy(), inverse.reshape(-1, 3, 4).numpy(), strict=True):
        np.testing.assert_allclose(i, np.linalg.inv(four(e))[:3], atol=1e-14)


def test_relative_to_first() -> None:
    extrinsics = random_extrinsics(2, 4)
    found = C.relative_to_first(extrinsics)
    for scene, ours in zip(extrinsics.numpy(), found.numpy(), strict=True):
        for e, o in zip(scene, ours, strict=True):
            np.testing.assert_allclose(o, (four(e) @ np.linalg.inv(four(scene[0])))[:3], atol=1e-14)
    assert torch.allclose(found[:, 0], torch.eye(3, 4, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(C.relative_to_first(extrinsics[0]), found[0])


# Projection ---------------------------------------------------------------------------------------------------------


def test_unproject_pixel_by_pixel() -> None:
    depth = torch.rand(2, 3, 5, 4, dtype=torch.float64) + 0.5
    extrinsics, intrinsics = random_extrinsics(2, 3), random_intrinsics(2, 3)
    camera, world = C.unproject(depth, intrinsics), C.unproject(depth, intrinsics, extrinsics)
    assert camera.shape == world.shape == (2, 3, 5, 4, 3)
    for b, s, v, u in np.ndindex(2, 3, 5, 4):
        z, k, e = depth[b, s, v, u].item(), intrinsics[b, s].numpy(), extrinsics[b, s].numpy()
        x = np.array([(u - k[0, 2]) * z / k[0, 0], (v - k[1, 2]) * z / k[1, 1], z])
        np.testing.assert_allclose(camera[b, s, v, u].numpy(), x, atol=1e-14)
        np.testing.assert_allclose(world[b, s, v, u].numpy(), e[:, :3].T @ (x - e[:, 3]), atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_pixels_come_back(dtype: torch.dtype, tolerance: float) -> None:
    depth = torch.rand(2, 3, *SIZE, dtype=dtype) + 0.5
    extrinsics, intrinsics = random_extrinsics(2, 3).to(dtype), random_intrinsics(2, 3).to(dtype)
    pixels, z = C.project(C.unproject(depth, intrinsics, extrinsics), intrinsics, extrinsics)
    assert pixels.dtype == z.dtype == dtype
    v, u = torch.meshgrid(*(torch.arange(n, dtype=dtype) for n in SIZE), indexing="ij")
    assert (pixels - torch.stack([u, v], -1)).abs().max() < tolerance
    assert (z - depth).abs().max() < tolerance


def test_frame_a_reprojected_into_frame_b_shows_the_same_surface() -> None:
    """Two views of a plane of which depth and colour are known in closed form: colours must agree where a lands."""
    k = random_intrinsics(2, seed=4)
    tilt = Rotation.from_euler("yxz", [[0, 0, 0], [12, -7, 20]], degrees=True).as_matrix()
    extrinsics = torch.from_numpy(np.concatenate([tilt, [[[0.0], [0], [0]], [[-0.5], [0.2], [0.3]]]], -1))
    normal, distance = np.array([0.2, -0.1, 1.0]), 3.0  # the plane: normal . X = distance

    def depth_of_plane(view: int) -> ARRAY:
        e, depth = extrinsics[view].numpy(), np.zeros(SIZE)
        for v, u in np.ndindex(*SIZE):
            ray = np.linalg.inv(k[view].numpy()) @ [u, v, 1]  # z = 1 in the camera
            depth[v, u] = (distance + normal @ e[:, :3].T @ e[:, 3]) / (normal @ e[:, :3].T @ ray)
        return depth

    a, b = (torch.from_numpy(depth_of_plane(view)) for view in (0, 1))
    pixels, z = C.project(C.unproject(a, k[0], extrinsics[0]), k[1], extrinsics[1])
    inside = (pixels >= 0).all(-1) & (pixels[..., 0] <= SIZE[1] - 1) & (pixels[..., 1] <= SIZE[0] - 1)
    assert inside.sum() > 200
    # Inverse depth of a plane is affine in the pixel: bilinear interpolation of b's is exact.
    grid = 2 * pixels / torch.tensor([SIZE[1] - 1, SIZE[0] - 1]) - 1
    seen = torch.nn.functional.grid_sample(1 / b[None, None], grid[None], align_corners=True)[0, 0]
    assert (1 / seen - z)[inside].abs().max() < 1e-12
    np.testing.assert_allclose(C.unproject(b, k[1], extrinsics[1]).numpy() @ normal, distance, atol=1e-12)


def test_points_may_have_any_further_dimensions() -> None:
    extrinsics, intrinsics = random_extrinsics(2, 3), random_intrinsics(2, 3)
    points = torch.randn(2, 3, 7, 3, dtype=torch.float64) + torch.tensor([0, 0, 9.0])
    pixels, z = C.project(points, intrinsics, extrinsics)
    assert pixels.shape == (2, 3, 7, 2) and z.shape == (2, 3, 7)
    for b, s, n in np.ndindex(2, 3, 7):
        x = extrinsics[b, s, :, :3] @ points[b, s, n] + extrinsics[b, s, :, 3]
        p = intrinsics[b, s] @ x
        assert torch.allclose(pixels[b, s, n], p[:2] / p[2]) and torch.isclose(z[b, s, n], x[2])
    one = C.project(points[0, 0], intrinsics[0, 0], extrinsics[0, 0])
    assert torch.equal(one[0], pixels[0, 0]) and torch.equal(one[1], z[0, 0])
    assert torch.equal(C.project(points, intrinsics[0, 0])[1], points[..., 2])
    # One set of points, seen by every camera.
    assert C.project(points[:1, :1], intrinsics, extrinsics)[0].shape == (2, 3, 7, 2)


def test_projection_of_points_at_and_behind_the_camera_is_finite() -> None:
    points = torch.tensor([[1.0, 2, 0], [0, 0, 0], [1, 1, -2], [1, 0, 1e-12], [1, 0, -1e-12]], requires_grad=True)
    pixels, z = C.project(points, random_intrinsics().float())
    pixels.sum().backward()
    assert pixels.isfinite().all() and points.grad is not None and points.grad.isfinite().all()
    assert z.tolist() == points[:, 2].tolist()


def test_valid_depth() -> None:
    depth = torch.tensor([0.0, -1.0, 1e-9, 1e-7, 5.0, math.nan, math.inf])
    assert C.valid_depth(depth).tolist() == [False, False, False, True, True, False, False]


def test_projection_gradients_are_the_numerical_ones() -> None:
    depth = (torch.rand(2, 3, 4, dtype=torch.float64) + 1).requires_grad_()
    e, k = random_extrinsics(2).requires_grad_(), random_intrinsics(2).requires_grad_()
    assert torch.autograd.gradcheck(C.unproject, (depth, k, e))
    points = (torch.rand(2, 5, 3, dtype=torch.float64) + 9).requires_grad_()
    assert torch.autograd.gradcheck(C.project, (points, k, e))


# Precision, autocast, refusals --------------------------------------------------------------------------------------


def everything(extrinsics: Tensor, intrinsics: Tensor, depth: Tensor) -> list[Tensor]:
    encoded = C.encode_pose(extrinsics, intrinsics, SIZE)
    points = C.unproject(depth, intrinsics, extrinsics)
    relative = C.relative_to_first(extrinsics)
    return [encoded, *C.decode_pose(encoded, SIZE), points, relative, *C.project(points, intrinsics, extrinsics)]


def test_autocast_changes_nothing() -> None:
    inputs = random_extrinsics(2, 3).float(), random_intrinsics(2, 3).float(), torch.rand(2, 3, *SIZE) + 0.5
    expected = everything(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(*inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_half_precision_inputs_are_computed_in_float32() -> None:
    turns = Rotation.from_euler("yxz", [[90, 0, 0], [0, 180, 0], [90, 90, 0]], degrees=True).as_matrix().round()
    extrinsics = random_extrinsics(3)
    extrinsics[..., :3] = torch.from_numpy(turns)  # rotations that bfloat16 holds exactly
    inputs = extrinsics.bfloat16(), random_intrinsics(3).bfloat16(), torch.rand(3, *SIZE).bfloat16()
    for ours, theirs in zip(everything(*inputs), everything(*(x.float() for x in inputs)), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@settings(max_examples=20)
@given(st.integers(0, 3), st.integers(0, 3))
def test_leading_dimensions_are_free(first: int, second: int) -> None:
    """None at all, none in number (an empty batch), or several."""
    lead = (first, second) if second else (first,)
    encoded = C.encode_pose(torch.eye(3, 4).expand(*lead, 3, 4), torch.eye(3).expand(*lead, 3, 3), SIZE)
    assert encoded.shape == (*lead, 9)
    assert C.decode_pose(encoded, SIZE)[0].shape == (*lead, 3, 4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: C.encode_pose(torch.eye(4), torch.eye(3), SIZE), r"\(4, 4\).*drop the last row"),
        (lambda: C.encode_pose(torch.eye(3, 4), torch.eye(4), SIZE), r"intrinsics has shape \(4, 4\)"),
        (lambda: C.decode_pose(torch.zeros(2, 8), SIZE), r"pose_enc has shape \(2, 8\), expected \(\.\.\., 9\)"),
        (lambda: C.decode_pose(torch.zeros(9), (42, 56, 3)), r"expected \(height, width\)"),
        (lambda: C.decode_pose(torch.zeros(9), (0, 56)), r"image_size is \(0, 56\)"),
        (lambda: C.quaternion_to_matrix(torch.zeros(3)), "quaternion has shape"),
        (lambda: C.matrix_to_quaternion(torch.zeros(3)), "matrix has shape"),
        (lambda: C.relative_to_first(torch.eye(3, 4)), "views, 3, 4"),
        (lambda: C.unproject(torch.ones(5), torch.eye(3)), r"expected \(\.\.\., H, W\)"),
        (lambda: C.unproject(torch.ones(2, 4, 5), torch.eye(3).expand(3, 3, 3)), "do not fit"),
        (lambda: C.project(torch.ones(5, 2), torch.eye(3)), "points has shape"),
        (lambda: C.project(torch.ones(4, 3), torch.eye(3).expand(4, 6, 3, 3)), "do not fit"),
    ],
)
def test_wrong_shapes_are_refused(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()  # type: ignore[operator]
