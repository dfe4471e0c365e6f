"""What the tests of mixed batches share: the slow reference, one sample at a time with set_adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

BASE = "__base__"


def alone(model: PeftModel, name: str, call: Callable[[], Any]) -> Any:
    """What `call` gives when the whole model runs with one adapter."""
    if name == BASE:
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


def one_at_a_time(model: PeftModel, x: Tensor, names: list[str]) -> Tensor:
    """The slow reference: sample by sample."""
    with torch.no_grad():
        return torch.cat([alone(model, name, lambda i=i: model(x[i : i + 1])) for i, name in enumerate(names)])


def mixed(model: PeftModel, x: Tensor, names: list[str]) -> Tensor:
    with torch.no_grad():
        return model(x, adapter_names=names)


def shake(model: nn.Module) -> None:
    """Make the copies of modules_to_save differ from the module they copy."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def clean(model: PeftModel) -> bool:
    """Nothing of a mixed batch is left in the model."""
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    marked = [m for m in model.modules() if getattr(m, "sample_adapters", None) is not None]
    return not marked and not any(m._forward_pre_hooks for m in wrappers)
