"""Modules that get a plain LoRA beside the cores (lora_modules): the same demands, on parameters of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from .checks import (
    architecture,
    base_weights,
    every_basis,
    has_tuner_layers,
    layers,
    learn,
    run,
    same,
    trainable,
)
from .models import BY_NAME, MLP, PrefixNamed, X
from .models import Case as C

HEADS = [
    C("mlp", MLP.model, X, {"target_modules": ["up"], "lora_modules": ["down"]}),
    C("mlp-regex", MLP.model, X, {"target_modules": ["up"], "lora_modules": r".*down"}),
    C(
        "tokens",
        BY_NAME["embedding"].model,
        BY_NAME["embedding"].sample,
        {"target_modules": ["mix"], "lora_modules": ["tokens"]},
    ),
    C(
        "gpt",
        BY_NAME["embedding"].model,
        BY_NAME["embedding"].sample,
        {"target_modules": ["head"], "lora_modules": ["mix"]},
    ),
    C(
        "conv2d",
        BY_NAME["conv2d"].model,
        BY_NAME["conv2d"].sample,
        {"target_modules": ["head"], "lora_modules": ["conv"]},
    ),
    C(
        "conv3d",
        BY_NAME["conv3d"].model,
        BY_NAME["conv3d"].sample,
        {"target_modules": ["head"], "lora_modules": ["conv"]},
    ),
    C("prefixed", PrefixNamed, X, {"target_modules": ["up"], "lora_modules": ["attrsub_head"]}),
]
every_head = pytest.mark.parametrize("case", HEADS, ids=str)


def peft(case, basis, **more):
    """A model of the case with a LoRA of rank 2 and a scale of 3 / 2."""
    return case.peft(basis, **{"lora_rank": 2, "lora_alpha": 3, **more})


def lora_names(model) -> set[str]:
    """Names of the LoRA parameters."""
    return {name for name, _ in model.named_parameters() if ".attrsub_lora_" in name}


@every_basis
@every_head
def test_where_what_lands(case, basis):
    model = peft(case, basis)
    kinds = {
        name: ("default" in layer.attrsub_M, "default" in layer.attrsub_lora_A)
        for name, layer in layers(model).items()
    }
    assert sorted(kinds.values()) == [(False, True), (True, False)]
    (name,) = (name for name, kind in kinds.items() if kind == (False, True))
    layer = layers(model)[name]
    assert layer.attrsub_lora_A["default"].weight.shape[0] == layer.attrsub_lora_B["default"].weight.shape[1] == 2
    core = {name for name, _ in model.named_parameters() if name.endswith(".attrsub_M.default.weight")}
    assert len(core) == 1 and trainable(model) == lora_names(model) | core


@every_basis
@every_head
def test_no_op_then_trained_saved_loaded_merged(case, basis, tmp_path):
    base = run(case.base(), case)
    model = peft(case, basis)
    assert same(run(model, case), base, 1e-6)
    before = copy.deepcopy(model.state_dict())
    learn(model, case, steps=4)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trainable(model)
    trained = run(model, case)
    with model.disable_adapter():
        assert torch.equal(run(model, case), base)

    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low)
        assert not trainable(loaded)
        assert same(run(loaded, case), trained, 1e-6)
    fresh = peft(case, basis)
    assert not set_peft_model_state_dict(fresh, get_peft_model_state_dict(model)).unexpected_keys
    assert same(run(fresh, case), trained, 1e-6)

    weights, updates = base_weights(model), deltas_of_all(model)
    model.merge_adapter()
    assert all(same(weight, weights[name] + updates[name]) for name, weight in base_weights(model).items())
    assert same(run(model, case), trained)
    model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=True)
    assert same(run(merged, case), trained)
    assert architecture(merged) == architecture(case.base()) and not has_tuner_layers(merged)


def deltas_of_all(model) -> dict[str, torch.Tensor]:
    """The updates of cores and LoRAs alike."""
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers(model).items()}


@every_basis
@every_head
def test_init_weights_false_and_adding_up(case, basis):
    model = peft(case, basis, init_weights=False)
    assert all(delta.abs().max() > 1e-3 for delta in deltas_of_all(model).values())
    first = run(model, case)
    model.add_adapter("other", case.config(basis, lora_rank=3, init_weights=False))
    assert torch.equal(run(model, case), first)
    model.set_adapter("other")
    assert all(name.endswith(".other.weight") for name in trainable(model))
    second = run(model, case)
    model.base_model.set_adapter(["default", "other"])
    both = run(model, case)
    assert not same(both, first, 1e-4) and not same(both, second, 1e-4)
    model.merge_adapter()
    assert same(run(model, case), both, 1e-4)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert not [name for name in model.state_dict() if ".other" in name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_head
def test_half_precision(case, dtype):
    config = case.config("random", lora_rank=2, init_weights=False)
    model = get_peft_model(case.base(dtype), config).eval()
    assert {model.get_parameter(name).dtype for name in lora_names(model)} == {torch.float32}
    output = run(model, case, dtype)
    assert output.dtype == dtype and torch.isfinite(output).all()
    model.merge_adapter()
    assert same(run(model, case, dtype).float(), output.float(), 0.15)


@every_basis
def test_safe_merge_of_a_broken_lora_writes_nothing(basis):
    model = peft(HEADS[0], basis)
    layer = model.get_base_model().down
    with torch.no_grad():
        layer.attrsub_lora_B["default"].weight.fill_(float("nan"))
    weight = layer.get_base_layer().weight.detach().clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight) and not layer.merged


def test_a_lora_needs_no_basis():
    case = C("lora-only", MLP.model, X, {"lora_modules": ["up"]})
    model = case.peft(None, lora_rank=2, target_modules=[])
    assert [name for name in trainable(model) if "attrsub_M" in name] == []
    assert lora_names(model) == {f"base_model.model.up.attrsub_lora_{side}.default.weight" for side in "AB"}
