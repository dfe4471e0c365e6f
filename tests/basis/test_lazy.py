"""A basis on disk is opened without reading it; what is asked for is read, checked, and nothing else."""

import json
import os
import pickle

import pytest
import torch

from peft_attrsub import Basis, BasisError

from .helpers import ATTRIBUTES, SHAPES, orthonormal


@pytest.fixture
def reads(monkeypatch):
    """{tensor name: rows} that leave the disk, whoever asks: every positioned read, found in its file's header."""
    rows = {}
    real = os.preadv

    def spy(fd, buffers, offset, *flags):
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, told in header.items():
            start, end = (8 + size + o for o in told.get("data_offsets", (0, 0)))
            if start <= offset < end:
                rows[name] = sum(len(b) for b in buffers) * told["shape"][0] // (end - start)
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", spy)
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


def test_bytes_read_are_those_of_the_tensors(saved):
    basis = Basis.from_pretrained(saved)
    n, m = SHAPES["block.0.fc"]
    d = basis.dim("block.0.fc", "geometry")
    assert basis.bytes_read == 0
    basis.select(attributes=["geometry"]).factors("block.0.fc", "geometry")
    assert basis.bytes_read == 4 * d * (n + 1 + m), "a view reads for the whole basis"
    assert Basis.from_factors({"x": {"fc": basis.factors("block.0.fc", "geometry")}}).bytes_read == 0


def test_a_file_cut_short_under_an_open_basis_is_a_sentence(wide):
    basis = Basis.from_pretrained(wide[1])
    os.truncate(wide[1] / "basis.safetensors", 2000)
    with pytest.raises(BasisError, match="truncated"):
        basis.factors("fc", "x")


def test_a_basis_crosses_to_another_process_and_reads_there(wide):
    basis, folder = wide
    moved = pickle.loads(pickle.dumps(Basis.from_pretrained(folder)))
    assert torch.equal(moved.factors("fc", "x")[0], basis.factors("fc", "x")[0])
