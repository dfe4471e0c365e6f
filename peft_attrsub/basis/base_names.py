"""Names of base models: which of them mean one model, and what of them may be published.

One model: names that differ in a trailing slash, a Hub id and its snapshot in the local cache
(.../models--org--name/snapshots/COMMIT), and quantized copies that say so in their names: `NAME-bnb-4bit` and
`NAME-unsloth-bnb-4bit` of `NAME`, in the same organization or in `unsloth`, which publishes under the names of others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PureWindowsPath

_SNAPSHOT = re.compile(r"(?:^|.*[/\\])models--([^/\\]+?)(?:--([^/\\]+))?[/\\]snapshots[/\\]([^/\\]+)[/\\]*")
_QUANTIZED = re.compile(r"(?:-unsloth)?-bnb-4bit$", re.IGNORECASE)
_COPIES = "unsloth"


@dataclass(frozen=True)
class BaseName:
    """The name of a base model as it may be published, and the revision that it tells.

    A path from the root of a file system is cut to its last part; a snapshot of the cache becomes its Hub id.
    """

    name: str
    revision: str | None = None
    path: str | None = None  # what was cut

    @property
    def _copy(self) -> bool:
        return self.name.lower().startswith(f"{_COPIES}/") or bool(_QUANTIZED.search(self.name))

    @property
    def _tail(self) -> str:
        return _QUANTIZED.sub("", self.name).rpartition("/")[2].lower()

    def same_as(self, other: BaseName) -> bool:
        """Whether two names mean one model."""
        if self.path or other.path:
            return self.path == other.path
        if self.name.lower() == other.name.lower():
            return True
        mine, its = (_QUANTIZED.sub("", x.name).lower() for x in (self, other))
        from_copies = any(x.name.lower().startswith(f"{_COPIES}/") for x in (self, other))
        return mine == its or (from_copies and self._tail == other._tail)


def base_name_of(text: str) -> BaseName:
    """The model that a name, a path or a snapshot of the cache means."""
    if (match := _SNAPSHOT.fullmatch(text)) is not None:
        owner, name, revision = match.groups()
        return BaseName(owner if name is None else f"{owner}/{name}", revision)
    stripped = text.rstrip("/\\") or text
    if os.path.isabs(stripped) or stripped.startswith("~") or PureWindowsPath(stripped).is_absolute():
        return BaseName(re.split(r"[/\\]", stripped)[-1], path=stripped)
    return BaseName(stripped)


def best_name(names: Iterable[BaseName]) -> BaseName:
    """Of names that mean one model, the one to record: that of the model itself before those of copies."""
    return min(names, key=lambda name: (name._copy, name.revision is None))


__all__ = ["BaseName", "base_name_of", "best_name"]
