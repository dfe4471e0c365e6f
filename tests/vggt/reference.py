"""VGGT's parts as the paper's reader would write them down: plain loops, one operation a line, no speed."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotated(x: np.ndarray, row: int, column: int, theta: float) -> np.ndarray:
    """A head vector turned by its place: pairs (j, j + D/4), in one half by the row, in the other by the column."""
    out = np.zeros(len(x))
    half = len(x) // 2
    pairs = half // 2
    for start, place in ((0, row), (half, column)):
        for j in range(pairs):
            angle = place * theta ** (-2 * j / half)
            a, b = x[start + j], x[start + pairs + j]
            out[start + j] = a * math.cos(angle) - b * math.sin(angle)
            out[start + pairs + j] = b * math.cos(angle) + a * math.sin(angle)
    return out


def positions_2d(h: int, w: int, frames: int, special: int = 5) -> list[tuple[int, int]]:
    """(row, column) of every token: special tokens at (0, 0), patches from (1, 1), the same in every frame."""
    return ([(0, 0)] * special + [(i + 1, j + 1) for i in range(h) for j in range(w)]) * frames


def attention(block: nn.Module, x: Tensor, heads: int) -> Tensor:
    """Self-attention (B, N, C) without norms on q, k and without positions, head by head."""
    q, k, v = block.qkv(x).chunk(3, -1)
    size = x.shape[-1] // heads
    outs = []
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        outs.append(scores.softmax(-1) @ v[..., part])
    return block.proj(torch.cat(outs, -1))


def plain_block(block: nn.Module, x: Tensor, heads: int, eps: float = 1e-5) -> Tensor:
    """x + g1 Attention(LN x), then x + g2 MLP(LN x)."""
    c = x.shape[-1:]
    x = x + block.ls1.gamma * attention(
        block.attn, F.layer_norm(x, c, block.norm1.weight, block.norm1.bias, eps), heads
    )
    y = F.layer_norm(x, c, block.norm2.weight, block.norm2.bias, eps)
    y = block.mlp.fc1(y)
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + block.ls2.gamma * block.mlp.fc2(y)


def camera_head(
    head: nn.Module, tokens: Tensor, activate: bool = True, feed_back_activated: bool = False, heads: int = 4
) -> list[Tensor]:
    """The four pose encodings; feed_back_activated is the wrong reading, for comparison."""
    c = tokens.shape[-1:]
    t = F.layer_norm(tokens, c, head.token_norm.weight, head.token_norm.bias, 1e-5)
    total = torch.zeros(*tokens.shape[:2], 9)
    fed = head.empty_pose_tokens.expand_as(total)
    found = []
    for _ in range(4):
        e = head.embed_pose(fed)
        shift, scale, gate = head.poseLN_modulation[1](e * torch.sigmoid(e)).chunk(3, -1)
        x = gate * (F.layer_norm(t, c, eps=1e-6) * (1 + scale) + shift) + t
        for block in head.trunk:
            x = plain_block(block, x, heads)
        x = F.layer_norm(x, c, head.trunk_norm.weight, head.trunk_norm.bias, 1e-5)
        x = head.pose_branch.fc1(x)
        total = total + head.pose_branch.fc2(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
        activated = torch.cat([total[..., :7], total[..., 7:].clamp(min=0)], -1)
        fed = activated if feed_back_activated else total
        found.append(activated if activate else total)
    return found


def plus_positions(x: Tensor, aspect: float) -> Tensor:
    """x (F, C, h, w) + 0.1 PE, pixel by pixel in float64."""
    c, h, w = x.shape[1:]
    diagonal = math.sqrt(aspect**2 + 1)
    table = np.zeros((c, h, w))
    waves = 100.0 ** (-np.arange(c // 4) / (c / 4))
    for i in range(h):
        for j in range(w):
            u, v = aspect / diagonal * (2 * j - (w - 1)) / w, (2 * i - (h - 1)) / h / diagonal
            table[:, i, j] = np.concatenate(
                [np.sin(u * waves), np.cos(u * waves), np.sin(v * waves), np.cos(v * waves)]
            )
    return x + 0.1 * torch.from_numpy(table).float()


def residual(unit: nn.Module, x: Tensor) -> Tensor:
    x = x.clamp(min=0)
    return x + unit.conv2(unit.conv1(x).clamp(min=0))


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def dense_head(head: nn.Module, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Patch tokens (F, h w, 2 C) of four levels to raw outputs; the 1x1 comes after upsampling, as published."""
    h, w = size[0] // 14, size[1] // 14
    aspect = size[1] / size[0]
    maps = []
    for i, tokens in enumerate(levels):
        x = F.layer_norm(tokens, tokens.shape[-1:], head.norm.weight, head.norm.bias, 1e-5)
        x = x.reshape(-1, h, w, tokens.shape[-1]).permute(0, 3, 1, 2)
        x = plus_positions(head.projects[i](x), aspect)
        maps.append(head.resize_layers[i](x))
    net = head.scratch
    l1, l2, l3, l4 = (getattr(net, f"layer{i + 1}_rn")(x) for i, x in enumerate(maps))
    o = net.refinenet4.out_conv(upsample(residual(net.refinenet4.resConfUnit2, l4), l3.shape[-2:]))
    double = (2 * l1.shape[-2], 2 * l1.shape[-1])
    for fusion, own, to in (
        (net.refinenet3, l3, l2.shape[-2:]),
        (net.refinenet2, l2, l1.shape[-2:]),
        (net.refinenet1, l1, double),
    ):
        o = o + residual(fusion.resConfUnit1, own)
        o = fusion.out_conv(upsample(residual(fusion.resConfUnit2, o), to))
    o = plus_positions(upsample(net.output_conv1(o), size), aspect)
    return net.output_conv2(o)
