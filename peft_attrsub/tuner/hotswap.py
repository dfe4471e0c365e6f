"""Hot swap: other values for one adapter of a running model, written into the tensors that are there.

The tensors keep their place, shape and dtype, so that a model under torch.compile is not compiled again and an
optimiser still holds the very same parameters (what it remembers of them, such as Adam's moments, is of the old
adapter). PEFT's own `peft.utils.hotswap.hotswap_adapter` knows LoRA's factors and scalings by name and refuses this
method, with a sentence, before it touches anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..basis import BasisError
from ..basis.adapters import CONFIG, WEIGHTS
from ..basis.hub import HubOptions, fetch
from ..basis.naming import natural_key, some
from .adapter_files import read_adapter
from .config import AttrSubspaceConfig
from .layer import AttrSubspaceLayer
from .provider import BasisProvider


def hotswap_adapter(
    model: nn.Module,
    name: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> None:
    """Replace cores, plain LoRA parts and modules_to_save of `adapter_name` by those of a saved adapter, in place.

    All or nothing: basis, attributes, dims, modules, kind of core, scaling and shapes are compared, and the new
    values brought to their device and dtype, before the first one is written. Dropout stays as the model has it.

    Args:
        model: a PeftModel, also inside torch.compile or a distributed wrapper. name: folder or Hub id of a saved
            adapter. adapter_name: whose values are replaced; it keeps its name and its config.
        revision, subfolder, token, cache_dir, local_files_only: as everywhere in PEFT.

    Raises:
        BasisError: the saved adapter cannot be read, or does not fit; the sentence says in what.
        ValueError: the model has no such adapter, or it is merged or not loaded yet.
    """
    peft = _peft_model(model)
    config = _check_state(peft, adapter_name)
    options = HubOptions(token, None if cache_dir is None else Path(cache_dir), local_files_only)
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    folder, _ = fetch(name, [inside + CONFIG, inside + WEIGHTS], "adapter", revision, options)
    new, values = read_adapter(folder / inside)
    where = f"the adapter {os.fspath(name)!r} cannot take the place of {adapter_name!r}"
    _check_configs(where, config, new)
    held = {
        key.replace("_orig_mod.", ""): tensor
        for key, tensor in get_peft_model_state_dict(
            peft, adapter_name=adapter_name, save_embedding_layers=False
        ).items()
    }
    frozen = _check_bases(where, peft, adapter_name, new, values)
    written = {key for key in held if key.rpartition(".")[2] not in _BASES}
    found = {key for key in values if key not in frozen}
    _check_keys(where, peft, written, found, values)
    staged = {key: _staged(where, key, held[key], values[key]) for key in sorted(written)}
    with torch.no_grad():
        for key, value in staged.items():
            held[key].copy_(value)


_BASES = ("attrsub_A", "attrsub_B", "attrsub_sizes")


def _peft_model(model: nn.Module) -> PeftModel:
    found = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    if found is None:
        raise ValueError(
            f"hotswap_adapter needs a PeftModel, but a {type(model).__name__} holds none: "
            "make one with get_peft_model or PeftModel.from_pretrained."
        )
    return found


def _layers(model: nn.Module, adapter: str) -> dict[str, AttrSubspaceLayer]:
    named = ((name.replace("_orig_mod.", ""), module) for name, module in model.named_modules())
    return {name: m for name, m in named if isinstance(m, AttrSubspaceLayer) and m.has(adapter)}


def _check_state(model: PeftModel, adapter: str) -> AttrSubspaceConfig:
    """The config of the adapter to be replaced, if there is one and its tensors can be written."""
    if adapter not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter!r}: it has {', '.join(model.peft_config)}.")
    config = model.peft_config[adapter]
    if not isinstance(config, AttrSubspaceConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter {adapter!r} is a {kind} adapter: use peft.utils.hotswap for it.")
    for name, layer in _layers(model, adapter).items():
        if adapter in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter!r} is merged into the weight of {name!r}: call unmerge_adapter() first."
            )
        if any(p.device.type == "meta" for p in (*layer.attrsub_M.values(), *layer.attrsub_lora_A.values())):
            raise ValueError(f"adapter {adapter!r} is still on the meta device in {name!r}: load its weights first.")
    return config


def _check_configs(where: str, old: AttrSubspaceConfig, new: AttrSubspaceConfig) -> None:
    """Compare what the tensors do not show: it is built into the layers, and into a compiled graph."""
    told = ["core", "columns", "scaling", "attributes"]
    if old.lora_modules or new.lora_modules:
        told += ["lora_rank", "lora_alpha"]
    if old.basis_digest and new.basis_digest:
        told.append("basis_digest")
    for key in told:
        mine, its = getattr(old, key), getattr(new, key)
        if mine != its:
            raise BasisError(
                f"{where}: its {key} is {its!r}, the model's {mine!r}; load it with load_adapter instead."
            )


def _check_bases(
    where: str, model: PeftModel, adapter: str, new: AttrSubspaceConfig, values: dict[str, Tensor]
) -> set[str]:
    """Compare A and B module by module; the keys of those that the saved adapter brings itself.

    One that brings them is compared by value, one that points to its basis by what it points to.
    """
    brought = {key for key in values if key.rpartition(".")[2] in _BASES}
    cores = {n: layer for n, layer in _layers(model, adapter).items() if adapter in layer.attrsub_M}
    provider = None if new.basis_in_adapter or not cores else _pointed(where, model.peft_config[adapter], new)
    for name, layer in cores.items():
        for part in _BASES:
            value, held = values.get(f"{name}.{part}"), getattr(layer, part)[adapter]
            if value is not None and not (
                value.shape == held.shape and torch.equal(value.to(device=held.device, dtype=held.dtype), held)
            ):
                raise BasisError(f"{where}: it brings another basis for module {name!r}; load it with load_adapter.")
            if value is None and new.basis_in_adapter:
                raise BasisError(f"{where}: it lacks its basis for module {name!r}, which its config announces.")
        if provider is not None and provider.key(_bare(name)) != layer.attrsub_A.key(adapter):
            raise BasisError(
                f"{where}: dim={new.dim!r} and attributes={new.attributes!r} give it other columns in module "
                f"{name!r} than the model's adapter has; load it with load_adapter instead."
            )
    return brought


def _pointed(where: str, old: AttrSubspaceConfig, new: AttrSubspaceConfig) -> BasisProvider | None:
    """The basis that a saved adapter points to; None where the configs say already that it is the model's."""
    if old.basis_in_adapter:
        raise BasisError(
            f"{where}: the model's adapter brought its basis with it, this one points to {new.basis!r}, so that they "
            "cannot be compared; load it with load_adapter instead."
        )
    same_basis = new.basis_digest == old.basis_digest if old.basis_digest else _seeded(new) == _seeded(old)
    if not same_basis:
        raise BasisError(f"{where}: its basis is {new.basis!r}, the model's {old.basis!r}; load it with load_adapter.")
    return None if new.dim == old.dim else BasisProvider(new)


def _seeded(config: AttrSubspaceConfig) -> tuple[Any, ...]:
    return config.basis, config.seed, config.generated_dim if config.generated else None


def _bare(name: str) -> str:
    """The name of a module as the base model has it."""
    return name.removeprefix("base_model.model.")


def _check_keys(where: str, model: PeftModel, written: set[str], found: set[str], values: dict[str, Tensor]) -> None:
    """Refuse a saved adapter with fewer or more tensors; PEFT saves some embeddings of the base with it."""
    lacking = sorted(written - found, key=natural_key)
    if lacking:
        raise BasisError(f"{where}: it has no tensors for {some(lacking)}; load it with load_adapter instead.")
    base = {key.replace("_orig_mod.", ""): value for key, value in model.state_dict().items()}
    for key in sorted(found - written, key=natural_key):
        held = base.get(key)
        if held is None:
            raise BasisError(f"{where}: it also adapts {key!r}, which the model's does not; use load_adapter instead.")
        if held.shape != values[key].shape or not torch.equal(values[key].to(held), held):
            raise BasisError(
                f"{where}: it comes with another {key!r} than the base model's; use load_adapter instead."
            )


def _staged(where: str, key: str, held: Tensor, value: Tensor) -> Tensor:
    """The new value in memory, on the device and in the dtype of the old one."""
    if held.shape != value.shape:
        shapes = f"{tuple(value.shape)} instead of {tuple(held.shape)}"
        raise BasisError(f"{where}: {key!r} has shape {shapes}; load it with load_adapter instead.")
    return value.to(device=held.device, dtype=held.dtype, copy=True)
