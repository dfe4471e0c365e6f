"""Which base weights an adapter or a basis was made for: name, revision, sha256 of the weights, seed where untrained.

In adapter_config.json the record is at auto_mapping.training.base, where examples/vggt put it; in basis_config.json it
is the key "base". Both are optional: what has no record, such as an adapter of another tool, is not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import BasisError
from .typed_json import Fields


@dataclass(frozen=True)
class BaseIdentity:
    """The weights of a base model.

    name: folder, Hub id or preset, for people. digest: sha256 over the tensors, in hex; two bases are the same exactly
    when it is equal. revision: commit on the Hub. seed: that untrained weights were drawn with, None for trained ones.
    """

    name: str
    digest: str
    revision: str | None = None
    seed: int | None = None
    #: Keys of a newer version, kept as they are.
    unknown: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        facts = [] if self.seed is None else [f"untrained weights, seed {self.seed}"]
        facts += [f"revision {self.revision[:12]}"] if self.revision else []
        return f"{self.name} ({', '.join([*facts, f'sha256 {self.digest[:12]}'])})"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, without what is None."""
        record = {key: getattr(self, key) for key in ("name", "digest", "revision", "seed")}
        return {**{key: value for key, value in record.items() if value is not None}, **self.unknown}

    @classmethod
    def read(cls, record: object, where: str) -> BaseIdentity:
        """What `to_dict` wrote. Raises BasisError for anything else."""
        fields = Fields(record, where)
        # Names from a stranger's file are printed: control characters have no place in them.
        name, digest = fields.name("name"), fields.sha256("digest")
        revision, seed = fields.name("revision", None), fields.whole("seed", None, None)
        return cls(name, digest, revision, seed, fields.unknown())

    @classmethod
    def of(cls, record: object) -> BaseIdentity | None:
        """What `to_dict` wrote; None for anything else."""
        try:
            return cls.read(record, "the base")
        except BasisError:
            return None


def adapter_base(config: Mapping[str, Any]) -> BaseIdentity | None:
    """The base that an adapter_config.json records, or None."""
    found: Any = config
    for key in ("auto_mapping", "training", "base"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return BaseIdentity.of(found)


def shared_base(parts: Iterable[tuple[str, BaseIdentity | None]], advice: str) -> BaseIdentity | None:
    """The base that all parts were made for; None where none of them records it.

    parts: (what it is, such as "adapter 'texture-0'", its base). Raises BasisError with both bases and the advice for
    the first part that contradicts an earlier one.
    """
    first: tuple[str, BaseIdentity] | None = None
    for what, base in parts:
        if base is None:
            continue
        if first is None:
            first = (what, base)
        elif base.digest != first[1].digest:
            raise BasisError(f"the base weights differ: {first[0]} has {first[1]}, {what} has {base}; {advice}.")
    return first[1] if first else None


__all__ = ["BaseIdentity", "adapter_base", "shared_base"]
