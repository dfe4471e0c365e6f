"""Sums of adapters: exact, because adapters on one basis differ only in their cores."""

from __future__ import annotations

import copy
import math

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import CORES, AttrSubspaceConfig
from .factors import Bases, disassemble
from .layer import AttrSubspaceLayer
from .shared_buffers import equal

#: Both mean dW = sum_i w_i dW_i.
COMBINATIONS = ("linear", "cat")


def check_combination(combination_type: str) -> None:
    """Raise ValueError for a combination_type that is no exact weighted sum of updates."""
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type={combination_type!r} is not supported for attribute-subspace adapters: use 'linear' or "
            "'cat', which give the exact weighted sum. Types that prune or approximate (svd, ties, dare_*, "
            "magnitude_prune) need LoRA factors: export the adapters with export_lora and combine those."
        )


def add_weighted_adapter(tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """sum_i w_i s_i A M_i B^T = s A (sum_i w_i s_i / s M_i) B^T; plain LoRA parts are put side by side."""
    config = _merged_config(tuner, adapters, weights, adapter_name)
    layers = {n: m for n, m in tuner.model.named_modules() if isinstance(m, AttrSubspaceLayer)}
    for name, layer in layers.items():
        _check_one_basis(name, layer, adapters)
        _check_tying(name, layer, adapters)
    tuner.peft_config[adapter_name] = config
    for layer in layers.values():
        present = [(a, w) for a, w in zip(adapters, weights, strict=True) if layer.has(a)]
        with torch.no_grad():
            if any(a in layer.attrsub_lora_A for a, _ in present):
                _add_loras(layer, present, config, adapter_name)
            elif present:
                _add_cores(layer, present, config, adapter_name)
            if present:
                layer.module_names[adapter_name] = layer.module_names[present[0][0]]
            tied = next((layer.tied[a] for a in adapters if a in layer.tied), None)
            if tied is not None:
                layer.tie(adapter_name, tied, config)
        layer.set_requires_grad(adapter_name, False)
    _carry_saved_modules(tuner.model, adapters, adapter_name)


def _merged_config(
    tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str
) -> AttrSubspaceConfig:
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights were given: give one weight each.")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights={weights!r} are not all finite numbers: give one finite weight per adapter.")
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
    for told in ("module_layouts", "basis_widths"):  # by module, and each adapter may have others
        setattr(merged, told, {k: v for c in configs for k, v in (getattr(c, told) or {}).items()} or None)
    merged.core = min((c.core for c in configs), key=CORES.index)  # the one that holds all of them
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
    held = [layer.bases(a) for a in adapters if a in layer.attrsub_M]
    if any(not equal(x, y) for pair in held[1:] for x, y in zip(held[0], pair, strict=True)):
        raise ValueError(
            f"the adapters stand on different bases in module {name!r}, where cores do not add up: "
            "export them with export_lora and combine the LoRA adapters instead."
        )


def _check_tying(name: str, layer: AttrSubspaceLayer, adapters: list[str]) -> None:
    """A layer that follows the embedding's sum of updates can do so for all adapters on the embedding, or for none."""
    tied = [a for a in adapters if a in layer.tied]
    if not tied:
        return
    source = layer.tied[tied[0]]
    apart = [a for a in adapters if a not in tied and (source.has(a) or layer.has(a))]
    if apart:
        raise ValueError(
            f"adapters {', '.join(tied)} share the update of the input embedding with {name!r} (ensure_weight_tying) "
            f"and {', '.join(apart)} do not, so they do not add up: export them with export_lora and combine those."
        )


def _add_cores(
    layer: AttrSubspaceLayer, present: list[tuple[str, float]], config: AttrSubspaceConfig, name: str
) -> None:
    first = present[0][0]
    a, b = layer.bases(first)
    bases = Bases(a, b, layer.slices[first], layer.attrsub_A.key(first), layer.fingerprint(first))
    layer.add_core(name, bases, config, inference_mode=True)
    total = sum(layer.core(a) * (w * layer.scaling[a] / layer.scaling[name]) for a, w in present)
    assert isinstance(total, torch.Tensor)
    value = disassemble(total, layer.slices[name], layer.core_kind[name])
    held = layer.attrsub_M[first].weight
    layer.attrsub_M[name].weight = nn.Parameter(value.to(held).clone(), requires_grad=False)


def _add_loras(
    layer: AttrSubspaceLayer, present: list[tuple[str, float]], config: AttrSubspaceConfig, name: str
) -> None:
    layer.add_lora(name, config, inference_mode=True)
    a = torch.cat([layer.attrsub_lora_A[x].weight for x, _ in present], 0)
    b = torch.cat([layer.attrsub_lora_B[x].weight * (w * layer.scaling[x]) for x, w in present], 1)
    layer.attrsub_lora_A[name].weight = nn.Parameter(a.clone(), requires_grad=False)
    layer.attrsub_lora_B[name].weight = nn.Parameter(b.clone(), requires_grad=False)
