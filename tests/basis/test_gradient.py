"""Bases from the task's gradient against dense gradients by autograd, and what they leave untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_attrsub import AttrSubspaceConfig, Basis, BasisError, gradient_basis, random_basis, select_basis
from peft_attrsub.basis.layout import ModuleLayout


class Net(nn.Module):
    """Every layer type; `unused` is never called."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(30, 12)
            self.conv1 = nn.Conv1d(12, 16, 3, padding=1, stride=2)
            self.conv2 = nn.Conv2d(1, 6, (3, 2), dilation=(1, 2))
            self.fc = nn.Linear(16, 20)
            self.gpt = Conv1D(18, 20)
            self.unused = nn.Linear(4, 4)
        self.checkpointed = checkpointed

    def tail(self, x: Tensor) -> Tensor:
        return self.gpt(self.fc(x).tanh())

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.conv1(self.embed(ids).transpose(1, 2)).relu().transpose(1, 2)
        x = x + self.conv2(x[:, None])[:, :, :, :1].mean((1, 2))[:, None]
        out = checkpoint(self.tail, x, use_reentrant=False) if self.checkpointed else self.tail(x)
        return {"loss": (out - labels).square().mean()}


MODULES = ["embed", "conv1", "conv2", "fc", "gpt", "unused"]


def batches(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "ids": torch.randint(0, 30, (5, 9), generator=generator),
            "labels": torch.randn(5, 5, 18, generator=generator),
        }
        for _ in range(count)
    ]


def dense(model: nn.Module, given: list[Any], normalize: str) -> dict[str, Tensor]:
    """{module: N (n x m)} by autograd, one batch after the other."""
    stacks: dict[str, list[Tensor]] = {}
    for batch in given:
        model.zero_grad()
        model(**batch)["loss"].backward()
        for name, module in model.named_modules():
            if (layout := ModuleLayout.of(module)) is not None and module.weight.grad is not None:
                matrix = layout.as_matrix(module.weight.grad, isinstance(module, Conv1D))
                stacks.setdefault(name, []).append(matrix.double())
    found = {}
    for name, gradients in stacks.items():
        g = torch.stack(gradients)
        v = g.square().mean(0)
        v = v.sum(1, keepdim=True) * v.sum(0, keepdim=True) / v.sum()
        found[name] = g.mean(0) / (v.sqrt() if normalize == "adam" else 1)
        found[name] = found[name].nan_to_num(0, 0, 0)
    return found


def leading(matrix: Tensor, dim: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :dim] * s[:dim]) @ vh[:dim]


def product(basis: Basis, module: str, attribute: str = "task") -> Tensor:
    u, s, v = (x.double() for x in basis.factors(module, attribute))
    return (u * s) @ v.T


@pytest.mark.parametrize("normalize", ["adam", "none"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_leading_triplets_of_the_dense_gradient(normalize, exact, checkpointed):
    model, given = Net(checkpointed), batches()
    model.fc.requires_grad_(False)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    found = gradient_basis(model, given, 3, normalize=normalize, exact=exact, modules=MODULES)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters()) and not model.fc._forward_hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    reference = dense(Net(), given, normalize)
    assert set(reference) == set(MODULES) - {"unused"} and set(found.modules) == set(MODULES)
    assert found.dim("unused", "task") == 0
    for name, matrix in reference.items():
        wanted = leading(matrix, 3)  # the sketch has more columns than these modules
        torch.testing.assert_close(product(found, name), wanted, rtol=1e-3, atol=1e-4 * float(wanted.norm()))
    # The directions of the basis can be trained in, saved with the adapter.
    peft = get_peft_model(Net(), AttrSubspaceConfig(basis=found))
    assert not any("unused" in name for name, p in peft.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("exact", [True, False])
def test_a_wide_gradient_is_sketched_as_well_as_its_spectrum_allows(exact):
    """A module much larger than the sketch: its directions hold nearly as much of the gradient as the SVD's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 40))
    given = [(torch.randn(64, 200), torch.randn(64, 40)) for _ in range(2)]

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    found = gradient_basis(model, given, 6, loss_fn=loss_fn, exact=exact, normalize="none")
    for batch in given:
        (loss_fn(model, batch) / 2).backward()
    for name in ("0", "2"):
        gradient = model.get_submodule(name).weight.grad
        u, _, v = found.factors(name, "task")
        best = float(torch.linalg.svdvals(gradient)[:6].square().sum())
        assert float((u.T @ gradient @ v).square().sum()) > (0.999 if exact else 0.9) * best


@pytest.mark.parametrize("exact", [True, False])
def test_excluded_directions_stay_out_and_the_bases_go_together(exact):
    model, given = Net(), batches()
    first = random_basis(model, 4, modules=MODULES)
    found = gradient_basis(model, given, 3, exclude=first, exact=exact, modules=MODULES)
    whole = Basis.combine([first, found])
    for module in MODULES:
        slices = whole.joint(module)[2]
        u, _, v = found.factors(module, "task")
        left, right = first.joint(module)[:2]
        assert u.shape[1] == 0 or float((left.T @ u).abs().max()) < 1e-4
        assert v.shape[1] == 0 or float((right.T @ v).abs().max()) < 1e-4
        assert slices["task"][0].stop - slices["task"][0].start == u.shape[1]


def test_selected_directions_are_those_of_a_core_s_gradient():
    model, given = Net(), batches()
    basis = random_basis(model, 6, modules=MODULES[:5])
    found = select_basis(basis, model, given, 2)
    reference = dense(Net(), given, "none")
    for module in basis.modules:
        a, b = (x.double() for x in basis.joint(module)[:2])
        wanted = a @ leading(a.T @ reference[module] @ b, 2) @ b.T
        torch.testing.assert_close(
            product(found, module, "selected"), wanted, rtol=1e-3, atol=1e-4 * float(wanted.norm())
        )


def test_the_gradient_lowers_the_loss_faster_than_random_directions():
    given = batches(4)
    losses = {}
    for name, basis in {
        "gradient": gradient_basis(Net(), given, 4, modules=MODULES[:5]),
        "random": random_basis(Net(), 4, modules=MODULES[:5]),
    }.items():
        model = get_peft_model(Net(), AttrSubspaceConfig(basis=basis))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(40):
            optimizer.zero_grad()
            model(**given[step % 4])["loss"].backward()
            optimizer.step()
        losses[name] = sum(float(model(**batch)["loss"]) for batch in given)
    assert losses["gradient"] < losses["random"]


def test_what_cannot_be_used_is_a_sentence():
    model, given = Net(), batches(1)
    with pytest.raises(ValueError, match="there are no batches"):
        gradient_basis(model, [])
    with pytest.raises(ValueError, match="a batch is a list, expected a dict"):
        gradient_basis(model, [[1, 2]])
    with pytest.raises(ValueError, match="the loss of a batch is nan"):
        gradient_basis(model, given, loss_fn=lambda model, batch: model(**batch)["loss"] * float("nan"))
    with pytest.raises(BasisError, match="does not depend on any of the modules"):
        gradient_basis(model, given, modules=["unused"])
    with pytest.raises(BasisError, match="the gradient is zero in all"):
        gradient_basis(model, given, loss_fn=lambda model, batch: model(**batch)["loss"] * 0, modules=["fc"])
    with pytest.raises(BasisError, match="normalize must be 'adam' or 'none', got 'sign'"):
        gradient_basis(model, given, normalize="sign")
    other = random_basis(nn.ModuleDict({"fc": nn.Linear(7, 7)}), 2)
    with pytest.raises(BasisError, match="was mined for another model"):
        select_basis(other, model, given, 2)
    assert not model.fc._forward_hooks and all(p.requires_grad for p in model.parameters())
