"""The factored IRLS against the dense float64 reference, and the properties the mathematics promises."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub import build_basis
from tests.reference import irls_dense, largest_angle, objective, projector

from .helpers import SHAPES, deltas, low_rank, orthonormal, random_factors, refactored, save_many

EXACT = {"tol": 1e-12, "max_iter": 200}  # both sides iterate to the fixed point, so stopping cannot differ


def relative(actual, expected):
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def cluster(shapes, k, rank, generator, noise=0.3, ranks=None):
    """k adapters around one planted rank-`rank` update: stacking [shared, noise] keeps each one low rank."""
    shared = random_factors(shapes, rank, generator)
    adapters = []
    for i in range(k):
        own = random_factors(shapes, ranks[i] if ranks else rank, generator, scale=noise)
        adapters.append(
            {
                name: (
                    torch.cat([shared[name][0], own[name][0]], 1),
                    torch.cat([shared[name][1], own[name][1]], 0),
                )
                for name in shapes
            }
        )
    return adapters


def assert_same_as_dense(basis, adapters, dim, alpha=1.0, within=1e-4, modules=None, **kwargs):
    for module in modules or basis.modules:
        dense = irls_dense(deltas(adapters, module), dim, alpha=alpha, **kwargs)
        U, S, V = basis.factors(module, "shared")
        assert relative(low_rank(basis, module, "shared"), dense.low_rank) < within
        assert relative(S, dense.S) < within
        assert relative(projector(U), projector(dense.U)) < within
        assert relative(projector(V), projector(dense.V)) < within
        weights = basis.weights(module, "shared").double().numpy()
        assert relative(weights / weights.max(), dense.weights) < 10 * within


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_equals_dense_reference(tmp_path, alpha):
    adapters = cluster(SHAPES, 5, 3, torch.Generator().manual_seed(0))
    basis = build_basis(save_many(tmp_path, adapters), dim=3, alpha=alpha, progress=False, **EXACT)
    assert sorted(basis.modules) == sorted(SHAPES)
    assert_same_as_dense(basis, adapters, 3, alpha, **EXACT)


def test_equals_dense_reference_with_default_stopping(tmp_path):
    adapters = cluster(SHAPES, 5, 3, torch.Generator().manual_seed(1))
    basis = build_basis(save_many(tmp_path, adapters), dim=3, progress=False)
    assert_same_as_dense(basis, adapters, 3, within=1e-3)


def test_equals_dense_reference_with_mixed_ranks(tmp_path):
    adapters = cluster(SHAPES, 6, 2, torch.Generator().manual_seed(2), ranks=[1, 5, 2, 1, 4, 3])
    basis = build_basis(save_many(tmp_path, adapters), dim=4, progress=False, **EXACT)
    assert_same_as_dense(basis, adapters, 4, **EXACT)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    k=st.integers(1, 6),
    n=st.integers(3, 18),
    m=st.integers(3, 18),
    dim=st.integers(1, 4),
    alpha=st.sampled_from([0.3, 1.0, 1.7]),
    data=st.data(),
)
def test_equals_dense_reference_on_random_sizes(tmp_path_factory, seed, k, n, m, dim, alpha, data):
    """Three iterations from the same start, no stopping: any size, any mix of ranks."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [data.draw(st.integers(1, min(n, m))) for _ in range(k)]
    adapters = [random_factors({"layer": (n, m)}, r, generator) for r in ranks]
    dim = min(dim, n, m)
    folder = tmp_path_factory.mktemp("random")
    basis = build_basis(save_many(folder, adapters), dim=dim, alpha=alpha, max_iter=3, tol=1e-14, progress=False)
    dense = irls_dense(deltas(adapters, "layer"), dim, alpha=alpha, max_iter=3, tol=1e-14)
    last = dense.last_spectrum
    kept = basis.dim("layer", "shared")
    assert kept == min(dim, int((last > 1e-6 * last[0]).sum())), "no direction that the updates do not have"
    gap = (last[dim - 1] - last[dim]) / last[0] if dim < len(last) else 1.0
    if gap > 1e-2:  # with two equal singular values at the cut, the subspace itself is not defined
        assert relative(low_rank(basis, "layer", "shared"), dense.low_rank) < 1e-4


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20),
    k=st.integers(2, 6),
    dim=st.integers(1, 5),
    alpha=st.sampled_from([0.2, 1.0, 1.9]),
)
def test_smoothed_objective_never_rises(tmp_path_factory, seed, k, dim, alpha):
    generator = torch.Generator().manual_seed(seed)
    adapters = [random_factors({"layer": (14, 11)}, 3, generator, scale=float(1 + 4 * (i == 0))) for i in range(k)]
    paths = save_many(tmp_path_factory.mktemp("objective"), adapters)
    updates = deltas(adapters, "layer")
    values = []
    for iterations in range(1, 9):
        basis = build_basis(paths, dim=dim, alpha=alpha, eps=1e-3, max_iter=iterations, tol=1e-14, progress=False)
        values.append(objective(low_rank(basis, "layer", "shared"), updates, alpha, eps=1e-3))
    assert values[0] > 0
    for before, after in itertools.pairwise(values):
        assert after <= before * (1 + 1e-6), f"objective rose: {values}"


def test_more_iterations_do_something(tmp_path):
    """Guards the test above: the first iteration is not already the answer."""
    adapters = cluster(SHAPES, 5, 3, torch.Generator().manual_seed(0), noise=1.0)
    paths = save_many(tmp_path, adapters)
    module = "block.0.fc"
    one, many = (build_basis(paths, dim=3, max_iter=i, progress=False) for i in (1, 50))
    before, after = (
        objective(low_rank(b, module, "shared"), deltas(adapters, module), 1.0, 1e-6) for b in (one, many)
    )
    assert after < before * (1 - 1e-5)


def test_spectrum_holds_the_singular_values_of_the_first_and_last_mean(tmp_path):
    adapters = cluster(SHAPES, 4, 2, torch.Generator().manual_seed(5), noise=1.0)
    basis = build_basis(save_many(tmp_path, adapters), dim=3, progress=False, **EXACT)
    for module in SHAPES:
        dense = irls_dense(deltas(adapters, module), 3, **EXACT)
        for got, expected in zip(
            basis.spectrum(module, "shared"), (dense.first_spectrum, dense.last_spectrum), strict=True
        ):
            got = np.asarray(got, dtype=np.float64)
            assert len(got) >= 6, "a spectrum must reach beyond 2 d, where the paper reads it"
            size = min(len(got), len(expected))
            assert np.abs(got[:size] - expected[:size]).max() < 1e-4 * expected[0]


def test_invariant_to_the_choice_of_factors(tmp_path):
    """(B, A) and (B G^-1, G A) are the same update, so they give the same basis."""
    generator = torch.Generator().manual_seed(3)
    adapters = cluster(SHAPES, 4, 2, generator)
    rewritten = []
    for adapter in adapters:
        changed = {}
        for name, (B, A) in adapter.items():
            r = B.shape[1]
            left, right = orthonormal(r, r, generator), orthonormal(r, r, generator)
            G = left @ torch.diag(torch.logspace(-1, 1, r, dtype=torch.float64)) @ right  # condition number 100
            changed[name] = (B @ torch.linalg.inv(G), G @ A)
        rewritten.append(changed)
    first = build_basis(save_many(tmp_path / "x", adapters), dim=2, progress=False, **EXACT)
    second = build_basis(save_many(tmp_path / "y", rewritten), dim=2, progress=False, **EXACT)
    for module in SHAPES:
        for a, b in zip(first.factors(module, "shared"), second.factors(module, "shared"), strict=True):
            if a.ndim == 2:
                assert relative(projector(a), projector(b)) < 1e-5
            else:
                assert relative(a, b.double().numpy()) < 1e-5


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_a_common_scale_changes_no_weight(tmp_path, factor, eps):
    """eps is measured in the adapters' own size, so even a large eps keeps the weights."""
    adapters = cluster(SHAPES, 5, 2, torch.Generator().manual_seed(4), noise=1.0)
    scaled = [{n: (B * factor, A) for n, (B, A) in a.items()} for a in adapters]
    one = build_basis(save_many(tmp_path / "x", adapters), dim=2, eps=eps, progress=False, **EXACT)
    two = build_basis(save_many(tmp_path / "y", scaled), dim=2, eps=eps, progress=False, **EXACT)
    for module in SHAPES:
        w, v = (b.weights(module, "shared").double() for b in (one, two))
        w, v = w / w.sum(), v / v.sum()
        assert (w.max() / w.min()) > 1.01, "equal weights would prove nothing"
        torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            one.factors(module, "shared")[1] * factor, two.factors(module, "shared")[1], rtol=1e-4, atol=0
        )


def test_reordering_adapters_changes_nothing(tmp_path):
    adapters = cluster(SHAPES, 5, 2, torch.Generator().manual_seed(6))
    paths = save_many(tmp_path, adapters)
    order = [3, 0, 4, 2, 1]
    one = build_basis(paths, dim=2, progress=False, **EXACT)
    two = build_basis([paths[i] for i in order], dim=2, progress=False, **EXACT)
    for module in SHAPES:
        assert relative(low_rank(one, module, "shared"), low_rank(two, module, "shared").numpy()) < 1e-5
        torch.testing.assert_close(
            one.weights(module, "shared")[order], two.weights(module, "shared"), rtol=1e-4, atol=1e-6
        )


def test_one_adapter_wider_than_the_basis(tmp_path):
    """k = 1 and d < r: the best rank-d part of that one update, at any alpha."""
    adapter = random_factors(SHAPES, 6, torch.Generator().manual_seed(8))
    basis = build_basis(save_many(tmp_path, [adapter]), dim=2, progress=False)
    for module, (B, A) in adapter.items():
        U, S, Vt = torch.linalg.svd(B @ A)
        assert relative(low_rank(basis, module, "shared"), ((U[:, :2] * S[:2]) @ Vt[:2]).numpy()) < 1e-5


def test_identical_adapters_meet_a_zero_residual(tmp_path):
    """Residual 0 in every adapter: eps alone keeps the weights finite and equal."""
    adapter = random_factors(SHAPES, 3, torch.Generator().manual_seed(9))
    basis = build_basis(save_many(tmp_path, [refactored(adapter, i) for i in range(4)]), dim=3, progress=False)
    for module, (B, A) in adapter.items():
        weights = basis.weights(module, "shared")
        assert torch.isfinite(weights).all() and (weights > 0).all()
        torch.testing.assert_close(weights, weights[:1].expand(4), rtol=0.2, atol=0)
        assert relative(low_rank(basis, module, "shared"), (B @ A).numpy()) < 1e-5


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 3e-6, 1e-7, 1e-9])
def test_nearly_equal_adapters(tmp_path, spread):
    """Checkpoints of one run: the stacked factors are almost collinear, which a Gram matrix squares."""
    generator = torch.Generator().manual_seed(12)
    first = random_factors(SHAPES, 3, generator)
    adapters = [
        {
            name: tuple(t + spread * torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in pair)
            for name, pair in first.items()
        }
        for _ in range(3)
    ]
    basis = build_basis(save_many(tmp_path, adapters, dtype=torch.float64), dim=3, progress=False)
    for module in SHAPES:
        U, _, V = basis.factors(module, "shared")
        for Q in (U, V):
            torch.testing.assert_close(Q.T @ Q, torch.eye(3), atol=1e-5, rtol=0)
        mean = sum(deltas(adapters, module)) / 3  # the answer to within `spread`, whatever the weights
        assert relative(low_rank(basis, module, "shared"), mean.numpy()) < 30 * spread + 1e-5


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e6, 1e7, 1e8])
def test_invariant_to_badly_conditioned_factors(tmp_path, condition):
    """As above, G of a large condition number; float64 files, so that rounding on disk is no limit."""
    generator = torch.Generator().manual_seed(13)
    adapters = cluster(SHAPES, 3, 2, generator)
    rewritten = []
    for adapter in adapters:
        changed = {}
        for name, (B, A) in adapter.items():
            r = B.shape[1]
            left, right = orthonormal(r, r, generator), orthonormal(r, r, generator)
            half = np.log10(condition) / 2
            G = left @ torch.diag(torch.logspace(-half, half, r, dtype=torch.float64)) @ right
            changed[name] = (B @ torch.linalg.inv(G), G @ A)
        rewritten.append(changed)
    one, two = (
        build_basis(save_many(tmp_path / x, a, dtype=torch.float64), dim=2, progress=False, **EXACT)
        for x, a in (("x", adapters), ("y", rewritten))
    )
    for module in SHAPES:
        assert relative(low_rank(two, module, "shared"), low_rank(one, module, "shared").numpy()) < 1e-5
        for Q in two.factors(module, "shared")[::2]:
            torch.testing.assert_close(Q.T @ Q, torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("condition", [1e4, 1e6, 1e7])
def test_orthonormal_although_the_factors_are_nearly_dependent(tmp_path, condition):
    """Every direction in use, so that none of the badly conditioned ones can hide behind the leading ones."""
    generator = torch.Generator().manual_seed(14)
    adapters = []
    for _ in range(3):
        B, A = torch.randn(40, 4, generator=generator).double(), torch.randn(4, 30, generator=generator).double()
        left, right = orthonormal(4, 4, generator), orthonormal(4, 4, generator)
        G = left @ torch.diag(torch.logspace(0, np.log10(condition), 4, dtype=torch.float64)) @ right
        adapters.append({"layer": (B @ torch.linalg.inv(G), G @ A)})
    basis = build_basis(save_many(tmp_path, adapters, dtype=torch.float64), dim=12, progress=False)
    for Q in basis.factors("layer", "shared")[::2]:
        torch.testing.assert_close(Q.T @ Q, torch.eye(12), atol=1e-5, rtol=0)


def test_factors_are_contiguous(tmp_path):
    """U, S, V are handed out contiguous, so that safetensors and matmul take them as they are."""
    basis = build_basis(
        save_many(tmp_path, [random_factors(SHAPES, 3, torch.Generator().manual_seed(0))]),
        dim=2,
        progress=False,
    )
    for module in SHAPES:
        assert all(t.is_contiguous() for t in basis.factors(module, "shared"))


def test_factors_are_orthonormal_and_sorted(tmp_path):
    adapters = cluster(SHAPES, 4, 2, torch.Generator().manual_seed(10))
    basis = build_basis(save_many(tmp_path, adapters), dim=4, progress=False)
    for module, (n, m) in SHAPES.items():
        U, S, V = basis.factors(module, "shared")
        assert (U.shape, S.shape, V.shape) == ((n, 4), (4,), (m, 4))
        assert basis.dim(module, "shared") == 4
        assert all(t.dtype == torch.float32 and not t.requires_grad for t in (U, S, V))
        assert (S[:-1] >= S[1:]).all() and S[-1] >= 0
        for Q in (U, V):
            torch.testing.assert_close(Q.T @ Q, torch.eye(4), atol=1e-5, rtol=0)


def test_attributes_are_mined_apart(tmp_path):
    """Each attribute sees only its own adapters."""
    generator = torch.Generator().manual_seed(11)
    groups = {name: cluster(SHAPES, 3, 2, generator) for name in ("texture", "geometry")}
    basis = build_basis(
        {name: save_many(tmp_path / name, a) for name, a in groups.items()}, dim=2, progress=False, **EXACT
    )
    assert basis.attributes == ["texture", "geometry"]
    for name, adapters in groups.items():
        for module in SHAPES:
            dense = irls_dense(deltas(adapters, module), 2, **EXACT)
            assert relative(low_rank(basis, module, name), dense.low_rank) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_garbage_adapter_is_muted(tmp_path, seed):
    """Nine adapters around a rank-d truth, one ten times larger: alpha = 1 finds it, the mean does not."""
    generator = torch.Generator().manual_seed(seed)
    shapes, d = {"layer": (64, 48)}, 4
    U, V = orthonormal(64, d, generator), orthonormal(48, d, generator)
    adapters = []
    for _ in range(9):
        B = U + 0.02 * torch.randn(64, d, generator=generator, dtype=torch.float64)
        A = (V + 0.02 * torch.randn(48, d, generator=generator, dtype=torch.float64)).T
        adapters.append({"layer": (B, A)})
    garbage = {"layer": (10 * orthonormal(64, d, generator), orthonormal(48, d, generator).T)}
    adapters.insert(4, garbage)
    assert shapes["layer"] == (deltas(adapters, "layer")[0].shape)
    paths = save_many(tmp_path, adapters)

    robust = build_basis(paths, dim=d, alpha=1.0, progress=False)
    found_u, _, found_v = robust.factors("layer", "shared")
    assert largest_angle(found_u, U) < 5 and largest_angle(found_v, V) < 5
    assert int(robust.weights("layer", "shared").argmin()) == 4

    plain = build_basis(paths, dim=d, alpha=2.0, progress=False)
    mean_u, _, mean_v = plain.factors("layer", "shared")
    assert largest_angle(mean_u, U) > 30 and largest_angle(mean_v, V) > 30
    weights = plain.weights("layer", "shared")
    torch.testing.assert_close(weights, weights[:1].expand(10))
