"""What a Hub remembers: repositories of commits, each a tree of files, and large files apart by their sha256."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

LARGE = 10_000_000  # bytes; from here on every file is a large one
INITIAL = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


class Refused(Exception):
    """An answer that is no success: status, the Hub's error code, and a message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class File:
    """Content, git's id of the blob (of the pointer, for a large file), and its sha256 if it is a large file."""

    data: bytes
    oid: str
    sha256: str | None = None

    @staticmethod
    def regular(data: bytes) -> File:
        return File(data, git_oid(data))

    @staticmethod
    def large(data: bytes) -> File:
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
        return File(data, git_oid(pointer.encode()), sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, File]


def git_oid(data: bytes) -> str:
    """git's sha1 of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Branches and tags point to commits; a new repository has one commit with its .gitattributes."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    pulls: int = 0

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {".gitattributes": File.regular(INITIAL)}, parent=None)

    def commit(self, branch: str, title: str, files: dict[str, File], parent: str | None) -> Commit:
        """Put a whole new tree on a branch, in one step."""
        text = f"{self.name} {parent} {title} {len(self.commits)} {sorted((k, v.etag) for k, v in files.items())}"
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request or a sha."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits from the newest to the first."""
        found: list[Commit] = []
        sha: str | None = self.at(revision).sha
        while sha is not None:
            found.append(self.commits[sha])
            sha = found[-1].parent
        return found

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.at(revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return commit, commit.files[path]

    def is_large(self, path: str, size: int, sample: bytes) -> bool:
        """Whether the Hub wants a file as a large one: by name, by size, or because it is binary."""
        return path.endswith((".safetensors", ".bin", ".png")) or size >= LARGE or b"\0" in sample

    def ignores(self, path: str, gitignore: str) -> bool:
        patterns = [line.strip() for line in gitignore.splitlines() if line.strip() and not line.startswith("#")]
        return any(fnmatch(path, p) or fnmatch(Path(path).name, p) for p in patterns)


@dataclass
class Store:
    """All repositories, and who may do what: token -> (user, "read" or "write")."""

    tokens: dict[str, tuple[str, str]] = field(default_factory=dict)
    repos: dict[str, Repository] = field(default_factory=dict)
    secret: str = field(default_factory=lambda: secrets.token_hex(8))

    def create(self, name: str, private: bool = False) -> Repository:
        if name in self.repos:
            raise Refused(409, None, "You already created this model repo")
        self.repos[name] = Repository(name, private)
        return self.repos[name]

    def who(self, token: str | None) -> tuple[str, str] | None:
        if token is None:
            return None
        if token not in self.tokens:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def readable(self, name: str, token: str | None) -> Repository:
        """A repository that the token may see; a private one hides behind "not found", as on the Hub."""
        who = self.who(token)
        repo = self.repos.get(name)
        if repo is None or (repo.private and (who is None or who[0] != name.partition("/")[0])):
            # Someone without a token is told to bring one, whether or not there is such a repository.
            raise Refused(404 if who else 401, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, name: str, token: str | None) -> Repository:
        self.check_write(name, token)
        return self.readable(name, token)

    def check_write(self, name: str, token: str | None) -> None:
        who = self.who(token)
        if who is None:
            raise Refused(401, None, "Invalid username or password.")
        user, role = who
        if user != name.partition("/")[0]:
            raise Refused(403, None, f"You don't have the rights to write to the namespace of {name}")
        if role != "write":
            raise Refused(403, None, "This token has no write access: create one of role write")

    def seed(self, folder: Path, name: str, private: bool = False, branch: str = "main") -> str:
        """One commit that makes a branch of a repository equal to a folder; returns its sha."""
        repo = self.repos.get(name) or self.create(name, private)
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data, relative = path.read_bytes(), path.relative_to(folder).as_posix()
            kind = File.large if repo.is_large(relative, len(data), data[:512]) else File.regular
            files[relative] = kind(data)
            if files[relative].sha256:
                repo.lfs[files[relative].sha256] = data
        before = repo.at(repo.branches.get(branch, "main"))
        kept = {".gitattributes": before.files[".gitattributes"]}
        return repo.commit(branch, "seed", {**kept, **files}, parent=before.sha).sha
