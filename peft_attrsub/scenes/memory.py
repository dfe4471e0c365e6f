"""Give memory that is free back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def release() -> None:
    """Have the C library return its free pages: without it a process that makes scene after scene, whose arrays
    differ in size and come from several threads, holds on to several times of what it uses. glibc only; elsewhere
    nothing happens."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return
    trim(0)
