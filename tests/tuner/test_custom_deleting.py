"""Deleting adapters: active, inactive, unknown, the last; and nothing of them stays behind."""

from __future__ import annotations

import copy
from operator import attrgetter

import pytest
import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from .checks import every_basis, every_case, has_tuner_layers, layers, run, same
from .models import MLP, mined


def assert_gone(model, name: str) -> None:
    """No trace of the adapter in configs, layers or saved modules."""
    assert name not in model.peft_config
    for layer in layers(model).values():
        for container in (*layer.adapter_layer_names, *layer.other_param_names):
            assert name not in attrgetter(container)(layer), container
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            assert name not in module._adapters
        if isinstance(module, ModulesToSaveWrapper):
            assert name not in module.modules_to_save
    assert not [key for key in model.state_dict() if f".{name}." in key or key.endswith(f".{name}")]


@every_basis
@every_case
@pytest.mark.parametrize("was_active", [True, False])
def test_deleting(case, basis, was_active):
    base = run(case.base(), case)
    model = case.peft(basis, init_weights=False)
    expected = run(model, case)
    model.add_adapter("delete_me", case.config(basis, init_weights=False))
    if was_active:
        model.set_adapter("delete_me")
        with pytest.warns(UserWarning, match="delete_me was active which is now deleted"):
            model.delete_adapter("delete_me")
    else:
        model.delete_adapter("delete_me")
    assert_gone(model, "delete_me")
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model.eval(), case), expected)

    model.delete_adapter("default")
    assert_gone(model, "default")
    assert model.active_adapters == []
    assert torch.equal(run(model.base_model, case), base)


@every_case
def test_deleting_leaves_no_entry_in_any_container(case):
    model = case.peft("random", adapter="foobar")

    def holding(thing):
        found = {}
        for name in dir(thing):
            value = getattr(thing, name, None) if not name.startswith("_") else None
            if callable(getattr(value, "keys", None)) and hasattr(value, "__contains__") and "foobar" in value:
                found[name] = value
        return found

    before = [holding(layer) for layer in layers(model).values()]
    assert all("attrsub_M" in found for found in before)
    model.delete_adapter("foobar")
    for found in before:
        assert not [name for name, container in found.items() if "foobar" in container]


def test_deleting_an_unknown_adapter_is_refused():
    model = MLP.peft("random")
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.delete_adapter("nobody")
    assert list(model.peft_config) == ["default"]


def test_deleting_the_active_one_of_three():
    model = MLP.peft("random", adapter="first", init_weights=False)
    for name in ("second", "third"):
        model.add_adapter(name, MLP.config("random", init_weights=False))
    model.set_adapter("second")
    expected = run(model, MLP)
    model.set_adapter("first")
    model.delete_adapter("first")
    assert model.active_adapters == ["second"] and torch.equal(run(model, MLP), expected)
    model.delete_adapter("third")
    assert model.active_adapters == ["second"] and torch.equal(run(model, MLP), expected)


def test_deleting_one_of_two_that_share_a_basis_keeps_the_basis():
    model = MLP.peft(mined(MLP.base(), ["up", "down"]), dim=None, init_weights=False)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    expected = run(model, MLP)
    model.delete_adapter("default")
    assert torch.equal(run(model, MLP), expected)


def test_deleting_and_adding_again():
    model = MLP.peft("random", init_weights=False)
    model.delete_adapter("default")
    model.add_adapter("default", MLP.config("random"))
    model.set_adapter("default")
    assert same(run(model, MLP), run(MLP.base(), MLP), 1e-6)
    unloaded = model.unload()
    assert not has_tuner_layers(unloaded)


def test_deleting_with_modules_to_save():
    model = MLP.peft("random", "first", target_modules=["up"], modules_to_save=["down"], init_weights=False)
    model.add_adapter("second", MLP.config("random", target_modules=["up"], init_weights=False))
    third = MLP.config("random", target_modules=["up"], modules_to_save=["down"], init_weights=False)
    model.add_adapter("third", third)
    saved = model.base_model.model.down.modules_to_save
    assert set(saved) == {"first", "third"}
    for gone, active in (("first", ["second"]), ("second", ["third"])):
        model.delete_adapter(gone)
        assert model.active_adapters == active
        assert set(saved) == {"third"} and model.modules_to_save == {"down"}
        assert torch.isfinite(run(model, MLP)).all()
    model.delete_adapter("third")
    assert model.active_adapters == [] and model.modules_to_save is None and not saved
