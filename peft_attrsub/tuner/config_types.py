"""The types of an AttrSubspaceConfig's values: it may come from a stranger's adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..basis.layout import ModuleLayout
from ..basis.typed_json import short

if TYPE_CHECKING:
    from .config import AttrSubspaceConfig


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return abs(float(value)) < 1e18  # not NaN, either
    except OverflowError:
        return False


def _whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral) and -(2**63) <= int(value) < 2**64


def _names(value: Any) -> bool:
    several = isinstance(value, (list, tuple, set, frozenset))
    return _text(value) or (several and all(isinstance(name, str) for name in value))


def _wholes(value: Any) -> bool:
    return value is None or _whole(value) or (isinstance(value, (list, tuple, range)) and all(map(_whole, value)))


def _tokens(value: Any) -> bool:
    return _wholes(value) or (isinstance(value, Mapping) and all(isinstance(k, str) for k in value))


def _dim(value: Any) -> bool:
    return value is None or _whole(value) or (isinstance(value, Mapping) and all(map(_text, value)))


def _texts(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()))


_TYPES = {
    **dict.fromkeys(("scaling", "dropout", "lora_alpha"), (_number, "a finite number")),
    **dict.fromkeys(("lora_rank", "seed"), (_whole, "a whole number")),
    **dict.fromkeys(("fan_in_fan_out", "basis_in_adapter"), (_flag, "true or false")),
    **dict.fromkeys(("basis_digest", "basis_revision"), (_text, "a string")),
    **dict.fromkeys(
        ("attributes", "target_modules", "exclude_modules", "lora_modules", "modules_to_save", "layers_pattern"),
        (_names, "a string or a list of strings"),
    ),
    "layers_to_transform": (_wholes, "a whole number or a list of them"),
    "trainable_token_indices": (_tokens, "a list of whole numbers, or a dict of such lists"),
    "dim": (_dim, "a whole number or a dict by attribute"),
    "basis_widths": (_texts, "a dict of strings by module"),
}


def check_types(config: AttrSubspaceConfig) -> None:
    """Raise ValueError for the first value that is of another type than its field, or is not finite."""
    for name, (fits, expected) in _TYPES.items():
        value = getattr(config, name)
        if not fits(value):
            raise ValueError(f"{name}={short(value)} is unusable: expected {expected}.")
    layouts: Any = config.module_layouts
    if layouts is not None and not isinstance(layouts, Mapping):
        raise ValueError(f"module_layouts={short(layouts)} is unusable: expected a dict of layouts by module.")
    for module, layout in (layouts or {}).items():
        ModuleLayout.from_dict(layout, f"module_layouts[{short(module)}]")
