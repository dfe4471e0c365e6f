"""The numbers of an analysis as JSON and CSV: all of them, in one step, and without anybody's paths."""

import csv
import json
import os

import pytest
import torch

from peft_attrsub import BasisError, build_basis
from peft_attrsub.analysis import Analysis, analyse
from peft_attrsub.analysis.report import write_report
from tests.basis.helpers import SHAPES, random_factors, save_lora

from .helpers import given_factors


def test_json_is_the_record(analysis, tmp_path):
    path = analysis.save_json(tmp_path / "analysis.json")
    assert path == tmp_path / "analysis.json"
    assert json.loads(path.read_text()) == analysis.to_dict()
    assert "NaN" not in path.read_text() and path.read_text().endswith("\n")


COLUMNS = [
    "quantity", "module", "depth", "stack", "kind", "attribute", "other", "side", "adapter", "index", "value"
]  # fmt: skip


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(analysis, tmp_path_factory):
    return read_csv(analysis.save_csv(tmp_path_factory.mktemp("csv") / "analysis.csv"))


def only(table, quantity, **where):
    """{index or adapter: value} of the rows of a quantity; numbers as floats."""
    rows = [r for r in table if r["quantity"] == quantity and all(r[k] == str(v) for k, v in where.items())]
    return [float(r["value"]) for r in sorted(rows, key=lambda r: (int(r["index"] or 0), r["adapter"]))]


def test_csv_is_tidy(table):
    assert all(list(row) == COLUMNS for row in table)
    assert all(row["value"] for row in table), "one value a row"
    keys = [tuple(row[c] for c in COLUMNS[:-1]) for row in table]
    assert len(set(keys)) == len(keys), "each row says what it is, so no two say the same"
    for row in table:
        if row["quantity"] != "pattern":
            float(row["value"])
        if row["module"].startswith("blocks."):
            assert row["depth"] == row["module"].split(".")[1] and row["kind"] in ("fc", "proj")


def test_csv_rows_are_those_of_rows(analysis, table):
    rows = [{k: "" if v is None else str(v) for k, v in row.items()} for row in analysis.rows()]
    assert len(rows) == len(table)
    assert all(row.items() <= read.items() for row, read in zip(rows, table, strict=True))
    assert all("value" in row and "quantity" in row for row in analysis.rows())


def test_csv_holds_every_spectrum(record, table):
    names = {"weight": "weights", "residual": "residuals", "energy": "energies"}
    scalars = (
        "rank",
        "dim",
        "gap",
        "suggested_dim",
        "energy_at_dim",
        "energy_at_suggested",
        "captured_energy",
        "largest",
    )
    for one in record["spectra"]:
        where = {"module": one["module"], "attribute": one["attribute"]}
        assert only(table, "singular_value", **where) == one["singular_values"]
        assert only(table, "drop", **where) == [d["factor"] for d in one["drops"]]
        for quantity, key in names.items():
            assert only(table, quantity, **where) == one[key]
        for quantity in scalars:
            assert only(table, quantity, **where) == [one[quantity]]
        assert [r["value"] for r in table if r["quantity"] == "pattern" and where.items() <= r.items()] == [
            one["pattern"]
        ]


def test_csv_holds_every_overlap_and_its_nulls(record, table):
    for one in record["overlaps"]:
        where = {k: one[k] for k in ("module", "attribute", "other", "side")}
        assert only(table, "eigenvalue", **where) == one["eigenvalues"]
        null = record["nulls"][one["null"]]
        for part in ("mean", "low", "high"):
            assert only(table, f"eigenvalue_random_{part}", **where) == null[part]
            assert only(table, f"eigenvalue_permuted_{part}", **where) == [one["permuted"][part]]


def test_csv_holds_every_share(record, table):
    (one,) = record["explained"]
    for part in (one, *one["modules"]):
        where = {"adapter": "task", "module": part.get("module", "")}
        assert only(table, "explained", attribute="", **where) == [part["joint"]]
        assert only(table, "explained_expected", attribute="", **where) == [part["expected"]]
        for name, share in part["attributes"].items():
            assert only(table, "explained", attribute=name, **where) == [share["share"]]
            assert only(table, "explained_expected", attribute=name, **where) == [share["expected"]]


def values_of(table, **where):
    """Every number of the rows that belong to `where`; other columns must be empty."""
    empty = {"module", "other", "side", "adapter", "attribute"} - where.keys()
    return {
        float(r["value"])
        for r in table
        if all(r[k] == v for k, v in where.items()) and not any(r[k] for k in empty) and r["quantity"] != "pattern"
    }


def numbers(row):
    """The numbers of one record of a list, truth values as 0 and 1."""
    return {float(v) for v in row.values() if isinstance(v, (int, float))}


def test_csv_holds_every_pair(record, table):
    for one in record["pairs"]:
        where = {k: one[k] for k in ("attribute", "other", "side")}
        assert numbers(one) <= values_of(table, **where)


def test_csv_holds_every_adapter(record, table):
    for one in record["adapters"]:
        assert numbers(one) <= values_of(table, attribute=one["attribute"], adapter=one["adapter"])


def test_csv_holds_the_norms_of_what_was_explained(record, table):
    (one,) = record["explained"]
    for row in one["modules"]:
        assert row["norm"] in values_of(table, adapter="task", module=row["module"])


def test_csv_of_a_basis_without_records(tmp_path):
    result = analyse(given_factors(), draws=5)
    table = read_csv(result.save_csv(tmp_path / "a.csv"))
    assert {r["quantity"] for r in table} >= {"singular_value", "dim", "eigenvalue", "eigenvalue_random_mean"}
    assert all(r["value"] not in ("", "None", "nan") for r in table)


def test_names_with_commas_and_quotes_survive(tmp_path):
    g = torch.Generator().manual_seed(0)
    for name in ('a, "b"', "c"):
        save_lora(tmp_path / name, random_factors(SHAPES, 2, g))
    basis = build_basis({"tone": [tmp_path / 'a, "b"', tmp_path / "c"]}, dim=2, progress=False)
    result = analyse(basis, draws=2)
    table = read_csv(result.save_csv(tmp_path / "a.csv"))
    assert {r["adapter"] for r in table} == {"", 'a, "b"', "c"}
    assert json.loads(result.save_json(tmp_path / "a.json").read_text()) == result.to_dict()


SAVERS = {"json": Analysis.save_json, "csv": Analysis.save_csv}


@pytest.mark.parametrize("kind", SAVERS)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(analysis, tmp_path, kind, monkeypatch):
    target = tmp_path / f"analysis.{kind}"
    target.write_text("before")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(BasisError, match="No space"):
                SAVERS[kind](analysis, target)
        assert target.read_text() == "before"
        assert [p.name for p in tmp_path.iterdir()] == [target.name]
    SAVERS[kind](analysis, target)
    assert target.read_text() != "before" and [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("kind", SAVERS)
def test_a_folder_in_the_way_is_a_sentence(analysis, tmp_path, kind):
    (tmp_path / "taken").mkdir()
    with pytest.raises(BasisError, match=r"taken.*folder"):
        SAVERS[kind](analysis, tmp_path / "taken")
    assert [p.name for p in tmp_path.rglob("*")] == ["taken"]


@pytest.mark.parametrize("kind", SAVERS)
def test_a_missing_folder_is_a_sentence(analysis, tmp_path, kind):
    with pytest.raises(BasisError, match=r"nowhere.*does not exist"):
        SAVERS[kind](analysis, tmp_path / "nowhere" / "file")
    assert list(tmp_path.iterdir()) == []


def test_no_absolute_path_is_published(root, groups, task, tmp_path):
    """All adapters were given by absolute paths, and so was the basis; only last parts are told."""
    build_basis(groups, dim=2, progress=False).save_pretrained(tmp_path / "basis")
    result = analyse(str(tmp_path / "basis"), [task, groups["texture"][0]], draws=2)
    texts = [result.save_json(tmp_path / "a.json").read_text(), result.save_csv(tmp_path / "a.csv").read_text()]
    write_report(result, tmp_path / "a.html")
    for text in (*texts, (tmp_path / "a.html").read_text()):
        assert "adapter-0" in text and "task" in text
        assert str(root) not in text and str(tmp_path) not in text
        assert str(root.parent) not in text


def test_the_command_that_made_it_is_published_without_paths(cli, groups, tmp_path):
    result = cli(
        "build-basis", f"texture={os.path.dirname(groups['texture'][0])}", "-o", tmp_path / "basis", "--dim", 2
    )
    assert result.code == 0, result.err
    record = analyse(tmp_path / "basis", draws=2).to_dict()
    assert record["basis"]["command"].startswith("peft-attrsub build-basis texture=texture")
    assert str(tmp_path) not in json.dumps(record) and os.path.dirname(groups["texture"][0]) not in json.dumps(record)
