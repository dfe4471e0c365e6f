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

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from .layer import AttrSubspaceLayer

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


def cores_of(layer: AttrSubspaceLayer) -> list[str]:
    """The active adapters that have a core in this layer."""
    return [name for name in layer.active_adapters if name in layer.attrsub_M]


def sum_of_cores(layer: AttrSubspaceLayer, names: list[str]) -> Tensor:
    """sum_i scaling_i M_i of adapters on one basis (D_A x D_B)."""
    parts = []
    for name in names:
        core, scaling = layer.core(name), layer.scaling[name]
        parts.append(core if scaling == 1.0 else core * scaling)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def obstacle(layer: AttrSubspaceLayer) -> str | None:
    """Why this layer's next forward pass has to be factored; None if it may be folded."""
    names = cores_of(layer)
    if not names:
        return "no active adapter has a core here"
    if any(name in layer.attrsub_lora_A for name in layer.active_adapters):
        return "an active adapter is a plain LoRA here"
    if any(layer.forward_mode[name] == "factored" for name in names):
        return "forward_mode='factored'"
    return _of_adapters(layer, names) or _of_base(layer) or _of_dtypes(layer, names)


def _of_adapters(layer: AttrSubspaceLayer, names: list[str]) -> str | None:
    for name in names:
        dropout = layer.attrsub_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return "dropout > 0 in training mode"
        if layer.attrsub_A[name].shape[1] == 0 or layer.attrsub_B[name].shape[1] == 0:
            return "the basis has no direction here"
        for held in (layer.attrsub_A, layer.attrsub_B):
            if held.key(name) != held.key(names[0]):
                return "the active adapters stand on different bases"
    return None


def _of_base(layer: AttrSubspaceLayer) -> str | None:
    base = layer.base_layer
    if layer.layout.kind != "linear":
        return f"layers of kind {layer.layout.kind} have no folded form"
    if layer.quantization_backend is not None:
        return "the weight is quantised"
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base layer is a {type(base).__name__}, whose forward may do more than a Linear's"
    if "forward" in base.__dict__:
        return "the base layer's forward has been replaced"
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    if any(len(hook) for hook in hooks):
        return "the base layer has hooks, which have to see its input and output"
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


def _of_dtypes(layer: AttrSubspaceLayer, names: list[str]) -> str | None:
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
    held = [layer.attrsub_A[names[0]], layer.attrsub_B[names[0]], *(layer.attrsub_M[name] for name in names)]
    if any(tensor.dtype != weight.dtype for tensor in held):
        return f"W is in {_short(weight.dtype)}, basis or core are not"
    return None


def choose(layer: AttrSubspaceLayer, x: Tensor) -> Fold | None:
    """Whether to fold the forward and the backward pass on x; None: base and update one after the other."""
    names = cores_of(layer)
    if not names:
        return None
    fold = _passes(layer, names, x.numel() // max(x.shape[-1], 1))
    # With few tokens, as in generation, this comparison is all that a layer pays.
    if not any(fold) or obstacle(layer) is not None or not _plain(layer, x):
        return None
    return fold


def _plain(layer: AttrSubspaceLayer, x: Tensor) -> bool:
    """Whether x is an ordinary tensor beside the weight, with nothing looking over torch's shoulder."""
    weight, names = layer.base_layer.weight, cores_of(layer)
    autocast = torch.is_autocast_enabled(x.device.type)
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return False
    if x.device != weight.device or any(layer.attrsub_B[name].device != x.device for name in names):
        return False
    if not x.is_floating_point() or (x.dtype != weight.dtype and not autocast):
        return False
    if torch.compiler.is_compiling():
        return True
    # torch.func, forward-mode derivatives and jit.trace take ordinary operations only.
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not (transformed or torch.autograd.forward_ad._current_level >= 0 or torch._C._get_tracing_state())


def _passes(layer: AttrSubspaceLayer, names: list[str], tokens: int) -> Fold:
    if all(layer.forward_mode[name] == "folded" for name in names):
        return True, True
    dims = layer.attrsub_A[names[0]].shape[1], layer.attrsub_B[names[0]].shape[1]
    # Not by which cores are trained: a loaded adapter shall round as the one that was saved.
    return cheaper(tokens, layer.layout.shape, dims, torch.is_grad_enabled())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def explain_forward(model: nn.Module, tokens: int) -> str:
    """How each adapted layer would compute its update on `tokens` rows of input, and why, as a table.

    Read as things stand now: the active adapters, train() or eval(), inside or outside of torch.no_grad() and
    torch.autocast. The input is taken to be in the weight's dtype, on its device.
    Raises ValueError for a model without adapted layers, or fewer than one token.
    """
    from .layer import AttrSubspaceLayer

    if tokens < 1:
        raise ValueError(f"tokens={tokens} is no positive whole number: give the rows of x that a layer sees at once.")
    rows = [("module", "W", "D", "forward", "backward", "why")]
    for name, layer in model.named_modules():
        if isinstance(layer, AttrSubspaceLayer):
            rows.append((name, *_explained(layer, tokens)))
    if len(rows) == 1:
        raise ValueError("the model has no adapted layer: give what get_peft_model or PeftModel.from_pretrained made.")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _explained(layer: AttrSubspaceLayer, tokens: int) -> tuple[str, str, str, str, str]:
    """Shape, dims, the two passes, and why."""
    names, (n, m) = cores_of(layer), layer.layout.shape
    shapes = {(layer.attrsub_A[name].shape[1], layer.attrsub_B[name].shape[1]) for name in names}
    dims = ", ".join(str(a) if a == b else f"{a}x{b}" for a, b in sorted(shapes)) or "-"
    gradient = torch.is_grad_enabled()
    if layer.disable_adapters or layer.merged:
        return f"{n}x{m}", dims, "base", "base" if gradient else "-", "merged" if layer.merged else "switched off"
    reason, fold = obstacle(layer), (False, False)
    if reason is None:
        fold = _passes(layer, names, tokens)
        forced = all(layer.forward_mode[name] == "folded" for name in names)
        reason = "forward_mode='folded'" if forced else _compared(tokens, (n, m), gradient)
    forward, backward = ("folded" if one else "factored" for one in fold)
    return f"{n}x{m}", dims, forward, backward if gradient else "-", reason


def _compared(tokens: int, shape: tuple[int, int], gradient: bool) -> str:
    n, m = shape
    if gradient:
        return f"cheaper with {tokens} tokens: folding pays from about {m} forward, {n} backward"
    return f"cheaper with {tokens} tokens: folding pays from about {round(n * m / (n + m))}"
