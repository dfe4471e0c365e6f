"""Records of a mined basis (spectra, weights, residuals, energies, ranks) on disk: a small file of their own."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_attrsub import Basis, BasisError, build_basis, psv_basis
from peft_attrsub.analysis import analyse
from tests.basis.helpers import SHAPES, make_basis, random_factors, save_many

FC, PROJ = SHAPES
PARTS = ("first", "last", "weights", "residuals", "energy", "ranks")


@pytest.fixture(scope="module")
def basis(tmp_path_factory):
    return make_basis(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def saved(basis, tmp_path):
    basis.select().save_pretrained(tmp_path / "basis")
    return tmp_path / "basis"


def keys(folder, name):
    return set(load_file(folder / name))


def in_the_old_way(folder, ranks=False):
    """Rewrite a saved basis as it was before: records inside basis.safetensors, and without ranks."""
    records = load_file(folder / "basis_records.safetensors")
    kept = {k: v for k, v in records.items() if ranks or not k.endswith(".ranks")}
    save_file({**load_file(folder / "basis.safetensors"), **kept}, folder / "basis.safetensors", {"format": "pt"})
    (folder / "basis_records.safetensors").unlink()
    config = json.loads((folder / "basis_config.json").read_text())
    if not ranks:  # what the hash of a module's records covered then
        from peft_attrsub.basis.storage import tensor_hash

        for attribute in config["attributes"]:
            for module in attribute["record_hashes"]:
                name = f"{attribute['name']}.{module}"
                old = {part: kept[f"{name}.{part}"] for part in PARTS if part != "ranks"}
                attribute["record_hashes"][module] = tensor_hash(old)
    del config["config_sha256"]
    (folder / "basis_config.json").write_text(json.dumps(config))
    return folder


def test_records_are_in_a_file_of_their_own(basis, saved):
    names = {f"{a}.{m}" for a in basis.attributes for m in basis.modules}
    assert keys(saved, "basis_records.safetensors") == {f"{name}.{part}" for name in names for part in PARTS}
    assert keys(saved, "basis.safetensors") == {f"{name}.{part}" for name in names for part in ("Ut", "S", "Vt")}


def test_records_stay_whole_when_the_rest_is_sharded(basis, tmp_path):
    basis.select().save_pretrained(tmp_path / "basis", max_shard_size=1000)
    index = json.loads((tmp_path / "basis" / "basis.safetensors.index.json").read_text())
    assert "basis_records.safetensors" not in index["weight_map"].values()
    loaded = Basis.from_pretrained(tmp_path / "basis")
    loaded.verify()
    assert torch.equal(loaded.weights(FC, "texture"), basis.weights(FC, "texture"))


def test_ranks(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = [random_factors({FC: SHAPES[FC]}, r, g) | random_factors({PROJ: SHAPES[PROJ]}, 2, g) for r in (2, 5, 3)]
    built = build_basis({"tone": save_many(tmp_path, rows)}, dim=2, progress=False)
    built.save_pretrained(tmp_path / "basis")
    for basis in (built, Basis.from_pretrained(tmp_path / "basis")):
        assert basis.ranks(FC, "tone").tolist() == [2, 5, 3] and basis.ranks(PROJ, "tone").tolist() == [2, 2, 2]
        assert basis.record(FC, "tone", "ranks").tolist() == [2, 5, 3]


def test_a_basis_that_was_not_mined_has_no_records(tmp_path):
    basis = psv_basis(torch.nn.Sequential(torch.nn.Linear(6, 5)), dim=2)
    assert basis.ranks("0", "psv") is None
    with pytest.raises(BasisError, match="not mined"):
        basis.record("0", "psv", "ranks")
    with pytest.raises(BasisError, match="no record of a basis"):
        basis.record("0", "psv", "colour")
    basis.save_pretrained(tmp_path / "basis")
    assert not (tmp_path / "basis" / "basis_records.safetensors").exists()
    Basis.from_pretrained(tmp_path / "basis").verify()


def test_overwriting_by_one_without_records_leaves_none_behind(saved):
    psv_basis(torch.nn.Sequential(torch.nn.Linear(6, 5)), dim=2).save_pretrained(saved, overwrite=True)
    assert not (saved / "basis_records.safetensors").exists()


def test_a_folder_without_its_records_is_incomplete(saved):
    (saved / "basis_records.safetensors").unlink()
    with pytest.raises(BasisError, match=r"incomplete.*basis_records\.safetensors.*again"):
        Basis.from_pretrained(saved)


def test_a_truncated_file_of_records_is_named(saved):
    path = saved / "basis_records.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BasisError, match=r"basis_records\.safetensors"):
        Basis.from_pretrained(saved).verify()


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_changed_record_is_found(saved, part):
    path = saved / "basis_records.safetensors"
    whole = load_file(path)
    name = f"texture.{FC}.{part}"
    save_file({k: v + 1 if k == name else v for k, v in whole.items()}, path, {"format": "pt"})
    with pytest.raises(BasisError, match=r"texture.*block\.0\.fc.*sha256"):
        Basis.from_pretrained(saved).verify()
    save_file({k: v for k, v in whole.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(BasisError, match=r"texture.*block\.0\.fc"):
        Basis.from_pretrained(saved).verify()


@pytest.mark.parametrize("ranks", [False, True])
def test_a_basis_saved_the_old_way_loads_and_analyses(basis, saved, ranks):
    """Records inside basis.safetensors; without ranks, as every basis saved before they were kept."""
    new = analyse(saved, draws=5).to_dict()
    old = Basis.from_pretrained(in_the_old_way(saved, ranks))
    old.verify()
    assert old.digest == basis.digest
    assert (old.ranks(FC, "texture") is None) is not ranks
    for part in PARTS[:-1]:
        assert torch.equal(old.record(FC, "texture", part), basis.record(FC, "texture", part))
    found = analyse(old, draws=5).to_dict()
    if ranks:
        assert found == new
    else:
        assert {(one["rank"], one["pattern"], one["suggested_dim"]) for one in found["spectra"]} == {
            (None, None, None)
        }
        assert found["overlaps"] == new["overlaps"] and found["adapters"] == new["adapters"]


def test_saving_an_old_one_again_makes_it_a_new_one(basis, saved, tmp_path):
    old = Basis.from_pretrained(in_the_old_way(saved))
    old.save_pretrained(tmp_path / "again")
    again = Basis.from_pretrained(tmp_path / "again")
    again.verify()
    assert again.digest == basis.digest and again.ranks(FC, "texture") is None
    assert "texture.block.0.fc.weights" in keys(tmp_path / "again", "basis_records.safetensors")
    assert "texture.block.0.fc.weights" not in keys(tmp_path / "again", "basis.safetensors")
