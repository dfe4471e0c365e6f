"""Basis: for every module and attribute a low-rank subspace U (n x d), S (d), V (m x d)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks import (
    Block,
    check_factors,
    checked_records,
    corrupted,
    index_blocks,
)
from .card import model_card
from .config import CONFIG_NAME, AttributeRecord, BasisConfig, read_config
from .errors import BasisError
from .files import atomic_folder
from .hub import HubOptions, fetch, open_repo, split_revision
from .joint import Stored, check_columns, join
from .layout import ModuleLayout
from .naming import check_attribute, counted, natural_key, nearest, some
from .saving import PATTERNS, push_basis, write_basis
from .storage import (
    AT_DIM,
    CHUNK,
    FACTORS,
    RECORDS,
    FileStore,
    MemoryStore,
    chunk_hashes,
    stored_dtype,
)
from .views import Dim, base_of_all, check_dims, check_same_model, of_view

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class Basis:
    """Subspaces of several attributes over the modules of one model; immutable.

    Made by `build_basis`, `psv_basis`, `random_basis`, `Basis.from_factors` or `Basis.from_pretrained`. A
    basis from disk is lazy: tensors are read when asked for, and those of a module are checked against their sha256
    when the first of them is read.
    """

    def __init__(
        self,
        config: BasisConfig,
        blocks: dict[str, dict[str, Block]],
        source: str | list[str] | None = None,
        revision: str | None = None,
    ) -> None:
        self.config = config
        self._blocks = blocks
        self._digest: str | None = None
        self._checked: set[str] = set()
        #: Folder or Hub id this basis was read from or written to; None while it exists only in memory.
        self.source = source
        self.revision = revision

    @property
    def pinned_source(self) -> str | list[str] | None:
        """`source`, with the commit behind it (`user/name@commit`) where it came from the Hub."""
        return f"{self.source}@{self.revision}" if isinstance(self.source, str) and self.revision else self.source

    # What it holds

    @property
    def attributes(self) -> list[str]:
        """Names of the attributes, in order."""
        return list(self._blocks)

    @property
    def modules(self) -> list[str]:
        """Names of the modules as the base model has them (blocks.2 before blocks.10)."""
        return list(self.config.modules)

    def layout(self, module: str) -> ModuleLayout:
        """Kind and shape (n, m) of a module."""
        self._require(module)
        return self.config.modules[module]

    def dim(self, module: str, attribute: str) -> int:
        """Number of directions d of an attribute in a module."""
        return self._block(module, attribute).dim

    def factors(self, module: str, attribute: str) -> tuple[Tensor, Tensor, Tensor]:
        """U (n x d), S (d), V (m x d), columns by falling singular value."""
        ut, s, vt = self._stored(module, attribute)
        return ut.T.contiguous(), s, vt.T.contiguous()

    def singular_values(self, module: str, attribute: str) -> Tensor:
        """S of an attribute in a module, of all directions that are stored, without reading U and V."""
        block = self._block(module, attribute)
        return block.store.get(f"{block.name}.S")

    def kind(self, attribute: str) -> str:
        """Where an attribute comes from: "adapters" (mined), "psv", "random" or "factors" (given)."""
        self._require_attribute(attribute)
        return self._record(attribute).kind

    def has_consensus(self, attribute: str) -> bool:
        """Whether U S V^T is an update that source adapters agree on, in their own scale."""
        return self.kind(attribute) == "adapters"

    def dtype(self, attribute: str) -> torch.dtype:
        """The dtype in which the subspaces of an attribute are stored."""
        return self.singular_values(self.modules[0], attribute).dtype

    def spectrum(self, module: str, attribute: str) -> tuple[Tensor, Tensor]:
        """Singular values of C (paper, section 3.3) at the first and at the last IRLS iteration."""
        return self.record(module, attribute, "first"), self.record(module, attribute, "last")

    def weights(self, module: str, attribute: str) -> Tensor:
        """Final IRLS weight of each source adapter (k), mean 1: small means muted as an outlier."""
        return self.record(module, attribute, "weights")

    def record(self, module: str, attribute: str, part: str) -> Tensor:
        """first, last (spectra), weights, residuals (||L - dW_i|| / ||dW_i||), energy (share of ||dW_i||^2), ranks.

        Raises BasisError where the basis does not have it (see `has_record`).
        """
        if part not in RECORDS:
            raise BasisError(f"{part!r} is no record of a basis: use one of {', '.join(RECORDS)}.")
        block = self._block(module, attribute)
        if not self.has_record(module, attribute, part):
            mined = f"{block.name}.weights" in block.store
            why = "was cut to fewer directions" if mined else "was not mined from adapters"
            raise BasisError(f"attribute {attribute!r} {why}, so it has no {part} in module {module!r}.")
        if f"{block.name} records" not in self._checked:
            found = checked_records(block)
            self._checked.add(f"{block.name} records")
            return found[part]
        return block.store.get(f"{block.name}.{part}")

    def ranks(self, module: str, attribute: str) -> Tensor | None:
        """Rank of each source adapter (k) in a module; None in a basis that did not keep them."""
        return self.record(module, attribute, "ranks") if self.has_record(module, attribute, "ranks") else None

    def has_record(self, module: str, attribute: str, part: str) -> bool:
        """Whether `record` has it: residuals and energy were measured at the mined dim and hold for no other."""
        block = self._block(module, attribute)
        whole = part not in AT_DIM or block.dim == block.stored
        return whole and f"{block.name}.{part}" in block.store

    def joint(
        self,
        module: str,
        attributes: Sequence[str] | None = None,
        dim: Dim = None,
        columns: str = "orthonormal",
    ) -> tuple[Tensor, Tensor, dict[str, tuple[slice, slice]]]:
        """A (n x D_A), B (m x D_B) for dW = A M B^T, and each attribute's columns (slice in A, slice in B).

        Directions that an earlier attribute already spans are dropped, so D_A and D_B can differ (paper,
        section 3.4). columns: "orthonormal", or "spectral" (weighted by sqrt(S_j / max S)).
        """
        check_columns(columns)
        chosen = self.select(attributes, dim) if attributes is not None or dim is not None else self
        return join(chosen.stored(module), columns)

    def stored(self, module: str) -> dict[str, Stored]:
        """{attribute: (Ut d x n, S d, Vt d x m)} of one module, as they are on disk, read and checked."""
        return {attribute: self._stored(module, attribute) for attribute in self.attributes}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that have left the disk so far, for this basis and all views of the same files."""
        stores = {id(block.store): block.store for row in self._blocks.values() for block in row.values()}
        return sum(store.bytes_read for store in stores.values())

    # Smaller and larger ones

    def select(
        self, attributes: Sequence[str] | None = None, dim: Dim = None, modules: Iterable[str] | None = None
    ) -> Basis:
        """A view with fewer attributes (in the order given), directions or modules; nothing is copied."""
        names = self.attributes if attributes is None else [attributes] if isinstance(attributes, str) else attributes
        for name in names:
            self._require_attribute(name)
        if len(set(names)) != len(names):
            raise BasisError(f"attributes={list(names)!r} names one twice.")
        dims = check_dims(dim, self.attributes)
        kept = self.modules if modules is None else sorted(set(modules), key=natural_key)
        for module in kept:
            self._require(module)
        blocks: dict[str, dict[str, Block]] = {}
        for name in names:
            row = {m: self._blocks[name][m] for m in kept}
            limit = dims(name)
            if limit is not None:
                row = {m: replace(b, dim=min(b.dim, limit)) for m, b in row.items()}
            blocks[name] = row
        by_name = {a.name: a for a in self.config.attributes}
        records = [of_view(by_name[n], blocks[n]) for n in names]
        layouts = {m: self.config.modules[m] for m in kept}
        config = replace(self.config, attributes=records, modules=layouts, digest=None)
        return Basis(config, blocks)

    def rename(self, names: Mapping[str, str]) -> Basis:
        """A view in which attributes have other names, {old: new}; nothing is copied, and their order stays."""
        for old, new in names.items():
            self._require_attribute(old)
            check_attribute(new)
        called = {name: names.get(name, name) for name in self.attributes}
        twice = next((new for new in called.values() if list(called.values()).count(new) > 1), None)
        if twice is not None:
            raise BasisError(f"two attributes would be called {twice!r}: the basis has {', '.join(self.attributes)}.")
        records = [replace(record, name=called[record.name]) for record in self.config.attributes]
        config = replace(self.config, attributes=records, digest=None)
        return Basis(config, {called[name]: row for name, row in self._blocks.items()})

    @staticmethod
    def combine(bases: Sequence[Basis]) -> Basis:
        """Put the attributes of several bases of one model side by side, in order; nothing is copied."""
        if not bases:
            raise BasisError("combine got no basis: give at least one.")
        first = bases[0]
        blocks: dict[str, dict[str, Block]] = {}
        records: list[AttributeRecord] = []
        for basis in bases:
            check_same_model(first, basis)
            for record in basis.config.attributes:
                if record.name in blocks:
                    raise BasisError(
                        f"attribute {record.name!r} is in two of the bases: rename it in one (Basis.rename, "
                        "peft-attrsub rename), or leave it out (Basis.select, peft-attrsub select)."
                    )
                blocks[record.name] = basis._blocks[record.name]
                records.append(record)
        flat = [basis.pinned_source for basis in bases if isinstance(basis.pinned_source, str)]
        named = next((basis.config for basis in bases if basis.config.base_model), first.config)
        config = replace(
            first.config,
            attributes=records,
            base_model=named.base_model,
            base_model_revision=named.base_model_revision,
            base=base_of_all(bases),
            digest=None,
            command=None,
        )
        return Basis(config, blocks, source=flat if len(flat) == len(bases) else None)

    @classmethod
    def from_factors(
        cls,
        factors: Mapping[str, Mapping[str, tuple[Tensor, Tensor, Tensor]]],
        base_model: str | None = None,
        layouts: Mapping[str, ModuleLayout] | None = None,
        records: Sequence[AttributeRecord] | None = None,
        extras: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | str = torch.float32,
    ) -> Basis:
        """A basis in memory from {attribute: {module: (U n x d, S d, V m x d)}} with orthonormal U and V.

        layouts: for modules that are not linear. records, extras: provenance, as `build_basis` fills them.
        """
        if not factors or not any(factors.values()):
            raise BasisError("from_factors got no subspace: give {attribute: {module: (U, S, V)}}.")
        kind = stored_dtype(dtype)
        names = sorted(next(iter(factors.values())), key=natural_key)
        tensors: dict[str, Tensor] = dict(extras or {})
        shapes: dict[str, ModuleLayout] = {}
        for attribute, row in factors.items():
            check_attribute(attribute)
            if set(row) != set(names):
                difference = sorted(set(row) ^ set(names), key=natural_key)
                raise BasisError(f"attribute {attribute!r} covers other modules than the first: {some(difference)}.")
            for module in names:
                u, s, v = row[module]
                check_factors(f"attribute {attribute!r}, module {module!r}", u, s, v)
                layout = (layouts or {}).get(module) or ModuleLayout("linear", u.shape[0], v.shape[0])
                if (u.shape[0], v.shape[0]) != shapes.setdefault(module, layout).shape:
                    raise BasisError(
                        f"attribute {attribute!r} has shape {(u.shape[0], v.shape[0])} in module {module!r}, "
                        f"another one {shapes[module].shape}."
                    )
                for part, value in zip(FACTORS, (u.T, s, v.T), strict=True):
                    tensors[f"{attribute}.{module}.{part}"] = value.detach().to("cpu", kind).contiguous()
        config = BasisConfig(
            attributes=list(records) if records else [AttributeRecord(name) for name in factors],
            modules={m: shapes[m] for m in names},
            base_model=base_model,
            dtype=str(kind).removeprefix("torch."),
        )
        return cls(config, index_blocks(config, MemoryStore(tensors)))

    # Identity

    @property
    def digest(self) -> str:
        """sha256 over attributes, module names, shapes and bytes of all U, S, V: what A and B are made from.

        Computed once, from the recorded hashes where the basis was saved, else from its tensors.
        """
        if self._digest is None:
            digest = hashlib.sha256(b"peft_attrsub basis 1\n")
            for module, layout in self.config.modules.items():
                digest.update(f"{module} {json.dumps(layout.to_dict(), sort_keys=True)}\n".encode())
            for attribute in self.attributes:
                for module in self.modules:
                    digest.update(f"{attribute} {module} {' '.join(self._hashes(module, attribute))}\n".encode())
            self._digest = digest.hexdigest()
        return self._digest

    def verify(self) -> None:
        """Read every tensor and compare with the recorded digest; a BasisError names what is damaged."""
        self._checked.clear()
        for attribute in self.attributes:
            for module in self.modules:
                self._stored(module, attribute)
                checked_records(self._block(module, attribute))
        self._check_digest()

    def _check_digest(self) -> None:
        if self.config.digest and self.digest != self.config.digest:
            raise BasisError(
                f"the basis {self.source!r} has digest {self.digest}, its config says {self.config.digest}: "
                "it was changed after it was saved; copy or build it again."
            )

    def _hashes(self, module: str, attribute: str) -> list[str]:
        known = self._record(attribute).hashes.get(module)
        return chunk_hashes(*self._stored(module, attribute)) if known is None else known

    # Disk and Hub

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> None:
        """Write basis.safetensors (sharded above `max_shard_size`), basis_config.json and README.md, atomically.

        An existing basis is refused without `overwrite`; anything else in the way is never replaced.
        """
        with atomic_folder(folder, CONFIG_NAME, overwrite) as beside:
            config = write_basis(self, beside, dtype, max_shard_size)
            name = os.path.basename(os.path.abspath(folder))
            (beside / "README.md").write_text(model_card(Basis(config, self._blocks), name), encoding="utf-8")
        if config.dtype == self.config.dtype:
            self.config, self._digest = config, None
            self.source, self.revision = os.fspath(folder), None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        revision: str | None = None,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Basis:
        """Open a basis from a folder or a Hub id (`user/name`, `user/name@revision`), lazily.

        Args:
            name: folder or Hub id. revision: branch, tag or commit on the Hub, here or in the name.
            cache_dir, token, local_files_only: as everywhere in huggingface_hub.

        Raises:
            BasisError: missing, private, truncated, incomplete, foreign, or of a newer format.
        """
        options = HubOptions(token, None if cache_dir is None else Path(cache_dir), local_files_only)
        folder, commit = fetch(name, PATTERNS, "basis", revision, options)
        config = read_config(folder, name)
        source = os.fspath(name) if commit is None else split_revision(os.fspath(name))[0]
        basis = cls(config, index_blocks(config, FileStore(folder)), source=source, revision=commit)
        basis._check_digest()
        return basis

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        license: str | None = None,
    ) -> CommitInfo:
        """Upload the basis with its model card in one commit; an unchanged basis makes none.

        Args:
            repo_id: `user/name`; made if it does not exist. private: of a repository that is made; one that
                exists and is public is refused then.
            revision: branch to push to, made if it does not exist; default the main one.
            commit_message, token, create_pr: as everywhere in huggingface_hub. license: an identifier of the
                Hub for the card, e.g. "apache-2.0"; default "other".

        Returns:
            huggingface_hub.CommitInfo; its `oid` is the commit to pin. The basis then counts as read from there.

        Raises:
            BasisError: no right to write, no connection, no Xet storage; nothing was committed.
        """
        message = commit_message or f"Basis of {', '.join(self.attributes)}"
        target = open_repo(repo_id, private=private, revision=revision, token=token, create_pr=create_pr)
        config, info = push_basis(self, target, message, license)
        self.config, self._digest = config, None
        self.source, self.revision = target.repo_id, info.oid
        return info

    # Python's own

    def __deepcopy__(self, memo: dict[int, Any]) -> Basis:
        return self  # immutable, and large

    def __repr__(self) -> str:
        where = f" from {self.source!r}" if self.source else ""
        lines = [
            f"Basis{where}: {counted(len(self.modules), 'module')} of {self.config.base_model or 'an unnamed model'}"
        ]
        for attribute in self.attributes:
            dims = [block.dim for block in self._blocks[attribute].values()]
            width = str(max(dims)) if min(dims) == max(dims) else f"{min(dims)} to {max(dims)}"
            record = self._record(attribute)
            origin = counted(len(record.sources), "adapter") if record.sources else record.kind
            lines.append(f"  {attribute}: dim {width}, {origin}")
        return "\n".join(lines)

    # Inside

    def _record(self, attribute: str) -> AttributeRecord:
        return next(a for a in self.config.attributes if a.name == attribute)

    def _require_attribute(self, attribute: str) -> None:
        if attribute not in self._blocks:
            raise BasisError(f"the basis has no attribute {attribute!r}: it has {', '.join(self.attributes)}.")

    def _require(self, module: str) -> None:
        if module not in self.config.modules:
            near = nearest(module, self.config.modules)
            raise BasisError(f"the basis has no module {module!r}; nearest: {some(near) or 'none'}.")

    def _block(self, module: str, attribute: str) -> Block:
        self._require_attribute(attribute)
        self._require(module)
        return self._blocks[attribute][module]

    def _stored(self, module: str, attribute: str) -> Stored:
        """Ut (d x n), S (d), Vt (d x m)."""
        block = self._block(module, attribute)
        # Whole chunks are read, because it is chunks that carry a hash.
        rows = min(-(-block.dim // CHUNK) * CHUNK, block.stored)
        ut, s, vt = (block.store.get(f"{block.name}.{part}", rows) for part in FACTORS)
        if block.hashes and block.name not in self._checked:
            if chunk_hashes(ut, s, vt) != block.hashes[: -(-rows // CHUNK)]:
                raise BasisError(corrupted(attribute, module))
            self._checked.add(block.name)
        return ut[: block.dim], s[: block.dim], vt[: block.dim]
