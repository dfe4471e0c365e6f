"""VGGT as a transformers model: configuration, model, image processor, cameras, losses, targets of adapters."""

from .cameras import (
    check_extrinsics,
    decode_pose,
    encode_pose,
    invert_extrinsics,
    matrix_to_quaternion,
    project,
    quaternion_to_matrix,
    relative_to_first,
    to_image_corner,
    to_pixel_centers,
    unproject,
)
from .configuration_vggt import VggtConfig
from .image_processing_vggt import VggtImageProcessor
from .losses import VggtLoss, VggtLosses
from .modeling_vggt import VggtModel
from .outputs import VggtOutput
from .precision import Precision, choose_precision
from .prediction import VggtPrediction
from .targets import vggt_targets

__all__ = [
    "Precision",
    "VggtConfig",
    "VggtImageProcessor",
    "VggtLoss",
    "VggtLosses",
    "VggtModel",
    "VggtOutput",
    "VggtPrediction",
    "check_extrinsics",
    "choose_precision",
    "decode_pose",
    "encode_pose",
    "invert_extrinsics",
    "matrix_to_quaternion",
    "project",
    "quaternion_to_matrix",
    "relative_to_first",
    "to_image_corner",
    "to_pixel_centers",
    "unproject",
    "vggt_targets",
]
