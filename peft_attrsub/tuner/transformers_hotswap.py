"""`hotswap=True` in transformers' `load_adapter`, for models whose adapter is ours.

transformers looks at the type of the adapter before it calls anything of PEFT's, and raises an error for all but LoRA.
So its `load_adapter` is wrapped: a hot swap of one of our adapters goes to `hotswap_adapter`, everything else to the
original.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_origin, get_type_hints

from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .config import AttrSubspaceConfig
from .hotswap import hotswap_adapter

#: What `hotswap_adapter` takes of the arguments for the Hub, and where `load_adapter` has them.
_HUB = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


def accept_hotswap() -> None:
    """Wrap transformers' `load_adapter`; calling this again changes nothing."""
    original = PeftAdapterMixin.load_adapter
    if not getattr(original, "_by_peft_attrsub", False):
        PeftAdapterMixin.load_adapter = _wrapped(original)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments.pop("kwargs", {}), **bound.arguments}
        name = given.get("adapter_name") or "default"
        if not _ours(self, name) or not _asked(self, given.get("hotswap")):
            return original(self, *args, **kwargs)
        where = given.get("peft_model_id")
        if where is None:
            raise ValueError(
                "load_adapter(..., hotswap=True) was given no peft_model_id: give the folder or the Hub id of a saved "
                "attribute-subspace adapter."
            )
        options = {**given, **(given.get("adapter_kwargs") or {})}
        hotswap_adapter(self, where, name, **{key: options[key] for key in _HUB if options.get(key) is not None})
        return _nothing_missing()

    load_adapter._by_peft_attrsub = True  # type: ignore[attr-defined]
    return load_adapter


def _ours(model: Any, adapter: str) -> bool:
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    return bool(loaded) and isinstance(model.peft_config.get(adapter), AttrSubspaceConfig)


def _asked(model: Any, hotswap: object) -> bool:
    """Whether a hot swap is wanted; "auto": if `enable_peft_hotswap` was called."""
    return bool(getattr(model, "_hotswap_enabled", False)) if hotswap == "auto" else bool(hotswap)


def _nothing_missing() -> Any:
    """What `load_adapter` returns where every tensor has found its place; older versions return None."""
    try:
        from transformers.utils.loading_report import LoadStateDictInfo
    except ImportError:
        return None
    # Versions differ in how many of these collections it has.
    return LoadStateDictInfo(**{name: get_origin(kind)() for name, kind in get_type_hints(LoadStateDictInfo).items()})
