"""Saving and loading adapters as files: what is written, and that what comes back is what went in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_attrsub import AttrSubspaceConfig

from .checks import cores, deltas, every_basis, every_case, layers, learn, no_warning, run, same
from .models import BASES, MLP, Case, TokenModel, ids, mined


def trained(case: Case, basis, **more) -> PeftModel:
    """A model whose cores are not zero: an untrained adapter proves nothing about saving."""
    model = case.peft(basis, init_weights=False, **more)
    learn(model, case)
    return model


def reload(case: Case, folder: Path, **options) -> PeftModel:
    """The saved adapter on a fresh base, under another global seed than it was made with."""
    base = case.base()
    torch.manual_seed(54321)
    with no_warning("missing adapter keys", "unexpected"):
        return PeftModel.from_pretrained(base, folder, **options)


@every_basis
@every_case
def test_what_is_saved_comes_back(case, basis, tmp_path):
    model = trained(case, basis)
    expected = run(model, case)
    assert not same(expected, run(case.base(), case), 1e-4)
    model.save_pretrained(tmp_path)

    loaded = reload(case, tmp_path)
    assert same(run(loaded, case), expected, 1e-6)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for name, delta in deltas(model).items():
        assert same(deltas(loaded)[name], delta, 1e-6)


@every_basis
@every_case
def test_what_is_written(case, basis, tmp_path):
    case.peft(basis).save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= written
    assert not written & {"adapter_model.bin", "model.safetensors", "pytorch_model.bin", "config.json"}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    saved = tuple(f"base_model.model.{name}." for name in case.arguments.get("modules_to_save") or [])
    of_base = {f"base_model.model.{name}" for name in case.base().state_dict()}
    assert all(saved and name.startswith(saved) for name in of_base & tensors.keys())
    assert not any("default" in name or "base_layer" in name for name in tensors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"].startswith("ATTRSUB") and config["inference_mode"] is True
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and len(card) > 1000


@every_basis
@every_case
def test_pickle_format(case, basis, tmp_path):
    model = trained(case, basis)
    model.save_pretrained(tmp_path, safe_serialization=False)
    written = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.bin" in written and "adapter_model.safetensors" not in written
    assert same(run(reload(case, tmp_path), case), run(model, case), 1e-6)


@every_basis
@every_case
def test_a_passed_config_is_the_one_used(case, basis, tmp_path):
    config = case.config(basis, init_weights=False)
    model = get_peft_model(case.base(), config).eval()
    expected = run(model, case)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=False, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode is True
    assert same(run(loaded, case), expected, 1e-6)


@every_basis
@every_case
def test_saving_leaves_the_model_as_it_was(case, basis, tmp_path):
    model = trained(case, basis)
    config, output = model.peft_config["default"].to_dict(), run(model, case)
    grads = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == config
    assert model.peft_config["default"].inference_mode is False
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == grads
    assert torch.equal(run(model, case), output)


@every_basis
@every_case
def test_several_adapters_go_to_folders_of_their_own(case, basis, tmp_path):
    model = trained(case, basis)
    model.add_adapter("other", case.config(basis, init_weights=False))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        assert (folder / "adapter_model.safetensors").exists() and (folder / "adapter_config.json").exists()
    loaded = reload(case, tmp_path)
    result = loaded.load_adapter(tmp_path / "other", "other")
    assert not result.missing_keys and not result.unexpected_keys
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert same(run(loaded.eval(), case), run(model.eval(), case), 1e-6)


@every_basis
def test_selected_adapters(basis, tmp_path):
    model = trained(MLP, basis)
    model.add_adapter("other", MLP.config(basis, init_weights=False))
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert list(reload(MLP, tmp_path / "one").peft_config) == ["default"]
    assert not (tmp_path / "one" / "other").exists()
    model.save_pretrained(tmp_path / "two", selected_adapters=["other"])
    assert not (tmp_path / "two" / "adapter_config.json").exists()
    assert (tmp_path / "two" / "other" / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path / "three", selected_adapters=["nobody"])


@every_basis
@every_case
def test_a_name_inside_another_name_is_not_saved_along(case, basis, tmp_path):
    model = trained(case, basis)
    model.save_pretrained(tmp_path / "alone", selected_adapters=["default"])
    for other in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(other, case.config(basis, init_weights=False))
    model.save_pretrained(tmp_path / "among", selected_adapters=["default"])
    alone = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    among = load_file(tmp_path / "among" / "adapter_model.safetensors")
    assert alone.keys() == among.keys()
    assert all(torch.equal(among[name], value) for name, value in alone.items())


@every_basis
@every_case
def test_one_file_under_several_names(case, basis, tmp_path):
    model = trained(case, basis)
    model.save_pretrained(tmp_path)
    loaded = reload(case, tmp_path, adapter_name="first")
    for name in ("second", "yet-another"):
        result = loaded.load_adapter(tmp_path, adapter_name=name)
        assert not result.missing_keys and not result.unexpected_keys
    for name in ("first", "second", "yet-another"):
        loaded.set_adapter(name)
        assert same(run(loaded, case), run(model, case), 1e-6)


@every_basis
@every_case
def test_low_cpu_mem_usage(case, basis, tmp_path):
    model = trained(case, basis)
    model.save_pretrained(tmp_path)
    loaded = reload(case, tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    for adapter in ("default", "other"):
        loaded.set_adapter(adapter)
        assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
        assert same(run(loaded, case), run(model, case), 1e-6)
    loaded.merge_adapter()
    assert same(run(loaded, case), run(model, case))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_case
def test_a_basis_that_is_made_again_from_its_seed(case, low_cpu_mem_usage, tmp_path):
    model = trained(case, "random", save_basis=False, seed=3)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert not [name for name in names if name.endswith((".attrsub_A", ".attrsub_B"))]
    loaded = reload(case, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage)
    for adapter in ("default", "other"):
        loaded.set_adapter(adapter)
        assert same(run(loaded, case), run(model, case), 1e-6)
        assert all(same(deltas(loaded, adapter)[name], delta, 1e-6) for name, delta in deltas(model).items())


@pytest.mark.parametrize("options", [{"device_map": {"": "cpu"}}, {"torch_device": "cpu"}], ids=str)
@every_basis
def test_devices(basis, options, tmp_path):
    model = trained(MLP, basis)
    model.save_pretrained(tmp_path)
    assert same(run(reload(MLP, tmp_path, **options), MLP), run(model, MLP), 1e-6)


@every_basis
def test_loading_takes_the_right_class_and_mode(basis, tmp_path):
    trained(MLP, basis, dropout=0.4).save_pretrained(tmp_path)
    config = AttrSubspaceConfig.from_pretrained(tmp_path)
    assert isinstance(config, AttrSubspaceConfig) and config.dropout == 0.4
    loaded = reload(MLP, tmp_path)
    assert isinstance(loaded.peft_config["default"], AttrSubspaceConfig)
    assert not loaded.training  # loaded for inference: no dropout
    assert torch.equal(run(loaded, MLP), run(loaded, MLP))


@every_basis
def test_a_second_save_writes_the_same_bytes(basis, tmp_path):
    model = trained(MLP, basis)
    model.save_pretrained(tmp_path / "a")
    reload(MLP, tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (tmp_path / folder / name for folder in "ab")
        assert first.read_bytes() == second.read_bytes(), name


def test_only_the_main_process_writes(tmp_path):
    MLP.peft("random").save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not os.path.exists(tmp_path / "adapter" / "adapter_model.safetensors")


def test_an_existing_model_card_is_extended(tmp_path):
    (tmp_path / "README.md").write_text("---\nmeta: mine\n---\nWritten by hand.\n")
    MLP.peft("random").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "meta: mine" in card and "Written by hand." in card and "library_name: peft" in card


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_basis
def test_a_resized_embedding_is_not_loaded_in_silence(basis, low_cpu_mem_usage, tmp_path):
    # the core has no row per token: only the basis shows that the embedding is not the one it was trained on
    small = Case("tokens", TokenModel, ids(6, 5), {"target_modules": ["tokens"]})
    large = Case("tokens", lambda: TokenModel(tokens=35), ids(6, 5), {"target_modules": ["tokens"]})
    trained(small, basis, save_basis=True).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"30[\s\S]*35|35[\s\S]*30"):
        PeftModel.from_pretrained(large.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@every_basis
def test_a_layer_of_another_width_is_not_loaded_in_silence(basis, tmp_path):
    trained(MLP, basis, target_modules=["up"]).save_pretrained(tmp_path)
    base = MLP.base()
    base.up, base.down = torch.nn.Linear(12, 24), torch.nn.Linear(24, 4)
    with pytest.raises((ValueError, RuntimeError), match=r"20[\s\S]*24|24[\s\S]*20"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_basis_held_in_memory_travels_with_the_adapter(tmp_path):
    model = trained(MLP, mined(MLP.base(), ["up", "down"]), dim=None)
    assert {tuple(core.shape) for core in cores(model).values()} == {(4, 4)}
    model.save_pretrained(tmp_path)
    loaded = reload(MLP, tmp_path)
    assert same(run(loaded, MLP), run(model, MLP), 1e-6)
    assert all(same(deltas(loaded)[name], delta, 1e-6) for name, delta in deltas(model).items())
    low = reload(MLP, tmp_path, low_cpu_mem_usage=True)
    low.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    low.set_adapter("again")
    assert same(run(low, MLP), run(model, MLP), 1e-6)


def test_a_custom_model_has_no_embedding_layers_to_save(tmp_path):
    case = Case("tokens", TokenModel, ids(6, 5), {"target_modules": ["tokens"]})
    with pytest.warns(UserWarning, match="Could not identify embedding layer"):
        trained(case, "random").save_pretrained(tmp_path, save_embedding_layers=True)
    assert not any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@every_basis
@every_case
def test_ignoring_mismatched_sizes_ignores_nothing_that_matches(case, basis, tmp_path):
    model = trained(case, basis)
    model.save_pretrained(tmp_path)
    loaded = reload(case, tmp_path, ignore_mismatched_sizes=True)
    assert same(run(loaded, case), run(model, case), 1e-6)


@every_basis
def test_saved_modules_may_hold_scalars(basis, tmp_path):
    def base():
        model = MLP.base()
        model.drop = torch.nn.BatchNorm1d(20)
        return model.eval()

    config = MLP.config(basis, target_modules=["up"], modules_to_save=["drop"], init_weights=False)
    model = get_peft_model(base(), config)
    model.base_model.model.drop.modules_to_save["default"].num_batches_tracked.fill_(7)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, ignore_mismatched_sizes=True)
    assert loaded.base_model.model.drop.modules_to_save["default"].num_batches_tracked.item() == 7
    assert same(run(loaded, MLP), run(model.eval(), MLP), 1e-6)


def test_training_goes_on_after_loading(tmp_path):
    model = trained(MLP, "random")
    model.save_pretrained(tmp_path)
    loaded = reload(MLP, tmp_path, is_trainable=True)
    assert same(run(loaded.eval(), MLP), run(model, MLP), 1e-6)
    learn(model, MLP)
    learn(loaded, MLP)
    assert all(same(core, cores(model)[name]) for name, core in cores(loaded).items())
    assert len(layers(loaded)) == 2


@pytest.mark.parametrize("basis", BASES)
def test_an_adapter_for_other_modules_says_which(basis, tmp_path):
    trained(MLP, basis).save_pretrained(tmp_path)
    token = Case("tokens", TokenModel, ids(6, 5))
    with pytest.raises(ValueError, match="up"):
        PeftModel.from_pretrained(token.base(), tmp_path)
