"""The loss of a task on batches, as functions that adapt to a task before training take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

#: loss_fn(model, batch) -> scalar.
LossFn = Callable[[Any, Any], Tensor]


def model_loss(model: Any, batch: Any) -> Tensor:
    """model(**batch).loss, with the tensors of the batch moved to the model's device.

    Raises ValueError for a batch that is not a dict, and for a model whose output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, expected a dict for model(**batch): give such batches or a loss_fn."
        )
    device = next(model.parameters()).device
    found = model(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()})
    loss = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the model returned a {type(found).__name__} without a loss: put labels into the batches or give loss_fn."
        )
    return scalar(loss)


def scalar(loss: Any) -> Tensor:
    """A loss as a tensor without dimensions; ValueError for anything that is not one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"loss_fn must return a scalar tensor, got {what}.")
    return loss.reshape(())


def summed(values: Tensor) -> Tensor:
    """The sum over the processes of torch.distributed, where it runs; on the device of `values`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        moved = values.to(device)
        torch.distributed.all_reduce(moved)
        return moved.to(values.device)
    return values
