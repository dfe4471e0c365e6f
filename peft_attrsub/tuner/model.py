"""AttrSubspaceModel: puts cores (and plain LoRA, where asked) into a model, the PEFT way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..basis import BasisError
from ..basis.layout import ModuleLayout
from ..basis.naming import natural_key, some
from .arithmetic import add_weighted_adapter
from .config import AttrSubspaceConfig
from .kinds import LAYERS
from .layer import AttrSubspaceLayer
from .mixed import check_count, mixed_batch
from .provider import BasisProvider
from .registration import PREFIX
from .targets import exact_targets


class AttrSubspaceModel(BaseTuner):
    """A model whose targeted modules compute y = W x + scaling * A M (B^T x), with only M trained.

    Args:
        model: the model to adapt; it is changed in place. config: AttrSubspaceConfig.
        adapter_name: name of the adapter, "default" unless told otherwise.
        low_cpu_mem_usage: make the cores on the meta device, to be filled from a checkpoint.

    basis_bytes_read: adapter -> bytes of tensors of its basis that left the disk when it was added: those of its
        modules, attributes and directions, in whole chunks of 16 directions, and none for modules where an adapter
        on the same basis was there before. Also as an attribute of the PeftModel.
    """

    basis_bytes_read: dict[str, int]

    prefix: str = PREFIX
    tuner_layer_cls = AttrSubspaceLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    #: The adapter of each sample while a mixed batch runs (see `mixed`).
    sample_adapters: tuple[str, ...] | None = None

    def _prepare_adapter_config(self, peft_config: AttrSubspaceConfig, model_config: dict) -> AttrSubspaceConfig:
        return peft_config  # needs the model's module names: see _prepare_model

    def _prepare_model(self, peft_config: AttrSubspaceConfig, model: nn.Module) -> None:
        """Open the basis, pin it in the config, and resolve the default targets."""
        provider = BasisProvider(peft_config)
        self._provider = provider
        self._quantization_kwargs = get_quantization_kwargs(model)
        _pin(peft_config, provider)
        if peft_config.target_modules is None:
            if provider.basis is not None:
                peft_config.target_modules = _default_targets(peft_config, provider, model)
            elif peft_config.generated:
                peft_config.target_modules = "all-linear"
            else:
                peft_config.target_modules = []
        _maybe_include_all_linear_layers(peft_config, model)
        self._check_targets(peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's entry point for a new adapter; says afterwards which directions were dropped."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            # A config that is refused early, or no target at all, leaves no provider behind.
            if "_provider" in self.__dict__:
                self._provider.close()
        self.basis_bytes_read = {**self.__dict__.get("basis_bytes_read", {}), adapter_name: self._provider.bytes_read}
        lost = {name: counts for name, counts in self._provider.dropped.items() if any(counts)}
        if lost and not self.peft_config[adapter_name].inference_mode:
            listing = "; ".join(f"{name!r}: {a} columns of A, {b} of B" for name, (a, b) in lost.items())
            warnings.warn(
                "directions of the basis that earlier attributes, or the module's width, already span were "
                f"dropped: {listing}, over all modules.",
                stacklevel=2,
            )
        del self._provider  # closes the files of the basis

    @staticmethod
    def _check_target_module_exists(peft_config: AttrSubspaceConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if found or type(found).__name__ == "_ExcludedModule":
            return found
        return check_target_module_exists(_LoraTargets(peft_config), key)

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
        admitted = self._admit(peft_config, target, parent, current_key)
        if admitted is None:
            return
        layout, as_lora = admitted
        if layout.kind != "linear":
            peft_config.module_layouts = {**(peft_config.module_layouts or {}), current_key: layout.to_dict()}
        layer = target if isinstance(target, AttrSubspaceLayer) else self._new_layer(target, layout, peft_config)
        if as_lora:
            layer.add_lora(adapter_name, peft_config, peft_config.inference_mode)
        else:
            bases = self._bases(layer, current_key, peft_config)
            layer.add_core(adapter_name, bases, peft_config, peft_config.inference_mode)
        if layer is not target:
            layer.set_adapter([adapter_name], inference_mode=peft_config.inference_mode)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        elif adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _admit(
        self, config: AttrSubspaceConfig, target: nn.Module, parent: nn.Module, name: str
    ) -> tuple[ModuleLayout, bool] | None:
        """Layout of a targeted module, and whether it gets a plain LoRA; None to skip it; else a sentence."""
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"module {name!r} is inside an nn.MultiheadAttention, which reads its weight without calling "
                "it, so an adapter there would do nothing: exclude it with exclude_modules."
            )
        layout = self._layout(_unwrapped(target), name)
        as_lora = bool(check_target_module_exists(_LoraTargets(config), name))
        if not as_lora:
            if config.missing == "skip" and not self._provider.covers(name):
                return None
            self._provider.check_covers(name, layout)
        return layout, as_lora

    def _check_targets(self, config: AttrSubspaceConfig, model: nn.Module) -> None:
        """Refuse what cannot be adapted before anything is: a refused config leaves the model as it was."""
        inside: tuple[str, ...] = ()
        skipped, admitted, cores = [], False, []
        for name, module in list(model.named_modules()):
            if not name or name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside += (f"{name}.",)
            if self._check_target_module_exists(config, name):
                admission = self._admit(config, module, model.get_submodule(name.rpartition(".")[0]), name)
                if admission is None:
                    skipped.append(name)
                    continue
                admitted = True
                if not admission[1] and not self._holds_bases(module, name):
                    cores.append(name)
        if skipped and not admitted:
            raise BasisError(
                f"missing='skip' skips all targeted modules ({some(skipped)}): the basis has none of them, "
                f"it has {some(self._provider.modules)}."
            )
        self._provider.plan(cores)

    def _holds_bases(self, module: nn.Module, name: str) -> bool:
        """Whether another adapter has brought the bases of this one to a module already."""
        return isinstance(module, AttrSubspaceLayer) and module.shared(self._provider.key(name)) is not None

    def _layout(self, base: nn.Module, name: str) -> ModuleLayout:
        layout = ModuleLayout.of(base)
        if layout is not None:
            return layout
        quantised = resolve_quantization_backend(base, **self._quantization_kwargs)
        n, m = getattr(base, "out_features", None), getattr(base, "in_features", None)
        if quantised is not None and n and m:
            return ModuleLayout("linear", n, m)
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

    def _bases(self, layer: AttrSubspaceLayer, module: str, config: AttrSubspaceConfig) -> Any:
        if config.basis_in_adapter:
            return None
        key = self._provider.key(module)
        held = layer.shared(key)
        if held is not None:
            return held
        weight = None
        if config.basis == "psv":
            weight = layer.layout.as_matrix(layer.unmerged_weight(), layer.fan_in_fan_out)
            if weight.device.type == "meta":
                raise BasisError(f"basis='psv' needs the weight of {module!r}, which is on the meta device: load it.")
        return self._provider.make(module, layer.layout, weight)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; bases that no other adapter uses are let go."""
        super().delete_adapter(adapter_name)
        self.basis_bytes_read.pop(adapter_name, None)
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
        # PEFT compares shapes before it loads, so a basis that comes with the adapter needs its room by now.
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        for name, layer in model.named_modules():
            if isinstance(layer, AttrSubspaceLayer):
                layer.make_room(adapter_name, mapped, f"{name}." if name else "")
        return mapped

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add `adapter_name` = sum_i weights[i] * adapters[i], exactly: cores on one basis add up.

        Raises ValueError if the adapters stand on different bases or modules.
        """
        add_weighted_adapter(self, list(adapters), list(weights), adapter_name)


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


def _default_targets(config: AttrSubspaceConfig, provider: BasisProvider, model: nn.Module) -> set[str] | str:
    """Every module the basis covers, as PEFT's target_modules."""
    names = {name for name, _ in model.named_modules() if name}
    absent = sorted(set(provider.modules) - names, key=natural_key)
    if absent and config.missing == "error":
        raise BasisError(
            f"the basis covers modules that the model does not have ({some(absent)}), so it was mined for another "
            "model or another wrapping: choose target_modules, or set missing='skip' to use the rest."
        )
    wanted = set(provider.modules) & names
    if config.layers_to_transform is not None:
        wanted = {name for name in wanted if _in_layers(config, name)}
    return exact_targets(wanted, names)


def _in_layers(config: AttrSubspaceConfig, name: str) -> bool:
    # PEFT looks at the layer index only when a target matches by its ending.
    probe = copy.copy(config)
    probe.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(probe, name))
