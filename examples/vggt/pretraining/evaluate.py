"""What a model has learnt, on scenes it has never seen: depth and cameras, beside the answers of one who looks away.

abs_rel: mean over scenes of mean |s d - z| / z over valid pixels of all views, s the scene's ratio of medians.
rotation: median over all pairs of views i < j of all scenes, degrees, of the angle of R'_ij R_ij^T, where
    R_ij = R_j R_i^T and R' is predicted.
translation: the same of the angle between t'_ij and t_ij, t_ij = t_j - R_ij t_i, of pairs at least 1 % of the
    scene's scale apart.
Trivial: depth 1 everywhere, no rotation; a direction at random is off by 90 degrees in the median.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peft_attrsub.evaluation.depth import depth_metrics
from peft_attrsub.vggt import VggtModel
from peft_attrsub.vggt.batch import normalise_scene
from peft_attrsub.vggt.cameras import decode_pose

#: Nearer views, in units of the scene, have no direction from one to the other.
NEAR = 0.01


def measure(model: VggtModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
    """The three measures of the module, float32, each with its trivial answer, and how many scenes they are of."""
    depth: list[float] = []
    flat: list[float] = []
    angles: dict[str, list[Tensor]] = {"rotation": [], "still": [], "translation": []}
    model.eval()
    for batch in batches:
        with torch.inference_mode():
            found = model(batch["images"])
        truth = normalise_scene(batch)
        poses, _ = decode_pose(found.pose_enc, tuple(truth["depths"].shape[-2:]))
        for name, value in relative_errors(poses, truth["extrinsics"]).items():
            angles[name].append(value)
        for one, z, mask in zip(found.depth[..., 0], truth["depths"], truth["point_masks"], strict=True):
            depth.append(abs_rel(one, z, mask))
            flat.append(abs_rel(torch.ones_like(z), z, mask))
    joined = {name: torch.cat(values) for name, values in angles.items()}
    medians = {name: float(values.quantile(0.5)) for name, values in joined.items() if len(values)}
    return {
        "abs_rel": sum(depth) / len(depth),
        "rotation_degrees": medians["rotation"],
        "translation_degrees": medians.get("translation"),
        "trivial": {"abs_rel": sum(flat) / len(flat), "rotation_degrees": medians["still"]},
        "scenes": len(depth),
        "pairs": len(joined["rotation"]),
    }


def abs_rel(prediction: Tensor, truth: Tensor, mask: Tensor) -> float:
    """AbsRel of the views (S, H, W) of one scene after the scale that makes their medians agree."""
    return depth_metrics(prediction, truth, mask, align="median", scope="sequence").abs_rel


def relative_errors(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Angles in degrees over the pairs of views i < j of scenes: extrinsics (B, S, 3, 4) both, results flat.

    rotation, translation: as in the module; still: of the true relative rotation itself.
    """
    first, second = torch.triu_indices(truth.shape[1], truth.shape[1], 1)
    relative = []
    for poses in (predicted.double(), truth.double()):
        r, t = poses[..., :3], poses[..., 3]
        turn = r[:, second] @ r[:, first].transpose(-1, -2)
        relative.append((turn, t[:, second] - (turn @ t[:, first, :, None])[..., 0]))
    (turn, move), (true_turn, true_move) = relative
    apart = true_move.norm(dim=-1) >= NEAR
    cosine = torch.nn.functional.cosine_similarity(move, true_move, dim=-1).clamp(-1, 1)
    return {
        "rotation": angle(turn @ true_turn.transpose(-1, -2)).flatten(),
        "still": angle(true_turn).flatten(),
        "translation": cosine.acos().rad2deg()[apart],
    }


def angle(rotation: Tensor) -> Tensor:
    """Of rotations (..., 3, 3), degrees: 2 asin(|R - I| / (2 sqrt 2)), exact for small ones too."""
    apart = (rotation - torch.eye(3, dtype=rotation.dtype)).flatten(-2).norm(dim=-1)
    return 2 * (apart / 8**0.5).clamp(0, 1).asin().rad2deg()
