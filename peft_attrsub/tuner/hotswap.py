"""Hot swap: other values for one adapter of a running model, written into the tensors that are there.

The tensors keep their place, shape and dtype, so that a model under torch.compile is not compiled again and an
optimiser still holds the very same parameters (what it remembers of them, such as Adam's moments, is of the old
adapter). transformers' `load_adapter(..., hotswap=True)` comes here (see `transformers_hotswap`). PEFT's own
`peft.utils.hotswap.hotswap_adapter` supports LoRA only and raises ValueError before it changes the model.
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
from ..basis.naming import PEFT_PREFIX, base_name, natural_key, some
from . import keys
from .adapter_files import read_adapter
from .config import AttrSubspaceConfig
from .fingerprint import Fingerprint
from .layer import AttrSubspaceLayer
from .places import places
from .provider import BasisProvider
from .shared_buffers import equal


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
        model: a PeftModel or a model with injected adapters (transformers' `add_adapter` and `load_adapter`), also
            inside torch.compile or a distributed wrapper. name: folder or Hub id of a saved
            adapter. adapter_name: whose values are replaced; it keeps its name and its config.
        revision, subfolder, token, cache_dir, local_files_only: as everywhere in PEFT.

    Raises:
        BasisError: the saved adapter cannot be read, or does not fit; the sentence says in what.
        ValueError: the model has no such adapter, or it is merged or not loaded yet.
    """
    peft = _adapted_model(model)
    config, layers = _check_state(peft, adapter_name)
    options = HubOptions(token, None if cache_dir is None else Path(cache_dir), local_files_only)
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    folder, _ = fetch(name, [inside + CONFIG, inside + WEIGHTS], "adapter", revision, options)
    new, values = read_adapter(folder / inside)
    where = f"the adapter {os.fspath(name)!r} cannot take the place of {adapter_name!r}"
    _check_configs(where, config, new)
    state = get_peft_model_state_dict(peft, adapter_name=adapter_name, save_embedding_layers=False)
    held = {base_name(key): tensor for key, tensor in state.items()}
    around = "" if isinstance(peft, PeftModel) else PEFT_PREFIX
    values = {base_name(key).removeprefix(around): tensor for key, tensor in values.items()}
    frozen = _check_bases(where, layers, config, adapter_name, new, values)
    written = {key for key in held if not key.endswith(_BASES)}
    found = {key for key in values if key not in frozen}
    _check_keys(where, peft, written, found, values)
    staged = {key: _staged(where, key, held[key], values[key]) for key in sorted(written)}
    with torch.no_grad():
        for key, value in staged.items():
            held[key].copy_(value)


#: What says which basis a core belongs to: compared, not written.
_BASES = tuple(f".{name}" for name in (keys.BASIS_A, keys.BASIS_B, keys.FINGERPRINT, keys.OLD_SIZES))


def _adapted_model(model: nn.Module) -> nn.Module:
    """The PeftModel in a model, or the model that adapters have been injected into."""
    found = next((m for m in model.modules() if isinstance(m, PeftModel)), None)
    if found is None:
        found = next((m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)), None)
    if found is None:
        raise ValueError(
            f"hotswap_adapter needs a model with an adapter, but a {type(model).__name__} has none: make one with "
            "get_peft_model, PeftModel.from_pretrained or load_adapter."
        )
    return found


def _check_state(model: Any, adapter: str) -> tuple[AttrSubspaceConfig, dict[str, AttrSubspaceLayer]]:
    """The adapter to be replaced, if there is one and its tensors can be written: its config, and its layers by their
    names in its file."""
    if adapter not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter!r}: it has {', '.join(model.peft_config)}.")
    config = model.peft_config[adapter]
    if not isinstance(config, AttrSubspaceConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter {adapter!r} is a {kind} adapter: use peft.utils.hotswap for it.")
    layers = {place.file: place.layer for place in places(model, adapter)}
    for name, layer in layers.items():
        if adapter in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter!r} is merged into the weight of {name!r}: call unmerge_adapter() first."
            )
        if any(f.weight.is_meta for f in (*layer.attrsub_M.values(), *layer.attrsub_lora_A.values())):
            raise ValueError(f"adapter {adapter!r} is still on the meta device in {name!r}: load its weights first.")
    return config, layers


def _check_configs(where: str, old: AttrSubspaceConfig, new: AttrSubspaceConfig) -> None:
    """Compare what the tensors do not show: it is built into the layers, and into a compiled graph."""
    told = ["core", "columns", "scaling", "attributes"]
    if old.lora_modules or new.lora_modules:
        told += ["lora_rank", "lora_alpha"]
    for key in told:
        mine, its = getattr(old, key), getattr(new, key)
        if mine != its:
            raise BasisError(
                f"{where}: its {key} is {its!r}, the model's {mine!r}; load it with load_adapter instead."
            )


def _check_bases(
    where: str,
    layers: dict[str, AttrSubspaceLayer],
    old: AttrSubspaceConfig,
    adapter: str,
    new: AttrSubspaceConfig,
    values: dict[str, Tensor],
) -> set[str]:
    """Compare A and B module by module; the keys of what the saved adapter says about them.

    A basis that it brings is compared by value, one that it points to by its fingerprint; adapters of before 0.1.0
    have none, and are compared by what they point to.
    """
    told = {key for key in values if key.endswith(_BASES)}
    cores = {n: layer for n, layer in layers.items() if adapter in layer.attrsub_M}
    dated = {n: layer for n, layer in cores.items() if f"{n}.{keys.FINGERPRINT}" not in values}
    provider = None if new.basis_in_adapter or not dated else _pointed(where, old, new)
    for name, layer in cores.items():
        for part, held in zip((keys.BASIS_A, keys.BASIS_B), layer.bases(adapter), strict=True):
            value = values.get(f"{name}.{part}")
            if value is not None and not equal(held, value):
                raise BasisError(f"{where}: it brings another basis for module {name!r}; load it with load_adapter.")
            if value is None and new.basis_in_adapter:
                raise BasisError(f"{where}: it lacks its basis for module {name!r}, which its config announces.")
        if name not in dated and not new.basis_in_adapter:
            _compare(where, name, Fingerprint.read(values[f"{name}.{keys.FINGERPRINT}"]), layer.fingerprint(adapter))
        elif provider is not None and provider.key(layer.module_names[adapter]) != layer.attrsub_A.key(adapter):
            _refuse_columns(where, name)
    return told


def _compare(where: str, name: str, new: Fingerprint | None, held: Fingerprint | None) -> None:
    if new is None or held is None or new.basis != held.basis:
        raise BasisError(f"{where}: its basis is {new}, the model's {held}; load it with load_adapter.")
    if new.columns != held.columns:
        _refuse_columns(where, name)


def _refuse_columns(where: str, name: str) -> None:
    raise BasisError(
        f"{where}: its attributes, dim and columns give it other columns in module {name!r} than the model's adapter "
        "has; load it with load_adapter instead."
    )


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


def _check_keys(where: str, model: nn.Module, written: set[str], found: set[str], values: dict[str, Tensor]) -> None:
    """Refuse a saved adapter with fewer or more tensors; PEFT saves some embeddings of the base with it."""
    lacking = sorted(written - found, key=natural_key)
    if lacking:
        raise BasisError(f"{where}: it has no tensors for {some(lacking)}; load it with load_adapter instead.")
    more = sorted(found - written, key=natural_key)
    base = {base_name(key): value for key, value in model.state_dict().items()} if more else {}
    for key in more:
        held = base.get(key)
        if held is None:
            raise BasisError(f"{where}: it also adapts {key!r}, which the model's does not; use load_adapter instead.")
        if not equal(held, values[key]):
            raise BasisError(
                f"{where}: it comes with another {key!r} than the base model's; use load_adapter instead."
            )


def _staged(where: str, key: str, held: Tensor, value: Tensor) -> Tensor:
    """The new value in memory, on the device and in the dtype of the old one."""
    if held.shape != value.shape:
        shapes = f"{tuple(value.shape)} instead of {tuple(held.shape)}"
        raise BasisError(f"{where}: {key!r} has shape {shapes}; load it with load_adapter instead.")
    return value.to(device=held.device, dtype=held.dtype, copy=True)
