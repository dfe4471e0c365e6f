"""From cores to a plain LoRA that stock PEFT (and what reads its files) loads: exact, without an SVD.

lora_B = scaling * A M ,  lora_A = B^T        (or A and M B^T, where that is thinner)
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from ..basis import Basis, BasisError
from ..basis.adapters import CONFIG, WEIGHTS
from ..basis.hub import fetch
from ..basis.layout import ModuleLayout
from ..basis.naming import PEFT_PREFIX, base_name, strip_peft_prefix
from .adapter_files import read_adapter, write_adapter
from .config import AttrSubspaceConfig
from .factors import Bases, assemble, read_widths, slices_of, to_lora
from .fingerprint import Fingerprint
from .keys import old_blocks
from .names import ModuleNames
from .places import places
from .provider import BasisProvider
from .targets import exact_targets
from .vocabulary import embedding_layers


@dataclass
class _Exported:
    """LoRA factors of one module: left (n x r), right (r x m)."""

    left: Tensor
    right: Tensor
    layout: ModuleLayout


def export_lora(
    model: PeftModel | BaseTuner | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    rank: int | None = None,
    overwrite: bool = False,
    basis: Basis | str | os.PathLike[str] | list[str] | None = None,
) -> str:
    """Write an adapter as a plain LoRA folder and return the folder.

    Args:
        model: the PeftModel, or the folder (or Hub id) of a saved adapter; then no model is needed.
        folder: where to write adapter_config.json and adapter_model.safetensors, atomically.
        adapter_name: which adapter of the model.
        rank: best approximation of this rank; default exact, of rank min(D_A, D_B) per module.
        overwrite: replace an existing adapter folder.
        basis: for a folder or Hub id: where the adapter's basis is now, if it has moved. It must have the digest that
            the adapter was trained with.

    Modules are named as the basis names them, whatever the model is wrapped in: the LoRA is for the base model.

    Raises BasisError for an unknown adapter, and for grouped convolutions, whose LoRA in PEFT is another
    kind of update.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise BasisError(f"rank={rank!r} is no positive whole number.")
    if isinstance(model, (str, os.PathLike)):
        config, modules, rest = _from_folder(model, rank, basis)
        names: Iterable[str] = modules
    else:
        config, modules, rest = _from_model(model, adapter_name, rank)
        renaming = config.names or ModuleNames(_base(model))
        names = {*renaming.own.values(), *map(renaming.of, renaming.own)}
    lora = _lora_config(config, modules, names)
    tensors = dict(rest)
    for name, item in modules.items():
        tensors.update(_tensors(name, item))
    inputs = [model] if isinstance(model, (str, os.PathLike)) else []
    return write_adapter(folder, lora, tensors, overwrite, inputs)


def _base(model: PeftModel | BaseTuner) -> torch.nn.Module:
    inner = model.base_model if isinstance(model, PeftModel) else model
    base: torch.nn.Module = inner.model
    return base


def _from_model(
    model: PeftModel | BaseTuner, adapter_name: str, rank: int | None
) -> tuple[AttrSubspaceConfig, dict[str, _Exported], dict[str, Tensor]]:
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, AttrSubspaceConfig):
        have = ", ".join(name for name, c in configs.items() if isinstance(c, AttrSubspaceConfig)) or "none"
        raise BasisError(f"the model has no attribute-subspace adapter {adapter_name!r} to export; it has {have}.")
    modules = {}
    for place in places(_base(model), adapter_name):
        layer, name = place.layer, place.module
        a, core, b = (x.detach().cpu() if x is not None else None for x in layer.factors(adapter_name))
        assert a is not None and b is not None
        modules[name] = _export(name, a, core, b, layer.scaling[adapter_name], layer.layout, rank)
    layers = embedding_layers(_base(model))
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=layers)
    return config, modules, {base_name(k): v.detach().cpu().clone() for k, v in state.items() if ".attrsub_" not in k}


def _from_folder(
    adapter: str | os.PathLike[str], rank: int | None, basis: Basis | str | os.PathLike[str] | list[str] | None
) -> tuple[AttrSubspaceConfig, dict[str, _Exported], dict[str, Tensor]]:
    path, _ = fetch(adapter, [CONFIG, WEIGHTS], "adapter")
    config, tensors = read_adapter(path)
    if basis is not None:
        if config.basis_in_adapter:
            raise BasisError(
                f"adapter {os.fspath(adapter)!r} holds its basis in its own file: leave basis= (--basis) out."
            )
        config.basis, config.basis_revision = basis, None
    provider = BasisProvider(config)
    layouts = {n: ModuleLayout.from_dict(x) for n, x in (config.module_layouts or {}).items()}
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in tensors.items():
        stem, mark, part = key.rpartition(".attrsub_")
        if mark:
            found.setdefault(strip_peft_prefix(base_name(stem)), {})[part] = value
        else:
            rest[base_name(key)] = value
    modules = {}
    for name, parts in found.items():
        if "lora_A.weight" in parts:
            left, right = parts["lora_B.weight"], parts["lora_A.weight"].T
            layout = layouts.get(name) or ModuleLayout("linear", left.shape[0], right.shape[0])
            scaling = config.lora_alpha / config.lora_rank
            modules[name] = _export(name, left, None, right, scaling, layout, rank)
            continue
        bases = _stored_bases(name, parts, config, provider, layouts)
        core = assemble(parts["M.weight"].float(), bases.slices, config.core)
        layout = layouts.get(name) or ModuleLayout("linear", bases.a.shape[0], bases.b.shape[0])
        modules[name] = _export(name, bases.a, core, bases.b, config.scaling, layout, rank)
    return config, modules, rest


def _stored_bases(
    name: str,
    parts: dict[str, Tensor],
    config: AttrSubspaceConfig,
    provider: BasisProvider,
    layouts: dict[str, ModuleLayout],
) -> Bases:
    if "A" in parts:
        widths = (config.basis_widths or {}).get(name)
        if widths is None and "sizes" not in parts:
            raise BasisError(f"the adapter's config does not tell the widths of its basis in module {name!r}.")
        blocks = old_blocks(parts["sizes"], parts["A"], parts["B"]) if widths is None else read_widths(widths)
        return Bases(parts["A"].float(), parts["B"].float(), slices_of(config.attributes or [""], blocks), "")
    if provider.basis is not None:
        own = Fingerprint.read(parts["M.basis"]) if "M.basis" in parts else None
        if own is not None and not own.same(provider.fingerprint(name)):
            raise BasisError(
                f"the core of module {name!r} belongs to other columns than the adapter's {CONFIG} names, of the "
                f"basis {own}: the config was changed after it was saved; copy or download the adapter again."
            )
        return provider.make(name, provider.basis.layout(name), None)
    raise BasisError(
        f"the adapter's file holds no basis for module {name!r} and basis={config.basis!r} needs the model: "
        "load the adapter and call export_lora(model, folder)."
    )


def _export(
    name: str,
    a: Tensor,
    core: Tensor | None,
    b: Tensor,
    scaling: float,
    layout: ModuleLayout,
    rank: int | None,
) -> _Exported:
    if layout.groups != 1:
        raise BasisError(
            f"module {name!r} is a convolution with {layout.groups} groups, for which PEFT's LoRA is another kind of "
            "update: merge the adapter instead, or leave the module out."
        )
    matrix = torch.eye(a.shape[1]) if core is None else core
    if matrix.shape != (a.shape[1], b.shape[1]):
        raise BasisError(
            f"the core of module {name!r} has shape {tuple(matrix.shape)}, its basis {a.shape[1]} and {b.shape[1]} "
            "columns: the adapter's config was changed after it was saved; copy or download the adapter again."
        )
    left, right = to_lora(a, matrix, b, rank)
    return _Exported(left * scaling, right, layout)


def _tensors(name: str, item: _Exported) -> dict[str, Tensor]:
    stem, layout, r = f"{PEFT_PREFIX}{name}", item.layout, item.left.shape[1]
    if layout.kind == "embedding":
        return {f"{stem}.lora_embedding_A": item.right, f"{stem}.lora_embedding_B": item.left}
    a, b = item.right, item.left
    if layout.kernel:
        a, b = a.reshape(r, *layout.kernel), b.reshape(*b.shape, *[1] * (len(layout.kernel) - 1))
    return {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}


def _lora_config(config: AttrSubspaceConfig, modules: dict[str, _Exported], names: Iterable[str]) -> LoraConfig:
    ranks = {name: item.left.shape[1] for name, item in modules.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # "^" keeps a pattern from also matching a longer name with the same ending.
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != common}
    targets = exact_targets(ranks, names)
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(targets) if isinstance(targets, set) else targets,
        modules_to_save=config.modules_to_save,
        ensure_weight_tying=config.ensure_weight_tying,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
    )
