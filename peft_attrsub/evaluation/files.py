"""A file written in one step."""

from __future__ import annotations

import os
from pathlib import Path

from .. import _files


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file in one step and make its folder: a reader sees the old file or the whole new one, never a part."""
    final = Path(path)
    if final.is_dir():
        raise ValueError(f"{final} is a folder: give the name of a file to write.")
    final.parent.mkdir(parents=True, exist_ok=True)
    return _files.write_atomically(final, data)


__all__ = ["write_atomically"]
