"""Parts and unions of bases: which dims and attributes are meant, whether two bases fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .blocks import Block, kept_hashes, kept_record_hashes
from .config import AttributeRecord
from .errors import BasisError
from .identity import BaseIdentity, shared_base
from .naming import natural_key, some

if TYPE_CHECKING:
    from .basis import Basis

Dim = int | Mapping[str, int] | None


def check_dims(dim: Dim, attributes: Sequence[str]) -> Callable[[str], int | None]:
    """A function attribute -> dim (None: all there are) from an int or a dict by attribute."""
    values = dim if isinstance(dim, Mapping) else dict.fromkeys(attributes, dim)
    for name, value in values.items():
        if name not in attributes:
            raise BasisError(f"dim names the attribute {name!r}, the basis has {', '.join(attributes)}.")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BasisError(f"dim={value!r} for attribute {name!r} is no positive whole number.")
    return values.get


def of_view(record: AttributeRecord, row: dict[str, Block]) -> AttributeRecord:
    """The record of an attribute of which the subspaces in `row` are used."""
    return replace(record, hashes=kept_hashes(record, row), record_hashes=kept_record_hashes(record, row))


def check_same_model(first: Basis, other: Basis) -> None:
    """Refuse bases of different models or modules."""
    a, b = first.config, other.config
    if a.modules != b.modules:
        names = sorted(set(a.modules) ^ set(b.modules), key=natural_key)
        names = names or [m for m in a.modules if a.modules[m] != b.modules[m]]
        raise BasisError(
            f"the bases cover different modules or shapes, e.g. {some(names)}: select() common modules first."
        )
    base_of_all([first, other])
    recorded = a.base is not None and b.base is not None
    if a.base_model and b.base_model and a.base_model != b.base_model and not recorded:
        raise BasisError(f"the bases belong to different base models, {a.base_model!r} and {b.base_model!r}.")


def base_of_all(bases: Sequence[Basis]) -> BaseIdentity | None:
    """The base weights that all bases with a record were mined for; BasisError names two that differ."""
    named = [f"basis {b.source!r}" if b.source else f"the basis of {', '.join(b.attributes)}" for b in bases]
    parts = zip(named, (b.config.base for b in bases), strict=True)
    return shared_base(parts, "combine bases that were mined for the same weights")
