"""The shortcuts of the mining against the sentence they stand for: Gram matrices, thin products, warm starts."""

import pytest
import torch

from peft_attrsub.basis.forms import Core, Operator, stack_updates
from peft_attrsub.basis.irls import shared_subspace
from peft_attrsub.basis.linalg import gram, product_norm, thin_product
from peft_attrsub.basis.matrix_free import leading_svd

from .helpers import orthonormal

CPU = torch.device("cpu")


def factors(shape, ranks, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(side, r, generator=generator, dtype=torch.float64).to(dtype) for side in shape)
        for r in ranks
    ]


@pytest.mark.parametrize("width", [1, 5, 127, 128, 161, 300])
def test_gram_and_thin_products(width):
    x = torch.randn(70, width, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram(x.T.contiguous().T), x.T @ x, rtol=1e-12, atol=1e-12)
    y = torch.randn(width, 3, dtype=torch.float64)
    torch.testing.assert_close(thin_product(x, y), x @ y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_norm_of_a_product_whose_factors_cancel(condition):
    generator = torch.Generator().manual_seed(0)
    p, q = orthonormal(40, 4, generator), orthonormal(30, 4, generator)
    stretch = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), 4, dtype=torch.float64)
    assert float(product_norm(p * stretch, q / stretch)) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("form", [Core, Operator])
@pytest.mark.parametrize("ranks", [[16] * 10, [3, 40, 16, 1, 60, 30]], ids=["equal ranks", "mixed ranks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forms_give_the_dense_answer(form, ranks, dtype):
    """Spectrum, triplets, residuals and energies at two sets of weights: from nothing, then from a warm start."""
    n, m = 220, 200
    pairs = factors((n, m), ranks, 1, dtype)
    found = form(stack_updates(iter(pairs), (n, m), ranks, CPU))
    dense = [p.double() @ q.double().T for p, q in pairs]
    torch.testing.assert_close(found.norms, torch.stack([d.norm() for d in dense]), rtol=1e-10, atol=0)
    start = torch.full((len(ranks),), 1 / len(ranks), dtype=torch.float64)
    for weights in (start, start + 0.02 * torch.rand(len(ranks), dtype=torch.float64)):
        mean = sum(w * d for w, d in zip(weights, dense, strict=True))
        U, S, Vh = torch.linalg.svd(mean)
        spectrum = found.spectrum(weights)
        torch.testing.assert_close(spectrum, S[: len(spectrum)], rtol=0, atol=2e-7 * float(S[0]))
        u, s, v = triplet = found.leading(weights, 5)
        torch.testing.assert_close(s, S[:5], rtol=1e-7, atol=0)
        x, y = found.project(u, v)
        low = (U[:, :5] * S[:5]) @ Vh[:5]
        residuals = torch.stack([(low - d).norm() for d in dense])
        torch.testing.assert_close(found.residuals(triplet, x, y), residuals, rtol=1e-6, atol=0)
        energy = torch.stack([(U[:, :5].T @ d @ Vh[:5].T).square().sum() for d in dense])
        torch.testing.assert_close(found.energy(x, y), energy, rtol=1e-5, atol=1e-9 * float(energy.max()))
        left, right = found.expand(u, v)
        assert float(((left * s) @ right.T - low).norm() / low.norm()) < 1e-5


def test_residual_of_an_adapter_that_is_fitted_exactly():
    """Subtracting squares would leave 1e-8 of the norm; the weights, 1 / (eps^2 + residual^2), would see it."""
    (p, q), *_ = factors((50, 40), [4], 2, torch.float64)
    for form in (Core, Operator):
        found = form(stack_updates([(p, q), (p, q)], (50, 40), [4, 4], CPU))
        u, s, v = found.leading(torch.full((2,), 0.5, dtype=torch.float64), 4)
        residuals = found.residuals((u, s, v), *found.project(u, v))
        assert float(residuals.max()) < 1e-12 * float(s[0])


def test_warm_start_finds_a_direction_it_has_never_seen():
    """A block of the leading directions of one matrix, then a matrix whose largest direction is none of them."""
    generator = torch.Generator().manual_seed(3)
    u, v = orthonormal(300, 40, generator), orthonormal(280, 40, generator)
    values = torch.linspace(1, 0.1, 40, dtype=torch.float64)
    one = (u * values) @ v.T
    start = leading_svd(lambda x: one @ x, lambda x: one.T @ x, one.shape, 4, None, CPU)
    two = one + 5 * u[:, 39:] @ v[:, 39:].T
    found = leading_svd(lambda x: two @ x, lambda x: two.T @ x, two.shape, 4, start.block, CPU)
    assert start.converged and found.converged
    torch.testing.assert_close(found.s, torch.linalg.svdvals(two)[:4], rtol=1e-9, atol=0)


def test_given_up_iteration_says_so():
    flat = orthonormal(100, 100, torch.Generator().manual_seed(4)) + 0.01 * torch.randn(100, 100, dtype=torch.float64)
    found = leading_svd(lambda x: flat @ x, lambda x: flat.T @ x, flat.shape, 5, None, CPU, max_passes=2)
    assert not found.converged


def test_first_call_does_not_change_its_input():
    pairs = factors((60, 50), [3, 3], 5)
    before = [(p.clone(), q.clone()) for p, q in pairs]
    shared_subspace([p for p, _ in pairs], [q for _, q in pairs], 2)
    assert all(
        torch.equal(a, b) for one, two in zip(pairs, before, strict=True) for a, b in zip(one, two, strict=True)
    )
