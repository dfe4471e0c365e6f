"""Give memory that is free back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Have the C library return its free pages (glibc; elsewhere nothing happens): what is kept of one module lies
    between what was needed for it for a moment, and such holes add up over the modules of a model."""
    trim = _trim()
    if trim is not None:
        trim(0)
