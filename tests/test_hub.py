"""Hub ids stand wherever folders do: adapters to mine, a basis to tune in, an adapter to load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_attrsub import build_basis

from .hub import COMMIT, serve

ROOT = Path(__file__).resolve().parents[1]

MODEL = """
import sys, torch
from torch import nn
from peft import PeftModel, get_peft_model
from peft_attrsub import AttrSubspaceConfig, Basis, BasisError, build_basis
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
x = torch.arange(32.0).reshape(2, 16) / 32
"""


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4))


@pytest.fixture
def hub(tmp_path):
    root = tmp_path / "hub"
    for i in range(2):
        lora = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        get_peft_model(base(), lora).save_pretrained(root / "someone" / f"texture-{i}")
    adapters = [root / "someone" / f"texture-{i}" for i in range(2)]
    build_basis(adapters, dim=2).save_pretrained(root / "someone" / "basis")
    with serve(root) as (address, asked):
        yield root, address, asked


def python(code, address, home, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HOME": str(home)}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)
    environment["HF_HUB_DISABLE_XET"] = "1"
    command = [sys.executable, "-c", MODEL + code, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_mine_tune_save_and_load_by_hub_id(hub, tmp_path):
    root, address, _ = hub
    code = """
basis = build_basis(["someone/texture-0", "someone/texture-1@main"], dim=2, progress=False)
assert basis.digest == Basis.from_pretrained("someone/basis").digest
print([s.revision for s in basis.config.attributes[0].sources])
model = get_peft_model(base(), AttrSubspaceConfig(basis="someone/basis", basis_revision="main", init_weights=False))
model.save_pretrained(sys.argv[1])
torch.save(model(x), sys.argv[2])
"""
    done = python(code, address, tmp_path / "home", root / "someone" / "adapter", tmp_path / "y.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([COMMIT, COMMIT])
    config = json.loads((root / "someone" / "adapter" / "adapter_config.json").read_text())
    assert (config["basis"], config["basis_revision"]) == ("someone/basis", COMMIT)
    code = """
model = PeftModel.from_pretrained(base(), "someone/adapter")
assert torch.equal(model(x), torch.load(sys.argv[1]))
"""
    done = python(code, address, tmp_path / "another-home", tmp_path / "y.pt")
    assert done.returncode == 0, done.stderr


def test_only_safetensors_json_and_markdown_are_fetched(hub, tmp_path):
    root, address, asked = hub
    (root / "someone" / "basis" / "setup.py").write_text("print('not this')")
    (root / "someone" / "basis" / "basis.bin").write_bytes(b"nor this")
    done = python('Basis.from_pretrained("someone/basis").verify()', address, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    fetched = {line.rpartition("/")[2] for line in asked if "/resolve/" in line}
    assert fetched == {"README.md", "basis.safetensors", "basis_config.json"}


@pytest.mark.parametrize("name", ["someone/nothing", "someone/basis@no-such-branch"])
def test_what_the_hub_does_not_have_is_one_sentence(hub, tmp_path, name):
    _, address, _ = hub
    code = "try: Basis.from_pretrained(sys.argv[1])\nexcept BasisError as error: print(error)"
    done = python(code, address, tmp_path / "home", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and name.partition("@")[0] in done.stdout, done.stdout
