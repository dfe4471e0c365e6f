"""The machine that the demo runs on: how many commands fit on it at a time, and its name for the page."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil  # PEFT and accelerate need it too

#: Where Linux mounts the control groups, and says which are this process's.
GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
#: Bytes that one command of the demo needs at its peak, with some to spare.
NEEDED = 2**30


def workers(most: int, groups: Path = GROUPS, own: Path = OWN) -> int:
    """Commands at a time: one per core that this process may use, as many as fit into the memory, at most `most`.

    Cores are those of its affinity, and not more than the CPU limit of its control groups allows.
    """
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free: float = psutil.virtual_memory().available
    if (limit := cpu_limit(groups, own)) is not None:
        cores = min(cores, limit)
    if (limit := memory_limit(groups, own)) is not None:
        free = min(free, limit)
    return max(1, min(most, int(cores), int(free / NEEDED)))


def cpu_limit(groups: Path = GROUPS, own: Path = OWN) -> float | None:
    """The smallest CPU limit of the control groups (v1 and v2) that hold this process, in cores; None without one."""
    found = []
    for folder in _folders(groups, own, "cpu"):
        words = _text(folder / "cpu.max").split() or [
            *_text(folder / "cpu.cfs_quota_us").split(),
            *_text(folder / "cpu.cfs_period_us").split(),
        ]
        with contextlib.suppress(ValueError):  # "max 100000", or no such files
            quota, period = (float(word) for word in words)
            found += [quota / period] if quota > 0 and period > 0 else []
    return min(found, default=None)


def memory_limit(groups: Path = GROUPS, own: Path = OWN) -> float | None:
    """The smallest memory limit of these groups, in bytes; None without one."""
    found = []
    for folder in _folders(groups, own, "memory"):
        with contextlib.suppress(ValueError):  # "max", or no such files
            found.append(float(_text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")))
    return min(found, default=None)


def _folders(groups: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups and of those around them."""
    for line in _text(own).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        # v2 mounts one tree, v1 one for each controller. A container sees its own group as the root.
        for root in [groups / names, groups / controller] if names else [groups, groups / "unified"]:
            folder = root / path.strip().lstrip("/")
            while folder == root or root in folder.parents:
                yield folder
                folder = folder.parent


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor as its maker calls it, or else its architecture."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    if platform.system() == "Darwin":
        try:
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            found = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            found = ""
        if found:
            return found
    return platform.machine() or "unknown processor"
