"""A file written in one step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write beside `path`, then rename: a reader sees the old file or the whole new one, never a part."""
    final = Path(path)
    if final.is_dir():
        raise ValueError(f"{final} is a folder: give the name of a file to write.")
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(prefix=f".{final.name[:100]}.", suffix=".tmp", dir=final.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are private; this one is like any other that the user makes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, final)
    except BaseException:
        os.unlink(beside)
        raise
    return final


__all__ = ["write_atomically"]
