"""Files and folders written in one step, and hashes of files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from .._files import clear_abandoned, open_to_others, partial_prefix, sync_path, write_atomically
from .errors import BasisError
from .naming import some

#: Files of an adapter that PEFT has saved.
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


#: What each kind of folder holds that we write, by the file that it is known by; anything else is somebody else's.
_OURS = {
    "basis_config.json": ("basis*.safetensors", "basis*.json", "README.md", "figures"),
    ADAPTER_CONFIG: ("adapter_model*.safetensors", "adapter_model.bin", "adapter_config.json", "README.md"),
    "config.json": ("*.safetensors", "*.safetensors.index.json", "*config.json", "README.md"),
}
# Folders of tools that come and go by themselves.
_PASSING = (".gitattributes", ".git", ".cache", ".DS_Store", "Thumbs.db")


@contextlib.contextmanager
def atomic_folder(
    target: str | os.PathLike[str],
    marker: str,
    overwrite: bool = False,
    *,
    kind: str | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Path]:
    """Yield a folder next to `target`; on success it becomes `target`, on failure nothing is left.

    With `overwrite` a folder of the same kind (or an empty one) is replaced, in one step, so that a reader sees the
    old one or the new one; see `check_writable` for what is refused. Raises BasisError where writing fails.
    """
    final = check_writable(Path(target), marker, overwrite, kind=kind, inputs=inputs)
    prefix = partial_prefix(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(final.parent, prefix)
        beside = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=final.parent))
    except OSError as error:
        raise _not_written(target, error) from error
    try:
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                sync_path(path)
        open_to_others(beside)
        check_writable(final, marker, overwrite, kind=kind)
        _swap_in(beside, final)
    except OSError as error:
        raise _not_written(target, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_file(target: str | os.PathLike[str], text: str) -> Path:
    """Write a text file beside `target` and rename it: a reader sees the old file or the whole new one."""
    final = check_file(target)
    real = Path(os.path.realpath(final))
    clear_abandoned(real.parent, partial_prefix(real))
    try:
        return write_atomically(final, text.encode())
    except OSError as error:
        raise _not_written(target, error) from error


def _not_written(target: str | os.PathLike[str], error: OSError) -> BasisError:
    return BasisError(
        f"{os.fspath(target)!r} cannot be written ({error.strerror or error}): make room, or give another place; "
        "nothing half-written is left."
    )


def check_file(target: str | os.PathLike[str]) -> Path:
    """Refuse a target that no file can be written to."""
    final = Path(target)
    if final.is_symlink() and not final.exists():
        raise BasisError(f"{str(final)!r} is a link to {os.readlink(final)!r}, which does not exist: remove the link.")
    if final.is_dir():
        raise BasisError(f"{str(final)!r} is a folder: give the name of a file to write.")
    if not final.parent.is_dir():
        raise BasisError(
            f"the folder {str(final.parent)!r} does not exist: make it, or write {final.name!r} elsewhere."
        )
    _probe(final, Path(os.path.realpath(final)).parent)
    return final


def check_writable(
    target: Path,
    marker: str,
    overwrite: bool,
    *,
    kind: str | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Path:
    """The folder to write, a link resolved; refused where it cannot be written or must not be replaced.

    marker: the file by which a folder of this kind is known. kind: the PEFT type that is written, "LORA" or "ATTRSUB",
    so that an adapter of another type is not replaced. inputs: folders and files that are read for it.

    Raises BasisError for a file, a dangling link, a place without the right to write, an input, a folder that exists
    without `overwrite`, and one that holds another kind of thing, or files of others.
    """
    if target.is_symlink() and not target.exists():
        raise BasisError(
            f"{str(target)!r} is a link to {os.readlink(target)!r}, which does not exist: remove the link."
        )
    final = Path(os.path.realpath(target))
    if final.is_file():
        raise BasisError(f"{str(target)!r} is a file: give the name of a folder to write.")
    for source in inputs:
        read = Path(os.path.realpath(Path(source).expanduser()))
        if read.exists() and (read == final or final in read.parents or read in final.parents):
            raise BasisError(
                f"{str(target)!r} is, holds or is inside of {os.fspath(source)!r}, which is read for it: give another "
                "folder to write."
            )
    held = sorted(path.name for path in final.iterdir()) if final.exists() else []
    if held:
        _check_replaceable(target, final, held, marker, overwrite, kind)
    place = final if final.exists() else final.parent
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise BasisError(f"{str(target)!r} cannot be written: {str(place)!r} is not a folder.")
    _probe(target, final.parent if final.exists() else place)
    return final


def _check_replaceable(
    target: Path, final: Path, held: list[str], marker: str, overwrite: bool, kind: str | None
) -> None:
    if marker not in held:
        raise BasisError(f"{str(target)!r} exists and holds no {marker}, so it is not replaced: give another folder.")
    if not overwrite:
        raise BasisError(f"{str(target)!r} exists already: give another folder, or overwrite=True (--overwrite).")
    allowed = (*_OURS.get(marker, ("*",)), marker, *_PASSING)
    strange = [name for name in held if not any(fnmatch(name, pattern) for pattern in allowed)]
    if strange:
        raise BasisError(
            f"{str(target)!r} also holds {some(strange)}, so it is not replaced: move them away, or give another "
            "folder."
        )
    if kind is not None and (its := _adapter_type(final / marker)) not in (None, kind):
        raise BasisError(
            f"{str(target)!r} holds an adapter of PEFT type {its}, and not {kind}, so it is not replaced: give "
            "another folder."
        )


def _adapter_type(config: Path) -> str | None:
    try:
        found = json.loads(config.read_bytes()).get("peft_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return str(found).partition(":")[0].upper().rpartition(".")[2]  # ours goes on with what to install


def _probe(target: Path, folder: Path) -> None:
    """Refuse a folder in which nothing can be made; a file is written and removed, since rights alone do not tell."""
    try:
        mark = partial_prefix(Path(os.path.realpath(target)))
        handle, name = tempfile.mkstemp(prefix=f"{mark}{os.getpid()}-", dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise BasisError(f"{str(target)!r} cannot be written ({error.strerror}): give another place.") from error


def _swap_in(beside: Path, final: Path) -> None:
    """Rename `beside` to `final`; what was there before ends up under the other name."""
    if not final.exists() or not any(final.iterdir()):
        if os.name == "nt" and final.exists():
            final.rmdir()  # elsewhere an empty folder may be renamed over
        os.rename(beside, final)
    elif not _exchange(beside, final):
        # No atomic exchange on this system: keep the old folder until the new one has its name.
        old = final.with_name(f".{final.name}.replaced-{os.getpid()}")
        _move(final, old)
        try:
            os.rename(beside, final)
        except OSError:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _move(folder: Path, new: Path) -> None:
    try:
        os.rename(folder, new)
    except OSError as error:
        if error.errno != errno.EXDEV:  # overlayfs cannot rename a folder of a lower layer, only copy it
            raise
        shutil.move(folder, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux renameat2)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    # EXDEV: overlayfs, for a folder of a lower layer. EPERM: a system call filter of a container.
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
