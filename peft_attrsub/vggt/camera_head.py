"""The camera head: pose encodings of all frames, refined over a few iterations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Mlp
from .configuration_vggt import VggtConfig

POSE_SIZE = 9


class CameraHead(nn.Module):
    """Camera tokens (B, S, 2 C) to pose encodings (B, S, 9), one per iteration.

    From the raw encoding p of the last iteration (a learnt one at first, never differentiated through), embedded
    as e, shift, scale and gate modulate the tokens t; a trunk of blocks over the frames gives the next step:

        x = trunk(gate * (LN(t) (1 + scale) + shift) + t) ,   p <- p + MLP(LN(x))

    The encoding is translation (3), quaternion xyzw (4), field of view of height and width (2, kept >= 0).
    """

    def __init__(self, config: VggtConfig) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.iterations = config.camera_iterations
        self.trunk = nn.ModuleList(
            Block(config, dim, config.camera_num_heads, 4.0, config.layer_norm_eps, config.layer_scale_init)
            for _ in range(config.camera_depth)
        )
        self.token_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.trunk_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))
        self.embed_pose = nn.Linear(POSE_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.pose_branch = Mlp(dim, dim // 2, POSE_SIZE)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        t = self.token_norm(tokens)
        normed = F.layer_norm(t, t.shape[-1:], eps=1e-6)
        raw: Tensor | None = None
        outputs = []
        for _ in range(self.iterations):
            given = self.empty_pose_tokens.expand(*t.shape[:2], -1) if raw is None else raw.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(given)).chunk(3, -1)
            x = gate * (normed * (1 + scale) + shift) + t
            for block in self.trunk:
                x = block(x)
            step = self.pose_branch(self.trunk_norm(x))
            raw = step if raw is None else raw.detach() + step
            outputs.append(torch.cat([raw[..., :7], F.relu(raw[..., 7:])], -1))
        return outputs
