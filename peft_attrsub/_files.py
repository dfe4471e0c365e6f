"""Files written in one step, and locked, on any file system; only the standard library is imported."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: What a file system answers that cannot do what was asked, as FUSE, SMB, FAT and old NFS.
_UNABLE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
_NO_LOCKS = _UNABLE | {errno.ENOLCK, errno.ENOTTY}


def readable(name: str | os.PathLike[str]) -> str:
    """A path as text that can be written as UTF-8.

    Python has the bytes of a name that its locale cannot decode as lone surrogates: all beyond ASCII where LANG is
    unset, and names in another encoding anywhere. What is UTF-8 becomes itself again, the rest U+FFFD.
    """
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file next to `path`, then rename it: a reader sees the old file or the whole new one, never a part.

    The file gets the permissions of any new file. Its folder must exist. A link is followed. Raises OSError; what was
    there then stays. What a killed process leaves is found by `clear_abandoned`.
    """
    final = Path(os.path.realpath(path))
    prefix = partial_prefix(final)
    handle, beside = tempfile.mkstemp(prefix=f"{prefix}{os.getpid()}-", suffix=".tmp", dir=final.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        open_to_others(beside)
        os.replace(beside, final)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    return Path(path)


def partial_prefix(final: Path) -> str:
    """How the names begin that `final` has while it is written on this machine; the process number follows."""
    # Not the whole name: with an ending it could be longer than a name may be. UTF-8 takes 4 bytes a letter at most.
    return f".{final.name[:50]}.partial-{platform.node()}-"


def clear_abandoned(folder: Path, prefix: str) -> None:
    """Remove what processes of this machine that no longer run have left: names of `prefix` and their number."""
    from ._machine import is_running

    for path in folder.glob(f"{glob.escape(prefix)}*"):
        owner = path.name.removeprefix(prefix).partition("-")[0]
        if not owner.isdecimal() or is_running(int(owner)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(handle: int) -> None:
    """fsync, where the file system has it."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


def sync_path(path: str | os.PathLike[str]) -> None:
    """fsync of a file, or of the names in a folder, which fsync of the files does not cover."""
    windows = os.name == "nt"  # flushes files that are open for writing only, and no folders
    if windows and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) if windows else os.O_RDONLY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def current_umask() -> int:
    """The process's umask. Linux tells it; elsewhere it is set and put back, which other threads may see."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def open_to_others(path: str | os.PathLike[str]) -> None:
    """The permissions of a new file or folder, for one that `tempfile` has made private to the user."""
    mode = 0o777 if os.path.isdir(path) else 0o666
    with contextlib.suppress(PermissionError):  # mounts without permissions of their own
        os.chmod(path, mode & ~current_umask())


def lock(handle: int) -> bool:
    """Lock an open file against other processes until it is closed or the process ends.

    Returns whether there is a lock: False on a file system that has none. Raises BlockingIOError where another
    process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _lock_on_windows(handle: int) -> bool:
    try:
        import msvcrt
    except ImportError:  # neither of the two, as in a browser
        return False
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except OSError as error:  # EACCES or EDEADLOCK: taken
        raise BlockingIOError(errno.EWOULDBLOCK, "the file is locked") from error
    return True


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], busy: str) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made if needed; BlockingIOError(busy) where another process does."""
    with open(path, "ab") as file:
        try:
            lock(file.fileno())
        except BlockingIOError as error:
            raise BlockingIOError(errno.EWOULDBLOCK, busy) from error
        yield
