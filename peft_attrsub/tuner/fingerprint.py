"""Which basis a core belongs to: 64 bytes that travel with its weights.

A core means nothing in another basis, and shapes do not tell two bases apart. So every core is stored with a
fingerprint of the A and B that it was trained in:

    bytes  0 to 15   the basis: the start of its digest; for "random" and "psv" a hash of what they were made from
    bytes 16 to 23   its columns in this module: a hash of attributes, dims and the column rule
    bytes 24 to 63   the name of the basis, for messages; not compared

The bytes are numbers from 0 to 255, which stay exact when a file is cast to bfloat16 or float16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BYTES = 64
_BASIS, _COLUMNS = 16, 8
_NAME = BYTES - _BASIS - _COLUMNS


def hashed(what: Sequence[object]) -> str:
    """sha256 of a list that JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(list(what)).encode()).hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """basis, columns: hex digits. name: of the basis, cut to its end."""

    basis: str
    columns: str
    name: str

    @classmethod
    def of(cls, basis: str, columns: Sequence[object], name: str) -> Fingerprint:
        """From the hex digest of a basis, what decides its columns, and its name."""
        raw = name.encode()
        while len(raw) > _NAME:  # whole characters go, so that what is left is still UTF-8
            name = name[1:]
            raw = name.encode()
        return cls(basis[: 2 * _BASIS], hashed(columns)[: 2 * _COLUMNS], name)

    @classmethod
    def read(cls, tensor: Tensor) -> Fingerprint | None:
        """From its stored form, in whatever dtype; None if nothing was written there."""
        if tensor.is_meta or tensor.shape != (BYTES,):
            return None
        if tensor.dtype != torch.uint8:  # of a file that was cast
            tensor = tensor.detach().double().round().clamp(0, 255).to(torch.uint8)
        raw = bytes(tensor.tolist())
        if not any(raw):
            return None
        basis, columns = raw[:_BASIS], raw[_BASIS : _BASIS + _COLUMNS]
        name = raw[_BASIS + _COLUMNS :].rstrip(b"\0").decode(errors="replace")
        return cls(basis.hex(), columns.hex(), name)

    def tensor(self) -> Tensor:
        """Its stored form: uint8, (64,)."""
        raw = bytes.fromhex(self.basis) + bytes.fromhex(self.columns) + self.name.encode()
        return torch.tensor(list(raw.ljust(BYTES, b"\0")), dtype=torch.uint8, device="cpu")

    def same(self, other: Fingerprint) -> bool:
        """Whether two cores belong to the same columns of the same basis."""
        return (self.basis, self.columns) == (other.basis, other.columns)

    def __str__(self) -> str:
        return f"{self.name!r} (digest {self.basis[:8]}...)"
