"""What is held and what is kept: bases once per module, no input kept alive for the core's gradient."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig, psv_basis
from peft_attrsub.tuner import AttrSubspaceLayer

from .models import MLP


def layers(model):
    return [m for m in model.modules() if isinstance(m, AttrSubspaceLayer)]


@pytest.fixture
def saved(tmp_path):
    psv_basis(MLP.base(), dim=4).save_pretrained(tmp_path / "basis")
    return tmp_path


def test_two_adapters_on_one_basis_share_its_memory(saved):
    model = get_peft_model(MLP.base(), AttrSubspaceConfig(basis=str(saved / "basis")))
    model.add_adapter("second", AttrSubspaceConfig(basis=str(saved / "basis")))
    for move in (lambda m: m, lambda m: m.half(), lambda m: m.to(torch.float32), copy.deepcopy):
        model = move(model)
        for layer in layers(model):
            for held in (layer.attrsub_A, layer.attrsub_B):
                assert held["default"] is held["second"]
    model.delete_adapter("default")
    assert all(list(layer.attrsub_A) == ["second"] for layer in layers(model))
    model.delete_adapter("second")
    assert not any(list(layer.attrsub_A) for layer in layers(model))


@pytest.mark.parametrize("first", [True, False])
def test_a_stored_basis_is_not_narrowed_by_an_adapter_that_points_to_it(saved, first):
    exact = get_peft_model(MLP.base(), AttrSubspaceConfig(basis=str(saved / "basis")))
    model = get_peft_model(MLP.base().bfloat16(), AttrSubspaceConfig(basis=str(saved / "basis"), save_basis=first))
    model.add_adapter("other", AttrSubspaceConfig(basis=str(saved / "basis"), save_basis=not first))
    model.add_adapter("third", AttrSubspaceConfig(basis=str(saved / "basis"), save_basis=True))
    stored, pointing = ("default", "other") if first else ("other", "default")
    for mine, its in zip(layers(model), layers(exact), strict=True):
        assert torch.equal(mine.attrsub_A[stored], its.attrsub_A["default"])
        assert mine.attrsub_A["third"] is mine.attrsub_A[stored]
        assert torch.equal(mine.attrsub_A[pointing], its.attrsub_A["default"].bfloat16())


@pytest.mark.parametrize("stored", [True, False])
def test_bases_survive_a_model_that_is_emptied_and_filled_later(saved, stored):
    # the meta device, to_empty and load_state_dict: how large models are brought to their devices
    config = AttrSubspaceConfig(basis=str(saved / "basis"), save_basis=stored)
    model = get_peft_model(MLP.base(), config)
    expected = [(a.clone(), b.clone()) for a, b in (layer.bases("default") for layer in layers(model))]
    state = MLP.base().state_dict()
    for step in (lambda m: m.to("meta"), lambda m: m.to_empty(device="cpu"), lambda m: m.to_empty(device="cpu")):
        step(model)
        for layer, (a, b) in zip(layers(model), expected, strict=True):
            assert torch.equal(layer.attrsub_A["default"], a) and torch.equal(layer.attrsub_B["default"], b)
            assert layer.fingerprint("default") is not None
    model.load_state_dict({f"base_model.model.{k}": v for k, v in state.items()}, strict=False)


def test_other_attributes_or_dims_do_not_share(saved):
    model = get_peft_model(MLP.base(), AttrSubspaceConfig(basis=str(saved / "basis")))
    model.add_adapter("thin", AttrSubspaceConfig(basis=str(saved / "basis"), dim=2))
    for layer in layers(model):
        assert layer.attrsub_A["default"].shape[1] == 4 and layer.attrsub_A["thin"].shape[1] == 2


def test_loaded_adapters_that_bring_equal_bases_share_them(tmp_path):
    MLP.peft("random").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MLP.base(), tmp_path)
    model.load_adapter(tmp_path, "again")
    assert all(layer.attrsub_A["default"] is layer.attrsub_A["again"] for layer in layers(model))


def test_a_saved_adapter_holds_cores_and_a_pinned_pointer_only(saved):
    from safetensors.torch import load_file

    model = get_peft_model(MLP.base(), AttrSubspaceConfig(basis=str(saved / "basis")))
    model.save_pretrained(saved / "adapter")
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    assert {key.rpartition("attrsub_")[2] for key in tensors} == {"M.weight", "M.basis"}
    config = AttrSubspaceConfig.from_pretrained(str(saved / "adapter"))
    assert config.basis == str(saved / "basis") and len(config.basis_digest) == 64


def test_bases_never_require_grad_whatever_is_called(saved):
    model = get_peft_model(MLP.base(), AttrSubspaceConfig(basis=str(saved / "basis")))
    model.add_adapter("second", AttrSubspaceConfig(basis="random", dim=2, target_modules=["up"]))
    model.requires_grad_(True)
    model.set_adapter("second")
    model.set_adapter("default")
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad(["default", "second"], True)
    model.base_model.enable_adapter_layers()
    model.train()
    for layer in layers(model):
        for held in (layer.attrsub_A, layer.attrsub_B):
            assert not any(held[name].requires_grad or held[name].grad_fn for name in held)
    assert not any("attrsub_A" in name or "attrsub_B" in name for name, _ in model.named_parameters())


def test_the_input_is_not_kept_for_the_core_gradient():
    layer = nn.Sequential(nn.Linear(64, 48))
    model = get_peft_model(layer, AttrSubspaceConfig(basis="random", dim=4, target_modules=["0"], init_weights=False))
    x = torch.randn(100, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    rows = [t for t in kept if t.shape[0] == 100]
    assert sum(t.numel() for t in rows) == 100 * 4, "B^T x (tokens x D) is all that the core's gradient needs"
    y.sum().backward()
    core = model.base_model.model[0].attrsub_M["default"].weight
    a, b = (getattr(model.base_model.model[0], n)["default"] for n in ("attrsub_A", "attrsub_B"))
    torch.testing.assert_close(core.grad, a.T @ torch.ones(48, 100) @ x.detach() @ b, rtol=1e-4, atol=1e-4)


def test_a_refused_config_leaves_the_model_as_it_was():
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match="BatchNorm1d"):
        get_peft_model(base, AttrSubspaceConfig(basis="random", dim=2, target_modules=["0", "1"]))
    assert {name: type(module) for name, module in base.named_modules()} == before


def test_skipping_every_module_is_an_error(saved):
    base = nn.Sequential(nn.Linear(8, 8))
    config = AttrSubspaceConfig(basis=str(saved / "basis"), target_modules=["0"], missing="intersect")
    with pytest.raises(ValueError, match=r"'0'.*'up'"):
        get_peft_model(base, config)
