"""Cores next to layers that hold codes instead of a weight, as libraries that PEFT does not know make them.

They are trained, saved, loaded and exported as any other layer. Only what has to read or change the weight is refused:
merging, and basis="psv".
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig, BasisError, export_lora, psv_basis, random_basis
from peft_attrsub.tuner import AttrSubspaceLayer

WIDTH, OUT = 24, 40


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, and the scale of each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round(), scale


class InPlace(nn.Linear):
    """An nn.Linear whose weight became codes in `dtype`; the scale is its own affair."""

    dtype = torch.int8

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        codes, scale = codes_of(self.weight.detach())
        if self.dtype == torch.uint8:
            codes = codes + 128
        self.weight = nn.Parameter(codes.to(self.dtype), requires_grad=False)
        self.register_buffer("scale", scale)

    def values(self) -> Tensor:
        codes = self.weight.float() - 128 * (self.dtype == torch.uint8)
        return codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values(), self.bias)


class Unsigned(InPlace):
    dtype = torch.uint8


class Float8(InPlace):
    dtype = torch.float8_e4m3fn


class Packed(nn.Module):
    """Four codes in each int32, in columns, as GPTQ has it: no weight, and a shape that is not that of W."""

    name, has_bias = "qweight", True

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = n_in, n_out
        base = nn.Linear(n_in, n_out, bias=self.has_bias)
        codes, scale = codes_of(base.weight.detach())
        rows = (codes.T + 128).to(torch.int32).reshape(n_in // 4, 4, n_out)
        packed = sum(rows[:, i] << (8 * i) for i in range(4))
        self.register_buffer(self.name, packed)
        self.register_buffer("scales", scale)
        self.bias = base.bias

    def values(self) -> Tensor:
        packed = self.get_buffer(self.name)
        codes = torch.stack([(packed >> (8 * i)) & 255 for i in range(4)], 1).reshape(self.in_features, -1)
        return (codes.float() - 128).T * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.values(), self.bias)


class BuffersAlone(Packed):
    """No parameter at all, and a name that PEFT does not look for."""

    name, has_bias = "blob", False


KINDS = [InPlace, Unsigned, Float8, Packed, BuffersAlone]
every_kind = pytest.mark.parametrize("kind", KINDS)


def base(kind: type[nn.Module]) -> nn.Sequential:
    """Plain, quantised, plain."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, WIDTH), nn.Tanh(), kind(WIDTH, OUT), nn.Linear(OUT, 8)).eval()


def batch() -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """The slow reference: every update as a matrix, next to the base layer's own result."""
    for module in model.base_model.model:
        if isinstance(module, AttrSubspaceLayer):
            a, core, b = module.factors("default")
            x = module.base_layer(x) + x @ (a @ core @ b.T).T
        else:
            x = module(x)
    return x


@pytest.mark.parametrize("forward_mode", ["auto", "folded"])
@pytest.mark.parametrize("core", ["full", "block_diagonal", "dials"])
@pytest.mark.parametrize("save_basis", [True, False])
@every_kind
def test_trained_saved_loaded_and_exported(kind, save_basis, core, forward_mode, tmp_path):
    config = AttrSubspaceConfig(basis="random", dim=4, save_basis=save_basis, core=core, forward_mode=forward_mode)
    model = get_peft_model(base(kind), config).eval()
    layer = model.base_model.model[2]
    assert model.targeted_module_names == ["0", "2", "3"]
    assert {x.dtype for x in (*layer.bases("default"), layer.attrsub_M["default"].weight)} == {torch.float32}
    x = batch()
    torch.testing.assert_close(model(x), base(kind)(x))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(float(layer.attrsub_M["default"].weight.grad.norm()) > 0 for layer in layers(model))
    trained = model(x)
    torch.testing.assert_close(trained, dense(model, x))
    assert not torch.allclose(trained, base(kind)(x), atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(kind)(x))
    model.save_pretrained(tmp_path / "adapter")
    for low in (False, True):
        again = PeftModel.from_pretrained(base(kind), tmp_path / "adapter", low_cpu_mem_usage=low)
        torch.testing.assert_close(again(x), trained)
    export_lora(model, tmp_path / "lora")
    twin = PeftModel.from_pretrained(nn.Sequential(*(nn.Linear(*shape) for shape in SHAPES)), tmp_path / "lora")
    for name, mine in (("0", layers(model)[0]), ("2", layer)):
        found = twin.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(found, mine.get_delta_weight("default"), atol=1e-5, rtol=1e-4)


SHAPES = [(16, WIDTH), (1, 1), (WIDTH, OUT), (OUT, 8)]


def layers(model: nn.Module) -> list[AttrSubspaceLayer]:
    return [module for module in model.modules() if isinstance(module, AttrSubspaceLayer)]


@every_kind
def test_a_merge_is_refused_before_the_first_weight_is_changed(kind):
    model = get_peft_model(base(kind), AttrSubspaceConfig(basis="random", dim=4, init_weights=False)).eval()
    x = batch()
    before, state = model(x), copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        for safe in (False, True):
            with pytest.raises(ValueError, match=rf"module '2'.*quantised by its {kind.__name__}.*cannot be merged"):
                merge(safe_merge=safe)
    assert [layer.merged for layer in layers(model)] == [False] * 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), before)


@every_kind
def test_an_adapter_on_the_other_layers_is_merged(kind):
    model = get_peft_model(base(kind), AttrSubspaceConfig(basis="random", dim=4, init_weights=False)).eval()
    elsewhere = AttrSubspaceConfig(basis="random", dim=3, target_modules=["0", "3"], init_weights=False)
    model.add_adapter("elsewhere", elsewhere)
    x = batch()
    with pytest.raises(ValueError, match="module '2'"):
        model.merge_adapter()
    model.set_adapter("elsewhere")
    expected = model(x)
    model.merge_adapter(adapter_names=["elsewhere"])
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    merged = model.merge_and_unload(adapter_names=["elsewhere"])
    torch.testing.assert_close(merged(x), expected)
    assert type(merged[2]) is kind


@every_kind
def test_psv_is_refused_by_name_and_leaves_the_model(kind):
    model = base(kind)
    before = [type(module) for module in model.modules()]
    with pytest.raises(BasisError, match=r"'2'.*cannot be read back.*'random'"):
        get_peft_model(model, AttrSubspaceConfig(basis="psv", dim=4, target_modules=["0", "2"]))
    assert [type(module) for module in model.modules()] == before
    if isinstance(model[2], nn.Linear):
        with pytest.raises(BasisError, match=r"'2' is quantised .*before it was quantised"):
            psv_basis(model, dim=4)


@every_kind
def test_unload_gives_the_very_layers_back(kind):
    model = base(kind)
    before = list(model)
    unloaded = get_peft_model(model, AttrSubspaceConfig(basis="random", dim=4, init_weights=False)).unload()
    assert all(new is old for new, old in zip(unloaded, before, strict=True))


def test_a_mined_basis_of_the_model_as_it_was_fits_the_quantised_one(tmp_path):
    plain = nn.Sequential(*(nn.Linear(*shape) for shape in SHAPES))
    random_basis(plain, dim=4, modules=["0", "2", "3"]).save_pretrained(tmp_path / "basis")
    for kind in KINDS:
        config = AttrSubspaceConfig(basis=str(tmp_path / "basis"), init_weights=False)
        model = get_peft_model(base(kind), config).eval()
        torch.testing.assert_close(model(batch()), dense(model, batch()))


def test_a_module_that_is_sized_but_holds_no_codes_is_still_refused():
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 4
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"'0' is a Router, which cannot carry a core"):
        get_peft_model(nn.Sequential(Router()), AttrSubspaceConfig(basis="random", dim=2, target_modules=["0"]))


class MakesANewLayer:
    """A PEFT backend that puts a new layer in the old one's place to change the weight, and forgets the bias."""

    supports_merge, backend_name, layer_type = True, "fake", "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.values()

    def set_base_weight(self, peft_layer: AttrSubspaceLayer, weight: Tensor) -> None:
        new = Packed(WIDTH, OUT)
        new.values, new.bias = (lambda: weight), None
        peft_layer.base_layer = new

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        return x


def test_a_layer_that_is_made_again_by_a_merge_keeps_its_bias():
    config = AttrSubspaceConfig(basis="random", dim=4, init_weights=False)
    model = get_peft_model(base(Packed), config).eval()
    model.base_model.model[2].quantization_backend = MakesANewLayer()
    x = batch()
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
