"""Writing a basis into a folder or to the Hub: tensors (sharded when large), hashes, config, card."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import valid_records
from .card import full_card
from .config import CONFIG_NAME, BasisConfig
from .hub import Target, push_folder
from .storage import (
    FACTORS,
    INDEX_NAME,
    RECORDS_NAME,
    TENSORS_NAME,
    chunk_hashes,
    stored_dtype,
    tensor_hash,
)
from .tensor_file import write_tensors

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .basis import Basis

#: Files of a basis that are downloaded, and the figures of its card, which are not.
PATTERNS = ["basis*.safetensors", "basis*.json", "README.md"]
FIGURES = "figures/*.png"


def write_basis(basis: Basis, folder: Path, dtype: torch.dtype | str | None, max_shard_size: int | str) -> BasisConfig:
    """Write tensors and config of `basis` into `folder`; return the config with hashes and digest."""
    kind = None if dtype is None else stored_dtype(dtype)
    tensors: dict[str, Tensor] = {}
    small: dict[str, Tensor] = {}
    records = []
    for attribute in basis.config.attributes:
        hashes, record_hashes = {}, {}
        for module in basis.modules:
            factors = dict(zip(FACTORS, basis._stored(module, attribute.name), strict=True))
            factors = {k: v.to(kind or v.dtype).contiguous() for k, v in factors.items()}
            hashes[module] = chunk_hashes(*factors.values())
            block = basis._block(module, attribute.name)
            kept = valid_records(block)
            if kept:
                record_hashes[module] = tensor_hash(kept)
            name = f"{attribute.name}.{module}"
            tensors.update({f"{name}.{part}": value for part, value in factors.items()})
            small.update({f"{name}.{part}": value for part, value in kept.items()})
        records.append(replace(attribute, hashes=hashes, record_hashes=record_hashes))
    name = str(kind).removeprefix("torch.") if kind else basis.config.dtype
    config = replace(basis.config, attributes=records, dtype=name, digest=None, library_version=_version())
    config.digest = type(basis)(config, basis._blocks).digest
    _write_tensors(tensors, folder, max_shard_size)
    if small:
        write_tensors(small, folder / RECORDS_NAME)
    (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
    return config


def push_basis(
    basis: Basis, target: Target, commit_message: str, license: str | None
) -> tuple[BasisConfig, CommitInfo]:
    """Write `basis` with its measured card to the Hub in one commit; return its config there and the commit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_basis(basis, folder, None, "5GB")
        card = full_card(type(basis)(config, basis._blocks), target.repo_id, folder, license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return config, push_folder(folder, target, [*PATTERNS, FIGURES], commit_message)


def _version() -> str | None:
    try:
        return importlib.metadata.version("peft-attrsub")
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_tensors(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    # Not split_torch_state_dict_into_shards: it imports torch.distributed.tensor, and with it sympy, for a second.
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,  # every tensor is written on its own, see `write_tensors`
        filename_pattern="basis{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in plan.filename_to_tensors.items():
        write_tensors({key: tensors[key] for key in keys}, folder / (name if plan.is_sharded else TENSORS_NAME))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
