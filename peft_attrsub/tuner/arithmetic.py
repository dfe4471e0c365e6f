"""Sums of adapters: exact, because adapters on one basis differ only in their cores."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import AttrSubspaceConfig
from .factors import disassemble
from .layer import AttrSubspaceLayer

if TYPE_CHECKING:
    from .model import AttrSubspaceModel


def add_weighted_adapter(
    tuner: AttrSubspaceModel, adapters: list[str], weights: list[float], adapter_name: str
) -> None:
    """sum_i w_i s_i A M_i B^T = s A (sum_i w_i s_i / s M_i) B^T; plain LoRA parts are put side by side."""
    config = _merged_config(tuner, adapters, weights, adapter_name)
    layers = {n: m for n, m in tuner.model.named_modules() if isinstance(m, AttrSubspaceLayer)}
    for name, layer in layers.items():
        _check_one_basis(name, layer, adapters)
    tuner.peft_config[adapter_name] = config
    for layer in layers.values():
        present = [(a, w) for a, w in zip(adapters, weights, strict=True) if layer.has(a)]
        with torch.no_grad():
            if any(a in layer.attrsub_lora_A for a, _ in present):
                _add_loras(layer, present, config, adapter_name)
            elif present:
                _add_cores(layer, present, config, adapter_name)
        layer.set_requires_grad(adapter_name, False)
    _carry_saved_modules(tuner.model, adapters, adapter_name)


def _merged_config(
    tuner: AttrSubspaceModel, adapters: list[str], weights: list[float], adapter_name: str
) -> AttrSubspaceConfig:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights were given: give one weight each.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"adapter {adapter_name!r} exists already: choose another name.")
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"adapter {name!r} does not exist: there are {', '.join(tuner.peft_config)}.")
    configs: list[AttrSubspaceConfig] = [tuner.peft_config[name] for name in adapters]
    saving = {name for name, c in zip(adapters, configs, strict=True) if c.modules_to_save}
    if len(saving) > 1:
        raise ValueError(
            f"adapters {', '.join(sorted(saving))} all have modules_to_save, which are trained in full and do not "
            "add up: at most one of the adapters may have them."
        )
    if len({str(c.lora_modules) for c in configs}) > 1:
        raise ValueError("the adapters carry plain LoRA on different lora_modules, so they cannot be added up.")
    merged = copy.copy(configs[0])
    merged.modules_to_save = next((c.modules_to_save for c in configs if c.modules_to_save), None)
    targets = [c.target_modules for c in configs]
    if any(t != merged.target_modules for t in targets):
        if any(t is None or isinstance(t, str) for t in targets):
            raise ValueError("the adapters have different target_modules patterns, so they cannot be added up.")
        merged.target_modules = {name for t in targets for name in t or ()}
    if any(c.core == "full" for c in configs):
        merged.core = "full"
    merged.lora_rank = sum(c.lora_rank for c in configs)
    merged.lora_alpha = merged.lora_rank
    return merged


def _carry_saved_modules(model: nn.Module, adapters: list[str], adapter_name: str) -> None:
    """The modules that one of the adapters trained in full go along as they are."""
    for wrapper in [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]:
        source = next((a for a in adapters if a in wrapper.modules_to_save), None)
        if source is not None:
            wrapper.modules_to_save[adapter_name] = copy.deepcopy(wrapper.modules_to_save[source])
            wrapper.modules_to_save[adapter_name].requires_grad_(False)


def _check_one_basis(name: str, layer: AttrSubspaceLayer, adapters: list[str]) -> None:
    keys = {layer.attrsub_A.key(a) for a in adapters if a in layer.attrsub_A}
    if len(keys) > 1:
        raise ValueError(
            f"the adapters stand on different bases in module {name!r}, where cores do not add up: "
            "export them with export_lora and combine the LoRA adapters instead."
        )


def _add_cores(
    layer: AttrSubspaceLayer, present: list[tuple[str, float]], config: AttrSubspaceConfig, name: str
) -> None:
    first = present[0][0]
    bases = layer.shared(layer.attrsub_A.key(first))
    layer.add_core(name, bases, config, inference_mode=True)
    total = sum(layer.core(a) * (w * layer.scaling[a] / layer.scaling[name]) for a, w in present)
    assert isinstance(total, torch.Tensor)
    value = disassemble(total, layer.slices[name], layer.block_diagonal[name])
    held = layer.attrsub_M[first]
    layer.attrsub_M[name] = torch.nn.Parameter(value.to(held).clone(), requires_grad=False)


def _add_loras(
    layer: AttrSubspaceLayer, present: list[tuple[str, float]], config: AttrSubspaceConfig, name: str
) -> None:
    layer.add_lora(name, config, inference_mode=True)
    a = torch.cat([layer.attrsub_lora_A[x] for x, _ in present], 0)
    b = torch.cat([layer.attrsub_lora_B[x] * (w * layer.scaling[x]) for x, w in present], 1)
    layer.attrsub_lora_A[name] = torch.nn.Parameter(a.clone(), requires_grad=False)
    layer.attrsub_lora_B[name] = torch.nn.Parameter(b.clone(), requires_grad=False)
