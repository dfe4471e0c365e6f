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
        model.base_model.model[0].attrsub_M["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="default"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), y)


def plain(recipe):
    """Quantised by torchao alone: no transformers quantiser that knows the recipe."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    torchao.quantize_(model, recipe())
    return model


class Packed(torch.Tensor):
    """Stands for the tensors of other libraries: knows how to dequantise itself, and is not what it looks like."""

    def dequantize(self):
        return self.kept

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return func(args[0], args[1].kept, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def packed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    for layer in (model[0], model[2]):
        kept = layer.weight.detach() * 2
        layer.weight = nn.Parameter(torch.zeros_like(kept).as_subclass(Packed), requires_grad=False)
        layer.weight.kept = kept
    return model


UNKNOWN = {
    "int8": lambda: plain(torchao.Int8WeightOnlyConfig),
    "int8 both": lambda: plain(torchao.Int8DynamicActivationInt8WeightConfig),
    "float8": lambda: plain(torchao.Float8WeightOnlyConfig),
    "another library": packed,
}


@pytest.mark.parametrize("forward_mode", ["auto", "folded"])
@pytest.mark.parametrize("basis", ["random", "psv"])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_weight_that_cannot_be_quantised_again_is_trained_beside_and_never_merged(
    kind, basis, forward_mode, tmp_path
):
    make, x, many = UNKNOWN[kind], torch.randn(7, 64), torch.randn(600, 64)
    expected = make()(x)
    config = AttrSubspaceConfig(basis=basis, dim=4, forward_mode=forward_mode)
    model = get_peft_model(make(), config)
    assert model.targeted_module_names == ["0", "2"]
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(many).square().mean().backward()
        optimizer.step()
    found = model(x)
    assert not torch.allclose(found, expected, atol=1e-3)
    held = {name: value.clone() for name, value in model.state_dict().items() if "attrsub" in name}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be changed, so the adapter cannot be merged"):
            merge()
    torch.testing.assert_close(model(x), found)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(again(x), found)
    assert all(torch.equal(held[name], value) for name, value in again.state_dict().items() if "attrsub" in name)


class Eight(nn.Linear):
    """A weight in eight bits with a floating dtype, widened where it is used."""

    def __init__(self, *shape, dtype):
        super().__init__(*shape)
        self.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("save_basis", [True, False])
def test_bases_and_cores_do_not_take_eight_bits_for_their_dtype(dtype, autocast, save_basis):
    torch.manual_seed(0)
    base = nn.Sequential(Eight(32, 48, dtype=dtype))
    config = AttrSubspaceConfig(basis="random", dim=4, target_modules=["0"], save_basis=save_basis, init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    layer = model.base_model.model[0]
    a, b = layer.bases("default")
    assert {a.dtype, b.dtype, layer.attrsub_M["default"].weight.dtype} == {torch.float32}
    torch.testing.assert_close(a.T @ a, torch.eye(4), atol=1e-5, rtol=0)
    model(torch.randn(3, 32)).square().mean().backward()
    assert layer.attrsub_M["default"].weight.grad.abs().sum() > 0
