"""Base layers whose weight is quantised: how PEFT reads it, and whether an adapter can be merged into it."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn

from ..basis import BasisError
from ..basis.weights import dequantises_itself, holds_values


def backend_of(base: nn.Module, **kwargs: Any) -> Any:
    """PEFT's QuantizationBackend for a layer with a quantised weight; None for an ordinary layer.

    A weight that can be read but not quantised again has a backend with `supports_merge` False: one that torchao
    quantised without transformers' quantiser, which holds the recipe, and any other tensor that knows how to
    dequantise itself. Plain tensors of integers or of 8-bit floats cannot be read either: only the layer that holds
    them knows their scales.

    Args:
        kwargs: what PEFT's `get_quantization_kwargs` finds in the model.
    """
    try:
        backend = resolve_quantization_backend(base, **kwargs)
    except ValueError:
        # PEFT asks for a recipe, which merging alone needs.
        backend = resolve_quantization_backend(base, **{**kwargs, "get_apply_tensor_subclass": _no_recipe})
        return _not_merged(backend, "torchao (without a recipe to quantise it again)")
    if backend is not None:
        return backend
    weight = getattr(base, "weight", None)
    if dequantises_itself(weight):
        return _SelfDequantising(type(weight).__name__)
    if is_packed(base) or (isinstance(weight, Tensor) and not holds_values(weight.dtype)):
        return ForwardOnlyQuantizationBackend(f"its {type(base).__name__}")
    return None


def is_packed(base: nn.Module) -> bool:
    """Whether a module is a linear layer that holds a matrix of codes instead of a weight."""
    sizes = getattr(base, "out_features", None), getattr(base, "in_features", None)
    sized = all(isinstance(size, int) and size > 0 for size in sizes)
    if not sized or isinstance(getattr(base, "weight", None), Tensor):
        return False
    held = (*base._parameters.values(), *base._buffers.values())
    return any(x is not None and x.dim() > 1 and x.dtype != torch.bool and not holds_values(x.dtype) for x in held)


def check_readable(base: nn.Module, module: str, **kwargs: Any) -> None:
    """Raise BasisError if the values of a weight, which basis='psv' is made from, cannot be read."""
    backend = backend_of(base, **kwargs)
    if isinstance(backend, ForwardOnlyQuantizationBackend):
        raise BasisError(
            f"basis='psv' needs the weight of {module!r}, which is quantised by {backend.backend_name} and cannot be "
            "read back: use a mined basis or basis='random'."
        )


def basis_dtype(weight: torch.dtype | None) -> torch.dtype | None:
    """The dtype for a frozen basis next to a weight of this dtype; None: as it is, for weights of 8 bits or fewer."""
    return weight if weight is not None and weight.is_floating_point and holds_values(weight) else None


def undo_packing(base: nn.Module) -> None:
    """Bring a bitsandbytes 4-bit weight back to the layout that its dequantization reads.

    A forward pass for inference on a CPU with AVX512-BF16 packs it in place, and PEFT dequantizes what it finds.
    """
    state = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        base.state_dict()  # bitsandbytes undoes the packing, in place, before it saves


def keep_bias(before: nn.Module, after: Any) -> None:
    """Give a layer that a backend has put in the place of `before`, to change its weight, the bias of `before`.

    PEFT's HQQ backend makes a new layer without one.
    """
    if after is not before and getattr(after, "bias", None) is None:
        after.bias = getattr(before, "bias", None)


def _no_recipe() -> Any:
    raise RuntimeError("a weight without a recipe was about to be quantised again")


def _not_merged(backend: Any, name: str) -> Any:
    backend.supports_merge, backend.backend_name = False, name
    return backend


class _SelfDequantising:
    """Backend for tensor subclasses that PEFT does not know and that dequantise themselves."""

    supports_merge = False
    layer_type = "linear"

    def __init__(self, name: str) -> None:
        self.backend_name = name

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        weight: Tensor = base_layer.weight.dequantize()  # type: ignore[operator]
        return weight

    def maybe_clone_base_result(self, x: Tensor) -> Tensor:
        return x
