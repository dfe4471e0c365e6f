"""analyse: every number of the report, from a basis and, if wanted, adapters to be explained by it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..basis import Basis, BasisError
from ..basis.hub import is_local
from ..basis.naming import natural_key
from .explain import CAPTURED_RULE, Captured, captured_energy
from .export import rows, write_csv, write_json
from .naming import Place, place
from .outliers import MUTED_RULE, AdapterRecord, adapter_table
from .overlap import NULL_RULE, PERMUTATION_RULE
from .pairs import overlaps, pair_table
from .spectra import (
    DROP_RULE,
    PATTERN_RULE,
    SUGGESTED_RULE,
    energy_shares,
    find_drops,
    largest_fall,
    pattern,
    suggest_dim,
)

FORMAT = 1
RULES = {
    "drop": DROP_RULE,
    "pattern": PATTERN_RULE,
    "suggested_dim": SUGGESTED_RULE,
    "muted": MUTED_RULE,
    "null": NULL_RULE,
    "permutation": PERMUTATION_RULE,
    "captured": CAPTURED_RULE,
}


class Analysis:
    """The numbers of one basis: spectra, overlaps beside their nulls, adapters, explained adapters.

    `to_dict` gives them as plain JSON types, `rows` as tidy records, one number each.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record

    def to_dict(self) -> dict[str, Any]:
        """Keys: format, basis, settings, rules, modules, spectra, nulls, overlaps, pairs, adapters, explained.

        The record itself, not a copy: do not change it.
        """
        return self._record

    def rows(self) -> Iterator[dict[str, Any]]:
        """One record per number: quantity, where (module, depth, ...), whose (attribute, ...), index, value."""
        return rows(self._record)

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_dict` as JSON, in one step."""
        return write_json(self._record, path)

    def save_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write `rows` as CSV with a header, in one step."""
        return write_csv(self._record, path)


def analyse(
    basis: Basis | str | os.PathLike[str],
    adapters: Iterable[str | os.PathLike[str]] | str | os.PathLike[str] = (),
    draws: int = 200,
    mismatches: int = 5,
    seed: int = 0,
) -> Analysis:
    """Everything about a basis in numbers (paper, sections 3.3 and 4; method.md sections 3 and 4).

    Args:
        basis: a Basis, a folder or a Hub id.
        adapters: LoRA adapters whose updates are held against the basis (see `captured_energy`).
        draws: of random subspaces for the null of every size. mismatches: layers that each module is compared
            with for the permutation null. seed: of both.
    """
    if draws < 1 or mismatches < 0:
        raise BasisError(f"draws={draws!r}, mismatches={mismatches!r}: expected at least 1 and at least 0.")
    opened = basis if isinstance(basis, Basis) else Basis.from_pretrained(basis)
    sources = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    places = place(opened.modules)
    table = adapter_table(opened)
    found, nulls = overlaps(opened, places, draws, mismatches, seed)
    record = {
        "format": FORMAT,
        "basis": _about(opened),
        "settings": {"draws": draws, "mismatches": mismatches, "seed": seed},
        "rules": RULES,
        "modules": [_module(opened, name, at) for name, at in places.items()],
        "spectra": [_spectrum(opened, m, a, table) for a in opened.attributes for m in opened.modules],
        "nulls": nulls,
        "overlaps": found,
        "pairs": pair_table(found, nulls),
        "adapters": [_adapter(one) for one in table],
        "explained": [_explained(captured_energy(adapter, opened)) for adapter in sources],
    }
    return Analysis(_rounded(record))


def _about(basis: Basis) -> dict[str, Any]:
    source = basis.source if isinstance(basis.source, str) else None
    return {
        "name": Path(source).name if source else "basis",
        # A path says more about its writer than about the basis; a Hub id is its name.
        "source": Path(os.path.abspath(source)).name if source and is_local(source) else source,
        "base_model": basis.config.base_model,
        "digest": basis.digest,
        "dtype": basis.config.dtype,
        "attributes": basis.attributes,
        "modules": len(basis.modules),
        "command": basis.config.command,
    }


def _module(basis: Basis, name: str, at: Place) -> dict[str, Any]:
    layout = basis.layout(name)
    return {"name": name, **asdict(at), "n": layout.n, "m": layout.m}


def _spectrum(basis: Basis, module: str, attribute: str, table: Sequence[AdapterRecord]) -> dict[str, Any]:
    dim = basis.dim(module, attribute)
    mined = any(one.attribute == attribute for one in table)
    first, values = basis.spectrum(module, attribute) if mined else (None, basis.factors(module, attribute)[1])
    record: dict[str, Any] = {
        "module": module,
        "attribute": attribute,
        "dim": dim,
        "singular_values": values,
        "first_singular_values": [] if first is None else first,
        "largest": values[0] if values.numel() else None,
        **dict.fromkeys(("rank", "pattern", "gap", "suggested_dim", "energy_at_dim", "energy_at_suggested")),
        "captured_energy": None,
        **{part: [] for part in ("drops", "weights", "residuals", "energies")},
    }
    if not mined:
        return record
    energies = _record(basis, module, attribute, "energy")
    kept = torch.tensor([not one.muted for one in table if one.attribute == attribute])
    if energies is not None:
        record["energies"] = energies
        record["captured_energy"] = energies[kept].mean() if kept.any() else energies.mean()
    record["weights"] = basis.weights(module, attribute)
    residuals = _record(basis, module, attribute, "residuals")
    record["residuals"] = [] if residuals is None else residuals
    ranks = basis.ranks(module, attribute)
    if ranks is None or not values.any():
        return record
    rank = int(median(ranks.tolist()))
    drops = find_drops(values, rank)
    suggested = suggest_dim(values, drops)
    shares = energy_shares(values)
    return record | {
        "rank": rank,
        "drops": [asdict(drop) for drop in drops],
        "pattern": pattern(drops, rank),
        "gap": max((drop.factor for drop in drops), default=largest_fall(values, rank)),
        "suggested_dim": suggested,
        "energy_at_dim": shares[dim - 1] if dim else 0.0,
        "energy_at_suggested": shares[suggested - 1],
    }


def _record(basis: Basis, module: str, attribute: str, part: str) -> Tensor | None:
    return basis.record(module, attribute, part) if basis.has_record(module, attribute, part) else None


def _adapter(one: AdapterRecord) -> dict[str, Any]:
    return {
        "attribute": one.attribute,
        "adapter": one.adapter,
        "revision": one.revision,
        "weight_median": _middle(one.weights),
        "weight_min": one.weights.min(),
        "weight_max": one.weights.max(),
        "residual_median": _middle(one.residuals),
        "energy_median": _middle(one.energies),
        "muted_share": one.muted_share,
        "muted": one.muted,
    }


def _middle(values: Tensor | None) -> Tensor | None:
    # Not Tensor.median: that is the lower of the two middle values.
    return None if values is None else values.quantile(0.5)


def _explained(captured: Captured) -> dict[str, Any]:
    def by_attribute(shares: Mapping[str, Any]) -> dict[str, Any]:
        return {name: asdict(share) for name, share in shares.items()}

    return {
        "adapter": captured.adapter,
        "source_of": captured.source_of,
        "modules_missing": captured.missing,
        "joint": captured.joint.share,
        "expected": captured.joint.expected,
        "attributes": by_attribute(captured.attributes),
        "modules": [
            {
                "module": one.module,
                "norm": one.norm,
                "joint": one.joint.share,
                "expected": one.joint.expected,
                "attributes": by_attribute(one.attributes),
            }
            for one in sorted(captured.modules, key=lambda one: natural_key(one.module))
        ],
    }


def _rounded(value: Any) -> Any:
    """Plain JSON types, numbers to 6 significant digits."""
    if isinstance(value, Tensor):
        return _rounded(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value
