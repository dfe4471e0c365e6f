"""The aggregator: blocks that attend within a frame and over all frames in turn (VGGT's alternating attention)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from .blocks import Block, rope_tables
from .configuration_vggt import VggtConfig
from .encoder import Encoder

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Aggregator(nn.Module):
    """Images (B, S, 3, H, W) in [0, 1] to tokens (B, S, N, 2 C) of the layers asked for.

    The tokens of a frame are one camera token, the register tokens, then the patches row by row. The first frame
    has camera and register tokens of its own (slot 0), the others share theirs (slot 1): the first frame is the
    world's. Frame and global output of a layer stand side by side on the channels.
    """

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.patch_embed = Encoder(config)
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_register_tokens, dim))
        self.frame_blocks = self._blocks(config)
        self.global_blocks = self._blocks(config)
        self.frozen_encoder = False

    @staticmethod
    def _blocks(config: VggtConfig) -> nn.ModuleList:
        return nn.ModuleList(
            Block(
                config,
                config.embed_dim,
                config.num_heads,
                config.mlp_ratio,
                config.layer_norm_eps,
                config.layer_scale_init,
                qk_norm=True,
            )
            for _ in range(config.depth)
        )

    @property
    def special_tokens(self) -> int:
        """Tokens of a frame before its patches."""
        return 1 + self.config.num_register_tokens

    def forward(self, images: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """Tokens (B, S, N, 2 C) by layer, only of `layers`; nothing else is kept."""
        b, s, _, height, width = images.shape
        h, w = height // self.config.patch_size, width // self.config.patch_size
        patches = self._encode(images)  # [B S, h w, C]
        x = torch.cat([self._special(b, s).to(patches.dtype), patches], 1)
        n = x.shape[1]
        within = self._rope(h, w, images.device)
        across = (within[0].repeat(s, 1), within[1].repeat(s, 1))
        kept: dict[int, Tensor] = {}
        last = max(layers)
        for i, (frame, over) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            x = frame(x.view(b * s, n, -1), within)
            inner = x
            x = over(x.view(b, s * n, -1), across)
            if i in layers:
                kept[i] = torch.cat([inner.view(b, s, n, -1), x.view(b, s, n, -1)], -1)
            if i == last:
                break
        return kept

    def _encode(self, images: Tensor) -> Tensor:
        # Channel by channel with plain numbers: a tensor of them would be copied to the device at every call.
        colours = zip(images.unbind(2), _MEAN, _STD, strict=True)
        frames = torch.stack([(colour - mean) / std for colour, mean, std in colours], 2).flatten(0, 1)
        frames = frames.to(self.patch_embed.patch_embed.proj.weight.dtype)
        # Adapters inside a frozen encoder still learn.
        learns = not self.frozen_encoder or any(p.requires_grad for p in self.patch_embed.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return self.patch_embed(frames)

    def _special(self, b: int, s: int) -> Tensor:
        """Camera and register tokens (B S, 1 + R, C): slot 0 for the first frame of a scene, slot 1 for the rest."""
        both = torch.cat([self.camera_token, self.register_token], 2)  # [1, 2, 1 + R, C]
        first, rest = both[:, :1], both[:, 1:].expand(-1, s - 1, -1, -1)
        return torch.cat([first, rest], 1).expand(b, -1, -1, -1).flatten(0, 1)

    def _rope(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables (N, head dim) for one frame: patches count from 1, the special tokens stand at (0, 0)."""
        rows, columns = torch.arange(1, h + 1, device=device), torch.arange(1, w + 1, device=device)
        patches = torch.stack([rows.repeat_interleave(w), columns.repeat(h)], -1)
        positions = torch.cat([patches.new_zeros(self.special_tokens, 2), patches])
        return rope_tables(positions, self.config.embed_dim // self.config.num_heads, self.config.rope_theta)

    def train(self, mode: bool = True) -> Aggregator:
        """A frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen_encoder:
            self.patch_embed.eval()
        return self
