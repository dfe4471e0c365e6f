"""Cores on int8 weights, through PEFT's generic quantisation backend (torchao runs on a CPU)."""

import types

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.tuner import AttrSubspaceLayer
from tests import pairs

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed (extra [dev])")


@pytest.fixture(autouse=True, scope="module")
def _pair():
    if broken := pairs.torchao_int8():
        pytest.skip(broken)


def quantised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    # Where PEFT's get_quantization_kwargs looks for the recipe to quantise again after a merge.
    recipe = types.SimpleNamespace(get_apply_tensor_subclass=torchao.Int8WeightOnlyConfig)
    model.hf_quantizer = types.SimpleNamespace(quantization_config=recipe)
    return model


def near(y):
    return {"atol": 0.02 * y.abs().max().item(), "rtol": 0}  # int8's own error


@pytest.mark.parametrize("basis", ["random", "psv"])
def test_train_save_load_merge(basis, tmp_path):
    config = AttrSubspaceConfig(basis=basis, dim=8, target_modules=["0", "2"])
    x = torch.randn(16, 64)
    expected = quantised()(x)
    model = get_peft_model(quantised(), config)
    assert "torchao" in repr(model)
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    y = model(x).detach()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(quantised(), tmp_path)(x), y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **near(expected))
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, **near(expected))
    merged = model.merge_and_unload()
    assert not any(isinstance(m, AttrSubspaceLayer) for m in merged.modules())
    assert type(merged[0].weight) is type(quantised()[0].weight)


def test_psv_of_a_quantised_weight_is_that_of_its_dequantised_values():
    model = get_peft_model(quantised(), AttrSubspaceConfig(basis="psv", dim=4, target_modules=["0"]))
    weight = quantised()[0].weight.dequantize()
    u, _, _ = torch.linalg.svd(weight)
    a = model.base_model.model[0].attrsub_A["default"]
    torch.testing.assert_close((a.T @ u[:, :4]).abs(), torch.eye(4), atol=1e-3, rtol=0)


def test_safe_merge_refuses_before_it_writes():
    model = get_peft_model(quantised(), AttrSubspaceConfig(basis="random", dim=4, target_modules=["0"]))
    x = torch.randn(4, 64)
    y = quantised()(x)
    with torch.no_grad():
        model.base_model.model[0].attrsub_M["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="default"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), y)
