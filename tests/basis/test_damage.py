"""A basis whose files were cut, flipped, swapped or lost: found, and said in a sentence that names it."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from peft_attrsub import Basis, BasisError

from .helpers import make_basis


def read_everything(folder):
    basis = Basis.from_pretrained(folder)
    for module in basis.modules:
        for attribute in basis.attributes:
            basis.factors(module, attribute)
    basis.verify()


@pytest.mark.parametrize("keep", [0, 5, 60, 0.5, 0.99], ids=str)
def test_truncated_weights(saved, keep):
    file = saved / "basis.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(BasisError, match=re.escape("basis.safetensors")):
        read_everything(saved)


def tensor_offsets(file):
    """{tensor name: (first byte, last byte)} in a safetensors file, header included."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: tuple(8 + length + o for o in entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def test_a_flipped_bit_is_found_in_every_tensor(saved):
    file = saved / "basis.safetensors"
    original = file.read_bytes()
    unnoticed = []
    for name, (start, stop) in tensor_offsets(file).items():
        data = bytearray(original)
        data[(start + stop) // 2] ^= 0x01
        file.write_bytes(data)
        try:
            read_everything(saved)
            unnoticed.append(name)
        except BasisError:
            pass
    assert unnoticed == []


def test_verify_alone_finds_a_flipped_bit(saved):
    file = saved / "basis.safetensors"
    start, _ = tensor_offsets(file)["geometry.block.1.proj.Vt"]
    data = bytearray(file.read_bytes())
    data[start] ^= 0x01
    file.write_bytes(data)
    with pytest.raises(BasisError, match=r"geometry.*block\.1\.proj"):
        Basis.from_pretrained(saved).verify()


def test_foreign_safetensors_file(saved):
    save_file({"model.weight": torch.zeros(3)}, saved / "basis.safetensors")
    with pytest.raises(BasisError, match=f"{saved}.*tensor"):
        read_everything(saved)


def test_weights_of_another_basis(saved, tmp_path, tmp_path_factory):
    """Same names, same shapes, other numbers: only the digest can tell."""
    make_basis(tmp_path_factory.mktemp("other"), seed=1).save_pretrained(tmp_path / "other")
    (saved / "basis.safetensors").write_bytes((tmp_path / "other" / "basis.safetensors").read_bytes())
    with pytest.raises(BasisError):
        read_everything(saved)


@pytest.mark.parametrize("name", ["basis_config.json", "basis.safetensors"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(BasisError, match=re.escape(name)):
        read_everything(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}', '"basis"'])
def test_broken_config_is_named(saved, text):
    (saved / "basis_config.json").write_text(text)
    with pytest.raises(BasisError, match=re.escape("basis_config.json")):
        read_everything(saved)


def test_an_index_that_leaves_its_folder(saved, tmp_path):
    (saved / "basis.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"texture.block.0.fc.Ut": "../elsewhere.safetensors"}}
    (saved / "basis.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BasisError, match=r"index\.json.*outside"):
        read_everything(saved)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "null"])
def test_broken_index_is_named(saved, text):
    (saved / "basis.safetensors.index.json").write_text(text)
    with pytest.raises(BasisError, match=re.escape("basis.safetensors.index.json")):
        read_everything(saved)


def test_newer_format_is_refused(saved):
    path = saved / "basis_config.json"
    config = json.loads(path.read_text())
    assert config["format"] == 1
    config["format"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(BasisError, match="99"):
        read_everything(saved)


@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_no_basis_there(tmp_path, what):
    target = tmp_path / "nothing"
    if what == "empty":
        target.mkdir()
    if what == "file":
        target.write_text("hello")
    with pytest.raises(BasisError, match="nothing"):
        Basis.from_pretrained(target)
