"""What an adapter reads of its basis: its modules, attributes and directions, and nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig, Basis, BasisError
from peft_attrsub.basis.ahead import ReadAhead
from peft_attrsub.basis.joint import orthonormalise

ATTRIBUTES = ("texture", "geometry", "camera", "lighting")
WIDTH, DIM = 80, 64


def base():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(WIDTH, WIDTH + 2 * (i % 2)) if not i % 2 else nn.Tanh() for i in range(11))
    ).eval()


LINEARS = [str(i) for i in range(0, 11, 2)]  # six of them
THIRD = ["4", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)

    def q():
        return torch.linalg.qr(torch.randn(WIDTH, DIM, generator=generator)).Q

    spectrum = torch.linspace(2, 1, DIM)
    made = Basis.from_factors({a: {m: (q(), spectrum.clone(), q()) for m in LINEARS} for a in ATTRIBUTES})
    path = tmp_path_factory.mktemp("basis") / "basis"
    made.save_pretrained(path)
    return str(path)


def expected(modules, attributes, rows):
    """Bytes of Ut, S and Vt in float32, `rows` directions each."""
    return len(modules) * len(attributes) * rows * (WIDTH + 1 + WIDTH) * 4


def config(folder, **changes):
    return AttrSubspaceConfig(basis=folder, init_weights=False, **changes)


PART = {"attributes": ["geometry", "texture"], "dim": 16, "target_modules": THIRD}


@pytest.mark.parametrize(
    ("changes", "modules", "attributes", "rows"),
    [
        ({}, LINEARS, ATTRIBUTES, DIM),
        (PART, THIRD, PART["attributes"], 16),
        ({"dim": 17, "target_modules": THIRD}, THIRD, ATTRIBUTES, 32),  # whole chunks of 16 carry a hash
        ({"target_modules": ["4"], "lora_modules": ["8"]}, ["4"], ATTRIBUTES, DIM),
    ],
    ids=["all", "2-of-4-attributes-16-of-64-a-third", "a-chunk-begun", "lora-beside"],
)
def test_a_new_and_a_loaded_adapter_read_what_they_use(folder, tmp_path, changes, modules, attributes, rows):
    model = get_peft_model(base(), config(folder, **changes)).eval()
    read = expected(modules, attributes, rows)
    assert model.basis_bytes_read == {"default": read}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True).eval()
    assert loaded.basis_bytes_read == {"default": read}
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(loaded(x), model(x))


def test_a_second_adapter_reads_only_what_is_not_there(folder, tmp_path):
    model = get_peft_model(base(), config(folder, **PART))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "same")
    model.add_adapter("wider", config(folder, **{**PART, "target_modules": [*THIRD, "0"]}))
    model.add_adapter("random", AttrSubspaceConfig(basis="random", dim=2, target_modules=THIRD))
    one = expected(["0"], PART["attributes"], 16)
    assert model.basis_bytes_read == {"default": 2 * one, "same": 0, "wider": one, "random": 0}
    model.delete_adapter("same")
    assert set(model.basis_bytes_read) == {"default", "wider", "random"}


def test_an_open_basis_counts_what_was_read_for_the_adapter(folder):
    basis = Basis.from_pretrained(folder)
    basis.factors("0", "texture")
    before = basis.bytes_read
    model = get_peft_model(base(), config(basis, **PART))
    assert model.basis_bytes_read["default"] == basis.bytes_read - before == expected(THIRD, PART["attributes"], 16)


def test_reading_ahead_changes_no_basis(folder):
    model = get_peft_model(base(), config(folder))
    basis = Basis.from_pretrained(folder)
    for name in LINEARS:
        factors = [basis.factors(name, attribute) for attribute in ATTRIBUTES]
        layer = model.base_model.model.get_submodule(name)
        for held, side in ((layer.attrsub_A, 0), (layer.attrsub_B, 2)):
            slow = orthonormalise({a: f[side] for a, f in zip(ATTRIBUTES, factors, strict=True)}).q
            assert torch.equal(held["default"], slow)
    assert not [t for t in threading.enumerate() if t.name.startswith("basis-reader")]


def test_damage_that_was_read_ahead_is_told_by_its_module(folder, tmp_path):
    Basis.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    file = tmp_path / "copy" / "basis.safetensors"
    whole = bytearray(file.read_bytes())
    spoilt = Basis.from_pretrained(folder).factors("6", "camera")[0][:, 3].contiguous().numpy().tobytes()
    whole[bytes(whole).index(spoilt)] ^= 1
    file.write_bytes(whole)
    with pytest.raises(BasisError, match=r"'camera', module '6'"):
        get_peft_model(base(), config(str(tmp_path / "copy")))
    assert not [t for t in threading.enumerate() if t.name.startswith("basis-reader")]


def test_read_ahead_gives_every_name_its_result_in_and_out_of_turn():
    calls = []

    def read(name):
        calls.append(name)
        if name == "bad":
            raise BasisError("bad")
        return name.upper()

    ahead = ReadAhead(read, ["a", "b", "c", "bad", "d"])
    assert [ahead.get(n) for n in ("a", "b", "z", "c")] == ["A", "B", "Z", "C"]
    with pytest.raises(BasisError):
        ahead.get("bad")
    assert ahead.get("d") == "D" and ahead.get("d") == "D"
    ahead.close()
    assert sorted(calls) == ["a", "b", "bad", "c", "d", "d", "z"], "each was read once for each time it was asked for"
