"""Analyses of every kind of basis: mined or not, selected, truncated, combined, bfloat16, with empty modules."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from peft_attrsub import Basis, build_basis, psv_basis, random_basis
from peft_attrsub.analysis import analyse, captured_energy, eigenvalues
from tests.basis.helpers import SHAPES, make_basis, orthonormal, random_factors, save_many

from .helpers import given_factors, spanning
from .schema import SCHEMA, check_schema, plain

FC, PROJ = SHAPES


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))


UNMINED = {
    "psv": lambda: psv_basis(net(), dim=3),
    "random": lambda: random_basis(net(), dim=3),
    "factors": given_factors,
}


@pytest.mark.parametrize("name", UNMINED)
def test_bases_without_records(name):
    """No adapters, so no pattern, no weights, no suggestion; the spectrum is the stored S."""
    basis = UNMINED[name]()
    record = plain(analyse(basis, draws=5).to_dict())
    check_schema(record, SCHEMA)
    assert record["adapters"] == [] and record["explained"] == []
    unknown = ("rank", "pattern", "gap", "suggested_dim", "energy_at_dim", "energy_at_suggested", "captured_energy")
    for one in record["spectra"]:
        assert [one[k] for k in unknown] == [None] * 7
        assert one["drops"] == one["weights"] == one["residuals"] == one["energies"] == []
        stored = basis.factors(one["module"], one["attribute"])[1]
        assert one["singular_values"] == pytest.approx(stored.tolist(), rel=1e-5)
        assert one["largest"] == pytest.approx(float(stored[0]), rel=1e-5)
    assert len(record["overlaps"]) == (4 if name == "factors" else 0)


def test_attributes_of_different_dim():
    """min(d, d') eigenvalues, and the null of just these sizes."""
    basis = given_factors()
    record = analyse(basis, draws=5).to_dict()
    for one in record["overlaps"]:
        null = record["nulls"][one["null"]]
        assert len(one["eigenvalues"]) == len(null["mean"]) == 2
        assert (null["d"], null["d_other"]) == (5, 2)
        at = 0 if one["side"] == "output" else 2
        q, p = (basis.factors(one["module"], a)[at] for a in ("wide", "narrow"))
        assert one["eigenvalues"] == pytest.approx(eigenvalues(q, p)[:2].tolist(), abs=5e-6)


def test_one_attribute_has_no_overlaps(basis):
    record = plain(analyse(basis.select("geometry"), draws=5).to_dict())
    check_schema(record, SCHEMA)
    assert record["overlaps"] == record["nulls"] == record["pairs"] == []
    assert {s["attribute"] for s in record["spectra"]} == {"geometry"} and len(record["adapters"]) == 4


def test_selection_gives_the_same_numbers(record, basis):
    """Attributes in another order, fewer modules: what is left is as it was (the permutation null aside)."""
    modules = basis.modules[1:4]
    found = analyse(basis.select(["camera", "texture"], modules=modules), draws=50, seed=3).to_dict()
    key = ("module", "attribute")
    before = {tuple(s[k] for k in key): s for s in record["spectra"]}
    for one in found["spectra"]:
        assert one == before[one["module"], one["attribute"]]
    assert len(found["spectra"]) == 6 and found["basis"]["attributes"] == ["camera", "texture"]
    turned = {(o["module"], o["side"]): o["eigenvalues"] for o in record["overlaps"] if o["other"] == "camera"
              and o["attribute"] == "texture"}  # fmt: skip
    for one in found["overlaps"]:
        assert (one["attribute"], one["other"]) == ("camera", "texture")
        assert one["eigenvalues"] == pytest.approx(turned[one["module"], one["side"]], abs=5e-6)


def test_a_truncated_basis(record, basis):
    """dim 1 of 3: the spectra stay, the subspaces shrink."""
    small = basis.select(dim=1)
    found = plain(analyse(small, draws=5).to_dict())
    for one, whole in zip(found["spectra"], record["spectra"], strict=True):
        assert one["dim"] == 1 and one["singular_values"] == whole["singular_values"]
        squares = np.square(one["singular_values"])
        assert one["energy_at_dim"] == pytest.approx(squares[0] / squares.sum(), rel=1e-4)
    for one in found["overlaps"]:
        at = 0 if one["side"] == "output" else 2
        q, p = (small.factors(one["module"], a)[at] for a in (one["attribute"], one["other"]))
        assert one["eigenvalues"] == pytest.approx([1 - abs(float(q[:, 0] @ p[:, 0]))], abs=1e-5)


def test_the_captured_energy_of_a_truncated_basis_is_not_that_of_the_whole(basis, groups):
    """It says what is inside at `dim`; the recorded energies are those of the dim that was mined."""
    found = analyse(basis.select("texture", dim=1), draws=2).to_dict()["spectra"]
    paths = groups["texture"]
    for one in found:
        shares = []
        for path in paths:
            captured = captured_energy(path, basis, attributes=["texture"], dim=1)
            shares.append(next(m.joint.share for m in captured.modules if m.module == one["module"]))
        assert one["captured_energy"] in (None, pytest.approx(np.mean(shares), rel=1e-4))


def test_modules_without_directions(tmp_path):
    g = torch.Generator().manual_seed(0)
    groups = {}
    for name in ("texture", "geometry"):
        rows = []
        for _ in range(3):
            row = random_factors(SHAPES, 3, g)
            row[PROJ] = (row[PROJ][0][:, :1], row[PROJ][1][:1])
            rows.append(row)
        groups[name] = save_many(tmp_path / name, rows)
    basis = build_basis(groups, dim=2, allocation="importance-literal", progress=False)
    empty = {(m, a) for m in basis.modules for a in basis.attributes if basis.dim(m, a) == 0}
    assert empty
    record = plain(analyse(basis, groups["texture"][:1], draws=5).to_dict())
    check_schema(record, SCHEMA)
    for one in record["spectra"]:
        if (one["module"], one["attribute"]) in empty:
            assert one["dim"] == 0 and one["energy_at_dim"] == 0 and one["captured_energy"] == 0
            assert one["singular_values"] and one["suggested_dim"] >= 1, "C is known, and would have directions"
    assert not {(o["module"], a) for o in record["overlaps"] for a in (o["attribute"], o["other"])} & empty


def test_bfloat16(tmp_path):
    """Stored directions are orthonormal to three digits only; overlaps are of the spans that they really have."""
    basis = make_basis(tmp_path, dtype=torch.bfloat16)
    record = plain(analyse(basis, draws=5).to_dict())
    check_schema(record, SCHEMA)
    assert record["basis"]["dtype"] == "bfloat16"
    for one in record["overlaps"]:
        at = 0 if one["side"] == "output" else 2
        q, p = (basis.factors(one["module"], a)[at] for a in (one["attribute"], one["other"]))
        assert one["eigenvalues"] == pytest.approx(eigenvalues(q, p)[:3].tolist(), abs=1e-5)
    full = analyse(make_basis(tmp_path / "again"), draws=5).to_dict()
    for one, wide in zip(record["overlaps"], full["overlaps"], strict=True):
        assert one["eigenvalues"] == pytest.approx(wide["eigenvalues"], abs=0.02)


def test_updates_that_are_zero(tmp_path):
    """One adapter did not train one module; no adapter trained another: numbers stay finite, nothing is invented."""
    g = torch.Generator().manual_seed(0)
    shapes = {**SHAPES, "block.2.fc": (12, 10)}
    rows = [random_factors(shapes, 3, g) for _ in range(3)]
    rows[0][FC] = (torch.zeros_like(rows[0][FC][0]), rows[0][FC][1])
    for row in rows:
        row["block.2.fc"] = (torch.zeros_like(row["block.2.fc"][0]), row["block.2.fc"][1])
    basis = build_basis(save_many(tmp_path, rows), dim=2, progress=False)
    result = analyse(basis, [tmp_path / "adapter-1"], draws=5)
    record = plain(result.to_dict())
    check_schema(record, SCHEMA)
    by_module = {s["module"]: s for s in record["spectra"]}
    dead = by_module["block.2.fc"]
    assert dead["dim"] == 0 and dead["pattern"] is None and dead["drops"] == []
    assert not any(dead["singular_values"])
    assert by_module[FC]["pattern"] is not None
    assert all(math.isfinite(float(row["value"])) for row in result.rows() if row["quantity"] != "pattern")


def test_combined_bases(tmp_path, basis):
    """Attributes from two files, one mined and one not."""
    g = torch.Generator().manual_seed(4)
    layouts = {m: basis.layout(m) for m in basis.modules}
    other = Basis.from_factors({
        "given": {m: spanning(orthonormal(x.n, 2, g), orthonormal(x.m, 2, g)) for m, x in layouts.items()}
    })  # fmt: skip
    record = plain(analyse(Basis.combine([basis.select("texture"), other]), draws=5).to_dict())
    check_schema(record, SCHEMA)
    assert {s["attribute"]: s["pattern"] is not None for s in record["spectra"]} == {"texture": True, "given": False}
    assert {(o["attribute"], o["other"]) for o in record["overlaps"]} == {("texture", "given")}
    assert {one["attribute"] for one in record["adapters"]} == {"texture"}
