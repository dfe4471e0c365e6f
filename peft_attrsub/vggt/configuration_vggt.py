"""VggtConfig: every size of a VGGT, and the presets vggt-1b and vggt-mini."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .shipped import find_shipped

HEADS = ("camera", "depth", "point")


class VggtConfig(PreTrainedConfig):
    """Sizes of a VGGT (Visual Geometry Grounded Transformer); the defaults are those of facebook/VGGT-1B.

    Args:
        image_size: side in pixels of the square that the position embedding was made for. Other sizes work.
        patch_size: side of a patch in pixels; heights and widths must be multiples of it.
        embed_dim: width C of the tokens, in the encoder and in the aggregator.
        depth, num_heads, mlp_ratio: of the aggregator, which has `depth` frame and `depth` global blocks.
        num_register_tokens: per frame, in the encoder and in the aggregator.
        rope_theta: base of the 2-D rotary position embedding of the aggregator.
        layer_scale_init: of the aggregator and of the camera head (the encoder's is 1).
        layer_norm_eps: everywhere but in the encoder (1e-6).
        encoder_depth, encoder_num_heads: of the DINOv2 encoder with registers.
        heads: which of "camera", "depth", "point" are built.
        camera_depth, camera_num_heads, camera_iterations: of the camera head, which is 2 C wide.
        dpt_features, dpt_channels: widths of the depth and point heads. dpt_layers: the four aggregator
            layers that they read.
        dpt_frames_chunk: frames that a DPT head works on at a time, one of every scene at least; bounds its memory,
            changes no result.
        initializer_range: standard deviation of new weights. token_std: of new class, camera and register tokens.
    """

    model_type = "vggt"
    attribute_map: ClassVar[dict[str, str]] = {
        "img_size": "image_size",
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
    }

    def __init__(
        self,
        image_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_register_tokens: int = 4,
        rope_theta: float = 100.0,
        layer_scale_init: float = 0.01,
        layer_norm_eps: float = 1e-5,
        encoder_depth: int = 24,
        encoder_num_heads: int = 16,
        heads: tuple[str, ...] | list[str] = ("camera", "depth"),
        camera_depth: int = 4,
        camera_num_heads: int = 16,
        camera_iterations: int = 4,
        dpt_features: int = 256,
        dpt_channels: tuple[int, ...] | list[int] = (256, 512, 1024, 1024),
        dpt_layers: tuple[int, ...] | list[int] | None = None,
        dpt_frames_chunk: int = 8,
        initializer_range: float = 0.02,
        token_std: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        self.image_size = kwargs.pop("img_size", image_size)
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.num_register_tokens = num_register_tokens
        self.rope_theta = rope_theta
        self.layer_scale_init = layer_scale_init
        self.layer_norm_eps = layer_norm_eps
        self.encoder_depth = encoder_depth
        self.encoder_num_heads = encoder_num_heads
        self.heads = list(heads)
        self.camera_depth = camera_depth
        self.camera_num_heads = camera_num_heads
        self.camera_iterations = camera_iterations
        self.dpt_features = dpt_features
        self.dpt_channels = list(dpt_channels)
        self.dpt_layers = _read_layers(depth) if dpt_layers is None else list(dpt_layers)
        self.dpt_frames_chunk = dpt_frames_chunk
        self.initializer_range = initializer_range
        self.token_std = token_std
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for width, heads in (
            (self.embed_dim, self.num_heads),
            (self.embed_dim, self.encoder_num_heads),
            (2 * self.embed_dim, self.camera_num_heads),
        ):
            if width % heads:
                raise ValueError(f"a width of {width} cannot be split over {heads} attention heads.")
        if (self.embed_dim // self.num_heads) % 4:
            raise ValueError(
                f"embed_dim={self.embed_dim} over num_heads={self.num_heads} gives heads of "
                f"{self.embed_dim // self.num_heads}: the 2-D rotary embedding needs a multiple of 4."
            )
        unknown = [name for name in self.heads if name not in HEADS]
        if unknown:
            raise ValueError(f"heads={self.heads!r} names {unknown[0]!r}: choose from {', '.join(HEADS)}.")
        if len(self.dpt_channels) != 4 or len(self.dpt_layers) != 4:
            raise ValueError("dpt_channels and dpt_layers need four numbers each, one per level of the pyramid.")
        if max(self.dpt_layers) >= self.depth or min(self.dpt_layers) < 0:
            raise ValueError(f"dpt_layers={self.dpt_layers} reads layers that depth={self.depth} does not have.")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers does it; "vggt-mini" is the one of this repository."""
        return super().get_config_dict(find_shipped(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> VggtConfig:
        """ "vggt-1b" (facebook/VGGT-1B) or "vggt-mini" (about 5 M parameters), with changes by keyword."""
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}.")
        return cls(**(PRESETS[name] | changes))


def _read_layers(depth: int) -> list[int]:
    """Four layers spread as in VGGT-1B (4, 11, 17, 23 of 24)."""
    return [max(0, round(depth * share) - 1) for share in (5 / 24, 12 / 24, 18 / 24, 1)]


#: Name of a set of sizes -> what differs from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "vggt-1b": {},
    # Made to be trained from scratch: LayerScale and tokens start large enough to be heard at once.
    "vggt-mini": {
        "image_size": 80,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 2,
        "layer_scale_init": 0.2,
        "token_std": 0.02,
        "encoder_depth": 4,
        "encoder_num_heads": 2,
        "camera_depth": 1,
        "camera_num_heads": 4,
        "dpt_features": 48,
        "dpt_channels": (48, 64, 96, 96),
    },
}
