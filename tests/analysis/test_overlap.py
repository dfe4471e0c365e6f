"""Eigenvalues of the disentanglement measure against the dense problem, and both nulls against brute force."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peft_attrsub import Basis, BasisError
from peft_attrsub.analysis import analyse, eigenvalues, random_null
from peft_attrsub.analysis.overlap import _drawn

from .helpers import layered_basis, spanning


def dense(s, t):
    """All eigenvalues of [[S'S, -S'T], [-T'S, T'T]] z = lambda diag(S'S, T'T) z, as method.md section 4 has it."""
    s, t = s.double().numpy(), t.double().numpy()
    zero = np.zeros((s.shape[1], t.shape[1]))
    m = np.block([[s.T @ s, -s.T @ t], [-t.T @ s, t.T @ t]])
    d = np.block([[s.T @ s, zero], [zero.T, t.T @ t]])
    return torch.from_numpy(scipy.linalg.eigh(m, d, eigvals_only=True))


def draw(n, d, generator):
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


@st.composite
def pairs_of_columns(draw_one):
    """S (n x d), S' (n x d') of full column rank, neither orthonormal, perhaps with common directions."""
    n = draw_one(st.integers(1, 24))
    d, e = draw_one(st.integers(1, n)), draw_one(st.integers(1, n))  # d + e may exceed n
    g = torch.Generator().manual_seed(draw_one(st.integers(0, 10**6)))
    s, t = draw(n, d, g), draw(n, e, g)
    shared = draw_one(st.integers(0, min(d, e)))
    apart = draw_one(st.sampled_from([0.0, 1e-9, 1e-4, 1e-2]))  # exactly shared, or nearly parallel
    t[:, :shared] = s[:, :shared] + apart * draw(n, shared, g)
    scale = draw_one(st.sampled_from([1.0, 1e-4, 1e4]))
    # Conditioning costs the dense form its digits, so that it could not say who is wrong.
    assume(max(np.linalg.cond(s.numpy()), np.linalg.cond(t.numpy())) < 50)
    return s, scale * t


@st.composite
def pairs_of_uneven_columns(draw_one):
    """The same, with columns of any length; and as they were, for the dense form."""
    s, t = draw_one(pairs_of_columns())
    powers = [draw_one(st.lists(st.floats(-150, 150), min_size=x.shape[1], max_size=x.shape[1])) for x in (s, t)]
    lengths = [10.0 ** torch.tensor(each, dtype=torch.float64) for each in powers]
    return (s, t), (s * lengths[0], t * lengths[1])


@given(pairs_of_columns())
@settings(max_examples=200)
def test_eigenvalues_are_those_of_the_dense_problem(pair):
    found, expected = eigenvalues(*pair), dense(*pair)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found.diff() >= 0).all() and found[0] >= 0 and found[-1] <= 2


@given(pairs_of_uneven_columns())
@settings(max_examples=200)
def test_the_length_of_a_column_does_not_matter(pair):
    even, uneven = pair
    found, expected = eigenvalues(*uneven), dense(*even)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_smallest_is_twice_the_squared_distance_of_the_paper():
    """d(S, S') = min |Sx - S'x'| / (|Sx| + |S'x'|), searched for directly: lambda_min = 2 d^2."""
    g = torch.Generator().manual_seed(3)
    s, t = draw(7, 2, g), draw(7, 3, g)
    a, b = s.numpy(), t.numpy()

    def distance(z):
        x, y = a @ z[:2], b @ z[2:]
        return np.linalg.norm(x - y) / (np.linalg.norm(x) + np.linalg.norm(y))

    random = np.random.default_rng(0)
    found = min(scipy.optimize.minimize(distance, random.standard_normal(5), tol=1e-12).fun for _ in range(20))
    assert float(eigenvalues(s, t)[0]) == pytest.approx(2 * found**2, abs=1e-6)


@given(st.integers(0, 1000), st.floats(0.05, 2.0))
def test_a_known_angle(seed, angle):
    """Two planes that meet in one line and are `angle` apart in the other direction."""
    q = torch.linalg.qr(draw(6, 6, torch.Generator().manual_seed(seed))).Q
    other = torch.stack([q[:, 0], np.cos(angle) * q[:, 1] + np.sin(angle) * q[:, 2]], 1)
    cos = abs(np.cos(angle))
    expected = torch.tensor([0, 1 - cos, 1 + cos, 2], dtype=torch.float64)
    torch.testing.assert_close(eigenvalues(q[:, :2], other), expected, rtol=0, atol=1e-7)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1e-5, 1e-3, 0.1, 1.0, 100.0]))
def test_only_the_spans_matter(seed, d, e, size):
    """S -> S G changes nothing, however near to an orthonormal matrix S and S G are."""
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.linalg.qr(draw(12, k, g)).Q for k in (d, e))
    mixed = s @ (torch.eye(d, dtype=torch.float64) + size * draw(d, d, g))
    assume(np.linalg.cond(mixed.numpy()) < 1e3)
    torch.testing.assert_close(eigenvalues(mixed, t), eigenvalues(s, t), rtol=0, atol=1e-6)
    torch.testing.assert_close(eigenvalues(t, mixed), eigenvalues(mixed, t), rtol=0, atol=1e-6)


def test_orthogonal_is_one_and_shared_is_zero():
    q = torch.linalg.qr(draw(9, 9, torch.Generator().manual_seed(0))).Q
    torch.testing.assert_close(
        eigenvalues(q[:, :3], q[:, 3:8]), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12
    )
    same = eigenvalues(q[:, :3], q[:, [2, 0, 1]])
    torch.testing.assert_close(same, torch.tensor([0, 0, 0, 2, 2, 2], dtype=torch.float64), rtol=0, atol=1e-12)
    inside = eigenvalues(q[:, :1], q[:, :4])
    torch.testing.assert_close(inside, torch.tensor([0, 1, 1, 1, 2], dtype=torch.float64), rtol=0, atol=1e-12)


def test_dependent_columns_count_once():
    g = torch.Generator().manual_seed(0)
    s, t = draw(10, 3, g), draw(10, 2, g)
    doubled = torch.cat([s, s @ draw(3, 2, g), torch.zeros(10, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(eigenvalues(doubled, t), eigenvalues(s, t), rtol=0, atol=1e-9)
    wide = draw(4, 9, g)  # more columns than dimensions: the whole space
    torch.testing.assert_close(
        eigenvalues(wide, draw(4, 1, g)), torch.tensor([0, 1, 1, 1, 2], dtype=torch.float64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    g = torch.Generator().manual_seed(0)
    s, t = draw(12, 3, g).to(dtype), draw(12, 4, g).to(dtype)
    torch.testing.assert_close(eigenvalues(s, t), dense(s, t), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (torch.ones(3, 1), torch.ones(4, 1), ["(3, 1)", "(4, 1)", "same n"]),
        (torch.ones(3), torch.ones(3, 1), ["(3,)", "(n, d)"]),
        (torch.zeros(3, 2), torch.ones(3, 1), ["without directions"]),
        (torch.ones(3, 1), torch.ones(3, 0), ["without directions"]),
    ],
)
def test_errors_are_sentences(one, other, words):
    with pytest.raises(BasisError) as error:
        eigenvalues(one, other)
    assert all(word in str(error.value) for word in words) and str(error.value).endswith(".")


# ---- the random null ----


def brute(n, d, e, draws, seed):
    """[draws, min(d, e)] eigenvalues 1 - cos of two subspaces, both drawn and both orthonormalised."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(draws):
        q, p = (np.linalg.qr(random.standard_normal((n, k)))[0] for k in (d, e))
        rows.append(1 - np.linalg.svd(q.T @ p, compute_uv=False))
    return np.stack(rows)


SIZES = [(40, 5, 5), (40, 3, 8), (20, 10, 10), (12, 1, 1), (12, 1, 11), (12, 8, 7), (10, 9, 4), (6, 6, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_random_null_is_that_of_drawn_subspaces(size):
    """Mean and band within five standard errors; the last sizes have d + d' > n, where directions must be shared."""
    draws = 3000
    null, drawn = random_null(*size, draws=draws, seed=1), brute(*size, draws, seed=2)
    error = drawn.std(0) * (2 / draws) ** 0.5
    assert (np.abs(null.mean.numpy() - drawn.mean(0)) <= 5 * error + 1e-12).all()
    for edge, share in ((null.low, 0.025), (null.high, 0.975)):
        below = (drawn <= edge.numpy() + 1e-12).mean(0)
        above = (drawn >= edge.numpy() - 1e-12).mean(0)  # a value that is always 0 lies on both sides
        slack = 5 * (share * (1 - share) * 2 / draws) ** 0.5
        assert (below >= share - slack).all() and (above >= 1 - share - slack).all()
    assert null.mean.shape == (min(size[1:]),)
    shared = max(0, sum(size[1:]) - size[0])
    assert np.allclose(null.high.numpy()[:shared], 0, atol=1e-7), "d + d' - n directions are always common"
    assert (null.low <= null.mean).all() and (null.mean <= null.high).all() and (null.mean.diff() >= 0).all()


def test_random_null_of_a_large_space_is_near_one():
    null = random_null(100_000, 2, 2)
    assert 0.98 < float(null.low[0]) < 1 and float(null.high[-1]) <= 1


def test_random_null_depends_on_sizes_and_seed_only():
    """Other calls before it, and the order of d and d', change nothing; another seed does."""
    first = random_null(30, 4, 6, draws=50, seed=7)
    _drawn.cache_clear()
    np.random.seed(99)
    torch.manual_seed(99)
    random_null(31, 4, 6, draws=50, seed=7)
    again, turned, other = (
        random_null(*args, draws=50, seed=seed) for args, seed in (((30, 4, 6), 7), ((30, 6, 4), 7), ((30, 4, 6), 8))
    )
    for part in ("mean", "low", "high"):
        assert torch.equal(getattr(first, part), getattr(again, part))
        assert torch.equal(getattr(first, part), getattr(turned, part))
        assert not torch.equal(getattr(first, part), getattr(other, part))


def test_random_null_is_the_same_in_another_process():
    code = (
        "from peft_attrsub.analysis import random_null\n"
        "for size in ((30, 4, 6), (9, 6, 5)):\n"
        "    null = random_null(*size, draws=40, seed=3)\n"
        "    print([x.tolist() for x in (null.mean, null.low, null.high)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, size in zip(done.stdout.splitlines(), ((30, 4, 6), (9, 6, 5)), strict=True):
        null = random_null(*size, draws=40, seed=3)
        assert line == str([x.tolist() for x in (null.mean, null.low, null.high)])


@pytest.mark.parametrize("arguments", [(5, 0, 1), (5, 1, 6), (5, -1, 2), (5, 1, 1, 0)])
def test_random_null_of_nothing_is_refused(arguments):
    with pytest.raises(BasisError, match=r"R\^5"):
        random_null(*arguments)


# ---- the permutation null ----


def smallest_and_permuted(basis, **settings):
    found = analyse(basis, draws=20, **settings).to_dict()["overlaps"]
    return [o["smallest"] for o in found], [o["permuted"] for o in found]


def test_overlap_that_every_layer_has_shows_in_mismatched_layers_too():
    smallest, permuted = smallest_and_permuted(layered_basis(6, "everywhere"))
    assert max(smallest) < 1e-5
    assert max(p["high"] for p in permuted) < 1e-5


def test_overlap_of_one_layer_vanishes_in_mismatched_layers():
    """What is left in mismatched layers is chance: the band of random subspaces."""
    basis = layered_basis(6, "by layer")
    smallest, permuted = smallest_and_permuted(basis)
    assert max(smallest) < 1e-5
    null = {n: random_null(n, 4, 4) for n in (60, 50)}
    for record in permuted:
        assert any(float(x.low[0]) < record["mean"] < float(x.high[0]) for x in null.values())
        assert record["low"] <= record["mean"] <= record["high"]
        assert record["low"] > 0.2


def test_unrelated_attributes_lie_in_the_random_band():
    found = analyse(layered_basis(12, "nowhere"), draws=200).to_dict()
    for pair in found["pairs"]:
        assert pair["null_low"] < pair["median"] < pair["null_high"]
        assert pair["share_below_null"] < 0.4
        assert pair["permuted_median"] == pytest.approx(pair["null_median"], abs=0.1)


def test_permuted_is_exactly_the_mean_over_all_mismatches():
    """With as many mismatches as there are other layers, nothing is left to chance."""
    basis = layered_basis(4, "everywhere", seed=1)
    record = next(o for o in analyse(basis, draws=5, mismatches=3).to_dict()["overlaps"] if o["side"] == "input")
    every = [
        float(eigenvalues(basis.factors(a, "texture")[2], basis.factors(b, "geometry")[2])[0])
        for a in basis.modules
        for b in basis.modules
        if a != b
    ]
    assert record["permuted"]["mean"] == pytest.approx(np.mean(every), abs=1e-5)
    low, high = np.quantile(every, [0.025, 0.975])
    assert (record["permuted"]["low"], record["permuted"]["high"]) == pytest.approx((low, high), abs=1e-5)


def test_more_mismatches_than_layers_are_all_of_them():
    basis = layered_basis(4, "nowhere")
    assert smallest_and_permuted(basis, mismatches=3)[1] == smallest_and_permuted(basis, mismatches=50)[1]


def test_a_kind_of_one_layer_has_no_permutation_null():
    found = analyse(layered_basis(1, "everywhere"), draws=5).to_dict()
    assert [o["permuted"] for o in found["overlaps"]] == [None, None]
    assert [p["permuted_median"] for p in found["pairs"]] == [None, None]


def test_layers_of_other_shapes_are_never_compared():
    """Same kind, another width at every depth: no product of the two exists."""
    g = torch.Generator().manual_seed(0)
    factors = {
        a: {f"stage.{i}.fc": spanning(*(torch.linalg.qr(draw(size, 2, g)).Q for size in (8 + i, 9))) for i in range(3)}
        for a in ("texture", "geometry")
    }
    found = analyse(Basis.from_factors(factors), draws=5).to_dict()["overlaps"]
    assert len(found) == 6 and all(o["permuted"] is None for o in found)
