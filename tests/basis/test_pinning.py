"""An adapter belongs to one basis: another digest, a lost folder or a damaged file is found on loading."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig, Basis, BasisError, random_basis


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))


@pytest.fixture
def adapter(tmp_path):
    """A trained adapter at tmp_path/adapter, pinned to the basis at tmp_path/basis."""
    random_basis(net(), 3, seed=1, modules=["0", "2"]).save_pretrained(tmp_path / "basis")
    model = get_peft_model(net(), AttrSubspaceConfig(basis=str(tmp_path / "basis")))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def load(adapter):
    return PeftModel.from_pretrained(net(), str(adapter))


def test_it_loads_before_anything_is_broken(adapter):
    x = torch.randn(4, 12)
    assert (load(adapter)(x) - net()(x)).abs().max() > 1e-3


def test_the_plain_type_name_loads_too(adapter):
    """peft_type "ATTRSUB" as PEFT's enum has it, whatever else the file may say there."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "ATTRSUB"}))
    x = torch.randn(4, 12)
    assert (load(adapter)(x) - net()(x)).abs().max() > 1e-3


def test_another_basis_under_the_same_name_is_refused_naming_both(adapter):
    folder = adapter.parent / "basis"
    pinned = Basis.from_pretrained(folder).digest
    other = random_basis(net(), 3, seed=2, modules=["0", "2"])
    other.save_pretrained(folder, overwrite=True)
    with pytest.raises(BasisError) as caught:
        load(adapter)
    text = str(caught.value)
    assert pinned[:8] in text and other.digest[:8] in text and "\n" not in text.strip()


def test_a_lost_basis_is_named(adapter):
    shutil.rmtree(adapter.parent / "basis")
    with pytest.raises(BasisError, match=str(adapter.parent / "basis")):
        load(adapter)


def test_a_damaged_basis_is_found_on_load(adapter):
    file = adapter.parent / "basis" / "basis.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(BasisError):
        load(adapter)


def test_an_edited_digest_in_the_basis_config_does_not_help(adapter):
    """Numbers changed and the recorded hashes with them: the pinned digest still differs."""
    folder = adapter.parent / "basis"
    pinned = Basis.from_pretrained(folder).digest
    random_basis(net(), 3, seed=2, modules=["0", "2"]).save_pretrained(folder, overwrite=True)
    path = folder / "basis_config.json"
    config = json.loads(path.read_text())
    config["digest"] = pinned
    del config["config_sha256"]
    path.write_text(json.dumps(config))
    with pytest.raises(BasisError):
        load(adapter)


def test_a_folder_moved_with_its_adapter(adapter, tmp_path):
    """save_basis=True: the adapter stands alone."""
    model = load(adapter)
    x = torch.randn(4, 12)
    expected = model(x)
    torch.manual_seed(0)
    config = AttrSubspaceConfig(basis=str(adapter.parent / "basis"), save_basis=True)
    alone = get_peft_model(net(), config)
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if "attrsub_M" in k}, strict=False)
    alone.save_pretrained(str(tmp_path / "alone"))
    shutil.rmtree(adapter.parent / "basis")
    torch.testing.assert_close(load(tmp_path / "alone")(x), expected)
