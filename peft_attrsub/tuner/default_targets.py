"""Which modules get a core where target_modules is "all-linear", or is not given and the basis names none.

All linear layers (nn.Linear, transformers' Conv1D, quantised ones), but

- output embeddings, which are as wide as the vocabulary, and the head of a task (SEQ_CLS, TOKEN_CLS, QUESTION_ANS),
  which PEFT trains in full;
- what modules_to_save or exclude_modules name, and what lies inside of an adapter, or of a module that another
  adapter saves in full;
- the layers of nn.MultiheadAttention, which reads their weights without calling them: an adapter would do nothing;
- poolers, unless the task is SEQ_CLS: the other tasks do not read a pooler, so that its core would never learn, and
  DistributedDataParallel would wait for its gradient;
- layers outside of layers_to_transform.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..basis.naming import natural_key, some
from .config import AttrSubspaceConfig

ALL_LINEAR = "all-linear"
#: Heads that PEFT trains in full for a task, as its task models name them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def linear_targets(
    model: nn.Module, config: AttrSubspaceConfig, quantised: Callable[[nn.Module], bool], own: Mapping[str, str]
) -> set[str]:
    """Names of the linear layers that get a core by default (see above), without wrappers.

    quantised: whether a module is a quantised linear layer. own: name in the model -> the same without wrappers.

    Raises ValueError where none is left. Warns of nn.MultiheadAttention, whose layers stay as they are.
    """
    heads = _heads(model, config, own)
    attention = attention_modules(model, own)
    found = set()
    for name, module in _outside_of_adapters(model):
        bare = own[name]
        if _is_linear(module, quantised) and not _inside(bare, heads) and not _is_idle_pooler(bare, config):
            found.add(bare)
    wanted = {name for name in found if _is_wanted(config, name)}
    warn_of_attention(config, wanted, attention)
    wanted = {name for name in wanted if _owner(name) not in attention}
    if not wanted:
        raise ValueError(
            f"no linear layer is left to adapt: the model has {len(found)} outside of its heads and idle poolers, and "
            f"nn.MultiheadAttention, exclude_modules={config.exclude_modules!r}, modules_to_save="
            f"{config.modules_to_save!r}, layers_to_transform={config.layers_to_transform!r} and layers_pattern="
            f"{config.layers_pattern!r} leave none; give target_modules."
        )
    return wanted


def attention_modules(model: nn.Module, own: Mapping[str, str]) -> set[str]:
    """Names, without wrappers, of every nn.MultiheadAttention in a model."""
    return {own[name] for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}


def warn_of_attention(config: AttrSubspaceConfig, names: Iterable[str], attention: set[str]) -> None:
    """Warn of the modules among `names` that get no core because they are in an nn.MultiheadAttention.

    Nothing is said of an attention that exclude_modules names itself.
    """
    inside = {_owner(name) for name in names} & attention
    left_out = {name for name in inside if not name or _is_wanted(config, name)}
    if left_out:
        warnings.warn(
            f"the linear layers inside of nn.MultiheadAttention ({some(sorted(left_out, key=natural_key))}) get "
            "no core: it reads their weights without calling them, so a core there would do nothing.",
            stacklevel=4,
        )


def in_layers(config: AttrSubspaceConfig, name: str) -> bool:
    """Whether a module is in the layers of layers_to_transform, by PEFT's own rule."""
    if config.layers_to_transform is None:
        return True
    # PEFT looks at the layer index only when a target matches by its ending.
    return "." in name and bool(check_target_module_exists(_probe(config, {name.rpartition(".")[2]}), name))


def _is_wanted(config: AttrSubspaceConfig, name: str) -> bool:
    """Whether PEFT would take a module that is targeted by its name: not excluded, not saved in full."""
    return in_layers(config, name) and bool(check_target_module_exists(_probe(config, {name}), name))


def _probe(config: AttrSubspaceConfig, targets: set[str]) -> Any:
    probe = copy.copy(config)
    probe.target_modules = targets
    return probe


def _outside_of_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every named module, but for those inside of adapted layers and of modules that an adapter saves in full."""
    inside: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if not name or name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (f"{name}.",)
        yield name, module


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_linear(module: nn.Module, quantised: Callable[[nn.Module], bool]) -> bool:
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, (nn.Linear, Conv1D)) or quantised(base)


def _heads(model: nn.Module, config: AttrSubspaceConfig, own: Mapping[str, str]) -> list[str]:
    """Names of output embeddings, also of a model inside of another module, and of task heads."""
    embeddings: list[Any] = []
    for module in model.modules():
        with suppress(AttributeError, NotImplementedError, TypeError):
            embeddings.append(module.get_output_embeddings())  # type: ignore[operator]  # of transformers
    found = {id(module) for module in embeddings}
    tasks = _HEADS.get(_task(config), ())  # at any depth, as PEFT reads modules_to_save
    named = [(own[name], module) for name, module in model.named_modules()]
    return [bare for bare, module in named if id(module) in found or bare.rpartition(".")[2] in tasks]


def _inside(name: str, parts: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _is_idle_pooler(name: str, config: AttrSubspaceConfig) -> bool:
    return _task(config) != "SEQ_CLS" and "pooler" in name.split(".")


def _task(config: AttrSubspaceConfig) -> str:
    return str(getattr(config.task_type, "value", config.task_type))
