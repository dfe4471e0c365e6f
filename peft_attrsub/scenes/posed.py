"""What moves from view to view, and where it is: a scene's `motion`, checked and applied to meshes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .description import Scene
from .meshes import Mesh

# Largest entry of R R^T - 1 of a pose that counts as rigid.
RIGID = 1e-6


def moving_ids(scene: Scene) -> list[int]:
    """The object ids that move, ascending; empty for a still scene. ValueError where `motion` is not what the
    description says: one entry per camera, the same ids in each, rigid 4 x 4 matrices."""
    if not scene.motion:
        return []
    names = set(scene.motion[0])
    if len(scene.motion) != len(scene.cameras) or any(set(view) != names for view in scene.motion):
        raise ValueError(
            f"the motion has {len(scene.motion)} views for {len(scene.cameras)} cameras, or not the same objects in "
            "each: make the scene again."
        )
    if not all(name.isdecimal() and 1 <= int(name) <= 65535 and str(int(name)) == name for name in names):
        raise ValueError(f"the motion names the objects {sorted(names)}: object ids from 1 to 65535 are expected.")
    for name in names:
        try:
            poses = np.array([view[name] for view in scene.motion], np.float64)
        except (TypeError, ValueError):
            poses = np.zeros(0)
        if not _rigid(poses):
            raise ValueError(f"a pose of the object {name} is no rotation and translation: make the scene again.")
    return sorted(map(int, names))


def object_poses(scene: Scene, index: int) -> dict[int, NDArray[np.float64]]:
    """Where the moving objects are in view `index`: by object id the rigid transform (4, 4) from the mesh as
    `build_mesh` makes it to the world. Empty for a still scene."""
    if not scene.motion:
        return {}
    return {int(name): np.array(pose, np.float64) for name, pose in scene.motion[index].items()}


def part_of(mesh: Mesh, chosen: np.ndarray) -> Mesh:
    """The triangles `chosen` (T,) bool alone, and the vertices they use."""
    used, corners = np.unique(mesh.triangles[chosen], return_inverse=True)
    return replace(
        mesh,
        vertices=mesh.vertices[used],
        triangles=corners.reshape(-1, 3).astype(np.int32),
        uv=mesh.uv[used],
        normals=mesh.normals[used],
        material=mesh.material[chosen],
        object_id=mesh.object_id[chosen],
    )


def pose_mesh(mesh: Mesh, poses: dict[int, NDArray[np.float64]]) -> Mesh:
    """The mesh with the vertices x and normals n of every object in `poses` at R x + t and R n; the rest is shared
    with the mesh given. ValueError for an object that the mesh does not have."""
    owner = np.zeros(len(mesh.vertices), np.int32)
    owner[mesh.triangles] = np.asarray(mesh.object_id)[:, None]
    vertices, normals = np.array(mesh.vertices, np.float32), np.array(mesh.normals, np.float32)
    for number, pose in poses.items():
        mine = np.flatnonzero(owner == number)
        if not len(mine):
            raise ValueError(f"the object {number} moves, but the mesh has no such object: give the scene's own mesh.")
        vertices[mine] = _turned(pose, vertices[mine]) + pose[:3, 3]
        normals[mine] = _turned(pose, normals[mine])
    return replace(mesh, vertices=vertices, normals=normals)


def _rigid(poses: np.ndarray) -> bool:
    if poses.shape[1:] != (4, 4) or not np.isfinite(poses).all() or (poses[:, 3] != [0, 0, 0, 1]).any():
        return False
    turn = poses[:, :3, :3]
    error = np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max()
    return bool(error <= RIGID and (np.linalg.det(turn) > 0).all())


def _turned(pose: NDArray[np.float64], points: np.ndarray) -> NDArray[np.float64]:
    # One term after the other: a matrix product rounds differently from one processor to the next.
    x, y, z = points.T.astype(np.float64)
    return np.stack([a * x + b * y + c * z for a, b, c in pose[:3, :3].tolist()], axis=1)
