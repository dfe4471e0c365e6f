"""The subspaces of a basis one by one: where each is stored, and whether what is read is sound."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import AttributeRecord, BasisConfig
from .errors import BasisError
from .storage import (
    AT_DIM,
    CHUNK,
    FACTORS,
    RECORDS,
    RECORDS_NAME,
    SPECTRA,
    Store,
    read_records,
    tensor_hash,
)


@dataclass(frozen=True)
class Block:
    """One subspace: where its tensors are, under which name, and how many directions are in use."""

    store: Store
    name: str
    dim: int
    stored: int
    hashes: tuple[str, ...] | list[str] = ()
    record_hash: str | None = None


def index_blocks(config: BasisConfig, store: Store) -> dict[str, dict[str, Block]]:
    """attribute -> module -> block, after checking every shape in the store against the config."""
    blocks: dict[str, dict[str, Block]] = {}
    for attribute in config.attributes:
        row = {}
        for module, layout in config.modules.items():
            name = f"{attribute.name}.{module}"
            shapes = {part: store.shape(f"{name}.{part}") for part in FACTORS}
            d = shapes["S"][0] if len(shapes["S"]) == 1 else -1
            if shapes["Ut"] != (d, layout.n) or shapes["Vt"] != (d, layout.m):
                raise BasisError(
                    f"the basis is damaged: attribute {attribute.name!r}, module {module!r} has shapes {shapes}, "
                    f"expected (d, {layout.n}), (d,), (d, {layout.m})."
                )
            hashes = attribute.hashes.get(module, ())
            if module in attribute.hashes and len(hashes) != -(-d // CHUNK):
                raise BasisError(
                    f"the basis is damaged: attribute {attribute.name!r}, module {module!r} has {len(hashes)} "
                    f"hashes for {d} directions, expected one for every {CHUNK}."
                )
            if module in attribute.record_hashes and f"{name}.weights" not in store:
                raise BasisError(
                    f"the basis is incomplete: it lacks the spectra and weights of attribute {attribute.name!r}, "
                    f"module {module!r}, which its config announces ({RECORDS_NAME}); copy or download it again."
                )
            _check_records(store, attribute, name)
            row[module] = Block(store, name, d, d, hashes, attribute.record_hashes.get(module))
        blocks[attribute.name] = row
    return blocks


def _check_records(store: Store, attribute: AttributeRecord, name: str) -> None:
    """Refuse records of another shape than (number of sources,); spectra are one row of any length."""
    for part in RECORDS:
        if (full := f"{name}.{part}") not in store:
            continue
        shape, of_sources = store.shape(full), part not in SPECTRA
        if len(shape) != 1 or (of_sources and shape[0] != len(attribute.sources)):
            raise BasisError(
                f"the basis is damaged: {full} has shape {shape}, expected "
                + (f"({len(attribute.sources)},), one number for each source." if of_sources else "one row.")
            )


def checked_records(block: Block) -> dict[str, Tensor]:
    """All stored records of a subspace, by part. Raises BasisError where they do not match their sha256."""
    found = read_records(block.store, block.name)
    if block.record_hash is not None and tensor_hash(found) != block.record_hash:
        attribute, _, module = block.name.partition(".")
        raise BasisError(corrupted(attribute, module))
    return found


def kept_hashes(record: AttributeRecord, row: dict[str, Block]) -> dict[str, list[str]]:
    """Hashes that still hold for the directions in use: those of whole chunks."""
    whole = {m: b for m, b in row.items() if (b.dim == b.stored or b.dim % CHUNK == 0) and m in record.hashes}
    return {m: record.hashes[m][: -(-b.dim // CHUNK)] for m, b in whole.items()}


def valid_records(block: Block) -> dict[str, Tensor]:
    """The records of a subspace that hold for the directions in use, by part."""
    found = checked_records(block)
    return found if block.dim == block.stored else {k: v for k, v in found.items() if k not in AT_DIM}


def kept_record_hashes(record: AttributeRecord, row: dict[str, Block]) -> dict[str, str]:
    """Hashes of records that still hold: a subspace that was cut has lost some of them."""
    return {m: value for m, value in record.record_hashes.items() if m in row and row[m].dim == row[m].stored}


def corrupted(attribute: str, module: str) -> str:
    """The sentence for a subspace whose bytes do not match their hash."""
    return (
        f"the basis is corrupted: attribute {attribute!r}, module {module!r} does not match its sha256; "
        "copy or build it again."
    )


def check_factors(where: str, u: Tensor, s: Tensor, v: Tensor) -> None:
    """Refuse U, S, V that do not fit together or are not finite."""
    if (u.dim(), s.dim(), v.dim()) != (2, 1, 2) or not u.shape[1] == s.shape[0] == v.shape[1]:
        shapes = tuple(u.shape), tuple(s.shape), tuple(v.shape)
        raise BasisError(f"{where}: U, S, V have shapes {shapes}, expected (n, d), (d,), (m, d).")
    if not all(bool(torch.isfinite(t).all()) for t in (u, s, v)):
        raise BasisError(f"{where}: U, S or V holds NaN or inf.")
