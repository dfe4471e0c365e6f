"""Small VGGTs whose weights follow from their tensors' names, and the lists of names that VGGT-1B is held against."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_attrsub.vggt import VggtConfig, VggtModel

FIXTURES = Path(__file__).parent / "fixtures"
_SMALL_STARTS = ("camera_token", "register_token", "cls_token", "pos_embed", "empty_pose_tokens")
TINY: dict[str, Any] = {
    "image_size": 56,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "camera_depth": 1,
    "camera_num_heads": 4,
    "dpt_features": 16,
    "dpt_channels": (8, 12, 16, 16),
    "heads": ("camera", "depth", "point"),
}


def tiny_config(**changes: Any) -> VggtConfig:
    """Under 300,000 parameters with every part of a VGGT; its position embedding is made for 4 x 4 patches."""
    return VggtConfig(**{**TINY, **changes})


def tiny(**changes: Any) -> VggtModel:
    """The model of `tiny_config`, filled, in eval mode: the same weights at every call."""
    return fill(VggtModel(tiny_config(**changes))).eval()


def images(views: int = 3, height: int = 42, width: int = 56, scenes: int = 1, seed: int = 1) -> Tensor:
    """Noise in [0, 1], (scenes, views, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(scenes, views, 3, height, width, generator=generator)


def value(name: str, shape: torch.Size) -> Tensor:
    """The known answers' weight of a tensor: it follows from its name (fixtures/README.md)."""
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.rpartition(".")[2] == "gamma":
        return 0.5 + 0.1 * r
    if len(shape) == 1:
        return 1 + 0.1 * r if "norm" in name and name.endswith("weight") else 0.1 * r
    if any(word in name for word in _SMALL_STARTS):
        return 0.2 * r
    return r / prod(shape[1:]) ** 0.5


def fill(model: nn.Module) -> Any:
    """Give every tensor of the model the weight that follows from its name."""
    model.load_state_dict({name: value(name, old.shape) for name, old in model.state_dict().items()})
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def meta(config: VggtConfig) -> VggtModel:
    """The model without memory for its weights: names and shapes only."""
    with torch.device("meta"):
        return VggtModel(config)


def shapes_by_pattern(tensors: dict[str, tuple[int, ...]]) -> Counter[tuple[str, tuple[int, ...]]]:
    """How often a name occurs with a shape, its layer indices written N as in vggt_checkpoint_tensors.txt."""
    return Counter((re.sub(r"\.\d+(?=\.)", ".N", name), shape) for name, shape in tensors.items())


def checkpoint_tensors() -> Counter[tuple[str, tuple[int, ...]]]:
    """The tensors of facebook/VGGT-1B as (name with N for the layer, shape), and how many of each there are."""
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for line in (FIXTURES / "vggt_checkpoint_tensors.txt").read_text().splitlines():
        count, name, shape = line.split(" ", 2)
        found[name, tuple(int(n) for n in re.findall(r"\d+", shape))] += int(count.removesuffix("x"))
    return found
