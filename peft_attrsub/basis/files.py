"""Files and folders written in one step, and hashes of files."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .._files import open_to_others, sync_path, write_atomically
from .._machine import is_running
from .errors import BasisError

#: Files of an adapter that PEFT has saved.
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike[str], marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder next to `target`; on success it becomes `target`, on failure nothing is left.

    `marker` is the file by which a folder of this kind is known: with `overwrite` only such a folder (or an
    empty one) is replaced, in one step, so that a reader sees the old one or the new one.
    """
    final = Path(target)
    check_writable(final, marker, overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(final)
    prefix = f".{final.name}.partial-{platform.node()}-{os.getpid()}-"
    beside = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                sync_path(path)
        open_to_others(beside)
        check_writable(final, marker, overwrite)
        _swap_in(beside, final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_file(target: str | os.PathLike[str], text: str) -> Path:
    """Write a text file beside `target` and rename it: a reader sees the old file or the whole new one."""
    final = check_file(target)
    try:
        return write_atomically(final, text.encode())
    except OSError as error:
        raise BasisError(f"{str(final)!r} cannot be written: {error.strerror}; give another path.") from error


def check_file(target: str | os.PathLike[str]) -> Path:
    """Refuse a target that no file can be written to."""
    final = Path(target)
    if final.is_dir():
        raise BasisError(f"{str(final)!r} is a folder: give the name of a file to write.")
    if not final.parent.is_dir():
        raise BasisError(
            f"the folder {str(final.parent)!r} does not exist: make it, or write {final.name!r} elsewhere."
        )
    return final


def _clear_abandoned(final: Path) -> None:
    """Remove what a killed process of this machine left while it was writing the same folder."""
    prefix = f".{final.name}.partial-{platform.node()}-"
    for path in final.parent.glob(f"{glob.escape(prefix)}*"):
        owner = path.name.removeprefix(prefix).partition("-")[0]
        if owner.isdecimal() and not is_running(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def check_writable(final: Path, marker: str, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is empty or `overwrite` may replace it."""
    if final.is_file():
        raise BasisError(f"{str(final)!r} is a file: give the name of a folder to write.")
    if not final.exists() or not any(final.iterdir()):
        return
    if not (final / marker).exists():
        raise BasisError(f"{str(final)!r} exists and holds no {marker}, so it is not replaced: give another folder.")
    if not overwrite:
        raise BasisError(f"{str(final)!r} exists already: give another folder, or overwrite=True (--overwrite).")


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
