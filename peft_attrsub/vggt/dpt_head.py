"""The dense head (DPT): depth or points, and their confidence, for every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vggt import VggtConfig

_HIDDEN = 32
_POSITION_WEIGHT = 0.1


class ResidualConv(nn.Module):
    """relu(x) + conv2(relu(conv1(relu(x)))): the skip path carries relu(x), as in the checkpoint's training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))


class Fusion(nn.Module):
    """One level of the pyramid: add the level's own map (except at the top), refine, upsample, mix."""

    def __init__(self, dim: int, top: bool = False) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(dim, dim, 1)
        if not top:
            self.resConfUnit1 = ResidualConv(dim)
        self.resConfUnit2 = ResidualConv(dim)

    def forward(self, x: Tensor, own: Tensor | None, size: tuple[int, int]) -> Tensor:
        if own is not None:
            x = x + self.resConfUnit1(own)
        # A 1x1 convolution and interpolation commute; before it, there are four times fewer pixels.
        return _resize(self.out_conv(self.resConfUnit2(x)), size)


class Scratch(nn.Module):
    """The pyramid's convolutions, under the names of the checkpoint."""

    def __init__(self, channels: Sequence[int], dim: int, outputs: int) -> None:
        super().__init__()
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(c, dim, 3, padding=1, bias=False) for c in channels
        )
        self.refinenet1, self.refinenet2, self.refinenet3 = (Fusion(dim) for _ in range(3))
        self.refinenet4 = Fusion(dim, top=True)
        self.output_conv1 = nn.Conv2d(dim, dim // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(dim // 2, _HIDDEN, 3, padding=1), nn.ReLU(), nn.Conv2d(_HIDDEN, outputs, 1)
        )


class DptHead(nn.Module):
    """Tokens of four layers, each (B, S, N, 2 C), to a map (B, S, H, W, outputs - 1) and its confidence (B, S, H, W).

    activation "exp": depth = exp(y); "inverse_log": sign(y) (exp|y| - 1) per coordinate. Confidence = 1 + exp(c).
    """

    def __init__(self, config: VggtConfig, outputs: int, activation: str) -> None:
        super().__init__()
        dim, channels = 2 * config.embed_dim, config.dpt_channels
        self.patch_size, self.chunk, self.activation = config.patch_size, config.dpt_frames_chunk, activation
        self.special_tokens = 1 + config.num_register_tokens
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.projects = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = Scratch(channels, config.dpt_features, outputs)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        b, s = levels[0].shape[:2]
        patches = [level[:, :, self.special_tokens :] for level in levels]  # [B, S, h w, 2 C]
        # The same frames of every scene, one at least: an adapter per scene needs its rows side by side in each chunk.
        step = max(1, self.chunk // b) if self.chunk > 0 else s
        parts = [
            self._frames([p[:, i : i + step].flatten(0, 1) for p in patches], size).unflatten(0, (b, -1))
            for i in range(0, s, step)
        ]
        out = torch.cat(parts, 1).movedim(2, -1)  # [B, S, H, W, outputs]
        value, confidence = out[..., :-1], 1 + out[..., -1].exp()
        if self.activation == "exp":
            return value.exp(), confidence
        return value.sign() * value.abs().expm1(), confidence

    def _frames(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Tokens (F, h w, 2 C) of four levels to raw outputs (F, outputs, H, W)."""
        height, width = size
        h, w = height // self.patch_size, width // self.patch_size
        aspect = width / height
        maps = []
        for tokens, project, resize in zip(levels, self.projects, self.resize_layers, strict=True):
            x = self.norm(tokens).transpose(1, 2).unflatten(2, (h, w))
            maps.append(resize(add_positions(project(x), aspect)))
        net = self.scratch
        l1, l2, l3, l4 = (
            conv(x) for conv, x in zip((net.layer1_rn, net.layer2_rn, net.layer3_rn, net.layer4_rn), maps, strict=True)
        )
        x = net.refinenet4(l4, None, l3.shape[-2:])
        x = net.refinenet3(x, l3, l2.shape[-2:])
        x = net.refinenet2(x, l2, l1.shape[-2:])
        x = net.refinenet1(x, l1, (2 * l1.shape[-2], 2 * l1.shape[-1]))
        x = _resize(net.output_conv1(x), (height, width))
        return net.output_conv2(add_positions(x, aspect))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def add_positions(x: Tensor, aspect: float) -> Tensor:
    """x (F, C, h, w) + 0.1 * PE: half of the channels tell the column, half the row.

    On the axis of n pixels p runs from -span (n-1)/n to span (n-1)/n, span = a / sqrt(a^2 + 1) across and
    1 / sqrt(a^2 + 1) down for aspect a = W / H; each half is [sin(p w_j), cos(p w_j)], w_j = 100^(-j / (C / 4)).
    """
    channels, height, width = x.shape[1:]
    diagonal = (aspect**2 + 1) ** 0.5
    across = _axis(width, aspect / diagonal, channels // 2, x)[:, None, :]  # [C / 2, 1, w]
    down = _axis(height, 1 / diagonal, channels // 2, x)[:, :, None]  # [C / 2, h, 1]
    half = channels // 2
    return torch.cat([x[:, :half] + across, x[:, half:] + down], 1)


def _axis(n: int, span: float, channels: int, like: Tensor) -> Tensor:
    """0.1 * [sin, cos] (channels, n) along one axis, computed in float64 where the device has it."""
    ends = span * (n - 1) / n
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    p = torch.linspace(-ends, ends, n, dtype=wide, device=like.device)
    j = torch.arange(channels // 2, dtype=wide, device=like.device)
    angles = 100.0 ** (-j / (channels / 2))[:, None] * p
    return (_POSITION_WEIGHT * torch.cat([angles.sin(), angles.cos()]).float()).to(like.dtype)
