"""Merging into the base weights and taking it back: merge, unmerge, safe merge, merge_and_unload, unload."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from .checks import (
    architecture,
    base_weights,
    cores,
    deltas,
    every_basis,
    every_case,
    has_tuner_layers,
    layers,
    learn,
    no_warning,
    run,
    same,
)
from .models import BASES, GROUPED, MLP, Case, ConvNet, floats


@every_basis
@every_case
def test_merged_unmerged_and_unloaded_agree(case, basis):
    base = run(case.base(), case)
    model = case.peft(basis, init_weights=False)
    adapted = run(model, case)
    weights, updates = base_weights(model), deltas(model)

    model.merge_adapter()
    assert all(layer.merged and layer.merged_adapters == ["default"] for layer in layers(model).values())
    for name, weight in base_weights(model).items():
        assert same(weight, weights[name] + updates[name], 1e-6)
    assert same(run(model, case), adapted)

    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers(model).values())
    assert all(same(weight, weights[name], 1e-6) for name, weight in base_weights(model).items())
    assert same(run(model, case), adapted)

    merged = model.merge_and_unload()
    assert same(run(merged, case), adapted)
    assert not same(run(merged, case), base, 1e-4)
    assert not has_tuner_layers(merged) and not hasattr(merged, "peft_config")
    assert same(run(pickle.loads(pickle.dumps(merged)), case), adapted)


@every_basis
@every_case
def test_after_merge_and_unload_the_architecture_is_the_base(case, basis, tmp_path):
    base = case.base()
    merged = case.peft(basis, init_weights=False).merge_and_unload()
    assert architecture(merged) == architecture(base)
    assert list(merged.state_dict()) == list(base.state_dict())
    for name, old in base.state_dict().items():
        new = merged.state_dict()[name]
        assert (new.shape, new.dtype, new.stride()) == (old.shape, old.dtype, old.stride()), name
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    again = case.base()
    again.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert torch.equal(run(again, case), run(merged, case))


@every_basis
@every_case
def test_unload_gives_the_base_back(case, basis):
    base = case.base()
    model = case.peft(basis, init_weights=False)
    learn(model, case)
    assert not same(run(model, case), run(base, case))
    unloaded = model.unload()
    assert architecture(unloaded) == architecture(base)
    assert not has_tuner_layers(unloaded) and not hasattr(unloaded, "peft_config")
    state = unloaded.state_dict()
    assert list(state) == list(base.state_dict())
    kept = tuple(case.arguments.get("modules_to_save") or [])  # PEFT leaves the trained copy of these in place
    for name, value in base.state_dict().items():
        assert torch.equal(state[name], value) != bool(kept and name.startswith(kept)), name


@every_basis
@every_case
def test_merging_twice_is_merging_once(case, basis):
    model = case.peft(basis, init_weights=False)
    model.merge_adapter()
    weights, output = base_weights(model), run(model, case)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert all(torch.equal(weight, weights[name]) for name, weight in base_weights(model).items())
    assert torch.equal(run(model, case), output)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="(?i)already unmerged"):
        model.unmerge_adapter()


@every_case
def test_merging_in_train_mode_leaves_no_chance(case):
    model = case.peft("random", init_weights=False, dropout=0.5).train()
    expected = {name: weight + deltas(model)[name] for name, weight in base_weights(model).items()}
    for twin in (copy.deepcopy(model), copy.deepcopy(model)):
        twin.merge_adapter()
        assert all(same(weight, expected[name], 1e-6) for name, weight in base_weights(twin).items())


@every_basis
@every_case
def test_safe_merge_is_merge(case, basis):
    model = case.peft(basis, init_weights=False)
    plain, safe = copy.deepcopy(model), copy.deepcopy(model)
    plain.merge_adapter()
    safe.merge_adapter(safe_merge=True)
    assert all(torch.equal(weight, base_weights(safe)[name]) for name, weight in base_weights(plain).items())
    assert same(run(safe, case), run(model, case))
    safe.unmerge_adapter()
    assert same(run(safe.merge_and_unload(safe_merge=True), case), run(model, case))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@every_basis
@every_case
def test_safe_merge_of_a_broken_adapter_raises_and_writes_nothing(case, basis, broken):
    model = case.peft(basis)
    with torch.no_grad():
        for core in cores(model).values():
            core.view(-1)[0] = broken
    weights = base_weights(model)
    message = r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    for layer in layers(model).values():
        with pytest.raises(ValueError, match=message):
            layer.merge(safe_merge=True)
        assert not layer.merged
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(weight, weights[name]) for name, weight in base_weights(model).items())


def test_safe_merge_of_a_second_broken_adapter_keeps_the_first():
    model = MLP.peft("random", init_weights=False)
    model.add_adapter("broken", MLP.config("random"))
    with torch.no_grad():
        for core in cores(model, "broken").values():
            core.fill_(float("nan"))
    layer = next(iter(layers(model).values()))
    with pytest.raises(ValueError, match="broken"):
        layer.merge(safe_merge=True, adapter_names=["default", "broken"])
    assert torch.isfinite(layer.get_base_layer().weight).all()
    # whatever was written is also on record, so that unmerge can take it back
    assert layer.merged_adapters in ([], ["default"])
    if layer.merged:
        layer.unmerge()
    assert same(layer.get_base_layer().weight, MLP.base().up.weight)


@every_case
def test_merging_leaves_a_broken_bias_alone(case):
    model = case.peft("random", init_weights=False)
    for layer in layers(model).values():
        base = layer.get_base_layer()
        if getattr(base, "bias", None) is None:
            continue
        with torch.no_grad():
            base.bias[0] = float("inf")
        bias = base.bias.detach().clone()
        layer.merge(safe_merge=True)  # the update is on the weight alone
        assert torch.equal(base.bias, bias) and layer.merged


@every_basis
@every_case
def test_two_adapters_merged_together_or_alone(case, basis):
    if "modules_to_save" in case.arguments:
        case = Case(case.name, case.model, case.sample, {**case.arguments, "modules_to_save": None})
    model = case.peft(basis, init_weights=False)
    model.add_adapter("second", case.config(basis, init_weights=False))
    model.eval()
    first = run(model, case)
    model.set_adapter("second")
    second = run(model, case)
    assert not same(first, second, 1e-3)
    model.base_model.set_adapter(["default", "second"])
    both = run(model, case)
    model.set_adapter("default")

    twins = [copy.deepcopy(model) for _ in range(3)]
    assert same(run(twins[0].merge_and_unload(adapter_names=["second"]), case), second)
    assert same(run(twins[1].merge_and_unload(adapter_names=["default"]), case), first)
    assert same(run(twins[2].merge_and_unload(adapter_names=["second", "default"]), case), both, 1e-4)
    model.merge_adapter(["second"])
    assert all(layer.merged_adapters == ["second"] for layer in layers(model).values())
    assert same(run(model, case), second)


def test_merging_takes_a_list_of_names():
    model = MLP.peft("random", init_weights=False)
    with pytest.raises(TypeError, match="list of strings"):
        model.merge_adapter("default")
    assert not any(layer.merged for layer in layers(model).values())


def test_merging_one_more_warns_and_adds():
    model = MLP.peft("random", init_weights=False)
    model.add_adapter("second", MLP.config("random", init_weights=False))
    weights = base_weights(model)
    twin = copy.deepcopy(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="merged default. You are now additionally merging second"):
        model.merge_adapter(["second"])
    twin.merge_adapter(["default", "second"])
    assert same(run(model, MLP), run(twin, MLP))
    model.unmerge_adapter()
    assert all(same(weight, weights[name]) for name, weight in base_weights(model).items())


def test_switching_a_merged_model_unmerges_first():
    model = MLP.peft("random", init_weights=False)
    model.add_adapter("second", MLP.config("random", init_weights=False))
    model.eval()
    weights = base_weights(model)
    model.set_adapter("second")
    expected = run(model, MLP)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert all(same(weight, weights[name]) for name, weight in base_weights(model).items())
    assert same(run(model, MLP), expected)


@every_basis
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped_convolutions_are_exact(case, basis):
    # with groups, an output reads its own share of the channels only: the update has the weight's shape
    model = case.peft(basis, init_weights=False)
    adapted = run(model, case)
    assert not same(adapted, run(case.base(), case), 1e-4)
    learn(model, case)
    assert not same(adapted, run(model, case), 1e-4)
    adapted = run(model, case)
    model.merge_adapter()
    assert same(run(model, case), adapted)
    model.unmerge_adapter()
    assert same(run(model, case), adapted)


@every_basis
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize(("kind", "axes"), [(nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)])
def test_a_convolution_keeps_its_geometry(kind, axes, padding_mode, basis):
    shape = (4, *[8] * axes)

    def net():
        return ConvNet(kind(4, 5, 3, stride=2, padding=2, dilation=2, padding_mode=padding_mode), shape)

    case = Case("dilated", net, floats(2, *shape), {"target_modules": ["conv"]})
    model = case.peft(basis, init_weights=False)
    adapted = run(model, case)
    assert not same(adapted, run(case.base(), case), 1e-4)
    model.merge_adapter()
    assert same(run(model, case), adapted)


@pytest.mark.parametrize("basis", BASES)
def test_deleting_a_merged_adapter_is_refused(basis):
    model = MLP.peft(basis, "first", init_weights=False)
    model.add_adapter("second", MLP.config(basis, init_weights=False))
    model.set_adapter("second")
    model.merge_adapter()
    output = run(model, MLP)
    refusal = "Cannot delete adapter(s) ['second'] while they are merged. Please unmerge them first."
    with pytest.raises(ValueError, match=re.escape(refusal)):
        model.delete_adapter("second")
    assert set(model.peft_config) == {"first", "second"}
    assert all(layer.merged_adapters == ["second"] for layer in layers(model).values())
    model.delete_adapter("first")
    assert set(model.peft_config) == {"second"}
    assert torch.equal(run(model, MLP), output)
    model.unmerge_adapter()
    model.delete_adapter("second")
    assert not model.peft_config


def test_a_fresh_adapter_on_an_unloaded_model_gives_no_warning():
    model = MLP.peft("random", init_weights=False).merge_and_unload()
    with no_warning():
        again = get_peft_model(model, MLP.config("random"))
    assert set(cores(again)) == {"base_model.model.up", "base_model.model.down"}
