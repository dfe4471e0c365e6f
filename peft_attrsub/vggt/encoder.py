"""DINOv2 with registers, as VGGT uses it: one image in, its patch tokens out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block
from .configuration_vggt import VggtConfig

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches of p x p pixels to tokens: (B, 3, H, W) -> (B, C, H/p, W/p)."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class Encoder(nn.Module):
    """ViT with a class token, register tokens and learnt positions; LayerScale starts at 1."""

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        dim, grid = config.embed_dim, config.image_size // config.patch_size
        self.grid = grid
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid + 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, dim))
        # Of the pre-training; in the checkpoint, never used here.
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config, dim, config.encoder_num_heads, config.mlp_ratio, eps=_EPS, scale=1.0)
            for _ in range(config.encoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> patch tokens (B, h w, C), row by row."""
        x = self.patch_embed(images)
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        special, positions = self.positions(h, w)
        # Not cast to x: under autocast the stream goes on in the dtype of the parameters.
        x = x + positions
        first = (self.cls_token + special).expand(x.shape[0], -1, -1)
        registers = self.register_tokens.expand(x.shape[0], -1, -1)
        x = torch.cat([first, registers, x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1 + registers.shape[1] :]

    def positions(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Position of the class token (1, 1, C) and of the patches (1, h w, C), interpolated where needed."""
        special, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if (h, w) == (self.grid, self.grid):
            return special, patches
        square = patches.float().reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
        return special, resized.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)
