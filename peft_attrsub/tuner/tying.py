"""`ensure_weight_tying`: the input embedding and the layers that share its weight are trained as one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .adapted import AdaptedLayer
from .config import AttrSubspaceConfig


def tie_saved_modules(config: AttrSubspaceConfig, model: Any, tied: Iterable[str]) -> None:
    """Make `modules_to_save` hold the input embedding only; PEFT ties the modules in `tied` to its trained copy.

    model: the base model, with `get_input_embeddings`. tied: full names of the modules tied to that embedding.
    """
    config.modules_to_tie = set(tied)
    name = embedding_name(model)
    kept = [
        m for m in config.modules_to_save or [] if not any(means(m, key) for key in (*config.modules_to_tie, name))
    ]
    config.modules_to_save = [*kept, name]


def tie_targets(config: AttrSubspaceConfig, model: Any, tied: Iterable[str]) -> None:
    """Make `target_modules` hold the input embedding and none of the layers in `tied`, which follow its adapter."""
    config.target_modules_to_tie = set(tied)
    name = embedding_name(model)
    targets = config.target_modules
    if isinstance(targets, str):
        config.target_modules = rf"(?:{targets}|{re.escape(name)})"
        return
    kept = {m for m in targets or () if not any(means(m, key) for key in config.target_modules_to_tie)}
    config.target_modules = kept if any(means(m, name) for m in kept) else kept | {name}


def tied_update(layer: AdaptedLayer, adapter: str, x: Tensor) -> Tensor:
    """The update of a layer that shares its weight with the input embedding, whose update is dW = s A M B^T.

    Both weights are stored as vocabulary x hidden, and dW is hidden x vocabulary. An embedding looks up rows of B, as
    the source does; a linear layer computes y = x dW = s (x A) M B^T. A plain LoRA has no M.
    """
    source = layer.tied[adapter]
    a, core, b = (None if part is None else part.to(x.device) for part in source.factors(adapter))
    assert a is not None and b is not None
    if layer.layout.kind == "embedding":
        first, last, core = b, a, None if core is None else core.T
        z = layer.project_in(x, first)
    else:
        first, last = a, b
        z = layer.prepare_input(x, adapter, first.dtype) @ first
    if core is not None:
        z = z.to(core.dtype) @ core
    return nn.functional.linear((z * source.scaling[adapter]).to(last.dtype), last)


def merged_with_source(layer: AdaptedLayer, adapter: str) -> bool:
    """Whether merging the embedding's adapter has changed this layer's weight, too: it is the same parameter."""
    source = layer.tied.get(adapter)
    return source is not None and layer.get_base_layer().weight is source.get_base_layer().weight


def embedding_name(model: Any) -> str:
    """The name of the input embedding in a model."""
    embedding = model.get_input_embeddings()
    return str(next(n for n, module in model.named_modules() if module is embedding))


def means(target: str, name: str) -> bool:
    """Whether a name in modules_to_save or target_modules means this module: its full name or its ending."""
    return name == target or name.endswith(f".{target}")
