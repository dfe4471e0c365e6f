"""Several adapters on one model: adding, switching, several at once."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from .checks import (
    activate,
    cores,
    deltas,
    every_basis,
    every_case,
    layers,
    learn,
    run,
    same,
)
from .models import AFFINE, MLP, STACK, pair

UP = {"target_modules": ["up"]}
PAIRS = [
    pytest.param(UP, UP, id="same"),
    pytest.param(UP, {"target_modules": ["down"]}, id="different"),
    pytest.param(UP, {"target_modules": ["up", "down"]}, id="overlapping"),
    pytest.param({**UP, "dim": 2}, {**UP, "dim": 4}, id="dims"),
    pytest.param({**UP, "scaling": 0.5}, {**UP, "scaling": 2.0}, id="scalings"),
    pytest.param({**UP, "basis": "random"}, {**UP, "basis": "psv"}, id="bases"),
    pytest.param({**UP, "seed": 1}, {**UP, "seed": 2}, id="seeds"),
]
every_pair = pytest.mark.parametrize(("one", "two"), PAIRS)


def outputs(model, case) -> tuple[torch.Tensor, ...]:
    """The outputs of the base model, of each adapter, and of both at once."""
    with model.disable_adapter():
        base = run(model, case)
    alone = []
    for name in ("one", "two"):
        model.set_adapter(name)
        alone.append(run(model, case))
    activate(model, ["one", "two"])
    return base, *alone, run(model, case)


@every_basis
@every_case
def test_active_adapter(case, basis):
    model = case.peft(basis)
    model.add_adapter("other", case.config(basis))
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    model.set_adapter("other")
    assert model.active_adapters == ["other"] and model.active_adapter == "other"
    assert all(layer.active_adapters == ["other"] for layer in layers(model).values())
    if "modules_to_save" in case.arguments:
        with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
            activate(model, ["default", "other"])
        return
    activate(model, ["default", "other"])
    assert model.active_adapters == model.base_model.active_adapter == ["default", "other"]
    assert all(layer.active_adapters == ["default", "other"] for layer in layers(model).values())


@every_basis
@every_pair
def test_each_adapter_is_itself_and_both_are_both(one, two, basis):
    model = pair(MLP, one, two, basis)
    base, first, second, both = outputs(model, MLP)
    assert len({tuple(output.flatten().tolist()) for output in (base, first, second, both)}) == 4
    for left, right in ((base, first), (base, second), (first, second), (first, both), (second, both)):
        assert not same(left, right, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, MLP), (base, first, second, both), strict=True))


@pytest.mark.parametrize(("one", "two"), [p for p in PAIRS if p.id not in ("different", "overlapping")])
def test_two_active_adapters_add_up(one, two):
    # f is affine in the update d of `up`: f(d1 + d2) - f(0) = (f(d1) - f(0)) + (f(d2) - f(0))
    base, first, second, both = outputs(pair(AFFINE, one, two), AFFINE)
    assert same(both - base, (first - base) + (second - base), 1e-4)


@every_basis
@every_pair
def test_both_merged_is_both_active(one, two, basis):
    model = pair(MLP, one, two, basis)
    base, first, second, both = outputs(model, MLP)
    twins = [copy.deepcopy(model) for _ in range(3)]

    model.merge_adapter()
    assert same(run(model, MLP), both, 1e-4)
    model.unmerge_adapter()
    assert same(run(model, MLP), both, 1e-4)
    with model.disable_adapter():
        assert same(run(model, MLP), base)

    twins[0].merge_adapter(["one"])
    twins[0].merge_adapter(["two"])
    assert same(run(twins[0], MLP), both, 1e-4)
    twins[0].unmerge_adapter()
    with twins[0].disable_adapter():
        assert same(run(twins[0], MLP), base)

    assert same(run(twins[1].merge_and_unload(adapter_names=["one"]), MLP), first)
    assert same(run(twins[2].merge_and_unload(adapter_names=["two"]), MLP), second)


@every_basis
@every_case
def test_adding_an_adapter_leaves_the_others_alone(case, basis):
    model = case.peft(basis, init_weights=False)
    learn(model, case)
    before, update, output = copy.deepcopy(model.state_dict()), deltas(model), run(model, case)
    config = model.peft_config["default"]
    model.add_adapter("other", case.config(basis, init_weights=False, seed=5))
    assert model.peft_config["default"] is config
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model, case), output)
    assert before.keys() <= model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(deltas(model)[name], delta) for name, delta in update.items())


@every_basis
@every_case
def test_the_same_config_twice_gives_two_adapters(case, basis):
    config = case.config(basis, init_weights=False)
    model = case.peft(basis, init_weights=False)
    model.add_adapter("other", config)
    for name, core in cores(model, "other").items():
        assert not same(core.detach(), cores(model)[name].detach(), 1e-3)


def test_training_one_adapter_leaves_the_other_alone():
    model = pair(MLP, {"target_modules": ["up"]}, {"target_modules": ["up", "down"]})
    before = copy.deepcopy(model.state_dict())
    model.set_adapter("two")
    learn(model, MLP)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"base_model.model.{name}.attrsub_M.two.weight" for name in ("up", "down")}


def test_partly_overlapping_targets_are_active_everywhere():
    model = STACK.peft("random", target_modules=["layers.0.up", "layers.1.up"])
    model.add_adapter("other", STACK.config("random", target_modules=["layers.1.up", "layers.2.up"]))
    assert len(layers(model)) == 3
    assert [len(cores(model, name)) for name in ("default", "other")] == [2, 2]
    for switch in (model.set_adapter, model.base_model.set_adapter):
        for name in ("default", "other", "default"):
            switch(name)
            assert model.base_model.active_adapters == [name]
            assert all(layer.active_adapters == [name] for layer in layers(model).values())


def test_a_psv_basis_is_that_of_the_base_weight_even_while_another_adapter_is_merged():
    expected = MLP.peft("psv", dim=4, init_weights=False)
    model = MLP.peft("random", init_weights=False)
    model.merge_adapter()
    model.add_adapter("later", MLP.config("psv", dim=4))
    with torch.no_grad():
        for name, core in cores(model, "later").items():
            core.copy_(cores(expected)[name])
    for name, delta in deltas(model, "later").items():
        assert same(delta, deltas(expected)[name], 1e-4)


def test_a_taken_name_is_refused():
    model = MLP.peft("random", init_weights=False)
    config, before = model.peft_config["default"], copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", MLP.config("random", dim=2))
    assert model.peft_config["default"] is config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_setting_an_unknown_adapter_is_refused():
    model = MLP.peft("random")
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")
    assert model.active_adapters == ["default"]


def test_another_method_on_the_same_model_is_refused():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        MLP.peft("random").add_adapter("another", LoraConfig(target_modules=["up"]))


@every_basis
def test_modules_to_save_of_one_adapter_only(basis):
    for saving in ("one", "two"):
        arguments = {name: {"target_modules": ["up"]} for name in ("one", "two")}
        arguments[saving]["modules_to_save"] = ["down"]
        model = pair(MLP, arguments["one"], arguments["two"], basis)
        assert list(model.base_model.model.down.modules_to_save) == [saving]
        seen = []
        for name in ("one", "two", "one"):
            model.set_adapter(name)
            assert model.base_model.model.down.active_adapters == ([name] if name == saving else [])
            seen.append(run(model, MLP))
        assert torch.equal(seen[0], seen[2]) and not same(seen[0], seen[1], 1e-3)


@every_basis
def test_saved_modules_that_do_not_meet_may_be_active_together(basis):
    model = STACK.peft(basis, "one", target_modules=["layers.0.up"], modules_to_save=["layers.0.down"])
    more = {"target_modules": ["layers.0.up"], "modules_to_save": ["layers.1.down"]}
    model.add_adapter("two", STACK.config(basis, **more))
    activate(model, ["one", "two"])
    blocks = model.base_model.model.body["layers"]
    assert [blocks[i].down.active_adapters for i in (0, 1)] == [["one"], ["two"]]


@every_basis
def test_saved_modules_that_meet_may_not(basis):
    model = STACK.peft(basis, "one", target_modules=["lift.0"], modules_to_save=["layers.0.down", "head"])
    more = {"target_modules": ["lift.0"], "modules_to_save": ["layers.2.down", "head"]}
    model.add_adapter("two", STACK.config(basis, **more))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        activate(model, ["one", "two"])


def test_configs_of_adapters_are_apart():
    model = pair(MLP, {"dim": 2}, {"dim": 4})
    assert [model.peft_config[name].dim for name in ("one", "two")] == [2, 4]
    assert {tuple(core.shape) for core in cores(model, "one").values()} == {(2, 2)}
    assert {tuple(core.shape) for core in cores(model, "two").values()} == {(4, 4)}
