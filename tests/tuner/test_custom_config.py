"""The config as data, and what a model says of itself: repr, status, counts, warnings about names."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from peft import PeftConfig, PeftModel, get_layer_status, get_model_status, get_peft_config, get_peft_model
from peft.utils import PeftType

from peft_attrsub import AttrSubspaceConfig

from .checks import cores, every_basis, every_case, layers, no_warning, run, same
from .models import BASES, BY_NAME, MLP, PREFIXED, pair


@every_basis
@every_case
def test_a_config_survives_every_way_of_copying(case, basis, tmp_path):
    config = case.config(basis, init_weights=False, seed=4)
    expected = config.to_dict()
    assert json.loads(json.dumps(expected)) == expected
    config.save_pretrained(tmp_path)
    twins = [
        AttrSubspaceConfig(**expected),
        get_peft_config(dict(expected)),
        AttrSubspaceConfig.from_pretrained(tmp_path),
        PeftConfig.from_pretrained(tmp_path),
        copy.copy(config),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        replace(config),
    ]
    for twin in twins:
        assert type(twin) is AttrSubspaceConfig and twin.peft_type is PeftType.ATTRSUB
        record = twin.to_dict()
        assert {key: record[key] for key in expected if key != "basis_in_adapter"} == {
            key: value for key, value in expected.items() if key != "basis_in_adapter"
        }
    assert replace(config, dim=7).dim == 7


def test_defaults_are_those_of_the_contract():
    config = AttrSubspaceConfig(basis="random")
    expected = {
        "attributes": None,
        "basis_revision": None,
        "columns": "orthonormal",
        "core": "full",
        "dim": None,
        "dropout": 0.0,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 16,
        "lora_modules": None,
        "lora_rank": 16,
        "missing": "error",
        "modules_to_save": None,
        "save_basis": "auto",
        "scaling": 1.0,
        "seed": 0,
        "target_modules": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("basis", BASES)
def test_one_config_serves_several_models(basis):
    config = MLP.config(basis)
    models = [get_peft_model(MLP.base(), config) for _ in range(2)]
    models[0].add_adapter("other", config)
    assert all(set(cores(model)) == set(cores(models[0])) for model in models)


@pytest.mark.parametrize(
    ("name", "module", "texts"),
    [
        ("mlp", "up", ["attrsub.Linear(", "in_features=12, out_features=20", "(default): Core(3x3)"]),
        ("gpt-conv1d", "mix", ["attrsub.Linear(", "Conv1D", "default"]),
        ("embedding", "tokens", ["attrsub.Embedding(", "Embedding(30, 8)", "default"]),
        ("conv1d", "conv", ["attrsub.Conv1d(", "4, 6, kernel_size=(3,)", "default"]),
        ("conv2d", "conv", ["attrsub.Conv2d(", "4, 8, kernel_size=(3, 3)", "stride=(2, 2)", "default"]),
        ("conv3d", "conv", ["attrsub.Conv3d(", "3, 7, kernel_size=(3, 3, 3)", "default"]),
    ],
)
def test_repr(name, module, texts):
    shown = repr(BY_NAME[name].peft("random").get_base_model().get_submodule(module))
    assert shown.startswith(texts[0])
    assert all(text in shown for text in [*texts, "base_layer", "attrsub_M"])


@every_basis
@every_case
def test_layer_status(case, basis):
    model = case.peft(basis)
    model.add_adapter("other", case.config(basis))
    status = {entry.name: entry for entry in get_layer_status(model) if entry.module_type.startswith("attrsub.")}
    assert {f"base_model.{name}" for name in status} == set(layers(model))
    for entry in status.values():
        assert entry.enabled and entry.merged_adapters == [] and entry.active_adapters == ["default"]
        assert entry.available_adapters == ["default", "other"]
        assert entry.requires_grad == {"default": True, "other": False}
        assert entry.devices == {"default": ["cpu"], "other": ["cpu"]}
        assert entry.quantization_backend is None
    assert get_layer_status(model) == model.get_layer_status()


@pytest.mark.parametrize("basis", BASES)
def test_model_status(basis):
    model = pair(MLP, {"target_modules": ["up"]}, {"target_modules": ["up", "down"]}, basis)
    status = model.get_model_status()
    assert status == get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type) == ("Mlp", "AttrSubspaceModel")
    assert status.peft_types == {"one": "ATTRSUB", "two": "ATTRSUB"}
    assert (status.trainable_params, status.num_adapter_layers) == (9, 2)
    assert status.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert status.enabled is True and status.active_adapters == ["one"] and status.merged_adapters == []
    assert status.requires_grad == {"one": True, "two": False}
    assert status.available_adapters == ["one", "two"]

    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    model.enable_adapter_layers()
    model.set_adapter("two")
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["two"]
    next(iter(layers(model).values())).unmerge()
    assert model.get_model_status().merged_adapters == "irregular"


def test_print_trainable_parameters(capsys):
    model = MLP.peft("random", dim=2)
    assert model.get_nb_trainable_parameters() == (8, sum(p.numel() for p in MLP.base().parameters()) + 8)
    model.print_trainable_parameters()
    assert "trainable params: 8 ||" in capsys.readouterr().out


def test_a_name_inside_the_prefix_warns_and_still_works(tmp_path):
    with pytest.warns(UserWarning, match="'attrsub' should not be contained in the prefix 'attrsub_'"):
        model = MLP.peft("random", adapter="attrsub", init_weights=False)
    with pytest.warns(UserWarning, match="'sub' should not be contained in the prefix 'attrsub_'"):
        model.add_adapter("sub", MLP.config("random"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.base(), tmp_path / "attrsub", adapter_name="attrsub")
    assert same(run(loaded, MLP), run(model, MLP), 1e-6)


def test_other_names_do_not_warn():
    with no_warning():
        model = MLP.peft("random", adapter="texture")
        model.add_adapter("attrsub_and_more", MLP.config("random"))
        run(model, MLP)


def test_a_base_model_with_the_prefix_in_its_names(tmp_path):
    case = PREFIXED
    model = case.peft("random", target_modules=["up"], init_weights=False)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "base_model.model.attrsub_trunk.up.attrsub_M.default.weight"
    ]
    expected = run(model, case)
    model.save_pretrained(tmp_path)
    base = case.base()
    with torch.no_grad():
        base.attrsub_head.bias.add_(1.0)  # of the base, so it must not come out of the adapter's file
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert same(run(loaded, case), expected + 1.0)
    assert same(run(loaded.merge_and_unload(), case), expected + 1.0)


def test_a_gpt_conv1d_needs_no_hint_about_its_layout():
    case = BY_NAME["gpt-conv1d"]
    plain, hinted = (case.peft("psv", init_weights=False, fan_in_fan_out=flag) for flag in (False, True))
    assert torch.equal(run(plain, case), run(hinted, case))


def test_a_wrong_hint_about_the_layout_warns():
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = MLP.peft("psv", fan_in_fan_out=True, init_weights=False)
    assert same(run(model, MLP), run(MLP.peft("psv", init_weights=False), MLP), 1e-6)
