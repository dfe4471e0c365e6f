"""Who takes part in the mining of an attribute: copies are refused, adapters that were never trained are left out.

A robust mean trusts the majority. One adapter that is given twice, or a few that are zero, become that majority: the
honest ones are then muted as outliers. Files are compared by what decides the updates, the tensors of their LoRA, and
most of the work is saved by looking at a few modules first.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from .adapters import LoraAdapter
from .errors import BasisError
from .processes import is_main_process

#: Cosine of two updates from which on one is called a near-copy of the other.
NEAR_COPY = 0.999
#: An adapter and its attribute.
_Named = tuple[str, LoraAdapter]
# Modules that are compared before all are, and the cosine there from which on all are.
_SAMPLE, _WORTH_A_LOOK = 3, 0.98


@dataclass(frozen=True)
class RollCall:
    """trained: the adapters to mine, by attribute. untrained: those whose update is zero in every module."""

    trained: dict[str, list[LoraAdapter]]
    untrained: dict[str, list[LoraAdapter]]


def roll_call(adapters: Mapping[str, Sequence[LoraAdapter]]) -> RollCall:
    """Sort the adapters of each attribute into those that take part and those that were never trained.

    Warns of untrained adapters, of copies across attributes, and of near-copies within one: two adapters whose
    updates have a cosine above 0.999 over all modules that both have.

    Raises:
        BasisError: two adapters of one attribute hold the same tensors, or all adapters of one were never trained.
    """
    for group in _groups([(attribute, adapter) for attribute, row in adapters.items() for adapter in row]):
        met: dict[str, LoraAdapter] = {}
        for attribute, adapter in group:
            if attribute in met:
                raise BasisError(
                    f"{_called(adapter)} is a copy of {_called(met[attribute])}: both hold the same tensors. "
                    f"Attribute {attribute!r} would count them twice and take honest adapters for outliers; leave one "
                    "out."
                )
            met[attribute] = adapter
        if len(met) > 1:
            listing = ", ".join(f"{adapter.source!r} of {attribute!r}" for attribute, adapter in met.items())
            _note(f"adapters of several attributes are copies: {listing}. These attributes share what they hold.")
    trained = {attribute: [a for a in row if _trained(a)] for attribute, row in adapters.items()}
    untrained = {a: [one for one in row if one not in trained[a]] for a, row in adapters.items()}
    for attribute, row in untrained.items():
        if row and not trained[attribute]:
            raise BasisError(
                f"every update of attribute {attribute!r} is zero: its adapters were never trained "
                f"({', '.join(map(_called, row))})."
            )
        for one in row:
            _note(
                f"{_called(one)} was never trained: its update is zero in every module. Attribute {attribute!r} is "
                "mined without it."
            )
        for one, other, cosine in _near_copies(trained[attribute]):
            _note(
                f"{_called(other)} is nearly a copy of {_called(one)} (the cosine of their updates is {cosine:.5f}): "
                f"attribute {attribute!r} counts what they share twice. Leave one out unless they were trained apart."
            )
    return RollCall(trained, untrained)


def _note(text: str) -> None:
    if is_main_process():
        warnings.warn(text, stacklevel=4)


def _called(adapter: LoraAdapter) -> str:
    return f"adapter {adapter.source!r}"


def _trained(adapter: LoraAdapter) -> bool:
    """Whether some module's update is not zero; one read, as a rule."""
    with adapter:
        for module in adapter.modules:
            left, right = adapter.read(module)
            # Factors that are not zero may still have a product that is.
            if left.any() and right.any() and float(inner_products([left], [right])) > 0:
                return True
    return False


def _groups(flat: Sequence[_Named]) -> list[list[_Named]]:
    """Adapters with equal tensors under equal names: one file, or several with the same content."""
    by_place: dict[Path, list[_Named]] = {}
    for item in flat:
        by_place.setdefault(item[1].path.resolve(), []).append(item)
    by_glance: dict[str, list[list[_Named]]] = {}
    for same in by_place.values():
        adapter = same[0][1]
        by_glance.setdefault(_content(adapter, _sample(adapter.modules)), []).append(same)
    groups: list[list[_Named]] = []
    for alike in by_glance.values():
        by_content: dict[str, list[_Named]] = {}
        for same in alike:
            # Few files look alike; only those are read to the end.
            content = _content(same[0][1], same[0][1].modules) if len(alike) > 1 else ""
            by_content.setdefault(content, []).extend(same)
        groups += by_content.values()
    return groups


def _content(adapter: LoraAdapter, modules: Sequence[str]) -> str:
    """sha256 of the names of all modules and of the LoRA of some."""
    digest = hashlib.sha256("\n".join(adapter.modules).encode())
    with adapter:
        for module in modules:
            for factor in adapter.read(module):
                digest.update(f"\n{module} {tuple(factor.shape)} {factor.dtype}\n".encode())
                digest.update(factor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _sample(modules: Sequence[str]) -> list[str]:
    """A few modules, spread over all."""
    count = min(_SAMPLE, len(modules))
    return [modules[(2 * i + 1) * len(modules) // (2 * count)] for i in range(count)]


def _near_copies(row: Sequence[LoraAdapter]) -> Iterator[tuple[LoraAdapter, LoraAdapter, float]]:
    """Pairs whose updates have a cosine above `NEAR_COPY` over all modules that all of the row have."""
    modules = [m for m in row[0].modules if all(m in a.entries for a in row)]
    modules = [m for m in modules if len({a.entries[m].layout for a in row}) == 1]
    if len(row) < 2 or not modules:
        return
    cosines = _cosines(row, _sample(modules))
    for i, j in combinations(range(len(row)), 2):
        if cosines[i, j] >= _WORTH_A_LOOK:
            pair = [row[i], row[j]]
            cosine = float(_cosines(pair, modules)[0, 1])
            if cosine > NEAR_COPY:
                yield row[i], row[j], cosine


def _cosines(row: Sequence[LoraAdapter], modules: Sequence[str]) -> Tensor:
    """(k, k): <dW_i, dW_j> / (||dW_i|| ||dW_j||) over some modules; 0 where an update is zero in all of them."""
    products = torch.zeros(len(row), len(row), dtype=torch.float64)
    with ExitStack() as files:
        for adapter in row:
            files.enter_context(adapter)
        for module in modules:
            lefts, rights = zip(*(adapter.read(module) for adapter in row), strict=True)
            products += inner_products(lefts, rights)
    norms = products.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return products * scale * scale[:, None]


def inner_products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """(k, k): <P_i Q_i^T, P_j Q_j^T> = sum((P_i^T P_j) * (Q_i^T Q_j)) for P_i (n x r_i) and Q_i (m x r_i)."""
    p, q = (torch.cat([x.double() for x in side], 1) for side in (lefts, rights))
    entries = (p.T @ p) * (q.T @ q)  # [R, R]
    whose = torch.repeat_interleave(torch.arange(len(lefts)), torch.tensor([x.shape[1] for x in lefts]))
    rows = entries.new_zeros(len(lefts), entries.shape[1]).index_add(0, whose, entries)
    return rows.new_zeros(len(lefts), len(lefts)).index_add(1, whose, rows)
