"""A basis on the Hub: looked at without downloading its tensors, or copied into a folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor

from .basis import Basis
from .blocks import index_blocks
from .config import CONFIG_NAME, read_config
from .errors import BasisError
from .files import atomic_folder
from .hub import HubOptions, fetch, is_local, matches, read_header, split_folder, split_revision
from .saving import FIGURES, PATTERNS
from .storage import INDEX_NAME, RECORDS_NAME, FileStore, tensor_files


class HeaderStore:
    """Shapes of all tensors from the headers of the files on the Hub; the small records from the cache."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
        self._shapes = shapes
        self._records = FileStore(folder, [RECORDS_NAME] if (folder / RECORDS_NAME).is_file() else [])

    @property
    def bytes_read(self) -> int:
        return self._records.bytes_read

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._records:
            return self._records.shape(name)
        if name not in self._shapes:
            raise BasisError(f"the basis on the Hub lacks the tensor {name!r} that its config announces.")
        return self._shapes[name]

    def get(self, name: str, rows: int | None = None) -> Tensor:
        if name not in self._records:
            raise BasisError(f"the tensor {name!r} was not downloaded: open the basis with Basis.from_pretrained.")
        return self._records.get(name, rows)

    def __contains__(self, name: str) -> bool:
        return name in self._records


def open_header(name: str, revision: str | None = None, token: str | bool | None = None) -> Basis:
    """A basis on the Hub for looking at: dims, spectra, weights and digest are there, U, S and V are not.

    Downloads basis_config.json and basis_records.safetensors, and of the tensors only the header, by a Range
    request. Raises BasisError like `Basis.from_pretrained`.
    """
    options = HubOptions(token=token)
    folder, commit = fetch(name, [CONFIG_NAME, RECORDS_NAME, INDEX_NAME], "basis", revision, options)
    config = read_config(folder, name)
    source = split_revision(name)[0]
    repo, inside = split_folder(source)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in tensor_files(folder):
        shapes |= read_header(repo, f"{inside}/{file}" if inside else file, commit, token)
    return Basis(config, index_blocks(config, HeaderStore(shapes, folder)), source=source, revision=commit)


def pull_basis(
    name: str,
    output: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Basis:
    """Copy a basis from the Hub into the folder `output`, in one step, after checking every tensor's sha256.

    Raises BasisError like `Basis.from_pretrained`, and for an `output` that is in the way.
    """
    if is_local(name):
        raise BasisError(f"{name!r} is a folder here, not a repository on the Hub: nothing to pull.")
    with atomic_folder(output, CONFIG_NAME, overwrite) as beside:
        folder, _ = fetch(name, [*PATTERNS, FIGURES], "basis", revision, HubOptions(token=token))
        read_config(folder, name)
        for path in folder.rglob("*"):
            if path.is_file() and matches(path.relative_to(folder).as_posix(), [*PATTERNS, FIGURES]):
                copy = beside / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                # The cache holds links; a copy must stand alone.
                shutil.copyfile(path, copy)
        Basis.from_pretrained(beside).verify()
    return Basis.from_pretrained(output)
