"""Basis in memory: from_factors, select, combine, joint."""

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub import Basis, BasisError
from tests.reference import projector, span_projector

from .helpers import orthonormal


def piece(n, m, d, generator):
    S = torch.sort(torch.rand(d, generator=generator) + 0.1, descending=True).values
    return orthonormal(n, d, generator).float(), S, orthonormal(m, d, generator).float()


def make(names, modules=None, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    modules = modules or {"fc": (20, 16), "proj": (12, 20)}
    return Basis.from_factors({a: {k: piece(n, m, d, generator) for k, (n, m) in modules.items()} for a in names})


def close(actual, expected, tol=1e-5):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), rtol=0, atol=tol)


# ---- from_factors ----


def test_from_factors_keeps_tensors_names_and_order():
    generator = torch.Generator().manual_seed(0)
    given_factors = {a: {"fc": piece(9, 7, 2, generator)} for a in ("zebra", "apple")}
    basis = Basis.from_factors(given_factors)
    assert basis.attributes == ["zebra", "apple"], "the caller's order decides who comes first in joint()"
    for a in basis.attributes:
        for stored, wanted in zip(basis.factors("fc", a), given_factors[a]["fc"], strict=True):
            assert torch.equal(stored, wanted)


def test_from_factors_survives_saving(tmp_path):
    basis = make(["a", "b"])
    basis.save_pretrained(tmp_path / "basis")
    loaded = Basis.from_pretrained(tmp_path / "basis")
    assert loaded.digest == basis.digest and loaded.attributes == ["a", "b"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\\b", "a\nb"])
def test_attribute_names_that_are_paths_are_refused(name):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(BasisError):
        Basis.from_factors({name: {"fc": piece(9, 7, 2, generator)}})


def wrong(U=None, S=None, V=None):
    good = piece(9, 7, 2, torch.Generator().manual_seed(0))
    return tuple(g if w is None else w for g, w in zip(good, (U, S, V), strict=True))


@pytest.mark.parametrize(
    "factors",
    [
        wrong(U=torch.zeros(9, 3)),
        wrong(S=torch.ones(3)),
        wrong(V=torch.zeros(7, 1)),
        wrong(U=torch.zeros(9)),
        wrong(S=torch.tensor([1.0, float("nan")])),
        wrong(U=torch.full((9, 2), float("inf"))),
    ],
    ids=["U columns", "S length", "V columns", "U vector", "nan", "inf"],
)
def test_factors_that_do_not_fit_are_refused_by_name(factors):
    with pytest.raises(BasisError, match="fc"):
        Basis.from_factors({"texture": {"fc": factors}})


def test_unknown_names_are_refused_by_name():
    basis = make(["texture"])
    for call in (
        lambda: basis.factors("fc", "colour"),
        lambda: basis.joint("fc", ["colour"]),
        lambda: basis.select(attributes=["colour"]),
        lambda: basis.weights("fc", "colour"),
    ):
        with pytest.raises(BasisError, match="colour"):
            call()
    for call in (
        lambda: basis.factors("nofc", "texture"),
        lambda: basis.joint("nofc"),
        lambda: basis.dim("nofc", "texture"),
    ):
        with pytest.raises(BasisError, match="nofc"):
            call()


# ---- select, combine ----


def test_select_attributes_modules_and_columns():
    basis = make(["a", "b", "c"], d=4)
    small = basis.select(attributes=["c", "a"], dim=2, modules=["proj"])
    assert sorted(small.attributes) == ["a", "c"] and small.modules == ["proj"]
    for a in ("a", "c"):
        assert small.dim("proj", a) == 2
        U, S, V = basis.factors("proj", a)
        for kept, whole in zip(small.factors("proj", a), (U[:, :2], S[:2], V[:, :2]), strict=True):
            assert torch.equal(kept, whole)
    assert small.digest != basis.digest
    assert basis.dim("proj", "a") == 4, "the original is left as it was"


def test_select_order_is_the_callers():
    assert make(["a", "b", "c"]).select(attributes=["c", "a"]).attributes == ["c", "a"]


def test_the_same_attribute_twice_is_refused():
    basis = make(["a", "b"])
    for call in (lambda: basis.select(attributes=["a", "b", "a"]), lambda: basis.joint("fc", ["a", "a"])):
        with pytest.raises(BasisError, match="twice"):
            call()


def test_select_everything_keeps_the_digest_and_saving_keeps_it_too(tmp_path):
    basis = make(["a", "b"], d=4)
    assert basis.select().digest == basis.digest
    basis.save_pretrained(tmp_path / "whole")
    part = Basis.from_pretrained(tmp_path / "whole").select(attributes=["b"], dim=2)
    part.save_pretrained(tmp_path / "part")
    assert Basis.from_pretrained(tmp_path / "part").digest == part.digest
    assert part.digest == basis.select(attributes=["b"], dim=2).digest


def test_select_dim_per_attribute_and_beyond_what_is_there():
    basis = make(["a", "b"], d=4)
    mixed = basis.select(dim={"a": 1, "b": 3})
    assert (mixed.dim("fc", "a"), mixed.dim("fc", "b")) == (1, 3)
    assert basis.select(dim=99).dim("fc", "a") == 4


@pytest.mark.parametrize("dim", [0, -1, {"a": 0}, {"colour": 2}, 1.5, "4"], ids=str)
def test_bad_dims_are_refused(dim):
    basis = make(["a", "b"])
    with pytest.raises((BasisError, TypeError)):
        basis.select(dim=dim)
    with pytest.raises((BasisError, TypeError)):
        basis.joint("fc", dim=dim)


def test_combine_puts_attributes_side_by_side():
    one, two = make(["a", "b"], seed=0), make(["c"], seed=1)
    both = Basis.combine([one, two])
    assert both.attributes == ["a", "b", "c"]
    for source, names in ((one, ["a", "b"]), (two, ["c"])):
        for a in names:
            for module in source.modules:
                for x, y in zip(both.factors(module, a), source.factors(module, a), strict=True):
                    assert torch.equal(x, y)
    assert Basis.combine([one.select(attributes=["a"]), one.select(attributes=["b"])]).digest == one.digest


def test_combine_refuses_an_attribute_clash_by_name():
    with pytest.raises(BasisError, match="texture"):
        Basis.combine([make(["texture"]), make(["texture"], seed=1)])


def test_combine_refuses_shapes_that_do_not_fit():
    with pytest.raises(BasisError, match="fc"):
        Basis.combine([make(["a"], {"fc": (9, 7)}), make(["b"], {"fc": (9, 8)})])


def test_combine_of_different_base_models_is_refused():
    generator = torch.Generator().manual_seed(0)
    one = Basis.from_factors({"a": {"fc": piece(9, 7, 2, generator)}}, base_model="org/one")
    two = Basis.from_factors({"b": {"fc": piece(9, 7, 2, generator)}}, base_model="org/two")
    with pytest.raises(BasisError, match=r"org/one.*org/two"):
        Basis.combine([one, two])


def test_combine_of_nothing_is_refused():
    with pytest.raises(BasisError):
        Basis.combine([])


# ---- joint ----


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(4, 24),
    m=st.integers(4, 24),
    dims=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_joint_is_an_orthonormal_basis_of_the_union(seed, n, m, dims):
    generator = torch.Generator().manual_seed(seed)
    factors = {f"a{i}": {"fc": piece(n, m, d, generator)} for i, d in enumerate(dims)}
    basis = Basis.from_factors(factors)
    A, B, slices = basis.joint("fc")
    for Q, side in ((A, 0), (B, 2)):
        parts = [factors[a]["fc"][side] for a in factors]
        close(Q.T @ Q, torch.eye(Q.shape[1]))
        close(projector(Q), span_projector(*parts), 1e-3)
        assert Q.shape[1] == scipy.linalg.orth(torch.cat(parts, 1).double().numpy(), rcond=1e-6).shape[1]
        end = 0
        assert list(slices) == list(factors)
        for i, name in enumerate(slices):  # columns up to attribute i span exactly attributes 0..i
            part = slices[name][0 if side == 0 else 1]
            assert part.start == end
            end = part.stop
            close(projector(Q[:, :end]), span_projector(*parts[: i + 1]), 1e-3)
        assert end == Q.shape[1]


def test_attribute_inside_an_earlier_one_adds_no_columns():
    generator = torch.Generator().manual_seed(0)
    U, S, V = piece(20, 16, 4, generator)
    turn = orthonormal(4, 2, generator).float()
    inner = (U @ turn, S[:2], V @ turn)
    A, B, slices = Basis.from_factors({"outer": {"fc": (U, S, V)}, "inner": {"fc": inner}}).joint("fc")
    assert A.shape == (20, 4) and B.shape == (16, 4)
    assert slices["outer"] == (slice(0, 4), slice(0, 4))
    assert slices["inner"] == (slice(4, 4), slice(4, 4))


def test_sides_are_ranked_apart():
    """Inside on the output side only: no new A column, all new B columns."""
    generator = torch.Generator().manual_seed(1)
    U, S, V = piece(20, 16, 4, generator)
    other = (U[:, :2].contiguous(), S[:2], orthonormal(16, 2, generator).float())
    A, B, slices = Basis.from_factors({"x": {"fc": (U, S, V)}, "y": {"fc": other}}).joint("fc")
    assert A.shape == (20, 4) and B.shape == (16, 6)
    assert slices["y"] == (slice(4, 4), slice(4, 6))


def test_partly_contained_attribute_adds_the_rest():
    generator = torch.Generator().manual_seed(2)
    Q, P = orthonormal(20, 6, generator).float(), orthonormal(16, 6, generator).float()
    S = torch.tensor([4.0, 2.0, 1.0, 0.5])
    turn = orthonormal(4, 4, generator).float()
    first = (Q[:, :4].contiguous(), S, P[:, :4].contiguous())
    second = (Q[:, 2:] @ turn, S, P[:, 2:] @ turn)  # two directions old, two new, well mixed
    A, B, slices = Basis.from_factors({"x": {"fc": first}, "y": {"fc": second}}).joint("fc")
    assert A.shape == (20, 6) and B.shape == (16, 6)
    assert slices["y"] == (slice(4, 6), slice(4, 6))
    close(projector(A), projector(Q))
    close(projector(B), projector(P))


def test_tiny_singular_values_do_not_hide_a_direction():
    """U is orthonormal, so a column counts as a direction however small its singular value is."""
    generator = torch.Generator().manual_seed(3)
    U, _, V = piece(20, 16, 3, generator)
    loud = (U, torch.tensor([1e3, 1.0, 1e-2]), V)
    quiet_U, _, quiet_V = piece(20, 16, 3, generator)
    quiet = (quiet_U, torch.tensor([1e-4, 1e-5, 1e-6]), quiet_V)
    A, B, slices = Basis.from_factors({"loud": {"fc": loud}, "quiet": {"fc": quiet}}).joint("fc")
    assert A.shape == (20, 6) and B.shape == (16, 6)
    assert slices["quiet"] == (slice(3, 6), slice(3, 6))


def test_joint_respects_attribute_order_and_choice():
    basis = make(["a", "b", "c"])
    _, _, slices = basis.joint("fc", ["c", "a"])
    assert list(slices) == ["c", "a"]
    A, _, _ = basis.joint("fc", ["b"])
    close(projector(A), projector(basis.factors("fc", "b")[0]))


def test_joint_dim_int_and_dict():
    basis = make(["a", "b"], d=4)
    A, B, slices = basis.joint("fc", dim=2)
    assert A.shape[1] == B.shape[1] == 4 and slices["b"] == (slice(2, 4), slice(2, 4))
    close(
        projector(A),
        span_projector(basis.factors("fc", "a")[0][:, :2], basis.factors("fc", "b")[0][:, :2]),
        1e-4,
    )
    A, B, slices = basis.joint("fc", dim={"a": 1, "b": 3})
    assert slices["a"] == (slice(0, 1), slice(0, 1)) and slices["b"] == (slice(1, 4), slice(1, 4))


def test_joint_is_cut_at_the_size_of_the_layer():
    generator = torch.Generator().manual_seed(4)
    factors = {name: {"fc": piece(5, 30, 4, generator)} for name in ("a", "b", "c")}
    A, B, slices = Basis.from_factors(factors).joint("fc")
    assert A.shape == (5, 5) and B.shape == (30, 12)
    assert [slices[x][0] for x in ("a", "b", "c")] == [slice(0, 4), slice(4, 5), slice(5, 5)]
    close(A.T @ A, torch.eye(5))


def test_joint_is_deterministic_and_survives_saving(tmp_path):
    basis = make(["a", "b"])
    basis.save_pretrained(tmp_path / "basis")
    loaded = Basis.from_pretrained(tmp_path / "basis")
    for x, y in zip(basis.joint("fc")[:2], loaded.joint("fc")[:2], strict=True):
        assert torch.equal(x, y)


def test_spectral_columns_span_the_same_space():
    basis = make(["a", "b"])
    A, B, _ = basis.joint("fc", columns="spectral")
    for Q, side in ((A, 0), (B, 2)):
        close(span_projector(Q), span_projector(*[basis.factors("fc", a)[side] for a in ("a", "b")]), 1e-3)
    with pytest.raises(BasisError, match="sideways"):
        basis.joint("fc", columns="sideways")


def test_module_known_to_one_attribute_only(tmp_path):
    """combine() of bases over different modules: the missing attribute contributes nothing there."""
    one = make(["a"], {"fc": (20, 16), "proj": (12, 20)})
    two = make(["b"], {"fc": (20, 16)}, seed=1)
    try:
        both = Basis.combine([one, two])
    except BasisError as error:
        assert "proj" in str(error)
        return
    A, _, slices = both.joint("proj")
    close(projector(A), projector(one.factors("proj", "a")[0]))
    assert "b" not in slices or slices["b"] == (slice(3, 3), slice(3, 3))
