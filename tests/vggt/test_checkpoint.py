"""Weights from facebook/VGGT-1B's layout: every name and shape, loading bit by bit, and our own folders."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from peft_attrsub.vggt import VggtConfig, VggtModel

from .small import TINY, checkpoint_tensors, fill, images, meta, shapes_by_pattern, tiny_config

HEADS = ("camera", "depth", "point")
# Stand-ins for the head that this model never builds, one name of each kind, its misspelling included.
TRACK = {
    "track_head.feature_extractor.norm.weight": (8,),
    "track_head.tracker.updateformer.virual_tracks": (1, 4, 1, 8),
    "track_head.tracker.updateformer.time_blocks.0.attn.in_proj_weight": (24, 8),
}


def checkpoint(**changes) -> dict[str, torch.Tensor]:
    """Tensors of a small public checkpoint: all heads."""
    tensors = fill(VggtModel(tiny_config(heads=HEADS, **changes))).state_dict()
    return {**tensors, **{name: torch.randn(shape) for name, shape in TRACK.items()}}


@pytest.fixture
def hub_folder(tmp_path):
    """A folder like facebook/VGGT-1B: its config names three sizes in the public package's words, and no model_type.

    The real config names no more because the other sizes are the defaults; here they are added.
    """
    folder = tmp_path / "VGGT-1B"
    folder.mkdir()
    sizes = {key: value for key, value in TINY.items() if key not in ("image_size", "heads")}
    sizes |= {"img_size": TINY["image_size"], "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(sizes))
    save_file(checkpoint(), folder / "model.safetensors")
    return folder


class Heard(logging.Handler):
    """What transformers' loggers say while it is attached."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def heard():
    handler = Heard()
    transformers_logging.add_handler(handler)
    yield handler.lines
    transformers_logging.remove_handler(handler)


# The real model, by names and shapes


def test_every_tensor_of_vggt_1b():
    model = meta(VggtConfig.preset("vggt-1b", heads=HEADS))
    own = shapes_by_pattern({name: tuple(t.shape) for name, t in model.state_dict().items()})
    listed = checkpoint_tensors()
    assert sum(listed.values()) == 1797
    track = Counter({key: n for key, n in listed.items() if key[0].startswith("track_head.")})
    assert sum(track.values()) == 394
    assert own + track == listed


def test_sizes_of_the_parts():
    model = meta(VggtConfig.preset("vggt-1b", heads=HEADS))

    def count(part):
        return sum(p.numel() for p in model.get_submodule(part).parameters())

    assert count("aggregator") == 909_112_320
    assert count("aggregator.patch_embed") == 304_372_736
    assert count("aggregator.frame_blocks") == count("aggregator.global_blocks") == 302_364_672
    assert count("camera_head") == 216_174_610
    assert count("depth_head") == 32_654_562
    assert count("point_head") == 32_654_628
    elements = sum(t.numel() for t in model.state_dict().values())
    assert elements == 1_256_537_516 - 65_941_396, "all of the checkpoint but the track head, and no buffer"


def test_the_sizes_of_the_real_config_are_the_defaults():
    config = VggtConfig(embed_dim=1024, img_size=518, patch_size=14)
    assert config.to_diff_dict() == VggtConfig.preset("vggt-1b").to_diff_dict()
    assert config.image_size == config.img_size == 518


def test_mini_is_a_vggt_of_about_five_million():
    model = meta(VggtConfig.preset("vggt-mini"))
    assert 4_500_000 < sum(p.numel() for p in model.parameters()) < 5_500_000
    big = {name.split(".")[0] for name in meta(VggtConfig.preset("vggt-1b")).state_dict()}
    assert {name.split(".")[0] for name in model.state_dict()} == big


# Loading


@pytest.mark.parametrize("heads", [HEADS, ("camera", "depth"), ("point",), ("camera",)], ids="-".join)
def test_weights_load_bit_by_bit_and_quietly(hub_folder, heard, heads):
    saved = load_file(hub_folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, told = VggtModel.from_pretrained(hub_folder, heads=list(heads), output_loading_info=True)
    assert not any(told.values()), told
    assert heard == []
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"aggregator", *(f"{head}_head" for head in heads)}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items())
    assert not model.training


def test_what_is_wrong_is_still_said(hub_folder, heard):
    """The quiet about unused heads must not swallow a foreign or a missing tensor."""
    tensors = load_file(hub_folder / "model.safetensors")
    del tensors["aggregator.frame_blocks.0.ls1.gamma"]
    save_file({**tensors, "aggregator.stranger": torch.zeros(3)}, hub_folder / "model.safetensors")
    _, told = VggtModel.from_pretrained(hub_folder, output_loading_info=True)
    assert told["missing_keys"] == {"aggregator.frame_blocks.0.ls1.gamma"}
    assert told["unexpected_keys"] == {"aggregator.stranger"}
    said = "\n".join(heard)
    assert "aggregator.stranger" in said and "aggregator.frame_blocks.0.ls1.gamma" in said
    assert "track_head" not in said and "point_head" not in said


def test_a_head_that_is_built_is_read_whole(hub_folder):
    """Only heads that the model does not have are skipped in silence, not parts of those that it has."""
    tensors = load_file(hub_folder / "model.safetensors")
    more = {"camera_head.trunk.7.ls1.gamma": torch.ones(64), "depth_head.stranger": torch.ones(3)}
    save_file({**tensors, **more}, hub_folder / "model.safetensors")
    _, told = VggtModel.from_pretrained(hub_folder, output_loading_info=True)
    assert told["unexpected_keys"] == set(more)
    _, told = VggtModel.from_pretrained(hub_folder, heads=["point"], output_loading_info=True)
    assert not told["unexpected_keys"]


def test_a_missing_tensor_starts_as_a_new_model_would(hub_folder, heard):
    tensors = load_file(hub_folder / "model.safetensors")
    lost = [
        "aggregator.frame_blocks.0.ls1.gamma",
        "aggregator.patch_embed.blocks.0.ls1.gamma",
        "camera_head.embed_pose.bias",
    ]
    for name in lost:
        del tensors[name]
    save_file(tensors, hub_folder / "model.safetensors")
    state = VggtModel.from_pretrained(hub_folder).state_dict()
    assert torch.equal(state[lost[0]], torch.full((32,), 0.01))
    assert torch.equal(state[lost[1]], torch.ones(32))
    assert torch.equal(state[lost[2]], torch.zeros(64))


def test_layer_scales_keep_their_name(hub_folder):
    """transformers once renamed every `gamma` to `weight` while loading."""
    model = VggtModel.from_pretrained(hub_folder)
    gammas = [name for name in model.state_dict() if name.endswith(".gamma")]
    assert len(gammas) == 2 * (2 + 4 + 4 + 1)
    saved = load_file(hub_folder / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in gammas)
    model.save_pretrained(hub_folder / "again")
    assert set(gammas) <= set(load_file(hub_folder / "again" / "model.safetensors"))


def test_half_precision_leaves_the_heads_in_float32(hub_folder):
    for spelling in (torch.bfloat16, "bfloat16", "bf16"):
        model = VggtModel.from_pretrained(hub_folder, heads=list(HEADS), dtype=spelling)
        assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'bf17': expected a torch dtype or its name"):
        VggtModel.from_pretrained(hub_folder, dtype="bf17")
    kinds = {(name.split(".")[0], tensor.dtype) for name, tensor in model.state_dict().items()}
    heads = {(f"{head}_head", torch.float32) for head in HEADS}
    assert kinds == {("aggregator", torch.bfloat16), *heads}
    saved = load_file(hub_folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[n], saved[n]) for n in state if not n.startswith("aggregator")), "heads lose no bit"
    with torch.no_grad():
        output = model(images())
        expected = VggtModel.from_pretrained(hub_folder, heads=list(HEADS))(images())
    for name in ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name], expected[name], rtol=0.1, atol=0.05)


def test_save_and_load_again(hub_folder, tmp_path):
    model = VggtModel.from_pretrained(hub_folder, heads=list(HEADS))
    model.save_pretrained(tmp_path / "ours")
    record = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert record["model_type"] == "vggt" and record["architectures"] == ["VggtModel"]
    config = AutoConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(config, VggtConfig) and config.heads == list(HEADS)
    again = AutoModel.from_pretrained(tmp_path / "ours")
    assert isinstance(again, VggtModel)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_saved_in_half_precision_and_loaded_again(hub_folder, tmp_path):
    model = VggtModel.from_pretrained(hub_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours", dtype="auto")
    assert {name: t.dtype for name, t in again.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_shards(hub_folder, tmp_path):
    model = VggtModel.from_pretrained(hub_folder)
    model.save_pretrained(tmp_path / "ours", max_shard_size="200kB")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    again = VggtModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_without_a_model_type_only_the_class_itself_loads(hub_folder):
    """AutoModel finds the class by config.json's model_type, which the public repository lacks."""
    for auto in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match="model_type"):
            auto.from_pretrained(hub_folder)
    assert isinstance(VggtConfig.from_pretrained(hub_folder), VggtConfig)


FRESH = """
import sys
from transformers import AutoConfig, AutoModel
if sys.argv[2] == "auto":
    import peft_attrsub.vggt
    model = AutoModel.from_pretrained(sys.argv[1])
else:
    from peft_attrsub.vggt import VggtModel
    model = VggtModel.from_pretrained(sys.argv[1])
print("\\n" + type(model).__module__, type(model).__name__, sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.mark.parametrize("way", ["class", "auto"])
def test_in_a_fresh_process(hub_folder, tmp_path, way):
    """Nothing here depends on what this process has imported or registered."""
    model = VggtModel.from_pretrained(hub_folder)
    folder = hub_folder
    if way == "auto":
        folder = tmp_path / "ours"
        model.save_pretrained(folder)
    script = [sys.executable, "-c", FRESH, str(folder), way]
    run = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    module, name, total = run.stdout.splitlines()[-1].split()
    assert (module, name) == ("peft_attrsub.vggt.modeling_vggt", "VggtModel")
    assert float(total) == sum(p.double().sum().item() for p in model.parameters())


def test_new_weights_start_as_the_public_model_does():
    torch.manual_seed(0)
    model = VggtModel(tiny_config())
    state = model.state_dict()
    assert torch.equal(state["aggregator.frame_blocks.0.ls2.gamma"], torch.full((32,), 0.01))
    assert torch.equal(state["camera_head.trunk.0.ls1.gamma"], torch.full((64,), 0.01))
    assert torch.equal(state["aggregator.patch_embed.blocks.1.ls2.gamma"], torch.ones(32))
    for name in ("aggregator.camera_token", "aggregator.register_token"):
        assert 0 < state[name].std() < 1e-5
    assert state["aggregator.camera_token"][0, 0].ne(state["aggregator.camera_token"][0, 1]).all()
    assert state["camera_head.empty_pose_tokens"].eq(0).all()
    assert not model.aggregator.patch_embed.mask_token.requires_grad
    assert not list(model.named_buffers())
