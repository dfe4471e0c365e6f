"""Stacked ranks beyond the layer (matrix-free) and beyond a full SVD of the core: still the dense answer."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_attrsub import build_basis
from peft_attrsub.basis.irls import shared_subspace
from tests.reference import irls_dense, objective

from .helpers import deltas, low_rank, orthonormal, random_factors, refactored, save_many
from .test_irls import assert_same_as_dense, cluster


@pytest.mark.parametrize("shape", [(48, 40), (40, 300), (300, 40)], ids=str)
def test_two_hundred_adapters(tmp_path, shape):
    """Stacked rank 800, far above min(n, m) = 40."""
    adapters = cluster({"layer": shape}, 200, 2, torch.Generator().manual_seed(7))
    settings = {"max_iter": 12, "tol": 1e-14}
    basis = build_basis(save_many(tmp_path, adapters), dim=2, progress=False, **settings)
    assert basis.weights("layer", "shared").shape == (200,)
    assert_same_as_dense(basis, adapters, 2, **settings)


@pytest.mark.parametrize("shape", [(60, 50), (400, 380)], ids=["matrix-free", "large core"])
def test_unrelated_adapters_reach_the_same_objective(tmp_path, shape):
    """No common truth: singular values lie close together, the hardest case for a subspace iteration."""
    generator = torch.Generator().manual_seed(8)
    adapters = [random_factors({"layer": shape}, 20, generator) for _ in range(16)]  # stacked rank 320
    settings = {"max_iter": 6, "tol": 1e-14}
    basis = build_basis(save_many(tmp_path, adapters), dim=5, progress=False, **settings)
    dense = irls_dense(deltas(adapters, "layer"), 5, **settings)
    reached = objective(low_rank(basis, "layer", "shared"), deltas(adapters, "layer"), 1.0, 1e-6)
    assert reached == pytest.approx(dense.objectives[-1], rel=1e-5)
    for got, expected in zip(
        basis.spectrum("layer", "shared"), (dense.first_spectrum, dense.last_spectrum), strict=True
    ):
        got = np.asarray(got, dtype=np.float64)[:10]
        assert np.abs(got - expected[:10]).max() < 1e-3 * expected[0]


@pytest.mark.parametrize("shape", [(200, 180), (420, 410)], ids=["matrix-free", "large core"])
def test_first_iteration_alone_is_exact(tmp_path, shape):
    """One step from a cold start, no gap to help: later steps cannot repair it."""
    generator = torch.Generator().manual_seed(13)
    adapters = [random_factors({"layer": shape}, 20, generator) for _ in range(20)]  # stacked rank 400
    basis = build_basis(save_many(tmp_path, adapters), dim=5, max_iter=1, progress=False)
    S = torch.linalg.svdvals(sum(deltas(adapters, "layer")) / 20)
    torch.testing.assert_close(basis.factors("layer", "shared")[1].double(), S[:5], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.as_tensor(basis.spectrum("layer", "shared")[0])[:10].double(), S[:10], rtol=1e-4, atol=0
    )


def test_large_core_equals_the_dense_reference(tmp_path):
    adapters = cluster({"layer": (340, 330)}, 10, 15, torch.Generator().manual_seed(9))  # stacked rank 300
    settings = {"max_iter": 8, "tol": 1e-14}
    basis = build_basis(save_many(tmp_path, adapters), dim=15, progress=False, **settings)
    assert_same_as_dense(basis, adapters, 15, **settings)


@pytest.mark.parametrize("shape", [(30, 26), (400, 380)], ids=["matrix-free", "large core"])
def test_objective_never_rises(tmp_path, shape):
    adapters = [random_factors({"layer": shape}, 20, torch.Generator().manual_seed(i)) for i in range(14)]
    paths, updates = save_many(tmp_path, adapters), deltas(adapters, "layer")
    values = []
    for iterations in range(1, 5):
        basis = build_basis(paths, dim=4, eps=1e-3, max_iter=iterations, tol=1e-14, progress=False)
        values.append(objective(low_rank(basis, "layer", "shared"), updates, 1.0, eps=1e-3))
    for before, after in itertools.pairwise(values):
        assert after <= before * (1 + 1e-6), f"objective rose: {values}"


def flat_pair(n, generator):
    """Two equal full-rank adapters whose update has n equal singular values: stacked rank 2 n."""
    U, V = orthonormal(n, n, generator), orthonormal(n, n, generator)
    return [refactored({"layer": (U, V.T)}, seed) for seed in range(2)]


def test_rules_see_the_whole_spectrum_when_matrix_free(tmp_path):
    """90 % of a flat spectrum of 100 is 90 directions; a spectrum cut short would say fewer."""
    paths = save_many(tmp_path, flat_pair(100, torch.Generator().manual_seed(10)))
    basis = build_basis(paths, dim=100, allocation="energy:0.9", progress=False)
    assert abs(basis.dim("layer", "shared") - 90) <= 1


def test_effective_rank_of_many_adapters(tmp_path):
    """Importance without a base model compares the updates' own effective ranks: 100 against 1 here."""
    generator = torch.Generator().manual_seed(11)
    adapters = flat_pair(100, generator)
    for a in adapters:
        a["thin"] = (orthonormal(100, 1, generator) * 1.0, orthonormal(100, 1, generator).T)
        a["wide"] = a["layer"]
    half = orthonormal(100, 50, generator)
    for a in adapters:
        a["half"] = (half, half.T)
    basis = build_basis(save_many(tmp_path, adapters), dim=10, allocation="importance-literal", progress=False)
    # ER: 100, 100, 50, <= 2 of mean 63: floors 1, 1, 0, 0
    dims = {m: basis.dim(m, "shared") if m in basis.modules else 0 for m in ("layer", "wide", "half", "thin")}
    assert dims == {"layer": 10, "wide": 10, "half": 0, "thin": 0}


def test_spectrum_reaches_beyond_twice_the_dimension(tmp_path):
    """The paper reads sigma_2d / sigma_1; a spectrum that stops before 2 d cannot show it."""
    generator = torch.Generator().manual_seed(12)
    adapters = [random_factors({"layer": (130, 120)}, 40, generator) for _ in range(4)]  # stacked rank 160 > 120
    basis = build_basis(save_many(tmp_path, adapters), dim=40, max_iter=3, progress=False)
    for spectrum in basis.spectrum("layer", "shared"):
        assert len(spectrum) > 80


def test_no_matrix_of_the_layers_size_is_formed():
    """Four updates of rank 2 on a 4000 x 3000 layer: every tensor torch makes stays below 1 % of n x m."""

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.seen = max(self.seen, t.numel())
            return out

    left = [torch.randn(4000, 2) for _ in range(4)]
    right = [torch.randn(3000, 2) for _ in range(4)]
    with Largest() as largest:
        found = shared_subspace(left, right, 2)
    assert found.u.shape == (4000, 2) and found.v.shape == (3000, 2)
    assert 4000 * 8 <= largest.seen < 120_000
