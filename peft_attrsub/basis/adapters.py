"""Saved LoRA adapters, read lazily and scaled right: dW = s * lora_B @ lora_A for every module.

s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, r and lora_alpha per module by rank_pattern and
alpha_pattern, exactly as PEFT matches them. Only safetensors and JSON are read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .._files import readable
from .errors import BasisError
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, file_sha256
from .hub import fetch
from .identity import BaseIdentity, adapter_base
from .layout import ModuleLayout
from .lora_config import REFUSED, read_lora_config
from .naming import OUTPUTS, natural_key, saved_names, some, strip_peft_prefix
from .tensor_file import TensorFile

WEIGHTS, CONFIG = ADAPTER_WEIGHTS, ADAPTER_CONFIG
_DEFAULT_ALPHA = 8  # of peft.LoraConfig
_PAIRS = {
    ".lora_A.weight": (".lora_B.weight", False),
    ".lora_embedding_A": (".lora_embedding_B", True),
}


@dataclass(frozen=True)
class LoraEntry:
    """One adapted module of one adapter: tensor names, rank, scaling and layout."""

    key_a: str
    key_b: str
    rank: int
    scaling: float
    layout: ModuleLayout


class _Unusable(Exception):
    """This module's LoRA is no low-rank matrix."""


def refuse_pickle(folder: Path, source: str) -> None:
    """Raise BasisError if the only weights of an adapter folder are a pickle, which can run code when it is read."""
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise BasisError(
            f"adapter {source!r} is saved as a pickle (adapter_model.bin), which is not loaded because it "
            "can run code: load it with PEFT and save it again as safetensors."
        )


def _finite(x: Tensor) -> bool:
    """No NaN and no inf. One pass: only a sum that overflows needs the look at every entry."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


class LoraAdapter:
    """A saved LoRA adapter. Opening reads the config and the names; `read` reads one module.

    Args:
        source: a folder, a Hub id (`user/name`, `user/name@revision`) or a .safetensors file with
            adapter_config.json beside it.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.source = os.fspath(source)
        path = Path(self.source).expanduser()
        self.revision: str | None = None
        if path.suffix == ".safetensors":
            if not path.is_file():
                raise BasisError(f"adapter file {self.source!r} does not exist.")
            self.path, folder = path, path.parent
        else:
            folder, self.revision = fetch(self.source, [WEIGHTS, CONFIG], "adapter")
            self.path = folder / WEIGHTS
        self.config = read_lora_config(folder, self.source)
        self._check_weights(folder)
        #: Modules whose LoRA cannot be mined, and why; an error only where such a module is asked for.
        self.unusable: dict[str, str] = {}
        self._file: TensorFile | None = None
        self._depth = 0
        with self:
            self.entries = self._index()

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    @property
    def base(self) -> BaseIdentity | None:
        """The weights it was trained on, where its config records them."""
        return adapter_base(self.config)

    @property
    def public_name(self) -> str:
        """The source as it may be published: an absolute path tells only its last part, and that of the run's folder
        where the last part is one that every run has."""
        if not os.path.isabs(self.source):
            return readable(self.source)
        path = Path(self.source)
        named = path.name in OUTPUTS and path.parent.name
        return readable(f"{path.parent.name}/{path.name}" if named else path.name)

    @property
    def modules(self) -> list[str]:
        return list(self.entries)

    def sha256(self) -> str:
        return file_sha256(self.path)

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """P (n x r) and Q (m x r) with dW = P Q^T; the scaling is in P."""
        entry = self.entries[module]
        with self:
            assert self._file is not None
            a, b = self._file.read(entry.key_a), self._file.read(entry.key_b)
        if not (a.is_floating_point() and b.is_floating_point()):
            raise BasisError(
                f"adapter {self.source!r}, module {module!r}: lora_A is {a.dtype}, lora_B is {b.dtype}, expected "
                "floating point numbers; copy or download the adapter again."
            )
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        a, b = a.to(wide), b.to(wide)
        if not _finite(a) or not _finite(b):
            raise BasisError(
                f"adapter {self.source!r} holds NaN or inf in module {module!r}: leave the adapter out or retrain it."
            )
        left = b.reshape(entry.layout.n, entry.rank) * entry.scaling
        return left, a.reshape(entry.rank, entry.layout.m).T

    def __enter__(self) -> LoraAdapter:
        """Hold the file open: several reads then cost one opening. Re-entrant; threads may read inside of it."""
        if self._file is None:
            self._file = TensorFile(self.path, "copy or download the adapter again")
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._file = None

    def _check_weights(self, folder: Path) -> None:
        if self.path.is_file():
            return
        refuse_pickle(folder, self.source)
        raise BasisError(f"adapter {self.source!r} has no {WEIGHTS}.")

    def _index(self) -> dict[str, LoraEntry]:
        assert self._file is not None
        shapes = {name: entry.shape for name, entry in self._file.entries.items()}
        keys = set(shapes)
        if any("lora_magnitude_vector" in key for key in keys):
            raise BasisError(f"adapter {self.source!r} uses use_dora: {REFUSED['use_dora']}.")
        found = {}
        for key in sorted(keys, key=natural_key):
            for ending in _PAIRS:
                if key.endswith(ending):
                    found[key.removesuffix(ending)] = ending
        try:
            names = saved_names(found)
        except BasisError as error:
            raise BasisError(f"adapter {self.source!r}: {error}") from error
        entries = {}
        for stem, ending in found.items():
            key, name, (partner, embedding) = stem + ending, names[stem], _PAIRS[ending]
            if stem + partner not in keys:
                raise BasisError(f"adapter {self.source!r} has {key!r} but lacks {stem + partner!r}.")
            try:
                entries[name] = self._entry(name, key, stem + partner, shapes, embedding)
            except _Unusable as reason:
                self.unusable[name] = str(reason)
        if not entries and self.unusable:
            raise BasisError(next(iter(self.unusable.values())))
        if not entries:
            raise BasisError(f"adapter {self.source!r} holds no LoRA tensors (found {some(sorted(keys))}).")
        return entries

    def _entry(
        self, name: str, key_a: str, key_b: str, shapes: dict[str, tuple[int, ...]], embedding: bool
    ) -> LoraEntry:
        shape_a, shape_b = shapes[key_a], shapes[key_b]
        kernel = shape_b[2:]  # of lora_B, which works on one place at a time
        most = 2 if embedding else 5
        if len(shape_a) != len(shape_b) or not 2 <= len(shape_a) <= most or 0 in shape_a + shape_b or {*kernel} - {1}:
            raise BasisError(
                f"adapter {self.source!r}, module {name!r}: shapes {shape_a}, {shape_b} are no LoRA factors."
            )
        rank = shape_a[0]
        if shape_b[1] != rank and len(shape_a) == 2:
            raise BasisError(
                f"adapter {self.source!r}, module {name!r}: lora_A {shape_a} and lora_B {shape_b} differ in rank."
            )
        if shape_b[1] != rank:
            raise _Unusable(
                f"adapter {self.source!r}, module {name!r}: factors {shape_a} and {shape_b} belong to a grouped "
                "convolution, whose LoRA is not one low-rank matrix; leave the module out with modules=."
            )
        # The patterns were written for the names that the model had when the adapter was trained.
        trained = strip_peft_prefix(key_a.removesuffix(".lora_embedding_A" if embedding else ".lora_A.weight"))
        expected = self._by_pattern("rank_pattern", (trained, name), self.config.get("r", rank))
        if expected != rank:
            raise BasisError(
                f"adapter {self.source!r}, module {name!r} has rank {rank} in the file but {expected} in {CONFIG}."
            )
        alpha = self._by_pattern("alpha_pattern", (trained, name), self.config.get("lora_alpha", _DEFAULT_ALPHA))
        scaling = alpha / (sqrt(rank) if self.config.get("use_rslora") else rank)
        return LoraEntry(key_a, key_b, rank, scaling, ModuleLayout.from_lora(shape_a, shape_b, embedding))

    def _by_pattern(self, key: str, names: tuple[str, ...], default: Any) -> Any:
        """A module's entry in rank_pattern or alpha_pattern, matched by PEFT; few adapters have any.

        names: of the module, the first one with an entry counts.
        """
        pattern = self.config.get(key)
        if not pattern:
            return default
        from peft.utils.other import get_pattern_key  # costs more than all of this room

        keys = (get_pattern_key(list(pattern), name) for name in names)
        return next((pattern[found] for found in keys if found in pattern), default)
