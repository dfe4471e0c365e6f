"""To and from the Hub: names, downloads into the cache, one commit per push; what goes wrong as one sentence.

huggingface_hub is imported where it is used: its first import costs more than the rest of this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BasisError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}(/{_PART})?)(?P<folder>(/{_PART})*)")


@dataclass(frozen=True)
class HubOptions:
    """How to reach the Hub: token, where the cache is, and whether only the cache may be used."""

    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False


def split_revision(name: str) -> tuple[str, str | None]:
    """("user/x", "abc") from "user/x@abc"; local paths are left alone."""
    if "@" in name and not os.path.exists(name):
        base, _, revision = name.rpartition("@")
        return base, revision or None
    return name, None


def split_folder(name: str) -> tuple[str, str]:
    """("user/x", "a/b") from "user/x/a/b": the repository, and the folder in it or ""."""
    parts = name.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def is_local(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is a folder here; else it can only be a Hub id."""
    return Path(name).expanduser().is_dir()


def fetch(
    name: str | os.PathLike[str],
    patterns: list[str],
    what: str,
    revision: str | None = None,
    options: HubOptions | None = None,
) -> tuple[Path, str | None]:
    """The local folder of `name`, and the commit if it came from the Hub.

    On the Hub, "user/repo/folder" is a folder in a repository, with "@revision" at the end. Only files matching
    `patterns` are downloaded: safetensors, JSON and Markdown, nothing that is executed.
    """
    if is_local(name):
        return Path(name).expanduser(), None
    repo, given = split_revision(os.fspath(name))
    if given and revision and given != revision:
        raise BasisError(
            f"{what} {os.fspath(name)!r} names the revision {given!r}, revision={revision!r} another one."
        )
    if not _HUB_ID.fullmatch(repo):
        raise BasisError(
            f"{what} {repo!r} was not found: expected an existing folder or a Hub id, 'user/name' or "
            "'user/name/folder'."
        )
    repo, inside = split_folder(repo)
    from huggingface_hub import snapshot_download

    options = options or HubOptions()
    try:
        folder = snapshot_download(
            repo,
            revision=revision or given,
            allow_patterns=[f"{inside}/{pattern}" if inside else pattern for pattern in patterns],
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
        )
    except Exception as error:
        raise _sentence(error, f"{what} {repo!r}", revision or given) from error
    found = Path(folder, inside)
    if not found.is_dir():
        raise BasisError(f"{what} {os.fspath(name)!r}: the repository {repo!r} has no {inside!r} with files of one.")
    return found, Path(folder).name


@dataclass(frozen=True)
class Target:
    """A repository ready to be written to: its full id, the branch, and the commit that the branch is at."""

    api: HfApi
    repo_id: str
    branch: str | None
    head: str
    create_pr: bool


def open_repo(
    repo_id: str, *, private: bool | None, revision: str | None, token: str | bool | None, create_pr: bool
) -> Target:
    """Find or make the repository and the branch, so that a missing right shows before any work is done."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BasisError(
            f"{repo_id!r} cannot name a repository: expected 'user/name' ({_first_line(error)})."
        ) from error
    api, what = HfApi(token=token), f"the push to {repo_id!r}"
    try:
        # A repository that exists may be writable for someone who may not make one.
        if "/" not in repo_id or not api.repo_exists(repo_id):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise BasisError(
                f"{repo_id!r} exists already and is public, so private=True would not hide it: make it "
                "private on the Hub first, or give another name."
            )
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.repo_info(repo_id, revision=revision).sha
    except BasisError:
        raise
    except Exception as error:
        raise _sentence(error, what, revision, pushing=True) from error
    return Target(api, repo_id, revision, str(head), create_pr)


def push_folder(folder: Path, target: Target, replaced: Sequence[str], commit_message: str) -> CommitInfo:
    """Upload a folder in ONE commit, so that no revision of the repository holds half of it.

    Files of the repository that match the patterns `replaced` and are not in the folder are deleted; unchanged
    files are not sent, and without any change there is no commit. What others pushed meanwhile is not mixed in.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    try:
        new = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        held = target.api.list_repo_files(target.repo_id, revision=target.head)
        stale = [name for name in held if name not in new and matches(name, replaced)]
        return target.api.create_commit(
            target.repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in new.items()),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            revision=target.branch,
            create_pr=target.create_pr,
            parent_commit=target.head,
        )
    except Exception as error:
        raise _sentence(error, f"the push to {target.repo_id!r}", target.branch, pushing=True) from error


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file of a repository is one of ours."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def read_header(repo_id: str, file: str, revision: str | None, token: str | bool | None) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a safetensors file on the Hub, by a Range request for its header."""
    from huggingface_hub import HfApi

    try:
        header = HfApi(token=token).parse_safetensors_file_metadata(repo_id, file, revision=revision)
    except Exception as error:
        raise _sentence(error, f"basis {repo_id!r}", revision) from error
    return {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}


def _sentence(error: Exception, what: str, revision: str | None, pushing: bool = False) -> BasisError:
    """What went wrong on the way to the Hub, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"the Hub ({constants.ENDPOINT})"
    login = "give token=, set HF_TOKEN, or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return BasisError(f"{what} is gated on {place}: ask for access on its page, then {login}.")
    if isinstance(error, RevisionNotFoundError):
        return BasisError(f"{what} has no revision {revision!r} on {place}: give a branch, a tag or a commit of it.")
    if status in (401, 403) and pushing:
        return BasisError(f"{what} is not allowed by {place}: {login}, with a token that may write there.")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return BasisError(
            f"{what} is neither a local folder (looked in {os.getcwd()!r}) nor on {place}, or it is private and the "
            f"token may not read it: check the name, or {login}."
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        asked = f" at revision {revision!r}" if revision else ""
        return BasisError(
            f"{what}{asked} is not in the local cache, and {place} was not reached (offline mode, local_files_only "
            f"or no connection: {_first_line(error.__cause__ or error)}): connect and load it once."
        )
    if pushing and status in (409, 412):
        return BasisError(f"{what} was refused by {place}: somebody else has pushed meanwhile; push again.")
    if pushing and status is not None and 400 <= status < 500:
        return BasisError(f"{what} was refused by {place}: {_first_line(error)}; nothing was committed.")
    if pushing and _uses_xet():
        return BasisError(
            f"{what} failed: {_first_line(error)}. If {place} is self-hosted and has no Xet storage, set "
            "HF_HUB_DISABLE_XET=1 and push again; nothing was committed."
        )
    again = "nothing was committed; push again" if pushing else "files that arrived whole are kept; load it again"
    kind = "" if isinstance(error, (HfHubHTTPError, OSError, ValueError)) else f"{type(error).__name__}: "
    return BasisError(f"{what} failed on {place}: {kind}{_first_line(error)}; {again}.")


def _uses_xet() -> bool:
    from huggingface_hub.constants import HF_HUB_DISABLE_XET

    return not HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _first_line(error: BaseException) -> str:
    """The server's own words where it sent some, else the first line of the error."""
    said = getattr(error, "server_message", None)
    lines = (said or str(error)).strip().splitlines()
    # A card that the Hub finds invalid is a ValueError, which lists what is wrong line by line.
    whole = said or type(error) is ValueError
    return " ".join(lines if whole else lines[:1]).rstrip(".:") or type(error).__name__
