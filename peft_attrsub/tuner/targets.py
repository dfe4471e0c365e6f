"""target_modules that PEFT's matching by endings reads as exactly the modules meant."""

from __future__ import annotations

import re
from collections.abc import Iterable


def exact_targets(wanted: Iterable[str], names: Iterable[str]) -> set[str] | str:
    """The names themselves, or a regex where an ending would also catch another module.

    Args:
        wanted: modules to target. names: all modules of the model.
    """
    chosen = set(wanted)
    endings = tuple(f".{name}" for name in chosen)
    if chosen and not any(name not in chosen and name.endswith(endings) for name in names):
        return chosen
    return "|".join(re.escape(name) for name in sorted(chosen)) or "(?!)"
