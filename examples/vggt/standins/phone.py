"""A burst as a phone held upright would have taken it, and stored: a SoaP bundle, frame_bundle.npz.

Source of the format: SoaP (princeton-computational-imaging), as its converter stores it, without raw frames.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_attrsub.scenes.description import Scene
from peft_attrsub.scenes.storage import intrinsic
from peft_attrsub.scenes.view import Renderer
from peft_attrsub.vggt.cameras import to_pixel_centers

RATE = 21.0  # frames per second


def record_burst(
    scene: Scene, renderer: Renderer, seed: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Images, depths and intrinsics for `write_soap_bundle`, one of each per camera of the scene.

    Depth is that of a LiDAR: 320 x 240 points, or half the picture's size where that is less, with 1 % noise.
    """
    sizes = [(min(320, scene.height // 2), scene.height), (min(240, scene.width // 2), scene.width)]
    chosen = np.ix_(*(((np.arange(new) + 0.5) * old / new).astype(int) for new, old in sizes))
    rng = np.random.default_rng([*seed, 0x11DA])
    images, depths, intrinsics = [], [], []
    for index, camera in enumerate(scene.cameras):
        view = renderer.render(index)
        images.append(view.rgb)
        depth = view.depth[chosen]
        depths.append((depth * (1 + 0.01 * rng.normal(size=depth.shape))).astype(np.float32))
        # A scene's cameras count from the image's corner, a calibrated phone's from the center of the first pixel.
        intrinsics.append(to_pixel_centers(intrinsic(camera)))
    return images, depths, intrinsics


def write_soap_bundle(
    folder: Path,
    images: Sequence[np.ndarray],
    depths: Sequence[np.ndarray],
    intrinsics: Sequence[np.ndarray],
    encoding: str = "metric",
) -> Path:
    """Write <folder>/frame_bundle.npz, whole or not at all, and return its path.

    images (H, W, 3) uint8, portrait. depths (h, w) float32 metres, portrait, 0 where there is none. intrinsics (3, 3):
    of the images, integer coordinates at pixel centers. encoding: "metric" or "inverse", how depth is stored.
    """
    if encoding not in ("metric", "inverse"):
        raise ValueError(f'encoding={encoding!r} was given: "metric" or "inverse" is expected.')
    record: dict[str, Any] = {f"num_{kind}_frames": len(images) for kind in ("rgb", "depth")} | {"num_raw_frames": 0}
    for index, (image, depth, matrix) in enumerate(zip(images, depths, intrinsics, strict=True)):
        # The sensor lies on its side: its width is the picture's height.
        width, height = image.shape[:2]
        landscape = np.array(
            [[matrix[1, 1], 0, matrix[1, 2]], [0, matrix[0, 0], height - 1 - matrix[0, 2]], [0, 0, 1]], np.float32
        )
        times = {"frame_count": index, "timestamp": index / RATE}
        alpha = np.full((*image.shape[:2], 1), 255, np.uint8)
        stored = depth
        if encoding == "inverse":
            stored = np.divide(1, depth, out=np.zeros_like(depth), where=depth > 0)
        record[f"rgb_{index}"] = times | {
            "height": height,
            "width": width,
            "intrinsics": landscape.T,
            "rgb": np.concatenate([image, alpha], axis=2),
        }
        record[f"depth_{index}"] = times | {
            "height": depth.shape[1],
            "width": depth.shape[0],
            "intrinsic_height": height,
            "intrinsic_width": width,
            "intrinsics": landscape.T,
            "lens_distortion": np.zeros(42, np.float32),
            "lens_undistortion": np.zeros(42, np.float32),
            "depth_accuracy": 1,
            "depth": stored.astype(np.float16),
        }
    record["motion"] = _motion(len(images))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "frame_bundle.npz"
    beside = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with beside.open("wb") as file:
            np.savez_compressed(file, **record)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _motion(frames: int) -> dict[str, Any]:
    """A gyroscope at rest, five readings a frame."""
    count = 5 * frames
    three = {key: np.zeros((count, 3)) for key in ("rotation_rate", "roll_pitch_yaw", "acceleration")}
    return three | {
        "frame_count": np.arange(count),
        "timestamp": np.arange(count) / (5 * RATE),
        "quaternion": np.tile([0.0, 0, 0, 1], (count, 1)),
        "gravity": np.tile([0.0, -1, 0], (count, 1)),
        "num_motion_frames": np.array(count),
    }


__all__ = ["record_burst", "write_soap_bundle"]
