"""What the tests of examples/vggt/training share: the folder on the path, a model of seconds, batches at random."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_attrsub.vggt import VggtConfig, VggtModel, precision

FOLDER = Path(__file__).parents[2] / "examples" / "vggt"


def on_path() -> None:
    """`training` and the scripts can be imported, as when a script of the folder runs."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))


def tiny_config(**changes: Any) -> VggtConfig:
    sizes = {"image_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2}
    sizes |= {
        "encoder_depth": 1,
        "encoder_num_heads": 2,
        "camera_depth": 1,
        "camera_num_heads": 2,
        "dpt_features": 16,
        "dpt_channels": (16, 16, 16, 16),
    }
    return VggtConfig.preset("vggt-mini", **(sizes | {"heads": ["camera", "depth"]} | changes))


def tiny_model(seed: int = 0) -> VggtModel:
    torch.manual_seed(seed)
    return VggtModel(tiny_config())


def random_batch(seed: int, scenes: int = 1, views: int = 2, size: tuple[int, int] = (28, 42)) -> dict[str, Any]:
    """A batch of VggtLoss with every pixel valid: depths of 1 to 2, cameras along a line."""
    draw = torch.Generator().manual_seed(seed)
    height, width = size
    extrinsics = torch.eye(4)[:3].expand(scenes, views, 3, 4).clone()
    extrinsics[:, :, 0, 3] = torch.arange(views) * 0.1
    k = torch.tensor([[width, 0, (width - 1) / 2], [0, width, (height - 1) / 2], [0, 0, 1.0]])
    depths = 1 + torch.rand(scenes, views, height, width, generator=draw)
    return {
        "images": torch.rand(scenes, views, 3, height, width, generator=draw),
        "depths": depths,
        "point_masks": torch.ones_like(depths, dtype=torch.bool),
        "extrinsics": extrinsics,
        "intrinsics": k.expand(scenes, views, 3, 3).clone(),
        "seq_name": [f"random-{seed}-{index}" for index in range(scenes)],
    }


def fake_cpu(monkeypatch: pytest.MonkeyPatch, *flags: str, slowdown: float = 0.5) -> None:
    """A CPU of which torch reports these flags, no cap in the environment, and this slowdown of what it emulates."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True), raising=False)
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(precision, "slowdown", lambda device, name: slowdown)
