"""The trained tensors of a layer as modules that are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .fingerprint import BYTES
from .shared_buffers import moved_with_values


class Factor(nn.Module):
    """One trained tensor, `weight`: part of a plain LoRA.

    It is read by calling the module with a function of it. Wrappers that move, gather or offload parameters
    (accelerate, DeepSpeed, FSDP) do so in hooks around the call of a module, so the tensor is complete inside the call
    and only there.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, use: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """use(weight, *inputs). Raises RuntimeError if the weight is on the meta device and the inputs are not."""
        if self.weight.is_meta and any(not x.is_meta for x in inputs):
            raise RuntimeError(
                f"a trained tensor of shape {tuple(self.weight.shape)} is on the meta device, so the adapter has no "
                "values to compute with: load its weights first, or let the wrapper that offloads it run the model."
            )
        return use(self.weight, *inputs)

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


class Core(Factor):
    """A core M, and in `basis` the fingerprint of the basis that it belongs to (see `fingerprint`)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        # On a device of its own choice: adapters are also made under torch.device("meta").
        self.basis: Tensor
        self.register_buffer("basis", torch.zeros(BYTES, dtype=torch.uint8, device="cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = self.basis
        super()._apply(fn, recurse)
        # Which basis a core belongs to is known before its weight is.
        self.basis = moved_with_values(fn, held)
        return self
