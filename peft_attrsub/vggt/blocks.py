"""The transformer block of VGGT: pre-norm attention and MLP with LayerScale; rotary positions where given.

    x <- x + g1 * Attention(LN(x)) ,   x <- x + g2 * MLP(LN(x))

One block serves the encoder, the aggregator (with q/k norm and 2-D rotary positions) and the camera head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rope = tuple[Tensor, Tensor]


class LayerScale(nn.Module):
    """x * gamma, gamma (C)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))), exact GELU."""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling) v for q, k, v (B, H, N, D): output (B, N, H, D) and weights (B, H, N, N)."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Self-attention over (B, N, C) with a fused qkv; the kind of attention is config._attn_implementation."""

    is_causal = False

    def __init__(self, config: Any, dim: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.scaling = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm:
            self.q_norm = nn.LayerNorm(dim // heads, eps=1e-5)
            self.k_norm = nn.LayerNorm(dim // heads, eps=1e-5)
        self.qk_norm = qk_norm
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        # Norms and tables may have widened q and k (autocast); attention wants one dtype.
        q, k = q.to(v.dtype), k.to(v.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out, _ = attend(self, q, k, v, None, scaling=self.scaling, dropout=0.0)
        return self.proj(out.reshape(b, n, c))


class Block(GradientCheckpointingLayer):
    """One transformer block on (B, N, C)."""

    def __init__(
        self,
        config: Any,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
        scale: float = 0.01,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(config, dim, heads, qk_norm)
        self.ls1 = LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, scale)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """cos and sin (N, head_dim), float32, of 2-D rotary positions (N, 2) given as (row, column).

    The first half of a head is turned by the row, the second by the column; within a half of width w the angles
    are p * theta^(-2 j / w), j = 0 .. w/2 - 1, twice over.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    angles = positions.float()[:, :, None] * theta**-exponents  # [N, 2, half / 2]
    angles = torch.cat([angles, angles], -1).flatten(1)  # [N, head_dim]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn x (B, H, N, D) by the tables; float32 inside, whatever the dtype of x."""
    cos, sin = rope
    halves = x.float().unflatten(-1, (2, 2, -1))  # [..., row or column, first or second quarter, D / 4]
    first, second = halves.unbind(-2)
    turned = torch.stack([-second, first], -2).flatten(-3)
    return (x.float() * cos + turned * sin).to(x.dtype)
