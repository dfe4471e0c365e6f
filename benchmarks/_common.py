"""What every benchmark shares: the machine's description, memory sampling, child processes, tables, JSON."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "peft", "transformers", "safetensors", "numpy")


#: Instructions that decide how fast matrix products are, by the names of /proc/cpuinfo (x86 "flags", Arm "Features").
FLAGS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve", "svebf16")
#: Environment variables that keep a library from using what the CPU has.
CAPS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def print_anything() -> None:
    """Write "?" for what the console's encoding lacks."""
    from peft_attrsub import _machine  # here: other interpreters run parts of this file without it

    _machine.print_anything()


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict:
    """CPU model, its vector instructions, caps on them, usable cores and RAM; nothing that names the host or a folder.

    cpu_flags: those of FLAGS that the CPU has; None where the system does not tell. cpu_caps: set variables of CAPS.
    """
    from peft_attrsub._machine import available_cores, cpu_name  # here: see `print_anything`

    flags = None
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = [flag for flag in FLAGS if flag in value.split()]
            elif not line.strip() and flags is not None:
                break  # the first core stands for all
    try:
        ram = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        ram = None
    caps = {name: os.environ[name] for name in CAPS if name in os.environ}
    return {
        "cpu": cpu_name(),
        "cpu_flags": flags,
        "cpu_caps": caps,
        "cores": available_cores(),
        "ram_gib": ram,
        "system": platform.system(),
    }


def load() -> float | None:
    """Programs competing for the cores over the last minute; timings taken under load say so themselves."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    import peft_attrsub

    found["peft_attrsub"] = getattr(peft_attrsub, "__version__", "unknown")
    return found


def header(benchmark: str, seed: int, quick: bool, **settings) -> dict:
    """The fields every result file opens with."""
    import torch

    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seed": seed,
        "quick": quick,
        "machine": machine() | {"torch_threads": torch.get_num_threads(), "load_at_start": load()},
        "versions": versions(),
        "settings": settings,
    }


def write_result(result: dict, name: str, output: str | None, quick: bool) -> None:
    """Write beside and rename. A quick run writes only with --output: it must not replace a published result."""
    if output is None and quick:
        return
    path = Path(output) if output else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def median(values) -> float:
    return statistics.median(values)


def summary(values, digits: int = 4) -> dict:
    values = list(values)
    return {
        "median": round(median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "rounds": len(values),
    }


def table(title: str, columns: list[str], rows: list[list]) -> None:
    cells = [columns] + [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for i, row in enumerate(cells):
        print(
            "  ".join(c.ljust(w) if j == 0 else c.rjust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
        if i == 0:
            print("  ".join("-" * w for w in widths))
    sys.stdout.flush()


def _status_mib(*fields: str) -> dict[str, float]:
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(":")
        if key in fields:
            found[key] = int(rest.split()[0]) / 1024
    return found


class PeakMemory:
    """Peak memory of this process above its value on entry, in MiB.

    rss: the kernel's high-water mark, which counts mapped pages of the adapter files too.
    anon: anonymous memory sampled every 5 ms, which is what the process itself allocated.
    """

    def __enter__(self):
        self.known = Path("/proc/self/status").exists()
        self.rss = self.anon = None
        if self.known:
            with contextlib.suppress(OSError):
                # The mark still holds the peak of the imports; 5 resets it to the present value.
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            self.start = _status_mib("VmRSS", "RssAnon")
            self.high = self.start["RssAnon"]
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()
        return self

    def _sample(self):
        while not self.stop.wait(0.005):
            self.high = max(self.high, _status_mib("RssAnon")["RssAnon"])

    def __exit__(self, *_):
        if self.known:
            self.stop.set()
            self.thread.join()
            self.high = max(self.high, _status_mib("RssAnon")["RssAnon"])
            # VmHWM and not ru_maxrss: the latter survives exec and would report the parent's peak.
            self.rss = round(_status_mib("VmHWM")["VmHWM"] - self.start["VmRSS"], 1)
            self.anon = round(self.high - self.start["RssAnon"], 1)

    def report(self) -> dict:
        return {"peak_rss_mib": self.rss, "peak_anon_mib": self.anon}


class Timer:
    """Wall seconds, and CPU seconds of all threads, which other programs on the machine disturb less."""

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    def report(self) -> dict:
        return {"seconds": self.wall, "cpu_seconds": self.cpu}


def run_child(job: dict, python: str | None = None) -> dict:
    """One job of _contenders.py in a process of its own: no memory and no cache leaks between contenders."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [python or sys.executable, str(HERE / "_contenders.py"), json.dumps(job), str(result)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode or not result.exists():
            raise RuntimeError(f"contender {job['contender']} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return json.loads(result.read_bytes())


def write_figure(path: Path, figure: Any) -> None:
    """A matplotlib figure as PNG, whole or not at all."""
    beside = path.with_name(f"{path.name}.partial")
    # No version of matplotlib in the file: the same picture is the same bytes.
    figure.savefig(beside, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    beside.replace(path)
