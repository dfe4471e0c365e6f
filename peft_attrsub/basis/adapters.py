"""Saved LoRA adapters, read lazily and scaled right: dW = s * lora_B @ lora_A for every module.

s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, r and lora_alpha per module by rank_pattern and
alpha_pattern, exactly as PEFT matches them. Only safetensors and JSON are read.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .._files import readable
from .adapter_keys import Pair, classify, told
from .errors import BasisError
from .files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, file_sha256
from .hub import fetch
from .identity import BaseIdentity, adapter_base
from .layout import ModuleLayout
from .lora_config import declared_extras, read_lora_config
from .naming import OUTPUTS, saved_names, some, strip_peft_prefix
from .tensor_file import TensorFile
from .typed_json import Fields, read_json

WEIGHTS, CONFIG = ADAPTER_WEIGHTS, ADAPTER_CONFIG
INDEX = f"{WEIGHTS}.index.json"
#: PEFT's default where a config has no lora_alpha.
_DEFAULT_ALPHA = 8.0
_ADVICE = "copy or save the adapter again"


@dataclass(frozen=True)
class LoraEntry:
    """One adapted module of one adapter: tensor names, rank, scaling and layout."""

    key_a: str
    key_b: str
    rank: int
    scaling: float
    layout: ModuleLayout


@dataclass(frozen=True)
class _Scaling:
    """How a config scales its LoRA; patterns by module, as PEFT matches them."""

    rank: int | None
    alpha: float
    rank_stabilized: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Scaling:
        """From a config that `read_lora_config` has checked."""
        return cls(
            config.get("r"),
            config.get("lora_alpha", _DEFAULT_ALPHA),
            bool(config.get("use_rslora")),
            config.get("rank_pattern") or {},
            config.get("alpha_pattern") or {},
        )


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
        source: a folder, a Hub id (`user/name`, `user/name@revision`) or a .safetensors file, with
            adapter_config.json beside it unless the file holds its own alphas (the layouts of kohya and diffusers).
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
            patterns = [WEIGHTS, CONFIG, INDEX, "adapter_model-*.safetensors"]
            folder, self.revision = fetch(self.source, patterns, "adapter")
            sharded = not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file()
            self.path = folder / (INDEX if sharded else WEIGHTS)
        own_scaling = not (folder / CONFIG).is_file() and self._needs_no_config()
        self.config: dict[str, Any] = {} if own_scaling else read_lora_config(folder, self.source)
        self._scaling = _Scaling.of(self.config)
        self._check_weights(folder)
        self._shards = _shards(self.path) if self.path.name == INDEX else [self.path]
        #: Modules whose LoRA cannot be mined, and why; an error only where such a module is asked for.
        self.unusable: dict[str, str] = {}
        self._files: dict[str, TensorFile] | None = None
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
        """Of its tensor file; of a sharded one over the hashes of all shards."""
        if len(self._shards) == 1:
            return file_sha256(self._shards[0])
        return hashlib.sha256("\n".join(map(file_sha256, self._shards)).encode()).hexdigest()

    def read(self, module: str) -> tuple[Tensor, Tensor]:
        """P (n x r) and Q (m x r) with dW = P Q^T; the scaling is in P."""
        entry = self.entries[module]
        with self:
            a, b = self._tensor(entry.key_a), self._tensor(entry.key_b)
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        a, b = a.to(wide), b.to(wide)
        if not _finite(a) or not _finite(b):
            raise BasisError(
                f"adapter {self.source!r} holds NaN or inf in module {module!r}: leave the adapter out or retrain it."
            )
        left = b.reshape(entry.layout.n, entry.rank) * entry.scaling
        return left, a.reshape(entry.rank, entry.layout.m).T

    def _tensor(self, key: str) -> Tensor:
        assert self._files is not None
        tensor = self._files[key].read(key)
        if not tensor.is_floating_point():
            raise BasisError(
                f"adapter {self.source!r} stores {key!r} as {str(tensor.dtype).removeprefix('torch.')}, which are "
                "codes and not values: save it again in a floating-point dtype."
            )
        return tensor

    def __enter__(self) -> LoraAdapter:
        """Hold the files open: several reads then cost one opening. Re-entrant; threads may read inside of it."""
        if self._files is None:
            opened = [TensorFile(shard, "copy or download the adapter again") for shard in self._shards]
            self._files = {key: file for file in opened for key in file.entries}
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._files = None

    def _needs_no_config(self) -> bool:
        """Whether the file says itself how its LoRA is scaled."""
        if self.path.suffix != ".safetensors" or not self.path.is_file():
            return False
        return classify(TensorFile(self.path, "copy or download the adapter again").entries, self.source).holds_alpha

    def _check_weights(self, folder: Path) -> None:
        if self.path.is_file():
            return
        refuse_pickle(folder, self.source)
        raise BasisError(f"adapter {self.source!r} has no {WEIGHTS}.")

    def _index(self) -> dict[str, LoraEntry]:
        assert self._files is not None
        shapes = {key: file.entries[key].shape for key, file in self._files.items()}
        saved = self.config.get("modules_to_save")
        keys = classify(shapes, self.source, saved if isinstance(saved, list) else ())
        try:
            names = saved_names(keys.pairs)
        except BasisError as error:
            raise BasisError(f"adapter {self.source!r}: {error}") from error
        entries = {}
        for stem, pair in keys.pairs.items():
            name = names[stem]
            try:
                entries[name] = self._entry(name, stem, pair, shapes, keys.holds_alpha)
            except _Unusable as reason:
                self.unusable[name] = str(reason)
        if not entries and self.unusable:
            raise BasisError(next(iter(self.unusable.values())))
        if not entries:
            raise BasisError(f"adapter {self.source!r} holds no LoRA tensors (found {some(sorted(shapes))}).")
        for line in told(keys, declared_extras(self.config), self.source):
            warnings.warn(line, stacklevel=3)
        if keys.layout == "kohya" and any("_" in name and "." not in name for name in entries):
            warnings.warn(
                f"adapter {self.source!r} has kohya's module names, such as {next(iter(entries))!r}: a basis of it is "
                "for other adapters with these names, and for a model only once they are mapped to the model's own.",
                stacklevel=3,
            )
        return entries

    def _entry(
        self, name: str, stem: str, pair: Pair, shapes: dict[str, tuple[int, ...]], holds_alpha: bool
    ) -> LoraEntry:
        shape_a, shape_b = shapes[pair.first], shapes[pair.second]
        where = f"adapter {self.source!r}, module {name!r}"
        if len(shape_a) != len(shape_b) or not 2 <= len(shape_a) <= 5 or 0 in (*shape_a, *shape_b):
            raise BasisError(f"{where}: shapes {shape_a}, {shape_b} are not LoRA factors.")
        if len(shape_a) == 3 and any(part in name.split(".") for part in ("experts", "mlp1", "mlp2")):
            raise BasisError(
                f"{where}: 3-d factors {shape_a}, {shape_b} belong to experts stored as one parameter "
                "(target_parameters), which a basis cannot hold: leave them out when training, or mine other adapters."
            )
        rank = shape_a[0]
        if shape_b[1] != rank and len(shape_a) == 2:
            raise BasisError(f"{where}: lora_A {shape_a} and lora_B {shape_b} differ in rank.")
        if any(size != 1 for size in shape_b[2:]):
            raise BasisError(
                f"{where}: lora_B has the shape {shape_b}, expected a kernel of 1 in all dimensions: {_ADVICE}."
            )
        if shape_b[1] != rank:
            raise _Unusable(
                f"{where}: factors {shape_a} and {shape_b} belong to a grouped "
                "convolution, whose LoRA is not one low-rank matrix; leave the module out with modules=."
            )
        layout = ModuleLayout.from_lora(shape_a, shape_b, pair.embedding)
        if holds_alpha:
            return LoraEntry(pair.first, pair.second, rank, self._own_alpha(where, pair, rank) / rank, layout)
        rule = self._scaling
        # The patterns were written for the names that the model had when the adapter was trained.
        trained = (strip_peft_prefix(stem), name)
        expected = _by_pattern(rule.ranks, trained, rule.rank)
        if expected not in (None, rank):
            raise BasisError(f"{where} has rank {rank} in the file but {expected} in {CONFIG}.")
        alpha = _by_pattern(rule.alphas, trained, rule.alpha)
        scaling = alpha / (sqrt(rank) if rule.rank_stabilized else rank)
        return LoraEntry(pair.first, pair.second, rank, scaling, layout)

    def _own_alpha(self, where: str, pair: Pair, rank: int) -> float:
        """The alpha that the file holds for a module; its rank where there is none, which scales by 1."""
        if pair.alpha is None:
            return float(rank)
        assert self._files is not None
        value = self._files[pair.alpha].read(pair.alpha)
        if value.numel() != 1 or not bool(value.double().isfinite().all()):
            raise BasisError(f"{where}: {pair.alpha!r} must be one finite number, got shape {tuple(value.shape)}.")
        return float(value)


def _by_pattern(patterns: dict[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """A module's entry in rank_pattern or alpha_pattern, matched by PEFT; few adapters have any.

    names: of the module, the first one with an entry counts.
    """
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # costs more than all of this room

    keys = (get_pattern_key(list(patterns), name) for name in names)
    return next((patterns[found] for found in keys if found in patterns), default)


def _shards(index: Path) -> list[Path]:
    """The files that a sharded adapter's index names, in order."""
    names = (
        Fields(read_json(index, _ADVICE), repr(str(index)))
        .table("weight_map", "anything", lambda x: True, {})
        .values()
    )
    files = sorted({name for name in names if isinstance(name, str)})
    if not files or len(files) < len(set(map(str, names))) or any(Path(name).name != name for name in files):
        raise BasisError(f"{str(index)!r} must name files of its own folder in weight_map: {_ADVICE}.")
    lacking = [name for name in files if not (index.parent / name).is_file()]
    if lacking:
        raise BasisError(f"{str(index.parent)!r} lacks {some(lacking)}, which {index.name} names: {_ADVICE}.")
    return [index.parent / name for name in files]
