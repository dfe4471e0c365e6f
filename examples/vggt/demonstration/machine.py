"""The machine that the demo runs on: how many cores it may use, and its name for the page."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: its affinity, and not more than the CPU limit of its control group allows.

    groups, own: where Linux mounts the control groups and says which are this process's.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit(groups, own)
    return count if limit is None else max(1, min(count, int(limit)))


def cpu_limit(groups: Path, own: Path) -> float | None:
    """The smallest CPU limit of the control groups (v1 and v2) that hold this process, in cores; None without one."""
    limits = []
    for line in _text(own).splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and "cpu" not in names.split(","):
            continue
        # v2 mounts one tree, v1 one for each controller. A container sees its own group as the root.
        for root in [groups / names, groups / "cpu"] if names else [groups, groups / "unified"]:
            folder = root / path.strip().lstrip("/")
            while folder == root or root in folder.parents:
                limits.append(_limit(folder))
                folder = folder.parent
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _limit(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split() or [
        *_text(folder / "cpu.cfs_quota_us").split(),
        *_text(folder / "cpu.cfs_period_us").split(),
    ]
    try:
        quota, period = (float(word) for word in words)  # "max 100000" and -1: no limit
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


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
