"""What the tuner tests ask of a model over and over: its output, its cores, what trains, what is the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_attrsub.tuner.layer import AttrSubspaceLayer

from .models import BASES, CASES, Case

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_basis = pytest.mark.parametrize("basis", BASES)


def run(model: nn.Module, case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """The model's output on the case's batch, without gradients; the caller picks train or eval mode."""
    with torch.no_grad():
        return model(case.inputs(dtype))


def same(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to rounding: |left - right| <= tolerance * (1 + |right|), every entry, and both finite."""
    return bool(torch.isfinite(left).all()) and torch.allclose(left, right, atol=tolerance, rtol=tolerance)


def loss(output: Tensor) -> Tensor:
    """A loss that every entry of the output pulls on: the mean squared distance from one."""
    return (output - 1.0).square().mean()


def learn(model: nn.Module, case: Case, steps: int = 3, lr: float = 0.02) -> None:
    """Train by Adam, whose step does not depend on the gradient's size, and go back to eval mode."""
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(case.inputs())).backward()
        optimizer.step()
    model.eval()


def layers(model: nn.Module) -> dict[str, AttrSubspaceLayer]:
    """Every adapted layer by its name; never empty."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, AttrSubspaceLayer)}
    assert found, "the model holds no adapted layer"
    return found


def cores(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The trainable core of every layer that has this adapter."""
    return {n: layer.attrsub_M[adapter].weight for n, layer in layers(model).items() if adapter in layer.attrsub_M}


def trainable(model: nn.Module) -> set[str]:
    """Names of the parameters that ask for a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def of_adapter(model: nn.Module, *adapters: str) -> set[str]:
    """Names of the parameters that belong to these adapters: cores, and copies made by modules_to_save."""
    endings = {f"attrsub_M.{adapter}.weight" for adapter in adapters}
    copies = {f"modules_to_save.{adapter}." for adapter in adapters}
    everything = [name for name, _ in model.named_parameters()]
    names = {n for n in everything if n.endswith(tuple(endings)) or any(copy in n for copy in copies)}
    assert names, f"no parameter belongs to {adapters}"
    return names


def activate(model: nn.Module, names: list[str]) -> None:
    """Make several adapters active at once, which a PeftModel allows through its tuner only."""
    model.base_model.set_adapter(names)


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The update of the base weight that this adapter stands for, by layer."""
    having = {name: layer for name, layer in layers(model).items() if adapter in layer.attrsub_M}
    found = {name: layer.get_delta_weight(adapter).detach().clone() for name, layer in having.items()}
    assert found, f"no layer has the adapter {adapter}"
    return found


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights under the adapted layers."""
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(model).items()}


def architecture(model: nn.Module) -> list[tuple[str, type]]:
    """Names and classes of all modules, in order."""
    return [(name, type(module)) for name, module in model.named_modules()]


def has_tuner_layers(model: nn.Module) -> bool:
    """Whether anything of the tuner, ours or another, is left in the model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextmanager
def no_warning(*fragments: str) -> Iterator[None]:
    """Fail if a warning holding one of these fragments is given; with none named, if any is."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield
    texts = [str(entry.message) for entry in record]
    bad = [text for text in texts if not fragments or any(fragment in text for fragment in fragments)]
    assert not bad, bad
