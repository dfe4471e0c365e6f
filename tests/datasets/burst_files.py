"""Tiny bundles in the exact formats of the SoaP and HNDR apps, written from the landscape sensor's point of view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WIDE, HIGH = 16, 12  # the colour sensor, on its side
DEPTH_WIDE, DEPTH_HIGH = 8, 6
MATRIX = np.array([[15.0, 0, 7.1], [0, 14.0, 5.8], [0, 0, 1]])  # of the colour sensor


def turn(landscape: np.ndarray) -> np.ndarray:
    """What the apps' converters do to every array: a quarter turn clockwise."""
    return np.ascontiguousarray(np.rot90(landscape, k=-1))


def soap_record(
    colours: int = 42,
    depths: int = 42,
    level: float = 0.4,
    matrix: np.ndarray = MATRIX,
    depth_delay: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """All keys of a bundle. level: about what the depth values are; depth_delay: seconds by which depth is late."""
    rng = np.random.default_rng(seed)
    record: dict[str, Any] = {"num_rgb_frames": colours, "num_depth_frames": depths, "num_raw_frames": 0}
    count = 5 * max(colours, depths)
    record["motion"] = {
        "frame_count": np.arange(count),
        "timestamp": np.arange(count) / 105.0,
        "quaternion": np.tile([0.0, 0, 0, 1], (count, 1)),
        **{key: np.zeros((count, 3)) for key in ("rotation_rate", "roll_pitch_yaw", "acceleration", "gravity")},
        "num_motion_frames": np.array(count),
    }
    for index in range(colours):
        record[f"rgb_{index}"] = {
            "frame_count": index,
            "timestamp": 100 + index / 21,
            "height": HIGH,
            "width": WIDE,
            "intrinsics": matrix.T.astype(np.float32),
            "rgb": turn(rng.integers(0, 256, (HIGH, WIDE, 4), np.uint8)),
        }
    for index in range(depths):
        values = level * rng.uniform(0.9, 1.1, (DEPTH_HIGH, DEPTH_WIDE))
        record[f"depth_{index}"] = {
            "frame_count": index,
            "timestamp": 100 + index * colours / depths / 21 + depth_delay,
            "height": DEPTH_HIGH,
            "width": DEPTH_WIDE,
            "intrinsic_height": 3 * HIGH,  # intrinsics for a frame three times as large as the picture
            "intrinsic_width": 3 * WIDE,
            "intrinsics": (np.diag([3.0, 3, 1]) @ matrix).T.astype(np.float32),
            "lens_distortion": np.zeros(42, np.float32),
            "lens_undistortion": np.zeros(42, np.float32),
            "depth_accuracy": 1,
            "depth": turn(values.astype(np.float16)),
        }
    return record


def write_bundle(folder: Path, record: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "frame_bundle.npz", **record)
    return folder / "frame_bundle.npz"


def hndr_record(frames: int = 4, scale: int = 3) -> dict[str, Any]:
    """A bundle that looks at a slanted wall and a ball before it; depth and colour by slow, plain ray casting."""
    record: dict[str, Any] = {"num_frames": frames}
    wide, high = WIDE * scale, HIGH * scale
    matrix = np.array([[40.0, 0, wide / 2 - 1.2], [0, 41.0, high / 2 + 0.7], [0, 0, 1]])
    for index in range(frames):
        # ARKit: x right and y up in the landscape picture, z towards the viewer.
        angle, roll = 0.10 * index, 0.15 * index
        about_y = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        about_z = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
        pose = np.eye(4)
        pose[:3, :3] = about_y @ about_z
        pose[:3, 3] = [0.12 * index, 0.05 * index**2, -0.04 * index]
        depth = np.zeros((high // 2, wide // 2), np.float32)
        for v in range(high // 2):
            for u in range(wide // 2):
                x = (2 * u + 0.5 - matrix[0, 2]) / matrix[0, 0]
                y = (2 * v + 0.5 - matrix[1, 2]) / matrix[1, 1]
                depth[v, u] = _first_hit(pose[:3, 3], pose[:3, :3] @ np.array([x, -y, -1]))
        confidence = np.full(depth.shape, 2, np.uint8)
        confidence[0], confidence[1] = 0, 1
        record[f"img_{index}"] = turn(np.full((high, wide, 3), 40 * index, np.uint8))
        record[f"depth_{index}"] = turn(depth)
        record[f"conf_{index}"] = turn(confidence)
        record[f"info_{index}"] = {
            "timestamp": index / 60,
            "euler_angles": np.zeros(3, np.float32),
            "world_pose": pose.astype(np.float32),
            "world_to_camera": np.linalg.inv(pose).astype(np.float32),
            "intrinsics": matrix.astype(np.float32),
        }
    return record


def _first_hit(eye: np.ndarray, way: np.ndarray) -> float:
    """Planar depth (way has length 1 along the optical axis) of a wall n.X = -1.5, or of a ball before it."""
    normal = np.array([0.3, -0.2, 1.0])
    wall = (-1.5 - normal @ eye) / (normal @ way)
    centre, radius = np.array([0.1, 0.05, -1.1]), 0.3
    a, b, c = way @ way, way @ (eye - centre), (eye - centre) @ (eye - centre) - radius**2
    ball = (-b - np.sqrt(b * b - a * c)) / a if b * b > a * c else np.inf
    return float(min(wall, ball))
