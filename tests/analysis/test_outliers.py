"""Which adapters are named as muted: the spoiled one and nobody else."""

import math

import pytest
import torch

from peft_attrsub import Basis, build_basis
from peft_attrsub.analysis import adapter_table, analyse
from peft_attrsub.basis.config import AttributeRecord, SourceRecord
from tests.basis.helpers import random_factors, save_lora

SHAPES = {f"blocks.{i}.fc": (30, 26) for i in range(4)}


def crowd(folder, spoiled=None, k=6, scale=10.0, modules=tuple(SHAPES)):
    """k adapters around common updates; in `modules` the spoiled one is unrelated and `scale` times as large."""
    generator = torch.Generator().manual_seed(0)
    common = random_factors(SHAPES, 3, generator)
    paths = []
    for i in range(k):
        own = random_factors(SHAPES, 3, generator, scale=0.3)
        wild = random_factors(SHAPES, 6, generator, scale=scale)
        stacked = {
            m: (torch.cat([common[m][0], own[m][0]], 1), torch.cat([common[m][1], own[m][1]], 0)) for m in SHAPES
        }
        if i == spoiled:
            stacked |= {m: wild[m] for m in modules}
        paths.append(save_lora(folder / f"{folder.name}-{i}", stacked))
    return paths


def mined(paths, **settings):
    return build_basis({"tone": paths}, dim=3, progress=False, **settings)


def muted(basis):
    return [one["adapter"] for one in analyse(basis, draws=2).to_dict()["adapters"] if one["muted"]]


@pytest.mark.parametrize("spoiled", [0, 3, 5])
def test_the_spoiled_adapter_is_named_and_nobody_else(tmp_path, spoiled):
    basis = mined(crowd(tmp_path / "tone", spoiled))
    assert muted(basis) == [f"tone-{spoiled}"]
    by_index = adapter_table(basis)
    assert [one.muted for one in by_index] == [i == spoiled for i in range(6)]
    assert by_index[spoiled].muted_share == 1 and by_index[spoiled - 1].muted_share == 0
    # Hardly any of the spoiled one lies in the subspace of the others.
    assert float(by_index[spoiled].residuals.min()) > max(
        float(one.residuals.max()) for one in by_index if not one.muted
    )


def test_a_healthy_crowd_names_nobody(tmp_path):
    assert muted(mined(crowd(tmp_path / "tone"))) == []


def test_plain_averaging_names_nobody(tmp_path):
    basis = mined(crowd(tmp_path / "tone", 2), alpha=2.0)
    assert muted(basis) == []
    assert all(torch.equal(one.weights, torch.ones(4)) for one in adapter_table(basis))


@pytest.mark.parametrize(("where", "named"), [(1, False), (2, False), (3, True)])
def test_more_than_half_of_the_modules_is_the_line(tmp_path, where, named):
    modules = list(SHAPES)[:where]
    basis = mined(crowd(tmp_path / "tone", 1, modules=modules))
    one = adapter_table(basis)[1]
    assert one.muted_share == pytest.approx(where / 4)
    assert muted(basis) == (["tone-1"] if named else [])


def with_weights(*rows):
    """A basis with these weights (one row per module), as far as the rule can see."""
    k = len(rows[0])
    eye = torch.eye(4)[:, :1]
    factors = {"tone": {f"blocks.{i}.fc": (eye, torch.ones(1), eye) for i in range(len(rows))}}
    extras = {}
    for i, row in enumerate(rows):
        for part in ("weights", "residuals", "energy"):
            extras[f"tone.blocks.{i}.fc.{part}"] = torch.tensor(row)
        extras[f"tone.blocks.{i}.fc.first"] = extras[f"tone.blocks.{i}.fc.last"] = torch.ones(2 * k)
    record = AttributeRecord("tone", kind="adapters", sources=[SourceRecord(f"tone-{j}") for j in range(k)])
    return Basis.from_factors(factors, records=[record], extras=extras)


def test_a_quarter_of_the_median_is_the_line():
    basis = with_weights([0.24, 1.0, 1.0, 1.0, 2.0], [0.26, 1.0, 1.0, 1.0, 2.0], [0.2, 1.0, 1.0, 1.0, 2.0])
    assert adapter_table(basis)[0].muted_share == pytest.approx(2 / 3)
    assert adapter_table(basis)[0].muted and not any(one.muted for one in adapter_table(basis)[1:])


def test_the_median_of_an_even_number_is_the_middle():
    """Of 0.2, 0.5, 1.5 and 1.8 it is 1, so that 0.2 is under a quarter of it."""
    basis = with_weights([0.2, 0.5, 1.5, 1.8])
    assert [one.muted for one in adapter_table(basis)] == [True, False, False, False]


def test_the_numbers_of_the_table(tmp_path):
    basis = mined(crowd(tmp_path / "tone", 4))
    for i, one in enumerate(adapter_table(basis)):
        assert (one.attribute, one.adapter, one.revision) == ("tone", f"tone-{i}", None)
        for part, found in (("weights", one.weights), ("residuals", one.residuals), ("energy", one.energies)):
            assert torch.equal(found, torch.stack([basis.record(m, "tone", part)[i] for m in basis.modules]))
    assert math.isclose(sum(float(one.weights.mean()) for one in adapter_table(basis)), 6, rel_tol=1e-5)


def test_attributes_that_were_not_mined_have_no_adapters():
    eye = torch.eye(4)[:, :1]
    assert adapter_table(Basis.from_factors({"given": {"fc": (eye, torch.ones(1), eye)}})) == []


@pytest.mark.parametrize("spoiled", [None, 2])
def test_the_command_names_the_same(tmp_path, cli, spoiled):
    """`peft-attrsub info` and the analysis are two ways to the same answer."""
    basis = mined(crowd(tmp_path / "tone", spoiled))
    basis.save_pretrained(tmp_path / "basis")
    result = cli("info", tmp_path / "basis", "--json")
    assert result.code == 0, result.err
    (record,) = result.json["attributes"]
    expected = [(one.adapter, pytest.approx(one.muted_share)) for one in adapter_table(basis) if one.muted]
    assert [(one["adapter"], one["share_of_modules"]) for one in record["muted"]] == expected
    kept = [one.energies.mean() for one in adapter_table(basis) if not one.muted]
    assert record["captured_energy"] == pytest.approx(float(torch.stack(kept).mean()), rel=1e-5)
    assert len(expected) == (spoiled is not None)
