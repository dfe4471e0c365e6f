"""Which way a linear layer computes base and update: factored, or folded into one product (see `folded`).

The costs compared are those in which the two ways differ, in multiply-adds, with T tokens, W n x m, cores D_A x D_B
and `TRAFFIC` multiply-adds for every number read or written:

                      thin products                       W + A M B^T
    forward           T n (D_B + 2 TRAFFIC)               FOLDING * n m (D + 2 TRAFFIC),  D = min(D_A, D_B)
    backward          T m (D_A + 2 TRAFFIC)               the same

Q = x B and P = g A are needed for the core's gradient either way; without gradients (inference) the thin products
cost T m (D_B + TRAFFIC) more. So training folds the forward pass from about T = m tokens on
and the backward pass from about T = n, inference earlier. `benchmarks/tuner.py` measures both ways on VGGT's shapes,
fits the two constants, and says what the choice loses against always taking the faster way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapted import AdaptedLayer

#: Multiply-adds that take as long as moving one number to or from memory; fitted by benchmarks/tuner.py.
TRAFFIC = 16.0
#: How much more a multiply-add costs when W + A M B^T is made than in the thin products; fitted there too.
FOLDING = 1.0

#: Dtypes in which W + A M B^T keeps what the core holds; narrower ones round small updates away.
_EXACT = (torch.float32, torch.float64)
_FLOATS = (*_EXACT, torch.bfloat16, torch.float16)
Fold = tuple[bool, bool]


def cheaper(
    tokens: int,
    shape: tuple[int, int],
    dims: tuple[int, int],
    gradients: bool = True,
    traffic: float = TRAFFIC,
    folding: float = FOLDING,
) -> Fold:
    """Whether the forward and the backward pass are cheaper folded.

    tokens: rows of x. shape: (n, m) of W. dims: (D_A, D_B). gradients: whether they are recorded.
    """
    (n, m), (d_a, d_b) = shape, dims
    folded = folding * n * m * (min(d_a, d_b) + 2 * traffic)
    forward = tokens * n * (d_b + 2 * traffic)
    backward = tokens * m * (d_a + 2 * traffic)
    if not gradients:
        forward += tokens * m * (d_b + traffic)
    return folded < forward, folded < backward


def cores_of(layer: AdaptedLayer) -> list[str]:
    """The active adapters that have a core in this layer."""
    return [name for name in layer.active_adapters if name in layer.attrsub_M]


def sum_of_cores(layer: AdaptedLayer, names: list[str]) -> Tensor:
    """sum_i scaling_i M_i of adapters on one basis (D_A x D_B)."""
    parts = []
    for name in names:
        core, scaling = layer.core(name), layer.scaling[name]
        parts.append(core if scaling == 1.0 else core * scaling)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def obstacle(layer: AdaptedLayer) -> str | None:
    """Why this layer's next forward pass has to be factored; None if it may be folded."""
    names = cores_of(layer)
    if not names:
        return "no active adapter has a core here"
    if any(name in layer.attrsub_lora_A for name in layer.active_adapters):
        return "an active adapter is a plain LoRA here"
    if any(name in layer.tied for name in layer.active_adapters):
        return "an active adapter is tied to the input embedding's"
    if any(layer.forward_mode[name] == "factored" for name in names):
        return "forward_mode='factored'"
    return _of_adapters(layer, names) or _of_base(layer) or _of_dtypes(layer, names)


def _of_adapters(layer: AdaptedLayer, names: list[str]) -> str | None:
    for name in names:
        dropout = layer.attrsub_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return "dropout > 0 in training mode"
        if layer.attrsub_A[name].shape[1] == 0 or layer.attrsub_B[name].shape[1] == 0:
            return "the basis has no direction here"
        for held in (layer.attrsub_A, layer.attrsub_B):
            if held[name] is not held[names[0]]:
                return "the active adapters stand on different bases"
    return None


def _of_base(layer: AdaptedLayer) -> str | None:
    base = layer.base_layer
    if layer.layout.kind != "linear":
        return f"layers of kind {layer.layout.kind} have no folded form"
    if layer.quantization_backend is not None:
        return "the weight is quantised"
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}, whose forward may do more than a Linear's"
    if "forward" in base.__dict__:
        return "the base layer's forward has been replaced"
    if _hooked(base):
        return "the base layer has hooks, which have to see its input and output"
    if any(_hooked(layer.attrsub_M[name]) for name in cores_of(layer)):
        return "the core has hooks, which have to see its input and output"
    weight, bias = base.weight, base.bias
    n, m = layer.layout.shape
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"the weight is a {type(weight).__name__}"
    if weight.shape != ((m, n) if layer.fan_in_fan_out else (n, m)):
        return "the weight is sharded away"
    if weight.device.type == "meta":
        return "the weight is on the meta device"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the base layer is being trained itself"
    return None


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(hook) for hook in hooks)


def _of_dtypes(layer: AdaptedLayer, names: list[str]) -> str | None:
    weight: Any = layer.base_layer.weight
    if weight.dtype not in _FLOATS:
        return f"the weight is in {_short(weight.dtype)}"
    if all(layer.forward_mode[name] == "folded" for name in names):
        return None
    device = weight.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) not in _EXACT:
        return f"autocast to {_short(torch.get_autocast_dtype(device))} would round small updates away"
    if weight.dtype not in _EXACT:
        return f"W + A M B^T in {_short(weight.dtype)} would round small updates away"
    cores = (layer.attrsub_M[name].weight for name in names)
    held = [layer.attrsub_A[names[0]], layer.attrsub_B[names[0]], *cores]
    if any(tensor.dtype != weight.dtype for tensor in held):
        return f"W is in {_short(weight.dtype)}, basis or core are not"
    return None


def choose(layer: AdaptedLayer, x: Tensor) -> Fold | None:
    """Whether to fold the forward and the backward pass on x; None: base and update one after the other."""
    names = cores_of(layer)
    if not names:
        return None
    fold = passes_to_fold(layer, names, x.numel() // max(x.shape[-1], 1))
    # With few tokens, as in generation, this comparison is all that a layer pays.
    if not any(fold) or obstacle(layer) is not None or not _plain(layer, x):
        return None
    return fold


def _plain(layer: AdaptedLayer, x: Tensor) -> bool:
    """Whether x is an ordinary tensor beside the weight, with nothing looking over torch's shoulder."""
    weight, names = layer.base_layer.weight, cores_of(layer)
    autocast = torch.is_autocast_enabled(x.device.type)
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False
    if x.device != weight.device:
        return False
    for name in names:
        if layer.attrsub_B[name].device != x.device or layer.attrsub_M[name].weight.device != x.device:
            return False
    if not x.is_floating_point() or (x.dtype != weight.dtype and not autocast):
        return False
    if torch.compiler.is_compiling():
        return True
    # torch.func, forward-mode derivatives and jit.trace take ordinary operations only.
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not (transformed or torch.autograd.forward_ad._current_level >= 0 or torch._C._get_tracing_state())


def passes_to_fold(layer: AdaptedLayer, names: list[str], tokens: int) -> Fold:
    """Which passes to fold, with nothing in the way."""
    if all(layer.forward_mode[name] == "folded" for name in names):
        return True, True
    dims = layer.attrsub_A[names[0]].shape[1], layer.attrsub_B[names[0]].shape[1]
    # Not by which cores are trained: a loaded adapter shall round as the one that was saved.
    return cheaper(tokens, layer.layout.shape, dims, torch.is_grad_enabled())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
