"""What only pre-training asks of the model, with small heads of its own that no checkpoint of the model holds.

VGGT's losses alone need far longer until views are matched: the answer "every camera is the first" is a good one for
long. Two hints say what to look for. P is a patch (i, p) of view i, and M(P) the patches that show the point at its
middle in the other views, by the true depth and cameras, not hidden.

    match  = - mean over P and (j, q) in M(P) of log softmax_q'( <f_ip, f_jq'> / 0.1 )[q]
             f: the encoder's patch tokens through a linear map, of length 1; q' over the patches of view j
    attend = - mean over P with M(P) not empty of log sum over Q in M(P) of a_PQ
             a: attention of the first head in chosen global blocks, over all tokens of the scene; in some of them
             M(P) is cut to the first view, in whose frame everything is to be told
    points = mean over views and pixels of |X - (linear map of the last tokens)|, X in the first camera's frame and
             in units of the scene, at k x k pixels a patch

A third needs no head: near things count as much as far ones in what depth is measured by (`relative_error`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_attrsub.vggt import VggtModel
from peft_attrsub.vggt.blocks import Attention, Rope, rotate

TEMPERATURE = 0.1
#: Global blocks whose first head is told what to attend to, and whether to the first view alone.
TOLD = ((1, False), (2, True), (4, True))
#: A point is seen in another view if the depth there differs by less than this share.
HIDDEN = 0.05


def relative_error(depth: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean over valid pixels of |d - z| / z; 0 where there is none. All (..., H, W), in the same unit."""
    return ((depth - truth).abs() / truth.clamp_min(1e-6))[mask].sum() / mask.sum().clamp_min(1)


def find_matches(truth: Mapping[str, Tensor], patch: int) -> Tensor:
    """(B, S, N, S) int64: the patch of view j that shows the middle of patch p of view i, -1 for none and for j = i.

    truth: depths, world_points, point_masks, extrinsics and intrinsics as in peft_attrsub.vggt.batch.
    """
    height, width = truth["depths"].shape[-2:]
    middle = patch // 2
    points = truth["world_points"][:, :, middle::patch, middle::patch].flatten(2, 3)  # [B, S, N, 3]
    known = truth["point_masks"][:, :, middle::patch, middle::patch].flatten(2)
    b, s, n, _ = points.shape
    flat = torch.where(known[..., None], points, 0.0).reshape(b, 1, s * n, 3)
    rotation, shift = truth["extrinsics"][..., :3], truth["extrinsics"][..., 3]
    seen = flat @ rotation.transpose(-1, -2) + shift[:, :, None]  # [B, S to, S from N, 3]
    depth = seen[..., 2].clamp_min(1e-6)
    k = truth["intrinsics"]
    column = (seen[..., 0] / depth * k[..., 0, 0, None] + k[..., 0, 2, None]).round()
    row = (seen[..., 1] / depth * k[..., 1, 1, None] + k[..., 1, 2, None]).round()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (seen[..., 2] > 1e-6)
    column, row = column.clamp(0, width - 1).long(), row.clamp(0, height - 1).long()
    there = truth["depths"].flatten(2).gather(2, row * width + column)
    open_ = inside & ((there - depth).abs() < HIDDEN * depth) & known.reshape(b, 1, s * n)
    found = torch.where(open_, row // patch * (width // patch) + column // patch, -1)
    found = found.view(b, s, s, n).permute(0, 2, 3, 1).clone()  # [B, S from, N, S to]
    found.diagonal(dim1=1, dim2=3).fill_(-1)
    return found


class Hints(nn.Module):
    """The heads of the hints, and the ears at the model that they need: make it after the model, before a step.

    width: of f. points: k.
    """

    def __init__(self, model: VggtModel, width: int = 64, points: int = 2) -> None:
        super().__init__()
        config = model.config
        self.patch, self.k = config.patch_size, points
        self.special = 1 + config.num_register_tokens
        self.describe = nn.Linear(config.embed_dim, width)
        self.locate = nn.Linear(2 * config.embed_dim, 3 * points * points)
        self._heard: dict[str, Any] = {}
        self.told = tuple((block, first) for block, first in TOLD if block < config.depth)
        model.aggregator.patch_embed.register_forward_hook(self._hear_encoder)
        for block, _ in self.told:
            model.aggregator.global_blocks[block].attn.register_forward_pre_hook(self._hear_block(block))

    def _hear_encoder(self, module: nn.Module, given: Any, tokens: Tensor) -> None:
        if self.training:
            self._heard["encoder"] = tokens

    def _hear_block(self, block: int) -> Any:
        def hear(module: nn.Module, given: tuple[Tensor, Rope]) -> None:
            if self.training:
                self._heard[f"block{block}"] = (module, *given)

        return hear

    def forward(self, last: Tensor, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms by name. last (B, S, T, 2 C): tokens of the last layer; truth: normalised (normalise_scene)."""
        matches = find_matches(truth, self.patch)
        terms = {"match": self._match(self._heard["encoder"], matches), "points": self._points(last, truth)}
        only = matches.clone()
        only[..., 1:] = -1
        told = [
            attention_on(*self._heard[f"block{block}"], only if first else matches, self.special)
            for block, first in self.told
        ]
        if told:
            terms["attend"] = torch.stack(told).mean()
        self._heard.clear()
        return terms

    def _match(self, tokens: Tensor, matches: Tensor) -> Tensor:
        b, s, n, _ = matches.shape
        f = F.normalize(self.describe(tokens).float(), dim=-1).view(b, s * n, -1)
        logits = (f @ f.transpose(1, 2) / TEMPERATURE).view(b, s, n, s, n)
        return F.cross_entropy(logits.flatten(0, 3), matches.flatten(), ignore_index=-1)

    def _points(self, last: Tensor, truth: Mapping[str, Tensor]) -> Tensor:
        """Pixel (r, c) of the k x k of a patch lies at (2 r + 1) patch / 2 k, rounded down."""
        b, s, height, width = truth["depths"].shape
        k, h, w = self.k, height // self.patch, width // self.patch
        at = torch.tensor([(2 * r + 1) * self.patch // (2 * k) for r in range(k)])
        rows = (torch.arange(h)[:, None] * self.patch + at).flatten()
        columns = (torch.arange(w)[:, None] * self.patch + at).flatten()
        target = truth["world_points"][:, :, rows][:, :, :, columns]
        mask = truth["point_masks"][:, :, rows][:, :, :, columns]
        found = self.locate(last[:, :, self.special :]).float()
        found = found.view(b, s, h, w, k, k, 3).transpose(3, 4).reshape(b, s, h * k, w * k, 3)
        error = torch.linalg.vector_norm(torch.where(mask[..., None], found - target, 1e-3), dim=-1)
        return (error * mask).sum() / mask.sum().clamp_min(1)


def attention_on(attention: Attention, x: Tensor, rope: Rope, matches: Tensor, special: int) -> Tensor:
    """The term "attend" of one block. x (B, S T, C): its input; special: tokens of a view before its patches."""
    b, s, n, _ = matches.shape
    dim = x.shape[-1] // attention.heads
    whole = x.shape[-1]
    rows = torch.cat([torch.arange(dim), whole + torch.arange(dim)])
    q, k = F.linear(x, attention.qkv.weight[rows], attention.qkv.bias[rows])[:, None].chunk(2, -1)
    if attention.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = rotate(q, rope)[:, 0], rotate(k, rope)[:, 0]  # [B, S T, dim]
    own = q.view(b, s, special + n, dim)[:, :, special:].reshape(b, s * n, dim)
    logits = (own.to(x.dtype) @ k.to(x.dtype).transpose(1, 2)).float() * attention.scaling  # [B, S N, S T]
    places = torch.arange(s) * (special + n) + special
    at = (matches + places).view(b, s * n, s)
    hit = (matches >= 0).view(b, s * n, s)
    there = logits.gather(2, at.clamp_min(0)).masked_fill(~hit, float("-inf"))
    some = hit.any(-1)
    # -inf of a patch without a match must not meet a gradient.
    mass = torch.where(some[..., None], there, 0.0).logsumexp(-1) - logits.logsumexp(-1)
    return -(mass * some).sum() / some.sum().clamp_min(1)
