"""What this machine lets the process use: cores, memory, and an output that takes any character.

Only the standard library is imported, and each call copes with a system that lacks what it asks for.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------------------------ cores


def available_cores(root: str | os.PathLike[str] = "/") -> int:
    """How many cores this process may keep busy, at least 1.

    The least of the cores there are, those of its CPU affinity (taskset, Slurm; Linux only), and the CPU time that
    its control groups grant, rounded up (docker --cpus, Kubernetes limits). root: of the file system; for tests.
    """
    counts = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    counts += [math.ceil(quota) for quota in _cpu_quotas(Path(root))]
    return max(1, min(counts))


def cores_per_process(root: str | os.PathLike[str] = "/") -> int:
    """The share of `available_cores` of one of LOCAL_WORLD_SIZE processes that a launcher started here."""
    return max(1, available_cores(root) // _count(os.environ.get("LOCAL_WORLD_SIZE")))


def cpu_name() -> str:
    """The processor as its maker calls it, or else its architecture."""
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
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


def _count(text: str | None) -> int:
    return max(1, int(text)) if text and text.isdecimal() else 1


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores by each control group that this process is in: cpu.max (v2), cpu.cfs_quota_us (v1)."""
    for folder in _groups(root, "cpu"):
        quota, _, period = (_text(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us") or "", _text(folder / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):  # "max" and -1: no limit
            yield int(quota) / int(period)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the control groups of this process for a controller, from its own up to the root's.

    In a container the path that /proc/self/cgroup tells may be one of the host, which is not there: the files of the
    container's own group then lie at the root of the mount.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in names.split(","):
            mounts = [root / "sys/fs/cgroup" / names, root / "sys/fs/cgroup" / controller]
        else:
            continue
        for mount in mounts:
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for length in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:length])


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _fields(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file."""
    lines = [line.split() for line in (_text(path) or "").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


# ----------------------------------------------------------------------------------------------------------- memory


def free_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes that this process can still take without swapping or being killed; None where the system does not say.

    The least of what is available on the machine, what is left below the limit of each of its control groups, and
    what is left below RLIMIT_AS (ulimit -v), which Slurm sets on some clusters. Page cache that a group can drop
    counts as free, as it does on the machine.
    """
    place = Path(root)
    found = [_available(place), _below_address_limit(place), *_below_group_limits(place)]
    known = [amount for amount in found if amount is not None]
    return max(0, min(known)) if known else None


def _available(root: Path) -> int | None:
    known = _fields(root / "proc/meminfo").get("MemAvailable:")
    if known is not None:
        return 1024 * known
    if sys.platform == "win32":
        status = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return int(status.available)
        return None
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):  # macOS tells the size of its memory only
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            continue
    return None


class _WindowsMemory(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    )


class _WindowsProcess(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("rest", ctypes.c_size_t * 7),
    )


def _windows_peak() -> int | None:
    if sys.platform == "win32":
        counters = _WindowsProcess(length=ctypes.sizeof(_WindowsProcess))
        kernel = ctypes.windll.kernel32
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        this = ctypes.c_void_p(kernel.GetCurrentProcess())
        if kernel.K32GetProcessMemoryInfo(this, ctypes.byref(counters), counters.length):
            return int(counters.peak)
    return None


def _below_group_limits(root: Path) -> Iterator[int]:
    """Bytes left in each control group with a limit: memory.max (v2), memory.limit_in_bytes (v1)."""
    for folder in _groups(root, "memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _text(folder / limit_name) or "", _text(folder / used_name) or ""
            # v1 writes "no limit" as a number near 2^63.
            if limit.isdecimal() and used.isdecimal() and int(limit) < 1 << 60:
                yield int(limit) - int(used) + _fields(folder / "memory.stat").get(cache_name, 0)


def _below_address_limit(root: Path) -> int | None:
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    pages = (_text(root / "proc/self/statm") or "0").split()[0]
    return limit - (int(pages) * os.sysconf("SC_PAGE_SIZE") if pages.isdecimal() else 0)


def free_shared_memory(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes free in /dev/shm, through which processes hand tensors to each other; None where there is no such folder.

    Containers often have 64 MB of it (docker --shm-size), and a process that writes beyond dies of a bus error.
    """
    try:
        return shutil.disk_usage(Path(root) / "dev/shm").free
    except OSError:
        return None


def peak_memory() -> int | None:
    """Bytes of memory that this process held at the worst moment so far; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return _windows_peak()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # musl, macOS; Windows
        return None


def release_memory() -> None:
    """Have the C library return its free pages (glibc; elsewhere nothing happens).

    Without it a process whose arrays differ in size and come from several threads holds several times of what it uses.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def is_running(process: int) -> bool:
    """Whether a process of that number may still run on this machine."""
    if os.name == "nt":
        return True  # os.kill(n, 0) is no question there: it sends Ctrl-C
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, and is somebody else's
        return True
    return True


# ----------------------------------------------------------------------------------------------------------- output


def print_anything() -> None:
    """Let standard output and standard error write a "?" for a character that their encoding lacks.

    A console of another code page, or LANG unset, would otherwise end a run at the first δ. For the start of a
    program: a library leaves the streams of its caller alone.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's or a notebook's own stream takes any character
            stream.reconfigure(errors="replace")
