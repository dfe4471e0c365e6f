"""Adapters of ours next to those of other methods in one model: PEFT's `PeftMixedModel`.

PEFT's `MixedModel` knows a fixed list of methods. `join_mixed_models` adds this one to the list. A mixed model takes
the class below when it gets its first adapter of ours; one that never does stays what it was.
"""

from __future__ import annotations

from typing import Any

import peft.tuners.mixed as peft_mixed
from peft.tuners.mixed import MixedModel
from peft.tuners.mixed import model as mixed_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from .config import AttrSubspaceConfig
from .layer import AttrSubspaceLayer
from .model import AttrSubspaceModel
from .registration import PREFIX


class AttrSubspaceMixedModel(AttrSubspaceModel, MixedModel):
    """A mixed model with adapters of ours: each adapter is treated by the class of its method.

    A module with adapters of several methods is wrapped once by each: y = W x + the sum of the active updates.
    """

    tuner_layer_cls = BaseTunerLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's entry point for a new adapter, of any method."""
        if _ours(self.peft_config[adapter_name]):
            # PeftMixedModel.add_adapter gives itself, under which all modules have longer names.
            super().inject_adapter(self.model if hasattr(self, "model") else model, adapter_name, *args, **kwargs)
        else:
            BaseTuner.inject_adapter(self, model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if _ours(peft_config):
            return super()._prepare_adapter_config(peft_config, model_config)
        return MixedModel._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if _ours(peft_config):
            super()._prepare_model(peft_config, model)
        else:
            MixedModel._prepare_model(self, peft_config, model)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        tuner = AttrSubspaceModel if _ours(peft_config) else MixedModel
        return tuner._check_target_module_exists(peft_config, key)

    def _check_new_adapter_config(self, config: Any) -> None:
        (BaseTuner if _ours(config) else MixedModel)._check_new_adapter_config(self, config)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        (AttrSubspaceModel if _ours(peft_config) else MixedModel)._check_tied_modules(self, model, peft_config)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tuner = AttrSubspaceModel if _ours(peft_config) else MixedModel
        tuner._add_modules_to_save_to_tie(self, peft_config, tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        tuner = AttrSubspaceModel if _ours(peft_config) else MixedModel
        tuner._add_targets_to_tie(self, peft_config, tied_weight_keys)

    def _create_and_replace(self, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        (AttrSubspaceModel if _ours(peft_config) else MixedModel)._create_and_replace(
            self, peft_config, *args, **kwargs
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        of_others = isinstance(new_module, BaseTunerLayer) and not isinstance(new_module, AttrSubspaceLayer)
        (MixedModel if of_others else AttrSubspaceModel)._replace_module(self, parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Delete one adapter or several; bases that no other adapter uses are let go."""
        MixedModel.delete_adapter(self, adapter_name)
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self._forget(name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported by mixed models of PEFT."""
        MixedModel.add_weighted_adapter(self, *args, **kwargs)


def join_mixed_models(member: PeftType) -> None:
    """Make PEFT's mixed models accept this method; calling it again changes nothing."""
    if member in mixed_model.COMPATIBLE_TUNER_TYPES:
        return
    types = (*mixed_model.COMPATIBLE_TUNER_TYPES, member)
    mixed_model.COMPATIBLE_TUNER_TYPES = peft_mixed.COMPATIBLE_TUNER_TYPES = types
    mixed_model.Configs = mixed_model.Configs | AttrSubspaceConfig
    mixed_model.Layers = (*mixed_model.Layers, AttrSubspaceLayer)
    mixed_model.PREFIXES.append(PREFIX)
    MixedModel.inject_adapter = _inject_adapter


def _inject_adapter(self: MixedModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    if _ours(self.peft_config[adapter_name]) and not isinstance(self, AttrSubspaceMixedModel):
        self.__class__ = AttrSubspaceMixedModel
        self.inject_adapter(model, adapter_name, *args, **kwargs)
    else:
        BaseTuner.inject_adapter(self, model, adapter_name, *args, **kwargs)


def _ours(config: object) -> bool:
    return isinstance(config, AttrSubspaceConfig)
