"""AttrSubspaceModel: puts cores (and plain LoRA, where asked) into a model, the PEFT way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
)
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..basis import BasisError
from ..basis.layout import ModuleLayout
from ..basis.naming import natural_key, some
from . import keys
from .arithmetic import add_weighted_adapter, check_combination
from .config import AttrSubspaceConfig
from .default_targets import ALL_LINEAR, attention_modules, in_layers, linear_targets, warn_of_attention
from .factors import Bases, written_widths
from .layer import AttrSubspaceLayer
from .layer_types import LAYERS
from .mixed_batch import check_count, mixed_batch
from .names import ModuleNames
from .places import places, state_dict_name, to_file, to_model
from .provider import BasisProvider, LatentBases
from .quantised import backend_of, check_readable, is_packed
from .registration import PREFIX
from .targets import exact_targets, matches, unwrap_targets
from .tying import embedding_name, means, tie_saved_modules, tie_targets

#: Share of a consensus below which a start says how little of it there is.
_WORTH_SAYING = 0.9


class AttrSubspaceModel(BaseTuner):
    """A model whose targeted modules compute y = W x + scaling * A M (B^T x), with only M trained.

    Args:
        model: the model to adapt; it is changed in place. config: AttrSubspaceConfig.
        adapter_name: name of the adapter, "default" unless told otherwise.
        low_cpu_mem_usage: make the cores on the meta device, to be filled from a checkpoint.

    To train plain LoRA next to cores, list its modules in `AttrSubspaceConfig(lora_modules=...)`; adapters of several
    methods are active at once in PEFT's mixed models (`get_peft_model(..., mixed=True)`).

    basis_bytes_read: adapter -> bytes of tensors of its basis that left the disk when it was added: those of its
        modules, attributes and directions, in whole chunks of 16 directions, and none for modules where an adapter
        on the same basis was there before. Also as an attribute of the PeftModel.
    """

    basis_bytes_read: dict[str, int]

    prefix: str = PREFIX
    tuner_layer_cls = AttrSubspaceLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    #: The adapter of each sample while a mixed batch runs (see `mixed_batch`).
    sample_adapters: tuple[str, ...] | None = None

    def _prepare_adapter_config(self, peft_config: AttrSubspaceConfig, model_config: dict) -> AttrSubspaceConfig:
        return peft_config  # needs the model's module names: see _prepare_model

    def _prepare_model(self, peft_config: AttrSubspaceConfig, model: nn.Module) -> None:
        """Open the basis, pin it in the config, and resolve the default targets."""
        provider = BasisProvider(peft_config)
        self._provider = provider
        self._quantization_kwargs = get_quantization_kwargs(model)
        provider.find_names(model)
        _pin(peft_config, provider)
        names = provider.names
        unwrap_targets(peft_config, names)
        targets = peft_config.target_modules
        if (isinstance(targets, str) and targets.lower() == ALL_LINEAR) or (targets is None and peft_config.generated):
            wanted = linear_targets(model, peft_config, self._is_quantised, names.own)
            _set_targets(peft_config, {names.of(name) for name in wanted}, names)
        elif targets is None and provider.basis is not None:
            _set_targets(peft_config, _default_targets(peft_config, provider, model), names)
        elif targets is None:
            peft_config.target_modules = []
        self._check_targets(peft_config, model)
        self._targets = peft_config.target_modules

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's entry point for a new adapter; says afterwards which directions were dropped."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            # A config that is refused early, or no target at all, leaves no provider behind.
            if "_provider" in self.__dict__:
                self._provider.close()
            targets = self.__dict__.pop("_targets", None)
        # PEFT shortens long lists to endings that are enough in this model; in one with another head they match more.
        self.peft_config[adapter_name].target_modules = targets
        self._tie_what_is_left(adapter_name)
        _leave_to_each_rank(model)
        _keep_off_the_fast_path(model)
        self.basis_bytes_read = {**self.__dict__.get("basis_bytes_read", {}), adapter_name: self._provider.bytes_read}
        lost = {name: counts for name, counts in self._provider.dropped.items() if any(counts)}
        if lost and not self.peft_config[adapter_name].inference_mode:
            listing = "; ".join(f"{name!r}: {a} columns of A, {b} of B" for name, (a, b) in lost.items())
            warnings.warn(
                "directions of the basis that earlier attributes, or the module's width, already span were "
                f"dropped: {listing}, over all modules.",
                stacklevel=2,
            )
        self._tell_of_the_start(adapter_name)
        del self._provider  # closes the files of the basis

    def _tell_of_the_start(self, adapter_name: str) -> None:
        """Say which attributes' consensus is cut short; nothing for adapters that are loaded for inference."""
        start, config = self._provider.start, self.peft_config[adapter_name]
        if start is None or config.inference_mode:
            return
        cut = {name: share.value for name, share in start.shares.items() if share.value < _WORTH_SAYING}
        if cut:
            listing = ", ".join(f"{100 * value:.0f} % of {name!r}" for name, value in cut.items())
            warnings.warn(
                f"the start holds only a part of the consensus update: {listing}. A larger dim keeps more"
                f"{', a full core too' if config.core != 'full' else ''}.",
                stacklevel=3,
            )

    @staticmethod
    def _check_target_module_exists(peft_config: AttrSubspaceConfig, key: str) -> Any:
        found = matches(peft_config, peft_config, key)
        if found or type(found).__name__ == "_ExcludedModule":
            return found
        return matches(peft_config, _LoraTargets(peft_config), key)

    def _create_and_replace(
        self,
        peft_config: AttrSubspaceConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if self._check_tied_module_exists(peft_config, current_key):
            self._tie(peft_config, adapter_name, target, target_name, parent)
            return
        admitted = self._admit(peft_config, target, parent, current_key)
        if admitted is None:
            return
        layout, as_lora = admitted
        module = self._provider.names.of(current_key)
        if layout.kind != "linear":
            peft_config.module_layouts = {**(peft_config.module_layouts or {}), module: layout.to_dict()}
        layer = target if isinstance(target, AttrSubspaceLayer) else self._new_layer(target, layout, peft_config)
        if as_lora:
            layer.add_lora(adapter_name, peft_config, peft_config.inference_mode)
        else:
            bases = self._bases(layer, module, peft_config)
            layer.add_core(adapter_name, bases, peft_config, peft_config.inference_mode)
            if peft_config.stores_basis and not peft_config.basis_in_adapter:
                widths = written_widths(layer.slices[adapter_name])
                peft_config.basis_widths = {**(peft_config.basis_widths or {}), module: widths}
        layer.module_names[adapter_name] = module
        if layer is not target:
            layer.set_adapter([adapter_name], inference_mode=peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        elif adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _tie(
        self, config: AttrSubspaceConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module
    ) -> None:
        """Let a layer that shares the input embedding's weight share its adapter."""
        source: Any = self.model.get_input_embeddings()
        layout = self._layout(_unwrapped(target), target_name)
        layer = target if isinstance(target, AttrSubspaceLayer) else self._new_layer(target, layout, config)
        layer.tie(adapter_name, source, config)
        if layer is not target:
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._replace_module(parent, target_name, layer, target)

    def _tie_what_is_left(self, adapter_name: str) -> None:
        """Tie layers that PEFT has passed over because they are not in the state dict that it was given."""
        config = self.peft_config[adapter_name]
        for name in sorted(config.target_modules_to_tie or ()):
            source, target = self.model.get_input_embeddings(), self.model.get_submodule(name)
            done = isinstance(target, AttrSubspaceLayer) and adapter_name in target.tied
            if not done and isinstance(source, AttrSubspaceLayer) and source.has(adapter_name):
                parent, _, last = name.rpartition(".")
                self._tie(config, adapter_name, target, last, self.model.get_submodule(parent))

    def _admit(
        self, config: AttrSubspaceConfig, target: nn.Module, parent: nn.Module, name: str
    ) -> tuple[ModuleLayout, bool] | None:
        """Layout of a targeted module, and whether it gets a plain LoRA; None to skip it; else a sentence."""
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"module {name!r} is inside an nn.MultiheadAttention, which reads its weight without calling "
                "it, so an adapter there would do nothing: exclude it with exclude_modules."
            )
        if name.rpartition(".")[2] == "_orig_mod" and not isinstance(target, AttrSubspaceLayer):
            raise ValueError(
                f"module {name!r} is compiled on its own, and its compiled forward would pass over an adapter: "
                "compile it after the adapter is made, or exclude it with exclude_modules."
            )
        layout = self._layout(_unwrapped(target), name)
        as_lora = bool(matches(config, _LoraTargets(config), name))
        if not as_lora:
            names = self._provider.names
            module, inside = names.of(name), names.inside(name)
            if config.missing == "intersect" and not (inside and self._provider.covers(module)):
                return None
            if not inside:
                raise BasisError(
                    f"module {name!r}, which target_modules asks for, is outside of the part of the model that the "
                    f"basis is for (module_prefixes={names.prefixes!r}): change target_modules, or set "
                    "missing='intersect' to leave such modules as they are."
                )
            self._provider.check_covers(module, layout)
            if config.basis == "psv" and not config.basis_in_adapter:
                check_readable(_unwrapped(target), name, **self._quantization_kwargs)
        return layout, as_lora

    def _check_targets(self, config: AttrSubspaceConfig, model: nn.Module) -> None:
        """Refuse what cannot be adapted before anything is: a refused config leaves the model as it was."""
        inside: tuple[str, ...] = ()
        skipped, cores, names = [], [], self._provider.names
        admitted: dict[str, str] = {}
        for name, module in list(model.named_modules()):
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
            if self._check_target_module_exists(config, name) and not self._check_tied_module_exists(config, name):
                admission = self._admit(config, module, model.get_submodule(name.rpartition(".")[0]), name)
                if admission is None:
                    skipped.append(name)
                    continue
                called = names.of(name)
                if admitted.setdefault(called, name) != name:
                    raise ValueError(
                        f"modules {admitted[called]!r} and {name!r} would both be {called!r} in the adapter's file "
                        f"(module_prefixes={names.prefixes!r}): leave one out with exclude_modules."
                    )
                if not admission[1] and not self._holds_bases(module, called, config.stores_basis):
                    cores.append(called)
        if names.hint and not admitted and not skipped:
            raise BasisError(
                f"target_modules={config.target_modules!r} and lora_modules={config.lora_modules!r} match no module "
                f"of the model.{names.hint}"
            )
        if skipped and not admitted:
            raise BasisError(
                f"missing='intersect' skips all targeted modules ({some(skipped)}): the basis has none of them, "
                f"it has {some(self._provider.modules)}.{names.hint}"
            )
        self._provider.plan(cores)

    def _holds_bases(self, module: nn.Module, name: str, stored: bool) -> bool:
        """Whether another adapter has brought the bases of this one to a module already."""
        if self._provider.whole is None:
            return False
        return isinstance(module, AttrSubspaceLayer) and module.shared(self._provider.key(name), stored) is not None

    def _is_quantised(self, base: nn.Module) -> bool:
        """Whether a module is a linear layer with a quantised weight."""
        sized = getattr(base, "out_features", None) and getattr(base, "in_features", None)
        return bool(sized) and backend_of(base, **self._quantization_kwargs) is not None

    def _layout(self, base: nn.Module, name: str) -> ModuleLayout:
        layout = ModuleLayout.of(base)
        if layout is not None:
            return layout
        if self._is_quantised(base):
            sized: Any = base
            return ModuleLayout("linear", sized.out_features, sized.in_features)
        raise ValueError(
            f"module {name!r} is a {type(base).__name__}, which cannot carry a core: supported are Linear, Conv1D, "
            "Conv1d, Conv2d, Conv3d, Embedding and quantised linear layers; change target_modules."
        )

    def _new_layer(self, target: nn.Module, layout: ModuleLayout, config: AttrSubspaceConfig) -> AttrSubspaceLayer:
        base = _unwrapped(target)
        transposed = isinstance(base, Conv1D)
        if config.fan_in_fan_out and not transposed and layout.kind == "linear":
            warnings.warn(
                f"fan_in_fan_out=True does not fit a {type(base).__name__} and is ignored there.",
                stacklevel=2,
            )
        return LAYERS[layout.kind](target, layout, transposed, **self._quantization_kwargs)

    def _bases(self, layer: AttrSubspaceLayer, module: str, config: AttrSubspaceConfig) -> Bases | LatentBases:
        if config.basis_in_adapter:
            return LatentBases(config, module)
        held = layer.shared(self._provider.key(module), config.stores_basis)
        if held is not None:
            return self._provider.started(module, held)
        weight = layer.weight_for_basis(module) if config.basis == "psv" else None
        return self._provider.make(module, layer.layout, weight)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; bases that no other adapter uses are let go."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        self.__dict__.get("basis_bytes_read", {}).pop(adapter_name, None)
        # PEFT passes over layers of models whose own names contain "attrsub_".
        for layer in self.model.modules():
            if isinstance(layer, AttrSubspaceLayer) and layer.has(adapter_name):
                layer.delete_adapter(adapter_name)
                self.active_adapter = layer.active_adapters[:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's forward; PEFT's task models come through here."""
        if self.sample_adapters is not None:
            check_count(self, self.sample_adapters, args, kwargs)
        return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT's entry point: around every forward and generate, with their arguments.
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with mixed_batch(self, names, args, kwargs):
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: AttrSubspaceConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        # PEFT compares shapes before it loads, so a basis that comes with the adapter needs its room by now; and all
        # of them are checked before the first one is written.
        named = to_model(keys.modern(state_dict), model, adapter_name, cls._remove_adapter_name_from_key)
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=named
        )
        arrivals = []
        for place in places(model, adapter_name):
            layer, prefix = place.layer, f"{place.key}."
            if adapter_name in layer.attrsub_M:
                keys.name_strays(mapped, prefix, adapter_name)
                arrivals.append((layer, layer.check_state_dict(mapped, prefix, shapes=False)))
                mapped.pop(prefix + keys.in_model(keys.OLD_SIZES, adapter_name), None)
        for layer, found in arrivals:
            if adapter_name in found:
                layer.make_room(adapter_name, found[adapter_name])
        return mapped

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # All cores are checked before the first one is written.
        for name, layer in self.model.named_modules(prefix=f"{prefix}model"):
            if isinstance(layer, AttrSubspaceLayer):
                layer.check_state_dict(state_dict, f"{state_dict_name(name)}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's entry point after an adapter was made: float32 unless the caller wants the dtype of the base.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, AttrSubspaceLayer) and adapter_name in layer.attrsub_M:
                    layer.cast_stored_bases(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AttrSubspaceConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        if config.stores_basis:
            # The config is written next; of an adapter of before 0.1.0 it does not have the widths yet.
            cored = [place for place in places(model, adapter_name) if adapter_name in place.layer.attrsub_M]
            config.basis_widths = {p.module: written_widths(p.layer.slices[adapter_name]) for p in cored}
        # PEFT looks for the names of `named_modules`, and would save nothing of a layer in an activation checkpoint.
        return to_file(state_dict, model, adapter_name)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT finds them by their weight, which it has moved once an adapter has tied them; in an adapted layer the
        # weight is one level below.
        found = [name.removesuffix(".base_layer") for name in super()._get_module_names_tied_with_embedding()]
        told = ("modules_to_tie", "target_modules_to_tie")
        known = (getattr(config, key, None) or () for config in self.peft_config.values() for key in told)
        return found or sorted({name for names in known for name in names})

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if not isinstance(new_module, AttrSubspaceLayer) or is_packed(new_module.get_base_layer()):
            # PEFT would look for a weight, which some quantised layers do not have, and which of trained token rows
            # is a plain tensor.
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _check_tied_modules(self, model: nn.Module, peft_config: AttrSubspaceConfig) -> None:
        # PEFT asks for the modules that are called as embeddings usually are, which "shared" of BART and T5 is not.
        tied = self._get_module_names_tied_with_embedding() if peft_config.ensure_weight_tying else []
        name = embedding_name(self.model) if tied else ""
        if tied and any(means(m, name) for m in peft_config.modules_to_save or ()):
            self._add_modules_to_save_to_tie(peft_config, tied)
        elif tied and peft_config.target_modules and matches(peft_config, peft_config, name):
            self._add_targets_to_tie(peft_config, tied)
        else:
            super()._check_tied_modules(model, peft_config)

    def _add_modules_to_save_to_tie(self, peft_config: AttrSubspaceConfig, tied_weight_keys: list[str]) -> None:
        tie_saved_modules(peft_config, self.model, tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: AttrSubspaceConfig, tied_weight_keys: list[str]) -> None:
        tie_targets(peft_config, self.model, tied_weight_keys)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, or raise ValueError before the first weight is changed."""
        self._require_merging(adapter_names)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters merged, or ValueError before the first weight is changed."""
        self._require_merging(adapter_names)
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return merged

    def _require_merging(self, adapters: list[str] | None) -> None:
        for name, layer in self.model.named_modules():
            if isinstance(layer, AttrSubspaceLayer):
                wanted = set(adapters or layer.active_adapters).difference(layer.merged_adapters)
                if any(layer.has(adapter) for adapter in wanted):
                    try:
                        layer.require_merging()
                    except ValueError as error:
                        raise ValueError(f"module {name!r}: {error}") from error

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add `adapter_name`, whose update is dW = sum_i weights[i] * dW_i, exactly: cores on one basis add up.

        Args:
            adapters: names of adapters on one basis. weights: a finite factor for each, also negative or 0.
            adapter_name: name of the new adapter; it is not active and not trainable yet.
            combination_type: "linear" or "cat", which are the same here. The weights act on the updates dW_i, as in
                LoRA's "cat"; LoRA's "linear" acts on the factors and gives cross terms. A plain LoRA part
                (`lora_modules`) is put side by side, so its rank is the sum of the ranks.

        Raises ValueError for another combination_type, and if the adapters stand on different bases or modules.
        """
        check_combination(combination_type)
        add_weighted_adapter(self, list(adapters), list(weights), adapter_name)


def _leave_to_each_rank(model: nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting frozen bases at every step: every process has read its own.

    DDP asks the module that it wraps, and by the names that are seen from there: the model itself, the tuner around
    it, or the PeftModel around both, which pass the question on.
    """
    names = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in model.named_modules():
        if isinstance(layer, AttrSubspaceLayer):
            for buffer, _ in layer.named_buffers():
                if buffer.startswith(PREFIX):
                    inner = f"{name}.{buffer}" if name else buffer
                    names |= {inner, f"model.{inner}", f"base_model.model.{inner}"}
    model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


def _keep_off_the_fast_path(model: nn.Module) -> None:
    """Have nn.TransformerEncoderLayer call its linear layers in evaluation, too.

    Without gradients it computes with their weights in one kernel, which passes over adapters, unless it finds a hook.
    """
    for encoder in model.modules():
        adapted = isinstance(encoder, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and [
            layer for layer in encoder.modules() if isinstance(layer, AttrSubspaceLayer)
        ]
        if adapted and isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False  # which that kernel alone understands
        for layer in adapted or ():
            if not layer._forward_pre_hooks:
                layer.register_forward_pre_hook(_call_me)


def _call_me(module: nn.Module, args: Any) -> None:
    """The hook that it finds."""


def _unwrapped(target: nn.Module) -> nn.Module:
    base: nn.Module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return base


class _LoraTargets:
    """The config as PEFT's matcher sees it when asked about lora_modules."""

    target_parameters: ClassVar[list[str]] = []

    def __init__(self, config: AttrSubspaceConfig) -> None:
        self.target_modules = config.lora_modules or []
        self.exclude_modules = config.exclude_modules
        self.modules_to_save = config.modules_to_save


def _pin(config: AttrSubspaceConfig, provider: BasisProvider) -> None:
    """Write into the config what a later load has to find again: attributes, digest, commit."""
    whole = provider.whole
    if provider.basis is None or whole is None:
        if config.generated:
            config.attributes = [config.basis]
        return
    config.attributes = provider.basis.attributes
    if config.basis_digest is None:
        config.basis_digest = whole.digest
    if isinstance(config.basis, (list, tuple)):
        # Each name carries its own commit; one revision for all of them would mean nothing.
        config.basis, config.basis_revision = config.pinned_list(whole), None
    elif whole.revision:
        config.basis_revision = whole.revision
        if isinstance(config.basis, str):
            config.basis = whole.source


def _set_targets(config: AttrSubspaceConfig, wanted: set[str], names: ModuleNames) -> None:
    """Make exactly these modules the target_modules of a config, for this load and the next."""
    # A list is shortened by PEFT to the endings that tell these modules from the others of this very model.
    whole = bool(names.prefixes) or names.wrapped_inside
    config.target_modules = exact_targets(wanted, {*names.own.values(), *map(names.of, names.own)}, whole)
    if isinstance(config.target_modules, str):
        # PEFT takes layer indices with lists only; the names have been chosen by them already.
        config.layers_to_transform = config.layers_pattern = None


def _default_targets(config: AttrSubspaceConfig, provider: BasisProvider, model: nn.Module) -> set[str]:
    """Every module the basis covers, in the layers asked for, by their names in the basis.

    Those inside of nn.MultiheadAttention are left out with a warning.
    """
    names = provider.names
    own = {names.of(name): own for name, own in names.own.items() if own and names.inside(name)}
    absent = sorted((m for m in provider.modules if m not in own and names.expects(m)), key=natural_key)
    if absent and config.missing == "error":
        raise BasisError(
            f"the basis covers modules that the model does not have ({some(absent)}), so it was mined for another "
            "model or another wrapping: choose target_modules, or set missing='intersect' to use the rest."
            f"{names.hint}"
        )
    found = [m for m in provider.modules if m in own]
    chosen = {m for m in found if in_layers(config, m) or in_layers(config, own[m])}
    if found and not chosen:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} and layers_pattern={config.layers_pattern!r} leave "
            f"none of the modules that the basis covers ({some(found)}): change them, or give target_modules."
        )
    attention = attention_modules(model, names.own)
    warn_of_attention(config, (own[m] for m in chosen), attention)
    return {m for m in chosen if own[m].rpartition(".")[0] not in attention}
