"""Cameras: pose encodings, quaternions, extrinsics, projection and its inverse.

Conventions of every function here: an extrinsic is [R | t], (..., 3, 4), camera from world, with OpenCV axes (x right,
y down, z forward): x_cam = R X + t. An intrinsic, (..., 3, 3), is in pixels and without skew: only fx, fy, cx, cy
are read. Depth is planar z, in the unit of t. Quaternions are xyzw, the scalar last. Fields of view are radians,
height before width.

Pixel coordinates. Two conventions exist, and they differ by half a pixel:

    pixel centers   the center of the first pixel is (0, 0), the image spans [-1/2, W - 1/2], its middle is (W - 1) / 2
    image corner    the center of the first pixel is (1/2, 1/2), the image spans [0, W], its middle is W / 2

`unproject`, `project`, every `datasets.Sample` and `VggtPrediction` use pixel centers. `decode_pose` gives the image
corner's, as VGGT's published code does; generated scenes and `opencv_cameras.json` hold the image corner's too.
`to_pixel_centers` and `to_image_corner` convert, once, where a camera enters or leaves. Focal lengths, and with them
pose encodings, are the same in both.

All of it is batched, differentiable, and computed elementwise in float32 or better whatever the autocast: a 3 x 3
product in bfloat16 or TF32 would move a point by more than a pixel. Float64 stays float64. Extrinsics and rotations
are checked where that is free: on the CPU, outside of torch.compile. On an accelerator nothing waits for the device;
`check_extrinsics` checks there as well. NaN passes the checks and shows in the result.
Source: VGGT (arXiv 2503.11651) and its released code's conventions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

#: A depth is measured where it is greater than this.
MIN_DEPTH = 1e-8
#: Fields of view are decoded within [this, pi - this] radians, so that a predicted 0 has a finite focal length.
MIN_FOV = 1e-3
#: How far R R^T of a rotation may be from I.
RIGID = 1e-3

Matrices = TypeVar("Matrices", Tensor, np.ndarray)


def at_least_float32(x: Tensor) -> Tensor:
    """x as float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _checked(name: str, x: Tensor, *trailing: int) -> Tensor:
    if x.dim() < len(trailing) or tuple(x.shape[x.dim() - len(trailing) :]) != trailing:
        expected = ", ".join(("...", *map(str, trailing)))
        hint = "; drop the last row" if trailing == (3, 4) and tuple(x.shape[-2:]) == (4, 4) else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({expected}){hint}.")
    return at_least_float32(x)


def check_extrinsics(extrinsics: Tensor, name: str = "extrinsics", tolerance: float = RIGID) -> None:
    """Raise a ValueError unless the first three columns of (..., 3, 3) or (..., 3, 4) are rotations.

    That is max |R R^T - I| <= tolerance and det R > 0; 4 machine epsilons are allowed where they are more than the
    tolerance, as in bfloat16. Reads the values: on an accelerator this waits for the device. NaN passes.
    """
    rotation = extrinsics.detach()[..., :3].to("cpu", torch.float64)
    off = (_times(rotation, rotation.transpose(-1, -2)) - torch.eye(3, dtype=torch.float64)).abs().flatten(-2).amax(-1)
    allowed = max(tolerance, 4 * torch.finfo(extrinsics.dtype).eps) if extrinsics.is_floating_point() else tolerance
    mirrored = torch.linalg.det(rotation.nan_to_num()) < 0
    bad = (off > allowed) | mirrored
    if not bool(bad.any()):
        return
    index = tuple(bad.nonzero()[0].tolist())
    place = f"{name}[{', '.join(map(str, index))}]" if index else name
    reason = (
        "is a reflection (its determinant is negative): one axis has the wrong sign"
        if bool(mirrored[index])
        else f"is not a rotation (R R^T differs from I by {float(off[index]):.2g}): it holds a scale or a shear"
    )
    raise ValueError(
        f"{place} {reason}. Expected a rotation R, with R R^T = I and det R = +1: divide the scale out, or flip the "
        "axis back (OpenCV cameras: x right, y down, z forward)."
    )


def _rigid(name: str, x: Tensor, *trailing: int) -> Tensor:
    """`_checked`, and the rotation in it too where reading the values is free."""
    checked = _checked(name, x, *trailing)
    if _readable(x):
        check_extrinsics(x, name)
    return checked


def _readable(x: Tensor) -> bool:
    """Whether a look at the values costs nothing and breaks nothing: not within torch.compile or vmap, and fake
    tensors have none."""
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_batchedtensor(x)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b for matrices (..., i, j) and (..., j, k), as a sum of products."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def _apply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """matrix (..., 3, 3) times each vector (..., *, 3); the leading dimensions of both are the same ones."""
    x, y, z = _aligned(matrix, vectors, 2).unbind(-1)  # columns
    return x * vectors[..., :1] + y * vectors[..., 1:2] + z * vectors[..., 2:]


def _aligned(x: Tensor, points: Tensor, own: int) -> Tensor:
    """x (L, own dims) with dimensions of 1 after L, so that it broadcasts against points (L, *, 3)."""
    lead, there = tuple(x.shape[: x.dim() - own]), tuple(points.shape[:-1])
    more = len(there) - len(lead)
    if more < 0 or any(a != b and 1 not in (a, b) for a, b in zip(lead, there, strict=False)):
        raise ValueError(
            f"cameras with leading dimensions {lead} do not fit depths or points with leading dimensions {there}: "
            "the latter must begin with the former (or with 1)."
        )
    return x.reshape(*lead, *([1] * more), *x.shape[x.dim() - own :]) if lead else x


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions xyzw (..., 4) of any length; zero gives the identity.

    With q = (x, y, z, w) / |q| and v = (x, y, z):  R = I + 2 w [v]_x + 2 [v]_x^2 ; q and -q are the same rotation.
    """
    q = _checked("quaternion", quaternion, 4)
    q = q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp(min=1e-12)
    x, y, z, w = q.unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternions xyzw (..., 4) with w >= 0 of rotation matrices (..., 3, 3); a ValueError for other matrices.

    The entries of R give all of 4 q q^T. Its row with the largest diagonal, 4 q_i^2 >= 1, divided by 4 |q_i|, is q
    up to sign, and only that row is differentiated: exact at and around half turns too. At w = 0 both signs are
    right; the largest component is the positive one.
    """
    m = _rigid("matrix", matrix, 3, 3)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    xw, yw, zw = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    squares = (1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz, 1 + xx + yy + zz)
    rows = (
        (squares[0], xy, xz, xw),
        (xy, squares[1], yz, yw),
        (xz, yz, squares[2], zw),
        (xw, yw, zw, squares[3]),
    )
    diagonal = torch.stack(squares, -1)
    best = diagonal.argmax(-1, keepdim=True)  # (..., 1)
    table = torch.stack([torch.stack(row, -1) for row in rows], -2)  # (..., 4, 4)
    row = table.gather(-2, best[..., None].expand(*best.shape, 4)).squeeze(-2)
    # The four sum to 4, so the largest is 1 or more, whatever the matrix: nothing divides by zero on a GPU either.
    q = row / (2 * diagonal.gather(-1, best).sqrt())
    return torch.where(q[..., 3:] < 0, -q, q)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, image_size: Sequence[int]) -> Tensor:
    """Pose encodings (..., 9) of extrinsics (..., 3, 4) and intrinsics (..., 3, 3) of images of (H, W) pixels.

    [0:3] t;  [3:7] quaternion xyzw of R, w >= 0;  [7] 2 atan((H/2) / fy);  [8] 2 atan((W/2) / fx), in radians.
    The principal point is not encoded: VGGT takes it to be the middle of the image. Where it is elsewhere, the points
    of an otherwise exact prediction are off by (c - middle) z / f. A ValueError for a matrix that is not a rotation.
    """
    extrinsics, intrinsics = _rigid("extrinsics", extrinsics, 3, 4), _checked("intrinsics", intrinsics, 3, 3)
    height, width = _size(image_size)
    fx, fy = intrinsics[..., 0, 0], intrinsics[..., 1, 1]
    fov_h = 2 * torch.atan2(torch.full_like(fy, height / 2), fy)
    fov_w = 2 * torch.atan2(torch.full_like(fx, width / 2), fx)
    quaternion = matrix_to_quaternion(extrinsics[..., :3])
    return torch.cat([extrinsics[..., 3], quaternion, torch.stack([fov_h, fov_w], -1)], -1)


def decode_pose(pose_enc: Tensor, image_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Extrinsics (..., 3, 4) and intrinsics (..., 3, 3) of pose encodings (..., 9), for images of (H, W) pixels.

    fy = (H/2) / tan(fov_h/2), fx = (W/2) / tan(fov_w/2), principal point (W/2, H/2): coordinates count from the
    image's corner, as in VGGT's published code. Use `to_pixel_centers` before `unproject` or `project`. The
    quaternion may have any length. Fields of view are kept within [MIN_FOV, pi - MIN_FOV].
    """
    pose_enc = _checked("pose_enc", pose_enc, 9)
    height, width = _size(image_size)
    extrinsics = torch.cat([quaternion_to_matrix(pose_enc[..., 3:7]), pose_enc[..., :3, None]], -1)
    tan_h, tan_w = torch.tan(pose_enc[..., 7:9].clamp(MIN_FOV, math.pi - MIN_FOV) / 2).unbind(-1)
    zero, one = torch.zeros_like(tan_h), torch.ones_like(tan_h)
    rows = (
        (width / 2 / tan_w, zero, one * (width / 2)),
        (zero, height / 2 / tan_h, one * (height / 2)),
        (zero, zero, one),
    )
    return extrinsics, torch.stack([torch.stack(row, -1) for row in rows], -2)


def to_pixel_centers(intrinsics: Matrices) -> Matrices:
    """Intrinsics (..., 3, 3) that count from the image's corner, for integers at pixel centers: cx - 1/2, cy - 1/2.

    A tensor for a tensor and an array for an array; the given one is not changed.
    """
    return _moved(intrinsics, -0.5)


def to_image_corner(intrinsics: Matrices) -> Matrices:
    """Intrinsics (..., 3, 3) with integers at pixel centers, for coordinates from the image's corner: cx + 1/2,
    cy + 1/2. The inverse of `to_pixel_centers`."""
    return _moved(intrinsics, 0.5)


def _moved(intrinsics: Any, by: float) -> Any:
    if tuple(intrinsics.shape[-2:]) != (3, 3):
        raise ValueError(f"intrinsics has shape {tuple(intrinsics.shape)}, expected (..., 3, 3).")
    if isinstance(intrinsics, Tensor):
        moved: Any = at_least_float32(intrinsics.clone())
    else:
        moved = np.array(intrinsics, np.result_type(intrinsics, np.float32))
    moved[..., :2, 2] += by
    return moved


def _size(image_size: Sequence[int]) -> tuple[int, int]:
    if len(image_size) != 2 or min(image_size) <= 0:
        raise ValueError(f"image_size is {tuple(image_size)}, expected (height, width) in pixels.")
    return image_size[0], image_size[1]


def invert_extrinsics(extrinsics: Tensor) -> Tensor:
    """World from camera, [R^T | -R^T t], for camera from world, [R | t]; both (..., 3, 4)."""
    extrinsics = _rigid("extrinsics", extrinsics, 3, 4)
    back = extrinsics[..., :3].transpose(-1, -2)
    return torch.cat([back, -_times(back, extrinsics[..., 3:])], -1)


def relative_to_first(extrinsics: Tensor) -> Tensor:
    """E_i inv(E_0): the extrinsics (..., S, 3, 4) of S views, with the camera of the first as the world frame."""
    extrinsics = _rigid("extrinsics", extrinsics, 3, 4)
    if extrinsics.dim() < 3:
        raise ValueError(f"extrinsics has shape {tuple(extrinsics.shape)}, expected (..., views, 3, 4).")
    back = invert_extrinsics(extrinsics[..., :1, :, :])
    rotation = _times(extrinsics[..., :3], back[..., :3])
    return torch.cat([rotation, _times(extrinsics[..., :3], back[..., 3:]) + extrinsics[..., 3:]], -1)


def transform(points: Tensor, extrinsics: Tensor) -> Tensor:
    """R X + t for points (L, *, 3) and extrinsics (L, 3, 4): L are any leading dimensions, * any further ones."""
    points, extrinsics = _checked("points", points, 3), _rigid("extrinsics", extrinsics, 3, 4)
    return _apply(extrinsics[..., :3], points) + _aligned(extrinsics[..., 3], points, 1)


def valid_depth(depth: Tensor) -> Tensor:
    """Where a depth was measured: finite and greater than 1e-8; bool, of the shape of depth."""
    return (depth > MIN_DEPTH) & depth.isfinite()


def unproject(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor | None = None) -> Tensor:
    """Points (..., H, W, 3) of depth maps (..., H, W): camera coordinates, or world's where extrinsics are given.

    x = (u - cx) z / fx,  y = (v - cy) z / fy  with integer pixel coordinates u (column) and v (row), from 0, at the
    centers of the pixels (see the head of this file for cameras that count from the image's corner);
    X_world = R^T (x_cam - t). What lies at an unmeasured depth means nothing: see `valid_depth`.
    """
    if depth.dim() < 2:
        raise ValueError(f"depth has shape {tuple(depth.shape)}, expected (..., H, W).")
    z, k = at_least_float32(depth), _checked("intrinsics", intrinsics, 3, 3)
    u = torch.arange(z.shape[-1], device=z.device, dtype=z.dtype)
    v = torch.arange(z.shape[-2], device=z.device, dtype=z.dtype)[:, None]
    k = _aligned(k, z[..., None], 2)
    x = (u - k[..., 0, 2]) * z / k[..., 0, 0]
    y = (v - k[..., 1, 2]) * z / k[..., 1, 1]
    points = torch.stack(torch.broadcast_tensors(x, y, z), -1)
    return points if extrinsics is None else transform(points, invert_extrinsics(extrinsics))


def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pixels (L, *, 2) as (u, v) and planar depths z (L, *) of points (L, *, 3) seen by cameras (L, ...).

    u = fx x / z + cx,  v = fy y / z + cy  for (x, y, z) = R X + t, or the points themselves without extrinsics.
    Integer u and v are the centers of pixels. Leading dimensions L of the cameras are those of the points; * are any
    further ones. A point is seen only where z > 0. Within 1e-8 of z = 0 that distance divides, with the sign
    of z, so that all stays finite.
    """
    points, k = _checked("points", points, 3), _checked("intrinsics", intrinsics, 3, 3)
    if extrinsics is not None:
        points = transform(points, extrinsics)
    k = _aligned(k, points, 2)
    x, y, z = points.unbind(-1)
    safe = torch.where(z.abs() < MIN_DEPTH, torch.where(z < 0, -MIN_DEPTH, MIN_DEPTH).to(z.dtype), z)
    u = k[..., 0, 0] * (x / safe) + k[..., 0, 2]
    v = k[..., 1, 1] * (y / safe) + k[..., 1, 2]
    return torch.stack([u, v], -1), z


__all__ = [
    "check_extrinsics",
    "decode_pose",
    "encode_pose",
    "invert_extrinsics",
    "matrix_to_quaternion",
    "project",
    "quaternion_to_matrix",
    "relative_to_first",
    "to_image_corner",
    "to_pixel_centers",
    "transform",
    "unproject",
    "valid_depth",
]
