"""The table of `explain_forward`: which way each layer computes its update, and why."""

from __future__ import annotations

import torch
from torch import nn

from .forward_choice import cores_of, obstacle, passes_to_fold
from .layer import AttrSubspaceLayer


def explain_forward(model: nn.Module, tokens: int) -> str:
    """How each adapted layer would compute its update on `tokens` rows of input, and why, as a table.

    Read as things stand now: the active adapters, train() or eval(), inside or outside of torch.no_grad() and
    torch.autocast. The input is taken to be in the weight's dtype, on its device.
    Raises ValueError for a model without adapted layers, or fewer than one token.
    """
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
        fold = passes_to_fold(layer, names, tokens)
        forced = all(layer.forward_mode[name] == "folded" for name in names)
        reason = "forward_mode='folded'" if forced else _compared(tokens, (n, m), gradient)
    forward, backward = ("folded" if one else "factored" for one in fold)
    return f"{n}x{m}", dims, forward, backward if gradient else "-", reason


def _compared(tokens: int, shape: tuple[int, int], gradient: bool) -> str:
    n, m = shape
    if gradient:
        return f"cheaper with {tokens} tokens: folding pays from about {m} forward, {n} backward"
    return f"cheaper with {tokens} tokens: folding pays from about {round(n * m / (n + m))}"
