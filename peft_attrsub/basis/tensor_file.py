"""One safetensors file, read tensor by tensor into memory of our own.

safetensors maps its files into memory: every page that was looked at counts as memory of the process while the file
is open, and a file that is cut short under a mapping kills it. Here the leading rows of a tensor are read straight
into the tensor that is handed out: each byte is in memory once, and a short file is a sentence.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import BasisError
from .typed_json import one_line

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError where the disk is full, as every other writer does."""
    # Two names may share one storage (e.g. a view): safetensors wants each on its own.
    alone = {k: v if v.untyped_storage().nbytes() == v.nbytes else v.clone() for k, v in tensors.items()}
    alone = {k: v.contiguous() for k, v in alone.items()}
    try:
        save_file(alone, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error), str(path)) from error


@dataclass(frozen=True)
class Entry:
    """Where a tensor starts in its file (in bytes), its dtype (None: one that is not read) and its shape."""

    start: int
    dtype: torch.dtype | None
    shape: tuple[int, ...]


class TensorFile:
    """A safetensors file that stays open; threads and forked processes may read from it at the same time."""

    def __init__(self, path: Path, advice: str = "copy or build the basis again") -> None:
        """Read and check the header. Raises BasisError if it is none, or announces more than the file holds.

        advice: what the errors tell the reader to do.
        """
        self._path, self._advice = path, advice
        self._lock = threading.Lock()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
            weakref.finalize(self, self._file.close)
            with safe_open(str(path), framework="pt"):  # checks offsets, overlaps and the length
                pass
            self.entries = self._header()
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise self._damaged(error) from error

    def _header(self) -> dict[str, Entry]:
        size = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(size))
        header.pop("__metadata__", None)
        return {
            name: Entry(8 + size + told["data_offsets"][0], _DTYPES.get(told["dtype"]), tuple(told["shape"]))
            for name, told in header.items()
        }

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor, or only its first `rows` rows; it shares nothing with the file."""
        entry = self.entries[name]
        if entry.dtype is None:
            raise BasisError(
                f"{str(self._path)!r} stores {name!r} in a dtype that is not read: save it again as float32 or "
                "bfloat16."
            )
        shape = entry.shape if rows is None else (min(rows, entry.shape[0]), *entry.shape[1:])
        tensor = torch.empty(shape, dtype=entry.dtype, device="cpu")
        if prod(shape):
            self._fill(tensor.reshape(-1).view(torch.uint8).numpy().data, entry.start)
        return tensor

    def _fill(self, target: memoryview, offset: int) -> None:
        while target:
            try:
                count = self._read_into(target, offset)
            except OSError as error:
                raise self._damaged(error) from error
            if not count:
                raise self._damaged("it ends too early")
            target, offset = target[count:], offset + count

    def _read_into(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [target], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(target) or 0

    def _damaged(self, why: object) -> BasisError:
        return BasisError(
            f"{str(self._path)!r} is truncated or no safetensors file ({one_line(why)}): {self._advice}."
        )
