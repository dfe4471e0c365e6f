"""The method is a true member of PEFT's enum; without the package a saved adapter says what to do."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import peft_attrsub
from peft_attrsub import AttrSubspaceConfig, AttrSubspaceModel
from peft_attrsub.tuner import register, registration

from .models import MLP

ROOT = Path(__file__).resolve().parents[2]


def python(code, *args, package=True):
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if package else ""}
    command = [sys.executable, *(() if package else ("-P",)), "-c", code, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_true_member_of_the_enum():
    member = PeftType.ATTRSUB
    assert member is PeftType("ATTRSUB") is PeftType["ATTRSUB"]
    assert member in list(PeftType) and member == "ATTRSUB" and isinstance(member, PeftType)
    assert [m.name for m in PeftType].count("ATTRSUB") == 1
    assert pickle.loads(pickle.dumps(member)) is member


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register(AttrSubspaceConfig, AttrSubspaceModel)
    importlib.reload(peft_attrsub)
    assert list(PeftType) == before
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ATTRSUB] is AttrSubspaceConfig


def test_a_peft_that_owns_the_name_is_refused():
    code = """
from peft.utils.peft_types import PeftType
taken = str.__new__(PeftType, "ATTRSUB")
taken._name_ = taken._value_ = "ATTRSUB"
PeftType._member_map_["ATTRSUB"] = PeftType._value2member_map_["ATTRSUB"] = taken
PeftType._member_names_.append("ATTRSUB")
try:
    import peft_attrsub
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert done.stdout.count("\n") == 1 and "ATTRSUB" in done.stdout and "peft_attrsub" in done.stdout, done


def test_another_class_under_our_name_is_refused():
    with pytest.raises(RuntimeError, match="ATTRSUB"):
        register(PeftConfig, AttrSubspaceModel)


def test_loading_without_the_package_says_what_to_import(tmp_path):
    MLP.peft("random").save_pretrained(tmp_path / "adapter")
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = python(code, tmp_path / "adapter", package=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and "import peft_attrsub" in last and "pip install peft-attrsub" in last, last


def test_loading_with_the_package_in_a_fresh_process(tmp_path):
    MLP.peft("random").save_pretrained(tmp_path / "adapter")
    code = "import sys, peft_attrsub; from peft import PeftConfig; print(PeftConfig.from_pretrained(sys.argv[1]))"
    done = python(code, tmp_path / "adapter")
    assert done.returncode == 0 and "ATTRSUB" in done.stdout, done.stderr


def test_the_plain_name_is_read_too(tmp_path):
    MLP.peft("random").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = path.read_text()
    assert registration.SAVED_TYPE in text
    path.write_text(text.replace(registration.SAVED_TYPE, "ATTRSUB"))
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type is PeftType.ATTRSUB


def test_auto_classes_find_the_base_model_and_the_method(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    settings = AttrSubspaceConfig(basis="random", dim=4, task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, loaded.unload()(ids).logits)
