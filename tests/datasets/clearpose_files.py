"""A ClearPose root as it is on disk, of a table plane and two balls whose depth is known by arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

HEIGHT, WIDTH = 48, 64
K = np.array([[60.133, 0, 33.467], [0, 60.133, 24.8], [0, 0, 1.0]])
FRAMES = ("000000", "000100", "000200")
#: Centre, radius and label of the balls: one of glass, one opaque.
BALLS = (((0.05, 0.0, 0.1), 0.1, 5), ((-0.15, 0.1, 0.06), 0.06, 201))
#: Of the struct of a frame, in this order.
FIELDS = (
    "cls_indexes",
    "center",
    "factor_depth",
    "intrinsic_matrix",
    "poses",
    "rotation_translation_matrix",
    "bbox",
)


def camera(index: int, shift: float = 0.0) -> np.ndarray:
    """World from camera (4, 4), OpenCV axes, looking down at the table from a walk around it."""
    angle = 0.25 * index + shift
    eye = np.array([0.6 * np.cos(angle), 0.6 * np.sin(angle), 0.5 + 0.03 * index])
    forward = np.array([0.0, 0.0, 0.05]) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.stack([right, np.cross(forward, right), forward], axis=1), eye
    return pose


def planar_depth(pose: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Depths (3, H, W) in metres of the table and of each ball, inf where missed; and rays (H, W, 3) with z = 1."""
    v, u = np.mgrid[:height, :width]
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(u.shape)], axis=-1)
    way, eye = rays @ pose[:3, :3].T, pose[:3, 3]
    depths = [np.where(way[..., 2] < 0, -eye[2] / way[..., 2], np.inf)]
    for centre, radius, _ in BALLS:
        away = eye - np.array(centre)
        a, b, c = (way**2).sum(-1), way @ away, away @ away - radius**2
        under = b * b - a * c
        depths.append(np.where(under > 0, (-b - np.sqrt(np.maximum(under, 0))) / a, np.inf))
    return np.stack(depths), rays


def pictures(pose: np.ndarray, hole: int = 3) -> dict[str, np.ndarray]:
    """What ClearPose stores of one view. The first `hole` rows were not measured: 0 also in depth_true."""
    depths, _ = planar_depth(pose)
    first = depths.argmin(0)
    label = np.array([0, *(label for _, _, label in BALLS)])[first]
    measured = np.minimum(depths[0], depths[2])  # the camera sees through glass
    measured[:hole] = 0
    true = np.where(label > 0, depths.min(0), measured)
    millimetres = [np.rint(np.where(np.isfinite(d), d, 0) * 1000).astype(np.uint16) for d in (measured, true)]
    color = (127 + 100 * np.sin(depths.min(0)[..., None] * [40, 60, 80])).clip(0, 255)
    return {
        "color": color.astype(np.uint8),
        "depth": millimetres[0],
        "depth_true": millimetres[1],
        "label": label.astype(np.uint8),
        "normal_true": np.full((HEIGHT, WIDTH, 3), 127, np.uint8),
    }


def record(pose: np.ndarray, balls: int = 2, spelling: str = "intrinsic_matrix", factor: int = 1000) -> dict[str, Any]:
    """The struct of one frame. poses are camera from object."""
    world = np.stack([np.vstack([np.c_[np.eye(3), centre], [0, 0, 0, 1]]) for centre, _, _ in BALLS[:balls]])
    poses = (np.linalg.inv(pose) @ world)[:, :3].transpose(1, 2, 0)
    seen = (K @ poses[:, 3]).T
    values = (
        np.array([[label] for _, _, label in BALLS[:balls]], np.uint8),
        seen[:, :2] / seen[:, 2:],
        np.array([[factor]]),
        K,
        poses,
        pose[:3],
        np.zeros((balls, 4)),
    )
    names = [spelling if name == "intrinsic_matrix" else name for name in FIELDS]
    return dict(zip(names, values, strict=True))


def write_pictures(folder: Path, frame: str, made: dict[str, np.ndarray]) -> None:
    for kind, array in made.items():
        Image.fromarray(array).save(folder / f"{frame}-{kind}.png")


def write_scene(
    root: Path, name: str, frames: tuple[str, ...] = FRAMES, shift: float = 0.0, **options: Any
) -> dict[str, dict[str, Any]]:
    """One scene folder; gives what is in its metadata.mat, so that a test can change and store it again."""
    folder = root / name
    folder.mkdir(parents=True)
    records = {}
    for index, frame in enumerate(frames):
        pose = camera(index, shift)
        write_pictures(folder, frame, pictures(pose))
        records[frame] = record(pose, **options)
    scipy.io.savemat(folder / "metadata.mat", records)
    return records


def write_root(root: Path) -> Path:
    """Four scenes of set3 and one of set8: two spellings of K, one object alone, a picture missing."""
    write_scene(root, "set3/scene1")
    write_scene(root, "set3/scene11", balls=1)
    write_scene(root, "set3/scene3", spelling="camera_intrinsics")
    write_scene(root, "set3/scene8", shift=0.4)
    write_scene(root, "set8/scene1", shift=0.8)
    (root / "set8/scene1/000100-color.png").unlink()
    return root
