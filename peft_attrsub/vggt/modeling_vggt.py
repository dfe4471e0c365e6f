"""VggtModel: cameras, depth and points from a few images, as a transformers model.

A clean implementation from the published description; tensor names are those of the checkpoint facebook/VGGT-1B,
so adapters and bases made with the public package fit this model and the other way round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init

from .aggregator import Aggregator
from .blocks import Block, LayerScale
from .camera_head import CameraHead
from .configuration_vggt import HEADS, VggtConfig
from .dpt_head import DptHead
from .encoder import Encoder
from .losses import VggtLoss
from .outputs import VggtOutput
from .precision import parse_dtype
from .shipped import SHIPPED, find_shipped

_TRUTH = ("depths", "extrinsics", "intrinsics", "point_masks", "world_points")
_IGNORED = ("return_dict", "output_attentions", "output_hidden_states")

if TYPE_CHECKING:
    from .prediction import VggtPrediction

#: Parts of the model whose blocks can recompute their activations in the backward pass.
CHECKPOINTED = ("encoder", "frame", "global", "camera")


class VggtPreTrainedModel(PreTrainedModel):
    config_class = VggtConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Their exponentials need the range and the digits.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["camera_head", "depth_head", "point_head"]
    # Nor are they quantised.
    _keep_in_fp32_modules: ClassVar[list[str]] = _keep_in_fp32_modules_strict

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std, tokens = self.config.initializer_range, self.config.token_std
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            init.constant_(module.gamma, module.init)
        elif isinstance(module, Encoder):
            init.trunc_normal_(module.pos_embed, std=std)
            init.normal_(module.cls_token, std=tokens)
            init.normal_(module.register_tokens, std=tokens)
            init.zeros_(module.mask_token)
        elif isinstance(module, Aggregator):
            init.normal_(module.camera_token, std=tokens)
            init.normal_(module.register_token, std=tokens)
        elif isinstance(module, CameraHead):
            init.zeros_(module.empty_pose_tokens)


class VggtModel(VggtPreTrainedModel):
    """VGGT: images of one scene, (B, S, 3, H, W) in [0, 1], to cameras, depth and points (see VggtOutput).

    H and W are multiples of the patch size; `VggtImageProcessor` makes them so. The first image is the world frame.
    """

    def __init__(self, config: VggtConfig) -> None:
        super().__init__(config)
        self.aggregator = Aggregator(config)
        if "camera" in config.heads:
            self.camera_head = CameraHead(config)
        if "depth" in config.heads:
            self.depth_head = DptHead(config, 2, "exp")
        if "point" in config.heads:
            self.point_head = DptHead(config, 4, "inverse_log")
        # Heads of the checkpoint that this model does not have; parts of those that it has are missed.
        absent = "|".join(name for name in (*HEADS, "track") if name not in config.heads)
        self._keys_to_ignore_on_load_unexpected = {rf"^({absent})_head\."}
        self._checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> VggtModel:
        """As transformers does it, from a folder or the Hub; "vggt-mini" is the small trained VGGT of this repository.

        Its weights are stored in bfloat16 and loaded as float32, unless dtype= says otherwise: a torch dtype, or its
        name ("bfloat16", "bf16").
        """
        given = pretrained_model_name_or_path
        kwargs |= {key: parse_dtype(kwargs[key]) for key in ("dtype", "torch_dtype") if key in kwargs}
        model: VggtModel = super().from_pretrained(find_shipped(given), *args, **kwargs)
        # Adapters name their base: a word that holds anywhere, not this machine's folder.
        if given in SHIPPED:
            model.name_or_path = model.config.name_or_path = given
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The encoder: what comes out of it is the input of the blocks that are trained."""
        return self.aggregator.patch_embed

    def forward(
        self,
        pixel_values: Tensor,
        depths: Tensor | None = None,
        extrinsics: Tensor | None = None,
        intrinsics: Tensor | None = None,
        point_masks: Tensor | None = None,
        world_points: Tensor | None = None,
        **kwargs: Any,
    ) -> VggtOutput:
        """Predict; with depths, extrinsics and intrinsics (shapes and units: see `batch`) also the loss of VggtLoss().

        pixel_values: (B, S, 3, H, W) or one scene (S, 3, H, W), in [0, 1]. Arguments that PEFT and transformers hand
        to every model are let through while they are None.
        """
        unused = [name for name, value in kwargs.items() if value is not None and name not in _IGNORED]
        if unused:
            raise TypeError(f"VggtModel does not take {unused[0]!r}: {', '.join(_TRUTH)} are what it learns from.")
        images = self._checked(pixel_values)
        dense = [name for name in ("depth", "point") if name in self.config.heads]
        layers = set(self.config.dpt_layers if dense else ())
        if "camera" in self.config.heads or not dense:
            layers.add(self.config.depth - 1)
        tokens = self.aggregator(images, layers)
        found: dict[str, Any] = {}
        # Whatever the caller's autocast: exponentials and small angles need float32.
        with _no_autocast(images.device.type):
            if "camera" in self.config.heads:
                cameras = tokens[self.config.depth - 1][:, :, 0].to(self.camera_head.token_norm.weight.dtype)
                found["pose_enc_list"] = tuple(self.camera_head(cameras))
                found["pose_enc"] = found["pose_enc_list"][-1]
            for name in dense:
                head = getattr(self, f"{name}_head")
                levels = [tokens[i].to(head.norm.weight.dtype) for i in self.config.dpt_layers]
                value, confidence = head(levels, tuple(images.shape[-2:]))
                what = "depth" if name == "depth" else "world_points"
                found |= {what: value, f"{what}_conf": confidence}
        truth = dict(zip(_TRUTH, (depths, extrinsics, intrinsics, point_masks, world_points), strict=True))
        given = {name: value for name, value in truth.items() if value is not None}
        if given:
            losses = VggtLoss()(VggtOutput(**found), given)
            found |= {"loss": losses.total, "loss_terms": losses.terms}
        # Made at once: a field set later would come last by index.
        return VggtOutput(**found)

    def _checked(self, images: Tensor) -> Tensor:
        if images.dim() == 4:
            images = images[None]
        if images.dim() != 5 or images.shape[2] != 3:
            raise ValueError(
                f"pixel_values has shape {tuple(images.shape)}, expected (scenes, views, 3, H, W) or (views, 3, H, W)."
            )
        if not images.shape[0] or not images.shape[1]:
            raise ValueError(f"pixel_values has shape {tuple(images.shape)}, which holds no view: give one or more.")
        if not images.is_floating_point():
            raise ValueError(
                f"pixel_values has dtype {images.dtype}, expected floats in [0, 1]: divide by 255, or use "
                "VggtImageProcessor."
            )
        height, width = images.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {patch}: make both sides "
                f"multiples of {patch}, for example with VggtImageProcessor."
            )
        return images

    def predict(self, images: Any, **kwargs: Any) -> VggtPrediction:
        """Cameras, depth, points and confidence of one scene, from pictures of any kind; see `prediction.predict`."""
        from .prediction import predict

        return predict(self, images, **kwargs)

    def freeze_encoder(self) -> None:
        """Freeze the DINOv2 encoder: no gradient, eval mode, no activations kept, no checkpointing."""
        self.aggregator.frozen_encoder = True
        self.aggregator.patch_embed.requires_grad_(False).eval()

    def checkpoint_blocks(self, parts: Sequence[str] = CHECKPOINTED) -> None:
        """Choose which blocks recompute their activations while gradient checkpointing is enabled.

        parts: of "encoder", "frame", "global", "camera". Fewer parts are faster and take more memory.
        """
        unknown = [part for part in parts if part not in CHECKPOINTED]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no part with blocks: choose from {', '.join(CHECKPOINTED)}.")
        self._checkpointed = tuple(parts)
        if self._checkpointing:
            self._apply_checkpointed()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        self._checkpointing = enable
        if enable and hasattr(self, "_checkpointed"):
            self._apply_checkpointed()

    def _apply_checkpointed(self) -> None:
        for part, blocks in self._parts().items():
            for block in blocks:
                block.gradient_checkpointing = part in self._checkpointed

    def _parts(self) -> dict[str, list[Block]]:
        a = self.aggregator
        found = {"encoder": a.patch_embed.blocks, "frame": a.frame_blocks, "global": a.global_blocks}
        if "camera" in self.config.heads:
            found["camera"] = self.camera_head.trunk
        return {part: [cast(Block, block) for block in blocks] for part, blocks in found.items()}


def _no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast switched off, where the device has it (the meta device has not)."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


AutoConfig.register("vggt", VggtConfig, exist_ok=True)
AutoModel.register(VggtConfig, VggtModel, exist_ok=True)

__all__ = ["CHECKPOINTED", "VggtModel", "VggtOutput", "VggtPreTrainedModel"]
