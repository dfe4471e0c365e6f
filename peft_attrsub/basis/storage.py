"""The tensors of a basis, in memory or on disk.

Tensor names are `attribute.module.part`. U and V are stored transposed (`Ut`: d x n, `Vt`: d x m): the
leading directions are then the leading bytes, and a smaller dim reads only those.

| part                  | shape        | what                                                     |
|-----------------------|--------------|----------------------------------------------------------|
| Ut, S, Vt             | d x n, d, d x m | the subspace                                          |
| first, last           | R            | singular values of C at the first and last iteration      |
| weights, residuals, energy | k       | per adapter: final weight, ||L - dW_i||/||dW_i||, share captured |
| ranks                 | k            | per adapter: rank of its LoRA in the module               |

The subspaces are in basis.safetensors (or its shards), the rest, which is small, in basis_records.safetensors.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import DTYPE_NAMES
from .errors import BasisError
from .tensor_file import TensorFile
from .typed_json import Fields, read_json, short

FACTORS = ("Ut", "S", "Vt")
RECORDS = ("first", "last", "weights", "residuals", "energy", "ranks")
SPECTRA = ("first", "last")
# Records that hold for the mined dim only.
AT_DIM = ("residuals", "energy")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
# Directions per sha256.
CHUNK = 16
TENSORS_NAME = "basis.safetensors"
INDEX_NAME = "basis.safetensors.index.json"
RECORDS_NAME = "basis_records.safetensors"


class Store(Protocol):
    """Where the tensors of a basis are, and how many bytes of them have been read from disk."""

    @property
    def bytes_read(self) -> int: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor, or only its first `rows` rows."""
        ...

    def __contains__(self, name: str) -> bool: ...


class MemoryStore:
    """Tensors held in memory."""

    bytes_read = 0

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get(self, name: str, rows: int | None = None) -> Tensor:
        return self._tensors[name] if rows is None else self._tensors[name][:rows]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors


class FileStore:
    """Tensors in basis.safetensors (or its shards) and basis_records.safetensors.

    A tensor leaves the disk when it is asked for; bytes_read counts what did.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """`names`: the files to open; default all of a basis."""
        self.folder = folder
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._opened: dict[str, TensorFile] = {}
        opened = _all_files(folder) if names is None else names
        self._files = {key: name for name in opened for key in self._open(name).entries}

    def _open(self, name: str) -> TensorFile:
        if name not in self._opened:
            self._opened[name] = TensorFile(self.folder / name)
        return self._opened[name]

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            raise BasisError(f"{str(self.folder)!r} lacks the tensor {name!r} that its config announces.")
        return self._open(self._files[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).entries[name].shape

    def get(self, name: str, rows: int | None = None) -> Tensor:
        tensor = self._file(name).read(name, rows)
        with self._lock:
            self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def tensor_files(folder: Path) -> list[str]:
    """Names of the files that hold the subspaces: the shards of the index, or the one file."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [TENSORS_NAME]
    advice = "copy or build the basis again"
    told = Fields(read_json(index, advice), repr(str(index)))
    names = set(told.table("weight_map", "file names", lambda x: isinstance(x, str)).values())
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise BasisError(
                f"{str(index)!r} points outside its folder ({short(name)}), which a basis never does: {advice}."
            )
        if not name.endswith(".safetensors"):
            raise told.wrong("weight_map", name, "names of safetensors files")
    if not names:
        raise told.wrong("weight_map", {}, "names of safetensors files")
    return sorted(names)


def _all_files(folder: Path) -> list[str]:
    names = tensor_files(folder)
    if names == [TENSORS_NAME] and not (folder / TENSORS_NAME).is_file():
        raise BasisError(f"{str(folder)!r} has a basis_config.json but no {TENSORS_NAME}: it is incomplete.")
    return [*names, RECORDS_NAME] if (folder / RECORDS_NAME).is_file() else names


def stored_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype in which a basis is stored, from a torch dtype or a name of it: "float32", "fp32", "bfloat16", "bf16".

    Raises: BasisError for every other one.
    """
    word = str(dtype).removeprefix("torch.")
    name = {"fp32": "float32", "bf16": "bfloat16"}.get(word, word)
    if name not in DTYPES:
        raise BasisError(f"dtype={dtype} cannot hold a basis: use float32 or bfloat16.")
    return DTYPES[name]


def chunk_hashes(ut: Tensor, s: Tensor, vt: Tensor) -> list[str]:
    """One sha256 for every CHUNK directions, so that a basis read in part is checked in part."""
    parts = dict(zip(FACTORS, (ut, s, vt), strict=True))
    starts = range(0, s.shape[0], CHUNK)
    return [tensor_hash({k: v[i : i + CHUNK] for k, v in parts.items()}) for i in starts]


def read_records(store: Store, name: str) -> dict[str, Tensor]:
    """The records of one subspace that are there, by part."""
    names = {part: f"{name}.{part}" for part in RECORDS}
    return {part: store.get(full) for part, full in names.items() if full in store}


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
