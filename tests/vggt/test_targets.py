"""vggt_targets: exact names, right sizes, and sentences for what cannot be."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_attrsub.vggt import VggtConfig, VggtModel
from peft_attrsub.vggt.targets import vggt_targets

from .small import checkpoint_tensors, images, tiny, tiny_config

COUNTS = {"aggregator": 192, "heads": 50, "lora": 242, "paper": 237}
TOO_SMALL = {
    "camera_head.embed_pose",
    "camera_head.pose_branch.fc2",
    "depth_head.scratch.output_conv1",
    "depth_head.scratch.output_conv2.0",
    "depth_head.scratch.output_conv2.2",
}


@pytest.mark.parametrize("which", COUNTS)
def test_counts_of_vggt_1b(which):
    names = vggt_targets(which)
    assert len(names) == len(set(names)) == COUNTS[which]


def test_the_sets_and_each_other():
    aggregator, heads, lora, paper = (set(vggt_targets(which)) for which in ("aggregator", "heads", "lora", "paper"))
    assert aggregator | heads == lora and not aggregator & heads
    assert lora - paper == TOO_SMALL
    assert aggregator == {
        f"aggregator.{blocks}_blocks.{i}.{part}"
        for blocks in ("frame", "global")
        for i in range(24)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert sum(name.startswith("camera_head.") for name in heads) == 20
    assert sum(name.startswith("depth_head.") for name in heads) == 30


def test_every_name_is_a_weight_of_the_checkpoint():
    """From the list of tensors alone: all weights of two or four axes outside the encoder, less the ConvTranspose."""
    expected = {}
    for (name, shape), count in checkpoint_tensors().items():
        part, _, kind = name.rpartition(".")
        inside = part.startswith(("aggregator.frame", "aggregator.global", "camera_head", "depth_head"))
        if inside and kind == "weight" and len(shape) in (2, 4):
            expected[part, shape] = count
    # resize_layers 0 and 1 are the transposed ones: 4 x 4 and 2 x 2
    transposed = {key for key in expected if "resize_layers" in key[0] and key[1][2] in (2, 4)}
    assert sum(expected.pop(key) for key in transposed) == 2
    assert sum(expected.values()) == 242
    patterns = {re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in vggt_targets("lora")}
    assert patterns == {name for name, _ in expected}
    large = sum(count for (_, shape), count in expected.items() if min(shape[0], prod(shape[1:])) >= 256)
    assert large == 237


def test_of_a_config_and_of_a_model():
    config = tiny_config()
    names = vggt_targets("lora", config)
    assert names == vggt_targets("lora", VggtModel(config))
    assert len(vggt_targets("aggregator", config)) == 2 * 4 * 4
    assert len(vggt_targets("heads", config)) == 1 * 4 + 4 + 30
    modules = dict(VggtModel(config).named_modules())
    assert all(isinstance(modules[name], (nn.Linear, nn.Conv2d)) for name in names)


def test_smaller_sides_for_smaller_models():
    config = tiny_config()
    modules, lora = dict(VggtModel(config).named_modules()), vggt_targets("lora", config)
    for side in (3, 16, 32):
        expected = [name for name in lora if min(modules[name].weight.flatten(1).shape) >= side]
        assert 0 < len(expected) < len(lora)
        assert vggt_targets("paper", config, min_side=side) == expected
        assert vggt_targets("lora", config, min_side=side) == expected


def test_names_of_the_public_package():
    """Any module with VGGT's names will do, its track head left out."""

    class Public(nn.Module):
        def __init__(self):
            super().__init__()
            inner = VggtModel(tiny_config())
            self.aggregator, self.camera_head, self.depth_head = inner.aggregator, inner.camera_head, inner.depth_head
            self.point_head, self.track_head = inner.point_head, nn.ModuleDict({"fc1": nn.Linear(4, 4)})

    for which in ("aggregator", "heads", "lora"):
        assert set(vggt_targets(which, Public())) == set(vggt_targets(which, tiny_config()))


@pytest.mark.parametrize("which", ["aggregator", "heads", "lora"])
def test_peft_adapts_exactly_these(which):
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=vggt_targets(which, tiny_config())))
    prefix, suffix = "base_model.model.", ".lora_A.default"
    found = [n.removeprefix(prefix).removesuffix(suffix) for n, _ in model.named_modules() if n.endswith(suffix)]
    assert sorted(found) == sorted(vggt_targets(which, tiny_config()))
    with torch.no_grad():
        model(images(2))


def test_what_cannot_be_is_a_sentence():
    with pytest.raises(ValueError, match=r"'everything' is no set.*aggregator, paper, lora, heads"):
        vggt_targets("everything")
    with pytest.raises(ValueError, match=r"VggtConfig.*'paper'.*at least 256.*min_side"):
        vggt_targets("paper", tiny_config())
    with pytest.raises(ValueError, match="Linear given has no matrix of the set 'aggregator'"):
        vggt_targets("aggregator", nn.Linear(3, 3))
    adapted = get_peft_model(tiny(), LoraConfig(target_modules=vggt_targets("lora", tiny_config())))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match=r"base_layer.*adapted already"):
            vggt_targets("lora", model)
    assert len(vggt_targets("heads", VggtConfig(heads=["camera"]))) == 20
