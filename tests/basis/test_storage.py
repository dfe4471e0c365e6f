"""A basis on disk: what is written, what is read back, what is read at all, and what is refused."""

import contextlib
import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_attrsub import Basis, BasisError

from .helpers import make_basis


def assert_same(one, two):
    assert one.attributes == two.attributes and one.modules == two.modules
    for module in one.modules:
        for attribute in one.attributes:
            for a, b in zip(one.factors(module, attribute), two.factors(module, attribute), strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
            assert torch.equal(
                torch.as_tensor(one.weights(module, attribute)),
                torch.as_tensor(two.weights(module, attribute)),
            )
            for a, b in zip(one.spectrum(module, attribute), two.spectrum(module, attribute), strict=True):
                torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=0)


def weight_files(folder):
    """basis.safetensors or its shards; not the small file of records beside them."""
    return sorted(p for p in Path(folder).glob("*.safetensors") if p.name != "basis_records.safetensors")


def test_save_and_load_is_exact(basis, saved):
    assert sorted(p.name for p in saved.iterdir()) >= ["README.md", "basis.safetensors", "basis_config.json"]
    loaded = Basis.from_pretrained(saved)
    assert_same(basis, loaded)
    assert loaded.digest == basis.digest
    loaded.verify()


def test_a_string_path_works_too(basis, saved):
    assert Basis.from_pretrained(str(saved)).digest == basis.digest


def test_config_tells_where_the_basis_comes_from(saved):
    text = json.dumps(json.loads((saved / "basis_config.json").read_text()))
    for word in ("toy/base", "alpha", "eps", "texture", "geometry", "adapter-0", "adapter-2", "sha256"):
        assert word in text, f"{word} is missing from basis_config.json"
    assert (saved / "README.md").read_text().startswith("---\n"), "a model card starts with its metadata"


def test_loaded_basis_can_be_saved_again_even_over_itself(basis, saved, tmp_path):
    Basis.from_pretrained(saved).save_pretrained(tmp_path / "copy")
    assert Basis.from_pretrained(tmp_path / "copy").digest == basis.digest
    Basis.from_pretrained(saved).save_pretrained(saved, overwrite=True)
    assert_same(basis, Basis.from_pretrained(saved))


def test_existing_folder_is_refused_without_overwrite(basis, saved, tmp_path_factory):
    with pytest.raises(BasisError, match="basis"):
        basis.save_pretrained(saved)
    other = make_basis(tmp_path_factory.mktemp("other"), seed=1)
    other.save_pretrained(saved, overwrite=True)
    assert Basis.from_pretrained(saved).digest == other.digest != basis.digest


def test_overwrite_does_not_delete_a_folder_that_is_no_basis(basis, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with contextlib.suppress(BasisError):
        basis.save_pretrained(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_nothing_but_the_final_folder_remains(basis, tmp_path):
    basis.save_pretrained(tmp_path / "basis")
    basis.save_pretrained(tmp_path / "basis", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["basis"]


def test_failed_save_leaves_the_old_basis(basis, saved, monkeypatch):
    """A disk that fills up while the weights are written: the error comes out, the old basis stays."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for module in list(sys.modules.values()):
        if getattr(module, "save_file", None) is save_file and getattr(module, "__name__", "").startswith(
            "peft_attrsub"
        ):
            monkeypatch.setattr(module, "save_file", full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("safetensors.torch.serialize_file", full, raising=False)
    smaller = basis.select(dim=1)
    with pytest.raises((OSError, BasisError)):
        smaller.save_pretrained(saved, overwrite=True)
    monkeypatch.undo()
    assert Basis.from_pretrained(saved).digest == basis.digest
    assert [p.name for p in saved.parent.iterdir()] == ["basis"]


# ---- shards ----


def test_shards_and_index(basis, tmp_path):
    basis.save_pretrained(tmp_path / "basis", max_shard_size=1000)
    files = weight_files(tmp_path / "basis")
    assert len(files) > 2
    index = json.loads((tmp_path / "basis" / "basis.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    stored = {key: f.name for f in files for key in load_file(f)}
    assert index["weight_map"] == stored
    loaded = Basis.from_pretrained(tmp_path / "basis")
    assert_same(basis, loaded)
    assert loaded.digest == basis.digest
    loaded.verify()


def test_going_back_to_one_file_leaves_no_stale_shard(basis, tmp_path):
    basis.save_pretrained(tmp_path / "basis", max_shard_size="2KB")
    basis.save_pretrained(tmp_path / "basis", overwrite=True)
    assert [f.name for f in weight_files(tmp_path / "basis")] == ["basis.safetensors"]
    assert not (tmp_path / "basis" / "basis.safetensors.index.json").exists()


def test_missing_shard_is_named(basis, tmp_path):
    basis.save_pretrained(tmp_path / "basis", max_shard_size=1000)
    gone = weight_files(tmp_path / "basis")[1]
    gone.unlink()
    with pytest.raises(BasisError, match=gone.name):
        Basis.from_pretrained(tmp_path / "basis").verify()


# ---- dtype, digest ----


def test_bfloat16(tmp_path):
    full = make_basis(tmp_path / "adapters")
    half = make_basis(tmp_path / "adapters2", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "basis")
    loaded = Basis.from_pretrained(tmp_path / "basis")
    assert_same(half, loaded)
    for module in full.modules:
        for wide, narrow in zip(full.factors(module, "texture"), loaded.factors(module, "texture"), strict=True):
            assert narrow.dtype == torch.bfloat16
            torch.testing.assert_close(narrow.float(), wide, rtol=1e-2, atol=1e-2)
    assert loaded.digest == half.digest != full.digest
    stored = load_file(tmp_path / "basis" / "basis.safetensors")
    assert stored["texture.block.0.fc.Ut"].dtype == torch.bfloat16, "half the size on disk is the point"


def test_names_of_dtypes(tmp_path):
    spellings = {torch.bfloat16: ("bfloat16", "bf16", "torch.bfloat16"), torch.float32: ("float32", "fp32")}
    full = make_basis(tmp_path / "adapters")
    for kind, names in spellings.items():
        expected = make_basis(tmp_path / str(kind), dtype=kind)
        for name in names:
            assert make_basis(tmp_path / name, dtype=name).digest == expected.digest
            full.save_pretrained(tmp_path / f"basis-{name}", dtype=name)
            saved = Basis.from_pretrained(tmp_path / f"basis-{name}")
            assert saved.config.dtype == str(kind).removeprefix("torch.") and saved.digest == expected.digest
            saved.verify()
    for bad in ("float16", "int8", torch.float64):
        with pytest.raises(BasisError, match=f"dtype={bad} cannot hold a basis: use float32 or bfloat16"):
            make_basis(tmp_path / "bad", dtype=bad)
        with pytest.raises(BasisError, match=f"dtype={bad} cannot hold a basis: use float32 or bfloat16"):
            full.save_pretrained(tmp_path / "b", dtype=bad)
    assert not (tmp_path / "b").exists()


def test_saving_in_another_dtype_leaves_the_basis_in_memory_alone(tmp_path):
    basis = make_basis(tmp_path / "adapters")
    before, digest = basis.factors("block.0.fc", "texture"), basis.digest
    basis.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    for old, new in zip(before, basis.factors("block.0.fc", "texture"), strict=True):
        assert torch.equal(old, new)
    basis.verify()
    assert basis.digest == digest != Basis.from_pretrained(tmp_path / "half").digest
    Basis.from_pretrained(tmp_path / "half").verify()


def test_failed_rename_leaves_the_basis_in_memory_alone(basis, tmp_path, monkeypatch):
    digest = basis.digest
    basis.save_pretrained(tmp_path / "good")

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises((OSError, BasisError)):
        basis.save_pretrained(tmp_path / "bad")
    monkeypatch.undo()
    assert basis.digest == digest
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    basis.verify()


def test_a_basis_opened_before_it_is_overwritten_still_reads_its_own_numbers(basis, saved, tmp_path_factory):
    opened = Basis.from_pretrained(saved)
    make_basis(tmp_path_factory.mktemp("other"), seed=1).save_pretrained(saved, overwrite=True)
    try:
        got = opened.factors("block.0.fc", "texture")
    except BasisError:
        return  # saying so is as good; other numbers under the old digest are not
    for a, b in zip(got, basis.factors("block.0.fc", "texture"), strict=True):
        assert torch.equal(a, b)


def test_pickling_and_copying(basis, saved):
    loaded = Basis.from_pretrained(saved)
    loaded.factors("block.0.fc", "texture")
    for other in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded), copy.copy(loaded)):
        assert_same(basis, other)


def test_digest_is_the_same_for_the_same_content(tmp_path):
    one, two = make_basis(tmp_path / "a"), make_basis(tmp_path / "b")
    assert one.digest == two.digest
    assert isinstance(one.digest, str) and len(one.digest) >= 64


def raw(basis):
    return {a: {m: tuple(t.clone() for t in basis.factors(m, a)) for m in basis.modules} for a in basis.attributes}


FC, PROJ = "block.0.fc", "block.1.proj"


def changed_part(attribute, module, index, change):
    """A change of one tensor (0: U, 1: S, 2: V)."""

    def apply(f):
        parts = list(f[attribute][module])
        parts[index] = change(parts[index])
        return {**f, attribute: {**f[attribute], module: tuple(parts)}}

    return apply


def bumped(tensor):
    """The smallest possible change: the next float32 in the last place."""
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(2.0))
    return tensor


CHANGES = {
    "last bit of U": changed_part("texture", FC, 0, bumped),
    "last bit of S": changed_part("geometry", PROJ, 1, bumped),
    "last bit of V": changed_part("geometry", FC, 2, bumped),
    "sign of V": changed_part("texture", PROJ, 2, torch.neg),
    "rows in another order": changed_part("texture", FC, 0, lambda t: t.flip(0)),
    "attribute renamed": lambda f: {{"texture": "textures"}.get(a, a): row for a, row in f.items()},
    "module renamed": lambda f: {
        a: {{FC: "block.0.fd"}.get(m, m): x for m, x in row.items()} for a, row in f.items()
    },
    "attributes in another order": lambda f: dict(reversed(f.items())),
    "contents of two attributes swapped": lambda f: {"texture": f["geometry"], "geometry": f["texture"]},
    "one attribute less": lambda f: {"texture": f["texture"]},
    "one module less": lambda f: {a: {FC: row[FC]} for a, row in f.items()},
    "one column less": lambda f: {
        **f, "texture": {**f["texture"], FC: tuple(t[..., :-1].contiguous() for t in f["texture"][FC])}
    },
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_digest_sees_every_change(basis, change):
    original = Basis.from_factors(raw(basis))
    assert original.digest == Basis.from_factors(raw(basis)).digest
    assert Basis.from_factors(CHANGES[change](raw(basis))).digest != original.digest


def test_digest_sees_the_dtype(basis):
    """The same numbers in half the bits are another artefact."""
    rounded = {a: {m: tuple(t.bfloat16().float() for t in x) for m, x in row.items()} for a, row in raw(basis).items()}
    full, half = (Basis.from_factors(rounded, dtype=t) for t in (torch.float32, torch.bfloat16))
    assert torch.equal(full.factors(FC, "texture")[0], half.factors(FC, "texture")[0].float())
    assert full.digest != half.digest


def test_repr_is_readable(basis):
    text = repr(basis)
    assert "texture" in text and "geometry" in text and "2" in text
    assert len(text) < 1000 and "object at 0x" not in text and "tensor(" not in text


def test_a_view_that_was_cut_verifies_before_and_after_it_is_saved(tmp_path):
    """Residuals and energies were measured at the mined dim, so they stay behind."""
    whole = make_basis(tmp_path / "adapters")
    cut = whole.select(dim=1)
    cut.verify()
    cut.save_pretrained(tmp_path / "cut")
    cut.verify()
    loaded = Basis.from_pretrained(tmp_path / "cut")
    loaded.verify()
    module, attribute = loaded.modules[0], loaded.attributes[0]
    assert torch.equal(loaded.weights(module, attribute), whole.weights(module, attribute))
    for basis in (cut, loaded):
        assert not basis.has_record(module, attribute, "energy")
        with pytest.raises(BasisError, match="cut to fewer directions"):
            basis.record(module, attribute, "residuals")
