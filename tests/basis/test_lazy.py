"""A basis on disk is opened without reading it; what is asked for is read, checked, and nothing else."""

import os
import sys

import pytest
import safetensors
import torch

from peft_attrsub import Basis, BasisError

from .helpers import ATTRIBUTES, SHAPES, orthonormal


@pytest.fixture
def reads(monkeypatch):
    """{tensor name: rows} that leave the disk through safetensors, whoever asks."""
    rows = {}
    real = safetensors.safe_open

    class SpySlice:  # asking for a shape reads the header only
        def __init__(self, name, view):
            self.name, self.view = name, view

        def __getitem__(self, index):
            part = self.view[index]
            rows[self.name] = part.shape[0]
            return part

        def __getattr__(self, attribute):
            return getattr(self.view, attribute)

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            whole = self.file.get_tensor(name)
            rows[name] = whole.shape[0]
            return whole

        def get_slice(self, name):
            return SpySlice(name, self.file.get_slice(name))

        def __getattr__(self, name):
            return getattr(self.file, name)

    for module in list(sys.modules.values()):
        if getattr(module, "safe_open", None) is real:
            monkeypatch.setattr(module, "safe_open", Spy)
    return rows


def test_only_what_is_asked_for_is_read(saved, reads):
    basis = Basis.from_pretrained(saved)
    assert basis.attributes == ATTRIBUTES and sorted(basis.modules) == sorted(SHAPES)
    repr(basis)
    assert reads == {}, "opening, listing and printing a basis must read no tensor"
    basis.factors("block.0.fc", "geometry")
    assert 1 <= len(reads) <= 3
    assert all("block.0.fc" in name and "geometry" in name for name in reads)


def test_joint_reads_only_its_module_and_attributes(saved, reads):
    Basis.from_pretrained(saved).joint("block.1.proj", ["texture"])
    assert reads and all("block.1.proj" in name and "texture" in name for name in reads)


def test_select_stays_lazy(saved, reads):
    small = Basis.from_pretrained(saved).select(attributes=["texture"], dim=2, modules=["block.0.fc"])
    assert reads == {}
    small.factors("block.0.fc", "texture")
    assert reads and all("block.0.fc" in name and "texture" in name for name in reads)


# ---- in part, by direction ----

DIMS = [1, 15, 16, 17, 32, 33, 40]


@pytest.fixture
def wide(tmp_path):
    """Forty directions: more than one hash covers."""
    generator = torch.Generator().manual_seed(0)
    S = torch.linspace(2, 1, 40)
    factors = (orthonormal(60, 40, generator).float(), S, orthonormal(50, 40, generator).float())
    basis = Basis.from_factors({"x": {"fc": factors}})
    basis.save_pretrained(tmp_path / "wide")
    return basis, tmp_path / "wide"


@pytest.mark.parametrize("dim", DIMS)
def test_fewer_directions_are_the_leading_ones(wide, tmp_path, dim):
    basis, folder = wide
    part = Basis.from_pretrained(folder).select(dim=dim)
    for got, whole in zip(part.factors("fc", "x"), basis.factors("fc", "x"), strict=True):
        assert torch.equal(got, whole[..., :dim])
    assert part.digest == basis.select(dim=dim).digest
    assert (part.digest == basis.digest) == (dim == 40)
    part.save_pretrained(tmp_path / "part")
    saved = Basis.from_pretrained(tmp_path / "part")
    assert saved.digest == part.digest
    saved.verify()


def test_few_directions_read_few_bytes(wide, reads):
    _, folder = wide
    Basis.from_pretrained(folder).select(dim=3).factors("fc", "x")
    assert reads and max(reads.values()) < 40


@pytest.mark.parametrize("dim", DIMS)
def test_what_is_read_in_part_is_checked_too(wide, dim):
    basis, folder = wide
    file = folder / "basis.safetensors"
    whole = file.read_bytes()
    U = basis.factors("fc", "x")[0]
    last = U[:, dim - 1].contiguous().numpy().tobytes()
    assert whole.count(last) == 1, "U is stored by direction"
    spoilt = bytearray(whole)
    spoilt[whole.index(last) + 7] ^= 1
    file.write_bytes(spoilt)
    with pytest.raises(BasisError, match="fc"):
        Basis.from_pretrained(folder).select(dim=dim).factors("fc", "x")


def test_damage_elsewhere_does_not_stand_in_the_way(wide):
    """Direction 40 is broken; who asks for 16 gets them."""
    basis, folder = wide
    file = folder / "basis.safetensors"
    whole = bytearray(file.read_bytes())
    last = basis.factors("fc", "x")[0][:, 39].contiguous().numpy().tobytes()
    whole[bytes(whole).index(last)] ^= 1
    file.write_bytes(whole)
    got = Basis.from_pretrained(folder).select(dim=16).factors("fc", "x")[0]
    assert torch.equal(got, basis.factors("fc", "x")[0][:, :16])


def test_tensors_outlive_their_file(wide):
    """Zeroing the file in place must not reach tensors that were read before (no memory map is handed out)."""
    basis, folder = wide
    got = Basis.from_pretrained(folder).factors("fc", "x")
    file = folder / "basis.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as f:
        f.write(bytes(size))
        f.flush()
        os.fsync(f.fileno())
    for a, b in zip(got, basis.factors("fc", "x"), strict=True):
        assert torch.equal(a, b)
