"""Losses of VGGT: cameras over the iterations, depth and points with confidence; every term by its name.

    total = 5 camera + 1 depth + 1 point ,
    camera = 1 camera_T + 1 camera_R + 0.5 camera_FoV ,
    depth  = depth_conf + depth_reg + depth_grad ,   point likewise, where the model has a point head.

Everything is computed in float32 or better whatever the autocast, and without a host synchronisation but for the
one that looks for non-finite terms. Masks choose predictions before any arithmetic: what lies outside of them (NaN
included) touches neither a loss nor a gradient. Where a rule bounds an error, it bounds finite errors: an infinite
one becomes NaN, so that the term that holds it is found by its name and not hidden behind the bound.
Source: VGGT (arXiv 2503.11651), section on training, and its released recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .batch import check_batch, complete_batch, normalise_scene
from .cameras import at_least_float32, encode_pose
from .gradient_losses import GRADIENT_LOSSES, GradientLoss
from .masked import bounded, masked_mean, trimmed_mean
from .outputs import VggtOutput

#: A scene counts for the cameras if its first view has more valid pixels than this,
#: and a batch counts for depth and points if it has at least as many.
MIN_PIXELS = 100
#: Weight of iteration k of n of the camera head: DECAY ** (n - 1 - k).
DECAY = 0.6
CAMERA_WEIGHTS = {"T": 1.0, "R": 1.0, "FoV": 0.5}
CONFIDENCE_ALPHA = 0.2


def camera_loss(pose_encs: Sequence[Tensor], target: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Terms T, R, FoV: mean |prediction - truth| over views and elements, weighted over the iterations.

        term = (1/n) sum_k 0.6^(n-1-k) mean |p_k - p| ,  k = 0 .. n-1

    pose_encs: the n encodings (B, S, 9) of the camera head; target (B, S, 9); counts (B,) bool: scenes that count.
    Elements of |p - p_k| in T are cut at 100. Quaternions are compared as they are, neither normalised nor with
    their sign fixed. Without a scene that counts, each term is 0, connected to the predictions.
    """
    total = {name: torch.zeros((), device=target.device) for name in CAMERA_WEIGHTS}
    mask = counts[:, None, None].expand(target.shape)
    for k, pose_enc in enumerate(pose_encs):
        weight = DECAY ** (len(pose_encs) - 1 - k) / len(pose_encs)
        error = torch.where(mask, at_least_float32(pose_enc), 0.0) - target
        parts = {"T": bounded(error[..., :3].abs()), "R": error[..., 3:7].abs(), "FoV": error[..., 7:].abs()}
        for name, part in parts.items():
            total[name] = total[name] + weight * masked_mean(part, mask[..., : part.shape[-1]])
    return total


def dense_loss(
    prediction: Tensor,
    confidence: Tensor,
    target: Tensor,
    mask: Tensor,
    gradient: GradientLoss | None = "grad",
    quantile: float | None = 0.98,
) -> dict[str, Tensor]:
    """Terms conf, reg and grad of a depth map (C = 1) or a point map (C = 3).

        e = min(|truth - prediction|, 100) ,  reg = mean e ,  conf = mean (e c - 0.2 log c)

    over valid pixels, the length taken over channels. Each mean leaves out its values from the `quantile` on (see
    `trimmed_mean`; None: none). grad: see `gradient_losses`; None: no such term.
    prediction, target (B, S, H, W, C); confidence c > 0 and mask (B, S, H, W). The batch as a whole must have 100
    valid pixels; with fewer, each term is 0, connected to the prediction.
    """
    mask = mask & (mask.sum() >= MIN_PIXELS)
    prediction = torch.where(mask[..., None], at_least_float32(prediction), 0.0)
    target = torch.where(mask[..., None], at_least_float32(target), 0.0)
    confidence = torch.where(mask, at_least_float32(confidence), 1.0)
    error = bounded(torch.linalg.vector_norm(target - prediction, dim=-1))
    terms = {
        "conf": trimmed_mean(error * confidence - CONFIDENCE_ALPHA * confidence.log(), mask, quantile),
        "reg": trimmed_mean(error, mask, quantile),
    }
    if gradient is not None:
        views = [x.flatten(0, 1) for x in (prediction, target, mask)]
        terms["grad"] = GRADIENT_LOSSES[gradient](*views)
    return terms


def find_nonfinite(terms: Mapping[str, Tensor]) -> str | None:
    """The name of the first term that is not finite, or None. One host synchronisation for all of them."""
    if not terms:
        return None
    finite = torch.stack([term.detach().isfinite().all() for term in terms.values()]).tolist()
    return next((name for name, good in zip(terms, finite, strict=True) if not good), None)


@dataclass
class VggtLosses:
    """total: what to differentiate. terms: each term by name, before its weights. nonfinite: the name of the first
    term that is not finite (then total is 0), or None."""

    total: Tensor
    terms: dict[str, Tensor]
    nonfinite: str | None = None


@dataclass
class VggtLoss:
    """The training loss of VGGT: `VggtLoss()(model(images), batch)` gives VggtLosses (see the module for formulas).

    Args:
        camera_weight, depth_weight, point_weight: 0 leaves a part out, and so does a head that the model has not.
        normalise: bring the batch to the first camera and to unit scale first (`normalise_scene`); False where the
            data set has done so.
        depth_gradient, point_gradient: "grad", "normal" (of point maps only) or None.
        quantile: errors from this quantile on are left out of depth and points; None: none.
        nonfinite: a term that is NaN or infinite is a ValueError ("raise"); or total becomes a zero, connected to
            the predictions, and the result names the term: the caller leaves out the step ("skip"), because the
            gradients can be NaN even so; or nothing is looked for, which saves the synchronisation ("keep").

    The batch: see `batch`. The loss is called inside or outside of autocast, on any device.
    """

    camera_weight: float = 5.0
    depth_weight: float = 1.0
    point_weight: float = 1.0
    normalise: bool = True
    depth_gradient: GradientLoss | None = "grad"
    point_gradient: GradientLoss | None = "normal"
    quantile: float | None = 0.98
    nonfinite: Literal["raise", "skip", "keep"] = "raise"

    def __post_init__(self) -> None:
        if self.nonfinite not in ("raise", "skip", "keep"):
            raise ValueError(f"nonfinite is {self.nonfinite!r}, expected 'raise', 'skip' or 'keep'.")
        if self.depth_gradient not in (None, "grad") or self.point_gradient not in (None, *GRADIENT_LOSSES):
            raise ValueError(
                f"depth_gradient is {self.depth_gradient!r} and point_gradient {self.point_gradient!r}: expected "
                "'grad' or None, and for points also 'normal'."
            )
        if self.quantile is not None and not 0 < self.quantile <= 1:
            raise ValueError(f"quantile is {self.quantile}, expected a number in (0, 1], or None for no trimming.")

    def __call__(self, output: VggtOutput, batch: Mapping[str, Any]) -> VggtLosses:
        predictions = self._used(output)
        check_batch(batch)
        for prediction in predictions:
            _check_prediction(prediction, batch["depths"])
        with torch.autocast(predictions[0].device.type, enabled=False):
            with torch.no_grad():
                truth = normalise_scene(batch) if self.normalise else complete_batch(batch)
            terms, total = self._terms(output, truth)
            name = None if self.nonfinite == "keep" else find_nonfinite(terms)
            if name is not None and self.nonfinite == "raise":
                raise ValueError(
                    f"the term {name!r} of the loss is {terms[name].item()}: look at this batch and at the model's "
                    'output for it, lower the learning rate, or leave out such steps with VggtLoss(nonfinite="skip").'
                )
            if name is not None:
                # nan_to_num stops the NaN of 0 * NaN, in the value and in the gradient.
                total = torch.stack([at_least_float32(p).sum() * 0 for p in predictions]).nan_to_num().sum()
        return VggtLosses(total, terms, name)

    def _used(self, output: VggtOutput) -> list[Tensor]:
        """The predictions that the weights ask for; camera encodings of all iterations one by one."""
        used: list[Tensor] = []
        if self.camera_weight and output.pose_enc_list is not None:
            used.extend(output.pose_enc_list)
        if self.depth_weight and output.depth is not None and output.depth_conf is not None:
            used.extend((output.depth, output.depth_conf))
        if self.point_weight and output.world_points is not None and output.world_points_conf is not None:
            used.extend((output.world_points, output.world_points_conf))
        if not used:
            raise ValueError(
                "the output has nothing that the loss weighs: give the model a head, or the loss a weight."
            )
        return used

    def _terms(self, output: VggtOutput, truth: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        mask = truth["point_masks"]
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=mask.device)
        if self.camera_weight and output.pose_enc_list is not None:
            target = encode_pose(truth["extrinsics"], truth["intrinsics"], tuple(mask.shape[-2:]))
            camera = camera_loss(output.pose_enc_list, target, mask[:, 0].sum((1, 2)) > MIN_PIXELS)
            for name, term in camera.items():
                terms[f"camera_{name}"] = term
                total = total + self.camera_weight * CAMERA_WEIGHTS[name] * term
        maps = (
            ("depth", self.depth_weight, self.depth_gradient, output.depth, output.depth_conf),
            ("point", self.point_weight, self.point_gradient, output.world_points, output.world_points_conf),
        )
        for part, weight, gradient, prediction, confidence in maps:
            if weight and prediction is not None and confidence is not None:
                target = truth["depths"][..., None] if part == "depth" else truth["world_points"]
                dense = dense_loss(prediction, confidence, target, mask, gradient, self.quantile)
                for name, term in dense.items():
                    terms[f"{part}_{name}"] = term
                    total = total + weight * term
        return terms, total


def _check_prediction(prediction: Tensor, depths: Tensor) -> None:
    if prediction.device != depths.device:
        raise ValueError(f"the output is on {prediction.device} and the batch on {depths.device}: move the batch.")
    lead = 2 if prediction.dim() == 3 else 4  # pose encodings are per view, everything else is per pixel
    if prediction.shape[:lead] != depths.shape[:lead]:
        raise ValueError(
            f"the output has a tensor of shape {tuple(prediction.shape)}, which does not fit depths of shape "
            f"{tuple(depths.shape)}: scenes, views and pixels must be those of the images that the model was given."
        )


__all__ = ["VggtLoss", "VggtLosses", "camera_loss", "dense_loss", "find_nonfinite"]
