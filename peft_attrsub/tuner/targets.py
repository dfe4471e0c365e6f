"""target_modules: what PEFT's matching by endings finds in a model, and targets that find exactly what is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION

from ..basis.naming import base_name
from .config import AttrSubspaceConfig
from .names import ModuleNames


def exact_targets(wanted: Iterable[str], names: Iterable[str], whole: bool = False) -> set[str] | str:
    """The names themselves, or a regex where an ending would also catch another module.

    Args:
        wanted: modules to target. names: all modules of the model. whole: always the regex, which stays exact in
            other models too; PEFT shortens long sets to the endings that are needed in this one.
    """
    chosen = set(wanted)
    endings = tuple(f".{name}" for name in chosen)
    if chosen and not whole and not any(name not in chosen and name.endswith(endings) for name in names):
        return chosen
    return "|".join(re.escape(name) for name in sorted(chosen)) or "(?!)"


def endings_as_pattern(endings: Iterable[str], whole: Iterable[str] = ()) -> str:
    """The regex that matches what PEFT matches by a list of names and endings; `whole`: names that are no endings."""
    ending, exact = ("|".join(re.escape(name) for name in sorted(names)) for names in (endings, whole))
    return "|".join(part for part in (exact, rf"(?:.*\.)?(?:{ending})" if ending else "") if part)


def unwrap_targets(config: AttrSubspaceConfig, names: ModuleNames) -> None:
    """Leave out wrappers from lists of targets, so that they mean the same in a model without them.

    Where the basis is for a part of the model, its names mean modules there, and not what ends like them elsewhere.
    """
    for option in ("target_modules", "exclude_modules", "lora_modules"):
        listed = getattr(config, option)
        if listed is not None and not isinstance(listed, str):
            setattr(config, option, {names.own.get(name) or base_name(name) for name in listed})
    targets = config.target_modules
    if not isinstance(targets, set) or config.layers_to_transform is not None:
        return
    exact = targets & names.known if names.prefixes else set()
    # PEFT shortens long lists by the names with wrappers, and the shorter ones could mean other modules too.
    long = len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION
    if exact or (long and names.wrapped_inside):
        config.target_modules = endings_as_pattern(targets - exact, exact)


def matches(config: AttrSubspaceConfig, targets: Any, key: str) -> Any:
    """What PEFT says of a module under any of its names: excluded, targeted or neither."""
    aliases = [base_name(key), key] if config.names is None else config.names.aliases(key)
    found = [check_target_module_exists(targets, alias) for alias in aliases]
    excluded = [answer for answer in found if type(answer).__name__ == "_ExcludedModule"]
    return excluded[0] if excluded else next((answer for answer in found if answer), False)
