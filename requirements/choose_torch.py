"""Which torch to install on a machine without an NVIDIA GPU, where PyPI's wheels for Linux bring CUDA along.

    python requirements/choose_torch.py torch      # prints the requirement to hand to pip

A requirement other than plain "torch" is the caller's choice and stays as it is. On Linux without an NVIDIA GPU the
newest CPU build (a local version like 2.13.0+cpu) is taken if one of pip's configured indexes offers it. Else stderr
says before the download what comes, how large it is, and how to get the CPU build instead.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: Names of wheels that a CPU does not need.
_CUDA = re.compile(r"(nvidia|cuda|triton)", re.IGNORECASE)


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether Linux shows a driver: nvidia-smi, or a device file of a GPU (also inside containers)."""
    return bool(shutil.which("nvidia-smi")) or any((root / "dev").glob("nvidia[0-9]*"))


def pip(*arguments: str) -> str:
    """Standard output of pip in this environment; "" where it fails: the installation will say why."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def newest_cpu_build(listing: str) -> str | None:
    """From the output of `pip index versions torch`: the first, that is the newest, version with the label +cpu."""
    found = re.search(r"\b\d[\w.]*\+cpu\b", listing)
    return found.group() if found else None


def size_of(url: str) -> int:
    """Bytes of a file on an index, 0 where that cannot be asked."""
    try:
        if url.startswith("file:"):
            return Path(urllib.request.url2pathname(url.removeprefix("file://"))).stat().st_size
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError):
        return 0


def warning(report: str) -> str | None:
    """From pip's JSON report of what it would install: the sentence to show if CUDA is among it, else None."""
    try:
        files = [entry["download_info"]["url"] for entry in json.loads(report)["install"]]
    except (ValueError, KeyError, TypeError):
        return None
    cuda = [url for url in files if _CUDA.search(url.rsplit("/", 1)[-1])]
    if not cuda:
        return None
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(size_of, files))
    size = f"{sum(sizes) / 1e9:.1f} GB" if all(sizes) else "several GB"
    return (
        f"make: no NVIDIA GPU was found, but torch comes from PyPI as a CUDA build: {size} to download in "
        f"{len(files)} files, {len(cuda)} of them for CUDA only. To get the much smaller CPU build, stop now (Ctrl-C) "
        "and set PIP_EXTRA_INDEX_URL to PyTorch's CPU index, which https://pytorch.org/get-started/locally shows; "
        "TORCH=torch==VERSION chooses a version"
    )


def choose(requirement: str) -> str:
    """The requirement to install; may print a warning on stderr."""
    if requirement != "torch" or not sys.platform.startswith("linux") or has_nvidia_gpu():
        return requirement
    version = newest_cpu_build(pip("index", "versions", "torch"))
    if version is not None:
        print(f"make: no NVIDIA GPU was found: installing the CPU build torch=={version}", file=sys.stderr)
        return f"torch=={version}"
    report = pip("install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-", requirement)
    if sentence := warning(report):
        print(sentence, file=sys.stderr, flush=True)
    return requirement


if __name__ == "__main__":
    print(choose(sys.argv[1]))
