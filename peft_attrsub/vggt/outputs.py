"""What a forward pass of VGGT gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class VggtOutput(ModelOutput):
    """What a forward pass gives; what a missing head would give is None.

    pose_enc (B, S, 9): translation (3) of the camera-from-world extrinsic (OpenCV axes, world = first camera),
        quaternion xyzw (4), fields of view of height and width in radians (2).
    pose_enc_list: the same after each iteration of the camera head; the last is pose_enc.
    depth (B, S, H, W, 1): planar z in the scene's own unit. depth_conf (B, S, H, W): 1 or more.
    world_points (B, S, H, W, 3): in the frame of the first camera. world_points_conf (B, S, H, W).
    loss, loss_terms: with depths and cameras to learn from only: the training loss and its terms by name (see
        `losses`).
    """

    loss: Tensor | None = None
    pose_enc: Tensor | None = None
    pose_enc_list: tuple[Tensor, ...] | None = None
    depth: Tensor | None = None
    depth_conf: Tensor | None = None
    world_points: Tensor | None = None
    world_points_conf: Tensor | None = None
    loss_terms: dict[str, Tensor] | None = None
