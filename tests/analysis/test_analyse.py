"""The whole analysis of a basis: its schema, and its numbers against numpy."""

from itertools import combinations

import numpy as np
import pytest
import torch

from peft_attrsub import BasisError, build_basis
from peft_attrsub.analysis import analyse, captured_energy, eigenvalues, find_drops, pattern, random_null, suggest_dim
from tests.basis.helpers import SHAPES, random_factors, save_many

from .schema import SCHEMA, check_schema, plain
from .synthetic import synthetic


def test_schema(record):
    check_schema(record, SCHEMA)
    plain(record)
    assert record["format"] == 1
    assert record["settings"] == {"draws": 50, "mismatches": 2, "seed": 3}
    assert all(sentence.endswith(".") for sentence in record["rules"].values())


def test_made_up_analyses_have_the_schema_of_real_ones():
    """What the report is tested with (`synthetic`) is what it will get."""
    check_schema(synthetic(depths=2, adapters=3, explained=1, loose=("head",)), SCHEMA)


def test_everything_is_there_once(record, basis):
    modules, attributes = basis.modules, basis.attributes
    assert [m["name"] for m in record["modules"]] == modules
    assert [m.rpartition(".")[0] for m in modules[::2]] == ["blocks.0", "blocks.2", "blocks.10"], "natural order"
    assert [(m["depth"], m["kind"]) for m in record["modules"]] == [(i, k) for i in (0, 2, 10) for k in ("fc", "proj")]
    assert all((m["n"], m["m"]) == basis.layout(m["name"]).shape for m in record["modules"])
    assert sorted((s["attribute"], s["module"]) for s in record["spectra"]) == sorted(
        (a, m) for a in attributes for m in modules
    )
    pairs = list(combinations(attributes, 2))
    assert {(o["attribute"], o["other"]) for o in record["overlaps"]} == set(pairs), "in the basis' order"
    assert sorted((o["attribute"], o["other"], o["module"], o["side"]) for o in record["overlaps"]) == sorted(
        (*pair, m, side) for pair in pairs for m in modules for side in ("output", "input")
    )
    assert sorted((p["attribute"], p["other"], p["side"]) for p in record["pairs"]) == sorted(
        (*pair, side) for pair in pairs for side in ("output", "input")
    )
    assert [(one["attribute"], one["adapter"]) for one in record["adapters"]] == [
        (a, f"adapter-{i}") for a in attributes for i in range(4)
    ]


def test_about(record, basis, tmp_path):
    assert record["basis"] == {
        "name": "basis", "source": None, "base_model": "toy/base", "digest": basis.digest, "dtype": "float32",
        "attributes": ["texture", "geometry", "camera"], "modules": 6, "command": None,
    }  # fmt: skip
    basis.select().save_pretrained(tmp_path / "mine")
    about = analyse(tmp_path / "mine", draws=2).to_dict()["basis"]
    assert (about["name"], about["source"], about["digest"]) == ("mine", "mine", basis.digest)


def test_numbers_have_six_digits(record):
    def floats(value):
        if isinstance(value, float):
            yield value
        elif isinstance(value, (list, dict)):
            for one in value.values() if isinstance(value, dict) else value:
                yield from floats(one)

    found = list(floats(record))
    assert len(found) > 900 and all(value == float(f"{value:.6g}") for value in found)


def test_same_again(analysis, basis, task):
    again = analyse(basis, [task], draws=50, mismatches=2, seed=3)
    assert again.to_dict() == analysis.to_dict() and list(again.rows()) == list(analysis.rows())


def test_threads_do_not_matter(analysis, basis, task):
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads == 1 else 1)
    try:
        other = analyse(basis, [task], draws=50, mismatches=2, seed=3).to_dict()
        assert torch.get_num_threads() != threads
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(analysis.to_dict()["overlaps"], other["overlaps"], strict=True):
        assert one["eigenvalues"] == pytest.approx(two["eigenvalues"], abs=2e-6)
        assert one["permuted"] == pytest.approx(two["permuted"], abs=2e-6)


def test_draws_and_seed_reach_the_nulls(basis):
    few, many, other = (analyse(basis, draws=d, seed=s).to_dict() for d, s in ((3, 0), (400, 0), (3, 1)))
    assert few["nulls"] != many["nulls"] != other["nulls"] != few["nulls"]
    assert [o["eigenvalues"] for o in few["overlaps"]] == [o["eigenvalues"] for o in other["overlaps"]]


def test_a_folder_is_as_good_as_a_basis(analysis, basis, task, tmp_path):
    basis.select().save_pretrained(tmp_path / "saved")
    found = analyse(str(tmp_path / "saved"), [task], draws=50, mismatches=2, seed=3).to_dict()
    expected = dict(analysis.to_dict())
    assert found.pop("basis")["digest"] == expected.pop("basis")["digest"]
    assert found == expected


def test_no_such_basis_is_a_sentence(tmp_path):
    with pytest.raises(BasisError, match="no-such-folder"):
        analyse(str(tmp_path / "no-such-folder"))


def test_no_mismatches_is_no_permutation_null(basis):
    record = plain(analyse(basis, draws=2, mismatches=0).to_dict())
    assert {o["permuted"] for o in record["overlaps"]} == {p["permuted_median"] for p in record["pairs"]} == {None}


@pytest.mark.parametrize(("setting", "value"), [("draws", 0), ("mismatches", -1)])
def test_settings_out_of_range_are_sentences(basis, setting, value):
    with pytest.raises(BasisError, match=f"{setting}={value}"):
        analyse(basis, **{setting: value})


def test_one_path_where_several_are_expected_is_a_sentence(basis, task):
    """A string is a sequence of letters, none of which is an adapter; the message must show what was given."""
    try:
        found = analyse(basis, task, draws=2).to_dict()["explained"]
    except BasisError as error:
        assert task in str(error)
    else:
        assert [one["adapter"] for one in found] == ["task"]


# ---- the numbers ----


def test_spectra_are_those_of_the_basis(record, basis):
    for one in record["spectra"]:
        module, attribute = one["module"], one["attribute"]
        first, values = basis.spectrum(module, attribute)
        assert one["singular_values"] == pytest.approx(values.tolist(), rel=1e-5)
        assert one["first_singular_values"] == pytest.approx(first.tolist(), rel=1e-5)
        drops = find_drops(values, 3)
        assert [d["index"] for d in one["drops"]] == [d.index for d in drops]
        assert (one["rank"], one["dim"]) == (3, 3)
        assert one["pattern"] == pattern(drops, 3) and one["suggested_dim"] == suggest_dim(values, drops)
        squares = values.double().numpy() ** 2
        assert one["energy_at_dim"] == pytest.approx(squares[:3].sum() / squares.sum(), rel=1e-5)
        assert one["largest"] == pytest.approx(float(values[0]), rel=1e-5)
        falls = values[:-1] / values[1:].clamp_min(1e-6 * float(values[0]))
        assert one["gap"] == pytest.approx(max((d.factor for d in drops), default=float(falls.max())), rel=1e-4)
        for key, part in (("weights", "weights"), ("residuals", "residuals"), ("energies", "energy")):
            assert one[key] == pytest.approx(basis.record(module, attribute, part).tolist(), rel=1e-5)
        assert one["captured_energy"] == pytest.approx(np.mean(one["energies"]), rel=1e-4), "nobody is muted here"


def test_muted_adapters_do_not_count_in_the_captured_energy(tmp_path):
    g = torch.Generator().manual_seed(0)
    common = random_factors(SHAPES, 3, g)
    rows = [{m: (b + 0.1 * torch.randn(b.shape, generator=g), a) for m, (b, a) in common.items()} for _ in range(5)]
    rows[2] = random_factors(SHAPES, 3, g, scale=20.0)
    record = analyse(build_basis(save_many(tmp_path, rows), dim=3, progress=False), draws=2).to_dict()
    assert [one["adapter"] for one in record["adapters"] if one["muted"]] == ["adapter-2"]
    for one in record["spectra"]:
        others = [e for i, e in enumerate(one["energies"]) if i != 2]
        assert one["captured_energy"] == pytest.approx(np.mean(others), rel=1e-4)
        assert one["captured_energy"] > 1.1 * np.mean(one["energies"])


def test_overlaps_are_the_eigenvalues_of_the_factors(record, basis):
    for one in record["overlaps"]:
        at = 0 if one["side"] == "output" else 2
        q, p = (basis.factors(one["module"], a)[at] for a in (one["attribute"], one["other"]))
        expected = eigenvalues(q, p)[:3]
        assert one["eigenvalues"] == pytest.approx(expected.tolist(), abs=5e-6)
        assert one["smallest"] == one["eigenvalues"][0] and sorted(one["eigenvalues"]) == one["eigenvalues"]


def test_overlaps_point_to_the_null_of_their_size(record, basis):
    for one in record["overlaps"]:
        n = basis.layout(one["module"]).shape[one["side"] == "input"]
        null = record["nulls"][one["null"]]
        assert (null["n"], null["d"], null["d_other"]) == (n, 3, 3)
        assert len(null["mean"]) == len(null["low"]) == len(null["high"]) == len(one["eigenvalues"])
        expected = random_null(n, 3, 3, draws=50, seed=3)
        assert null["mean"] == pytest.approx(expected.mean.tolist(), rel=1e-5)
        assert null["low"] == pytest.approx(expected.low.tolist(), rel=1e-5)
        assert null["high"] == pytest.approx(expected.high.tolist(), rel=1e-5)
    assert len(record["nulls"]) == 4, "n is 16, 20, 24 or 28: each size is drawn once"


def test_pairs_sum_up_the_overlaps(record):
    for pair in record["pairs"]:
        key = ("attribute", "other", "side")
        rows = [o for o in record["overlaps"] if all(o[k] == pair[k] for k in key)]
        smallest = np.array([o["smallest"] for o in rows])
        band = {k: np.array([record["nulls"][o["null"]][k][0] for o in rows]) for k in ("mean", "low", "high")}
        expected = {
            "modules": 6,
            "median": np.median(smallest),
            "low": smallest.min(),
            "high": smallest.max(),
            "null_median": np.median(band["mean"]),
            "null_low": np.median(band["low"]),
            "null_high": np.median(band["high"]),
            "permuted_median": np.median([o["permuted"]["mean"] for o in rows]),
            "share_above_half": np.mean(smallest > 0.5),
            "share_below_null": np.mean(smallest < band["low"]),
        }
        assert {k: pair[k] for k in expected} == pytest.approx(expected, rel=1e-5)
    assert len(record["pairs"]) == 6


def test_adapters_sum_up_the_spectra(record):
    for i, one in enumerate(record["adapters"]):
        rows = [s for s in record["spectra"] if s["attribute"] == one["attribute"]]
        weights, residuals, energies = (np.array([s[k] for s in rows]) for k in ("weights", "residuals", "energies"))
        at = i % 4
        muted = np.mean(weights[:, at] < 0.25 * np.median(weights, 1))
        expected = {
            "weight_median": np.median(weights[:, at]),
            "weight_min": weights[:, at].min(),
            "weight_max": weights[:, at].max(),
            "residual_median": np.median(residuals[:, at]),
            "energy_median": np.median(energies[:, at]),
            "muted_share": muted,
            "muted": muted > 0.5,
        }
        assert {k: one[k] for k in expected} == pytest.approx(expected, rel=1e-5)


def test_explained_is_captured_energy(record, basis, task):
    (one,) = record["explained"]
    expected = captured_energy(task, basis)
    assert one["adapter"] == "task" and one["modules_missing"] == ["head"]
    assert one["joint"] == pytest.approx(expected.joint.share, rel=1e-5)
    assert one["expected"] == pytest.approx(expected.joint.expected, rel=1e-5)
    assert [m["module"] for m in one["modules"]] == basis.modules, "natural order"
    by_name = {m.module: m for m in expected.modules}
    for row in one["modules"]:
        same = by_name[row["module"]]
        assert row["norm"] == pytest.approx(same.norm, rel=1e-5)
        for name, share in row["attributes"].items():
            assert share["share"] == pytest.approx(same.attributes[name].share, rel=1e-5)
            assert share["expected"] == pytest.approx(same.attributes[name].expected, rel=1e-5)
    assert set(one["attributes"]) == set(basis.attributes)


def test_several_adapters_are_explained_in_their_order(basis, groups):
    found = analyse(basis, [*groups["texture"][:2], groups["camera"][3]], draws=2).to_dict()["explained"]
    assert [one["adapter"] for one in found] == ["adapter-0", "adapter-1", "adapter-3"]
    assert max(found[2]["attributes"], key=lambda a: found[2]["attributes"][a]["share"]) == "camera"
