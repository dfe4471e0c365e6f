"""accelerate's offloading and dispatch: what runs from the meta device must equal what runs in memory.

accelerate replaces the forward of every module that holds tensors (`add_hook_to_module` in accelerate/hooks.py), and
brings the tensors back only for the time of that call: a parameter that is read without its module being called stays
on the meta device.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from torch.testing import assert_close

from .wrapped import KINDS, adapted, every_kind, logits

CPU = torch.device("cpu")


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers-too"])
@every_kind
def test_cpu_offload(kind, buffers, tmp_path):
    model = adapted(kind, tmp_path)
    expected = logits(model)
    assert_close(logits(cpu_offload(model, execution_device=CPU, offload_buffers=buffers)), expected)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers-too"])
@every_kind
def test_disk_offload(kind, buffers, tmp_path):
    model = adapted(kind, tmp_path)
    expected = logits(model)
    disk_offload(model, tmp_path / "offload", execution_device=CPU, offload_buffers=buffers)
    assert_close(logits(model), expected)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers-too"])
@every_kind
def test_dispatch_with_one_layer_on_disk(kind, buffers, tmp_path):
    model = adapted(kind, tmp_path)
    expected = logits(model)
    layer = "base_model.model.model.layers"
    names = ["base_model.model.model.embed_tokens", "base_model.model.model.norm"]
    names += ["base_model.model.model.rotary_emb", "base_model.model.lm_head", f"{layer}.0"]
    where = {**dict.fromkeys(names, "cpu"), f"{layer}.1": "disk"}
    dispatch_model(
        model, where, main_device="cpu", offload_dir=tmp_path / "offload", offload_buffers=buffers, force_hooks=True
    )
    assert_close(logits(model), expected)


@every_kind
def test_load_checkpoint_and_dispatch(kind, tmp_path):
    model = adapted(kind, tmp_path)
    Accelerator(cpu=True).save_model(model, str(tmp_path / "whole"))
    fresh = adapted(kind, tmp_path, trained=False)
    loaded = load_checkpoint_and_dispatch(fresh, str(tmp_path / "whole"), device_map={"": "cpu"})
    assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_core_on_meta_is_refused(kind, tmp_path):
    """Without hooks nothing brings it back; an output made of uninitialized memory must not come out in silence."""
    model = adapted(kind, tmp_path)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            holder, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(holder), leaf, torch.nn.Parameter(parameter.detach().to("meta")))
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        logits(model)
