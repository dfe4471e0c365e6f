"""PEFT's suite for configs (tests/test_config.py), and what it comes down to: a config starts an adapter.

Copies, equality after a round trip of a trained adapter, and unknown keys are in tests/tuner/test_custom_config.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import peft.config
import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_attrsub import AttrSubspaceConfig, BasisError

from ..tuner.checks import same
from .subjects import WAYS, Family, Subject, saved

FAMILY = Family("LlamaForCausalLM", "Llama", ("q_proj", "down_proj"), "CAUSAL_LM")
#: Ways that a file can hold: a basis in memory exists in its process only.
ON_DISK = [way for way in WAYS if not way.startswith("memory")]
every_way = pytest.mark.parametrize("way", ON_DISK)


def config(way: str = "random", **more: object) -> AttrSubspaceConfig:
    return Subject(FAMILY, way).config(**more)


def start(config: PeftConfig) -> torch.Tensor:
    """The output of a new adapter of this config."""
    subject = Subject(FAMILY, "random")
    torch.manual_seed(0)
    return subject.output(get_peft_model(subject.base(), config).eval())


def record(folder: object) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_methods():
    for name in ("to_dict", "save_pretrained", "from_pretrained", "from_json_file"):
        assert callable(getattr(config(), name))


@pytest.mark.parametrize("task", [*TaskType, None])
def test_valid_task_type(task, tmp_path):
    made = config(task_type=task)
    assert made.task_type == task
    made.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).task_type == task


def test_invalid_task_type():
    with pytest.raises(ValueError, match="Invalid task type: 'invalid-task-type'"):
        config(task_type="invalid-task-type")


def test_from_peft_type():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ATTRSUB] is AttrSubspaceConfig
    for name in (PeftType.ATTRSUB, "ATTRSUB"):
        assert type(get_peft_config({"peft_type": name, "basis": "random"})) is AttrSubspaceConfig


@every_way
def test_from_pretrained(way, tmp_path):
    made = config(way)
    made.save_pretrained(tmp_path)
    for reader in (AttrSubspaceConfig, PeftConfig):
        again = reader.from_pretrained(tmp_path)
        assert type(again) is AttrSubspaceConfig and again.to_dict() == made.to_dict()
        assert same(start(again), start(config(way)), 1e-6)


@every_way
def test_from_pretrained_of_an_adapter(way, tmp_path):
    # The config in somebody's adapter starts a new one with the same arguments.
    Subject(FAMILY, way).peft().save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    again.inference_mode = False
    assert same(start(again), start(config(way)), 1e-6)


@every_way
def test_save_pretrained(way, tmp_path):
    made = config(way)
    before = made.to_dict()
    made.save_pretrained(tmp_path)
    assert made.to_dict() == before
    assert record(tmp_path)["base_model_name_or_path"] is None and record(tmp_path)["dim"] == before["dim"]


@every_way
def test_from_json_file(way, tmp_path):
    made = config(way)
    made.save_pretrained(tmp_path)
    read = AttrSubspaceConfig.from_json_file(str(tmp_path / "adapter_config.json"))
    assert get_peft_config(read).to_dict() == made.to_dict()


@pytest.mark.parametrize("way", WAYS)
def test_to_dict(way):
    made = config(way)
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()
    assert made.to_dict().keys() == {field.name for field in dataclasses.fields(made)}


@every_way
def test_set_attributes(way, tmp_path):
    made = config(way, peft_type="test")
    made.dropout, made.inference_mode = 0.25, True
    made.save_pretrained(tmp_path)
    again = AttrSubspaceConfig.from_pretrained(tmp_path)
    assert again.dropout == 0.25 and again.to_dict() == made.to_dict()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("way", WAYS)
def test_config_copy_deepcopy_and_pickle_roundtrip(way, copied):
    made = config(way)
    again = copied(made)
    assert again.to_dict() == made.to_dict() and again is not made
    assert same(start(again), start(config(way)), 1e-6)


def test_save_pretrained_with_runtime_config(tmp_path):
    # What belongs to the machine is not saved; ours is how the update is computed.
    config(forward_mode="folded").save_pretrained(tmp_path)
    assert "forward_mode" not in record(tmp_path)
    assert AttrSubspaceConfig.from_pretrained(tmp_path).forward_mode == "auto"


def test_save_pretrained_with_target_modules(tmp_path):
    made = config(target_modules=["a", "list"], exclude_modules=["b", "other"])
    made.save_pretrained(tmp_path)
    again = AttrSubspaceConfig.from_pretrained(tmp_path)
    assert again.to_dict() == made.to_dict()
    assert again.target_modules == {"a", "list"} and again.exclude_modules == {"b", "other"}
    assert config(target_modules=".*regex").target_modules == ".*regex"


def test_regex_with_layer_indexing_lora():
    for more in ({"layers_to_transform": [0]}, {"layers_to_transform": [0], "layers_pattern": ["layers"]}):
        with pytest.raises(ValueError, match=r"layers_to_transform.*target_modules"):
            config(target_modules=".*q_proj", **more)
    config(target_modules=["q_proj"], layers_pattern=["layers"], layers_to_transform=[0])


def test_lora_config_layers_to_transform_validation():
    with pytest.raises(ValueError, match=r"layers_pattern.*layers_to_transform"):
        config(target_modules=["q_proj"], layers_pattern="model.layers")
    made = config(target_modules=["q_proj"], layers_to_transform=[0, 1], layers_pattern="model.layers")
    assert made.layers_to_transform == [0, 1] and made.layers_pattern == "model.layers"


def test_config_layers_to_transform_index_zero():
    made = config(layers_to_transform=0, layers_pattern="layers")
    subject = Subject(FAMILY, "random")
    model = get_peft_model(subject.base(), made)
    assert {name.split(".layers.")[1][0] for name in model.targeted_module_names} == {"0"}


def test_from_pretrained_forward_compatible(tmp_path):
    made = config()
    made.save_pretrained(tmp_path)
    text = json.dumps({**record(tmp_path), "foobar": "baz", "spam": 123})
    (tmp_path / "adapter_config.json").write_text(text)
    for reader in (AttrSubspaceConfig, PeftConfig):
        with pytest.warns(UserWarning, match=r"\['foobar', 'spam'\] for class AttrSubspaceConfig") as told:
            again = reader.from_pretrained(tmp_path)
        assert len(told) == 1 and again.to_dict() == made.to_dict()


def test_from_pretrained_sanity_check(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar"}')
    with pytest.raises(TypeError, match=r"missing required keys.*peft_type"):
        AttrSubspaceConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("version", "commit", "stored"),
    [
        ("0.10", None, "0.10"),
        ("0.15.0.dev7", "abcdef012345", "0.15.0.dev7@abcdef012345"),
        ("1.dev0", None, "1.dev0@UNKNOWN"),
    ],
)
def test_peft_version_is_stored(version, commit, stored, monkeypatch, tmp_path):
    monkeypatch.setattr(peft.config, "__version__", version)
    monkeypatch.setattr(peft.config, "_get_commit_hash", lambda package: commit)
    made = config()
    made.save_pretrained(tmp_path)
    assert made.peft_version == record(tmp_path)["peft_version"] == stored
    monkeypatch.setattr(peft.config, "__version__", "9.9")
    assert PeftConfig.from_pretrained(tmp_path).peft_version == stored


def test_a_relative_basis_is_found_from_the_adapter_and_from_the_working_directory(tmp_path, monkeypatch):
    # Not one of PEFT's: its adapters name no other folder.
    basis = AttrSubspaceConfig(basis=saved(FAMILY)).open_basis()
    basis.save_pretrained(tmp_path / "work" / "basis")
    monkeypatch.chdir(tmp_path / "work")
    subject = Subject(FAMILY, "pointer")
    model = subject.peft(basis="basis")
    model.save_pretrained("adapter")
    expected = subject.output(model)
    assert same(subject.output(subject.load("adapter")), expected, 1e-6)
    (tmp_path / "work" / "basis").rename(tmp_path / "work" / "adapter" / "basis")
    monkeypatch.chdir(tmp_path)
    assert same(subject.output(subject.load("work/adapter")), expected, 1e-6)
    (tmp_path / "work" / "adapter" / "basis").rename(tmp_path / "elsewhere")
    with pytest.raises(BasisError, match="work/adapter"):
        PeftModel.from_pretrained(subject.base(), "work/adapter")
