"""The folded forward against y = x (W + A M B^T)^T + bias written out, with torch's own derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_attrsub.tuner.folded import folded_linear

FOLDS = [(True, True), (True, False), (False, True), (False, False)]
every_fold = pytest.mark.parametrize("fold", FOLDS, ids=["both", "forward", "backward", "neither"])


@dataclass
class Problem:
    """x (..., m), core (D_A x D_B), W (n x m), bias (n), A (n x D_A), B (m x D_B)."""

    x: Tensor
    core: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor

    def fast(self, fold: tuple[bool, bool], transposed: bool = False) -> Tensor:
        weight = self.weight.T.contiguous() if transposed else self.weight
        return folded_linear(self.x, self.core, weight, self.bias, self.a, self.b, transposed=transposed, fold=fold)

    def slow(self) -> Tensor:
        return nn.functional.linear(self.x, self.weight + self.a @ self.core @ self.b.T, self.bias)


def problem(
    tokens: tuple[int, ...] = (6,),
    n: int = 7,
    m: int = 5,
    d_a: int = 3,
    d_b: int = 2,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Random numbers; x and the core ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, core = draw(*tokens, m).requires_grad_(), draw(d_a, d_b).requires_grad_()
    return Problem(x, core, draw(n, m), draw(n) if bias else None, draw(n, d_a), draw(m, d_b))


def derivatives(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of a fixed random weighting of y."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), inputs))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    sizes=st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 4)] * 2),
    bias=st.booleans(),
    transposed=st.booleans(),
    fold=st.sampled_from(FOLDS),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_written_out_sum(tokens, sizes, bias, transposed, fold, seed):
    p = problem(tokens, *sizes, bias=bias, seed=seed)
    fast, slow = p.fast(fold, transposed), p.slow()
    torch.testing.assert_close(fast, slow)
    for got, expected in zip(derivatives(fast, p.x, p.core), derivatives(slow, p.x, p.core), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        torch.testing.assert_close(p.fast(fold, transposed), slow)


@every_fold
@pytest.mark.parametrize("dims", [(3, 2), (2, 3)])
def test_first_and_second_derivatives_are_those_of_finite_differences(fold, dims):
    p = problem((2, 2), d_a=dims[0], d_b=dims[1])

    def run(x: Tensor, core: Tensor) -> Tensor:
        return folded_linear(x, core, p.weight, p.bias, p.a, p.b, fold=fold)

    assert torch.autograd.gradcheck(run, (p.x, p.core))
    assert torch.autograd.gradgradcheck(run, (p.x, p.core))


@every_fold
def test_a_penalty_on_the_gradient_trains_through_the_kept_product(fold):
    p = problem()
    penalties = []
    for y in (p.fast(fold), p.slow()):
        gradients = torch.autograd.grad(y.square().sum(), (p.x, p.core), create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        penalties.append(torch.autograd.grad(penalty, (p.x, p.core)))
    for got, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(got, expected)


@every_fold
@pytest.mark.parametrize("wants", ["x", "core"])
def test_only_the_gradient_that_is_asked_for(fold, wants):
    p = problem()
    (p.x if wants == "core" else p.core).requires_grad_(False)
    asked = getattr(p, wants)
    torch.testing.assert_close(derivatives(p.fast(fold), asked), derivatives(p.slow(), asked))
    assert (p.x.grad is None) and (p.core.grad is None)


def kept(p: Problem, fold: tuple[bool, bool]) -> list[tuple[int, ...]]:
    """Shapes that autograd keeps between the passes and that were not there before."""
    known = {t.untyped_storage().data_ptr() for t in (p.core, p.weight, p.bias, p.a, p.b) if t is not None}
    shapes = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = p.fast(fold)
    derivatives(y, p.core)
    return shapes


@every_fold
def test_what_is_kept_is_x_b_and_not_x(fold):
    p = problem((4, 10))
    assert kept(p, fold) == [(4, 10, 2)]
    p.core.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("x") if t is p.x else t, lambda t: t):
        p.fast(fold)


@every_fold
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_to_the_same(fold, reentrant):
    p = problem()

    def run(x: Tensor) -> Tensor:
        return folded_linear(x, p.core, p.weight, p.bias, p.a, p.b, fold=fold).tanh()

    y = checkpoint(run, p.x, use_reentrant=reentrant)
    y.sum().backward()
    got = p.x.grad.clone(), p.core.grad.clone()
    for one, expected in zip(got, torch.autograd.grad(run(p.x).sum(), (p.x, p.core)), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_summed_in_float32_and_rounded_once(dtype):
    p = problem((6,), dtype=dtype)
    p.core = p.core.detach().float().requires_grad_()
    y = p.fast((True, True))
    wide = Problem(p.x.detach().float(), p.core, p.weight.float(), p.bias.float(), p.a.float(), p.b.float())
    wide.x.requires_grad_()
    rounded = (wide.weight + wide.a @ wide.core @ wide.b.T).detach().to(dtype)
    torch.testing.assert_close(y, nn.functional.linear(p.x, rounded, p.bias))
    assert y.dtype == dtype
    dx, dcore = derivatives(y, p.x, p.core)
    assert dx.dtype == dtype and dcore.dtype == torch.float32
    expected = derivatives(wide.slow(), wide.x, wide.core)
    for got, exact in zip((dx.float(), dcore), expected, strict=True):
        # Half a unit of bfloat16 in each of the few numbers that a sum goes through.
        assert (got - exact).norm() < 0.02 * exact.norm()


def test_autocast_sums_in_float32_and_multiplies_in_its_own_dtype():
    p = problem((6,), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = p.fast((True, True))
    assert y.dtype == torch.bfloat16
    rounded = (p.weight + p.a @ p.core @ p.b.T).detach().bfloat16()
    torch.testing.assert_close(y, nn.functional.linear(p.x.bfloat16(), rounded, p.bias.bfloat16()))
    dx, dcore = derivatives(y, p.x, p.core)
    exact = derivatives(p.slow(), p.x, p.core)
    assert dx.dtype == dcore.dtype == torch.float32
    for got, expected in zip((dx, dcore), exact, strict=True):
        assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
@every_fold
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_is_one_graph_and_keeps_no_sum_of_weights(fold, backend):
    torch.compiler.reset()
    p = problem((40,), n=24, m=16, dtype=torch.float32)
    compiled = torch.compile(
        lambda x, core: folded_linear(x, core, p.weight, p.bias, p.a, p.b, fold=fold), fullgraph=True, backend=backend
    )
    existing = {t.untyped_storage().data_ptr() for t in (p.core, p.weight, p.bias, p.a, p.b)}
    new: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in existing:
            new.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = compiled(p.x, p.core)
    # x B, and at the most one product of M with a thin side.
    assert (40, 2) in new and (40, 16) not in new and (24, 16) not in new
    for got, expected in zip(derivatives(y, p.x, p.core), derivatives(p.slow(), p.x, p.core), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
