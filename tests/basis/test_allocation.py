"""How many columns each module gets, from spectra made by hand; and the two bases that need no adapters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_attrsub import BasisError, build_basis, psv_basis, random_basis
from peft_attrsub.basis.allocation import by_gap
from tests.reference import effective_rank, importance_literal, projector

from .helpers import Zoo, orthonormal, save_lora

# module -> singular values of its only update; effective rank (|s|^2 / s_max^2) beside it
FLAT = [1.0] * 8  # 8
ONE = [1.0] + [1e-4] * 7  # 1
HALF = [1.0, 1.0, 1.0, 1.0] + [1e-4] * 4  # 4
DECAY = [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125]  # 4/3
SPECTRA = {"flat": FLAT, "one": ONE, "half": HALF, "decay": DECAY}


def mine(tmp_path, spectra, n=20, m=16, **kwargs):
    """A basis of one adapter whose update in each module has exactly the given singular values."""
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, values in spectra.items():
        s = torch.tensor(values, dtype=torch.float64)
        U, V = orthonormal(n, len(values), generator), orthonormal(m, len(values), generator)
        factors[name] = (U * s, V.T)
    return build_basis([save_lora(tmp_path / "a", factors)], progress=False, **kwargs)


def dims(basis):
    return {m: basis.dim(m, "shared") for m in basis.modules}


def test_effective_rank_of_the_hand_made_spectra():
    """The arithmetic of this file, and the package's own function, agree on numbers known by hand."""
    from peft_attrsub.basis.allocation import effective_rank as package

    for values, expected in ((FLAT, 8.0), (ONE, 1 + 7e-8), (HALF, 4 + 4e-8), (DECAY, (1 - 0.25**8) / 0.75)):
        assert effective_rank(values) == pytest.approx(expected, rel=1e-9)
        assert package(torch.tensor(values)) == pytest.approx(expected, rel=1e-6)
        assert package(1e-20 * torch.tensor(values)) == pytest.approx(expected, rel=1e-6)


def test_uniform(tmp_path):
    assert set(dims(mine(tmp_path, SPECTRA, dim=3)).values()) == {3}


def test_uniform_is_the_default(tmp_path):
    assert dims(mine(tmp_path, SPECTRA, dim=3)) == dims(mine(tmp_path, SPECTRA, dim=3, allocation="uniform"))


def test_uniform_stops_at_the_rank_of_the_updates(tmp_path):
    """Directions beyond the span of the adapters would be noise."""
    assert dims(mine(tmp_path, {"thin": [1.0, 0.5], "flat": FLAT}, dim=6)) == {"thin": 2, "flat": 6}


def test_importance_keeps_the_budget(tmp_path):
    """ER 8, 1, 4, 4/3 of mean 3.58: shares at d = 3 are 6.7, 0.84, 3.35, 1.12; the sum stays 12."""
    got = dims(mine(tmp_path, SPECTRA, dim=3, allocation="importance"))
    assert sum(got.values()) == 12
    assert got["one"] == 1, "at least one column"
    assert got["decay"] == 1 and got["half"] == 3 and got["flat"] == 7


def test_importance_leaves_no_module_empty(tmp_path):
    """Shares 3.7 and five of 0.46 at d = 1: one column each is the whole budget of 6."""
    got = dims(mine(tmp_path, {"flat": FLAT, **{f"one{i}": ONE for i in range(5)}}, dim=1, allocation="importance"))
    assert set(got.values()) == {1} and len(got) == 6


def test_importance_literal_is_the_printed_formula(tmp_path):
    """d * floor(ER / mean ER): 3 * floor(2.23) = 6, 0, 3 * floor(1.12) = 3, 0."""
    got = dims(mine(tmp_path, SPECTRA, dim=3, allocation="importance-literal"))
    names = list(SPECTRA)
    expected = importance_literal([effective_rank(SPECTRA[n]) for n in names], 3)
    assert expected == [6, 0, 3, 0]
    assert [got.get(n, 0) for n in names] == expected


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), count=st.integers(2, 6), dim=st.integers(1, 4))
def test_importance_budget_on_random_spectra(tmp_path_factory, seed, count, dim):
    generator = torch.Generator().manual_seed(seed)
    spectra = {
        f"m{i}": sorted((torch.rand(12, generator=generator) ** 3 + 1e-3).tolist(), reverse=True) for i in range(count)
    }
    folder = tmp_path_factory.mktemp("budget")
    got = dims(mine(folder, spectra, dim=dim, allocation="importance"))
    assert sum(got.values()) == dim * count
    assert min(got.values()) >= 1 and max(got.values()) <= 12
    mean = sum(effective_rank(s) for s in spectra.values()) / count
    order = sorted(spectra, key=lambda m: effective_rank(spectra[m]))
    assert [got[m] for m in order] == sorted(got[m] for m in order), "more effective rank, never fewer columns"
    for m, s in spectra.items():  # close to the share, but for the floor at 1 and what that floor takes away
        assert abs(got[m] - dim * effective_rank(s) / mean) <= 1 + count


def test_importance_budget_moves_on_when_a_module_is_full(tmp_path):
    """ "flat" deserves 13.6 of 20 columns but holds 8: the rest goes to the others, none is lost."""
    got = dims(mine(tmp_path, SPECTRA, dim=5, allocation="importance"))
    assert got["flat"] == 8 and sum(got.values()) == 20
    assert max(got.values()) <= 8


def test_importance_reads_the_base_weight_when_there_is_one(tmp_path):
    """method.md section 6: ER is of W. Updates are alike here; only W differs."""
    generator = torch.Generator().manual_seed(1)
    model = nn.ModuleDict({"a": nn.Linear(16, 20), "b": nn.Linear(16, 20)})
    for name, values in (("a", [1.0] * 12), ("b", [1.0] + [1e-3] * 11)):
        U, V = orthonormal(20, 12, generator), orthonormal(16, 12, generator)
        model[name].weight.data = ((U * torch.tensor(values)) @ V.T).float()
    got = dims(mine(tmp_path, {"a": FLAT, "b": FLAT}, dim=4, allocation="importance", base_model=model))
    assert got == {"a": 7, "b": 1}


def test_energy(tmp_path):
    """Smallest j whose first j singular values hold the share; never above dim."""
    spectra = {"flat": FLAT, "decay": DECAY, "half": HALF}
    assert dims(mine(tmp_path, spectra, dim=8, allocation="energy:0.9")) == {"flat": 8, "decay": 2, "half": 4}
    assert dims(mine(tmp_path, spectra, dim=8, allocation="energy:0.5")) == {"flat": 4, "decay": 1, "half": 2}
    assert dims(mine(tmp_path, spectra, dim=3, allocation="energy")) == {"flat": 3, "decay": 2, "half": 3}


def test_gap(tmp_path):
    spectra = {
        "drop_at_3": [1.0, 0.9, 0.8, 1e-3, 9e-4, 8e-4, 7e-4, 6e-4],
        "drop_at_1": ONE,
        "drop_beyond": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 1e-3, 9e-4],
    }
    got = dims(mine(tmp_path, spectra, dim=4, allocation="gap"))
    assert got["drop_at_3"] == 3 and got["drop_at_1"] == 1 and 1 <= got["drop_beyond"] <= 4
    assert dims(mine(tmp_path, spectra, dim=7, allocation="gap"))["drop_beyond"] == 6


@st.composite
def planted(draw):
    """A spectrum that drops once, after `dim` values, and then perhaps to rounding; and that dim."""
    dim, tail, rounding = draw(st.integers(1, 8)), draw(st.integers(0, 20)), draw(st.integers(0, 8))
    if not tail:
        rounding = max(rounding, 1)  # else nothing falls at all
    falls = [draw(st.floats(1.0, 1.9)) for _ in range(dim - 1)]
    if tail:
        falls += [draw(st.floats(3.0, 100.0)), *(draw(st.floats(1.0, 1.3)) for _ in range(tail - 1))]
    values = [draw(st.sampled_from([1e-12, 1.0, 1e8]))]
    for fall in falls:
        values.append(values[-1] / fall)
    noise = [values[0] * draw(st.floats(0, 1e-9)) for _ in range(rounding)]
    return torch.tensor([*values, *sorted(noise, reverse=True)], dtype=torch.float64), dim


@settings(max_examples=300, deadline=None)
@given(planted(), st.integers(0, 40))
def test_gap_finds_the_planted_dimension_for_every_dim_from_it_up(case, more):
    spectrum, dim = case
    assert by_gap(dim + more)(spectrum) == dim


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), planted=st.integers(1, 4), count=st.integers(1, 4), copy=st.booleans())
def test_gap_on_adapters_that_share_a_subspace(tmp_path_factory, seed, planted, count, copy):
    """3 adapters of rank 4 share `planted` directions; the same whatever dim allows, beyond the stacked rank too."""
    generator = torch.Generator().manual_seed(seed)
    u, v = orthonormal(40, planted, generator), orthonormal(30, planted, generator)
    folder, rows = tmp_path_factory.mktemp("gap"), []
    for _ in range(count):
        noise = [0.02 * torch.randn(k, 4, generator=generator, dtype=torch.float64) for k in (40, 30)]
        left, right = (torch.nn.functional.pad(x, (0, 4 - planted)) for x in (u, v))
        rows.append({"m": (left + noise[0] / 40**0.5, (right + noise[1] / 30**0.5).T)})
    if copy:  # equal spans: the last values of the stack are rounding
        rows.append({"m": (1.5 * rows[0]["m"][0], rows[0]["m"][1])})
    paths = [save_lora(folder / str(i), row) for i, row in enumerate(rows)]
    stacked = 4 * len(paths)
    for dim in (planted, stacked - 1, stacked, stacked + 3):
        if dim >= planted:
            assert dims(build_basis(paths, dim=dim, allocation="gap", progress=False)) == {"m": planted}


@pytest.mark.parametrize("rule", ["energy:0", "energy:1.5", "energy:x", "uniform:0.5", "Importance"])
def test_odd_rules_are_refused(tmp_path, rule):
    with pytest.raises(BasisError, match=rule):
        mine(tmp_path, SPECTRA, dim=3, allocation=rule)


# ---- psv_basis ----


def matrix_of(module):
    """W as out x in: the transpose for Conv1D and Embedding, flattened for convolutions."""
    weight = module.weight.detach().double()
    return weight.T if isinstance(module, nn.Embedding | Conv1D) else weight.flatten(1)


def only(basis):
    (attribute,) = basis.attributes
    return attribute


def test_psv_is_the_svd_of_the_weight():
    torch.manual_seed(0)
    model = Zoo()
    names = ["embed", "fc", "gpt", "conv1", "conv2", "conv3"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    basis = psv_basis(model, 4, modules=names)
    assert sorted(basis.modules) == sorted(names)
    for name in names:
        U, S, Vt = torch.linalg.svd(matrix_of(model.get_submodule(name)), full_matrices=False)
        u, s, v = basis.factors(name, only(basis))
        torch.testing.assert_close(s.double(), S[:4], rtol=1e-5, atol=1e-5)
        for got, wanted in ((u, U[:, :4]), (v, Vt[:4].T)):
            torch.testing.assert_close(
                torch.as_tensor(projector(got)), torch.as_tensor(projector(wanted)), atol=1e-4, rtol=0
            )
        signs = torch.sign((u.double() * U[:, :4]).sum(0))
        torch.testing.assert_close((v.double() * Vt[:4].T).sum(0).sign(), signs)  # one sign per pair
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the model is read, not written"


def test_psv_of_half_precision_weights_and_bad_conditioning():
    """SVD has no bfloat16 kernel; and small singular values must still give orthonormal columns."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 12)
    U, V = (torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q for _ in range(2))
    layer.weight.data = ((U * torch.logspace(0, -4, 12, dtype=torch.float64)) @ V.T).float()
    model = nn.Sequential(layer)
    u, s, v = psv_basis(model, 12, modules=["0"]).factors("0", "psv")
    for Q in (u, v):
        torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(s.double(), torch.logspace(0, -4, 12, dtype=torch.float64)[: len(s)], rtol=1e-2, atol=0)
    half = psv_basis(model.to(torch.bfloat16), 3, modules=["0"])
    assert torch.isfinite(half.factors("0", "psv")[0]).all()


def test_module_choice_like_peft():
    model = Zoo()
    assert psv_basis(model, 2, modules=r".*conv[12]").modules == ["conv1", "conv2"]
    every = psv_basis(model, 2, modules="all-linear").modules
    assert "fc" in every and "gpt" in every and "embed" not in every
    with pytest.raises(BasisError, match="no_such"):
        psv_basis(model, 2, modules=["no_such"])


@pytest.mark.parametrize("make", [psv_basis, random_basis])
@pytest.mark.parametrize("dim", [0, -1])
def test_bad_dim(make, dim):
    with pytest.raises(BasisError, match="dim"):
        make(Zoo(), dim, modules=["fc"])


# ---- random_basis ----


def test_random_basis_is_orthonormal_and_follows_its_seed():
    model = Zoo()
    one, same, other = (random_basis(model, 5, seed=s, modules=["fc", "gpt"]) for s in (7, 7, 8))
    assert one.digest == same.digest != other.digest
    for module, (n, m) in {"fc": (24, 20), "gpt": (18, 14)}.items():
        U, S, V = one.factors(module, only(one))
        assert U.shape == (n, 5) and V.shape == (m, 5) and S.shape == (5,)
        for Q in (U, V):
            torch.testing.assert_close(Q.T @ Q, torch.eye(5), atol=1e-5, rtol=0)
        different = other.factors(module, only(other))[0]
        assert (torch.as_tensor(projector(U)) - torch.as_tensor(projector(different))).norm() > 0.5


def test_random_basis_ignores_the_weights_and_the_global_seed():
    torch.manual_seed(0)
    one = random_basis(Zoo(), 3, seed=1, modules=["fc"])
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    two = random_basis(Zoo(), 3, seed=1, modules=["fc"])
    assert one.digest == two.digest
    torch.manual_seed(99)
    Zoo()
    expected = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    model = Zoo()
    random_basis(model, 3, seed=1, modules=["fc"])
    assert torch.equal(torch.random.get_rng_state(), expected), "drawing a basis must not move torch's own generator"


def test_modules_of_equal_shape_get_different_columns():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    basis = random_basis(model, 3, modules=["0", "1"])
    U0, U1 = (basis.factors(name, only(basis))[0] for name in ("0", "1"))
    assert (U0 - U1).norm() > 0.1
    assert (basis.factors("0", only(basis))[0] - basis.factors("0", only(basis))[2]).norm() > 0.1
