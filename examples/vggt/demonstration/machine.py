"""The machine that the demo runs on: how many commands fit on it at a time, and its name for the page."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from pathlib import Path

from peft_attrsub._machine import available_cores, free_memory

#: Bytes that one command of the demo needs at its peak, with some to spare.
NEEDED = 2**30


def workers(most: int, root: str = "/") -> int:
    """Commands at a time: one per core that this process may use, as many as fit into the free memory, at most `most`.

    root: where the system's files are; see `peft_attrsub._machine`.
    """
    free = free_memory(root)
    fitting = most if free is None else free // NEEDED
    return max(1, min(most, available_cores(root), fitting))


def cpu_name() -> str:
    """The processor as its maker calls it, or else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    if platform.system() == "Darwin":
        try:
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            found = subprocess.run(asked, capture_output=True, encoding="utf-8", timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found = ""
        if found:
            return found
    return platform.machine() or "unknown processor"
