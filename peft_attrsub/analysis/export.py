"""The numbers of an analysis as JSON and as a tidy CSV: one number per row."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..basis.files import write_file

COLUMNS = ("quantity", "module", "depth", "stack", "kind", "attribute", "other", "side", "adapter", "index", "value")
_PER_SPECTRUM = (
    "rank",
    "dim",
    "pattern",
    "gap",
    "suggested_dim",
    "energy_at_dim",
    "energy_at_suggested",
    "captured_energy",
    "largest",
)
_PER_ADAPTER = (("weight", "weights"), ("residual", "residuals"), ("energy", "energies"))


def write_json(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the record as JSON, in one step."""
    return write_file(path, json.dumps(record) + "\n")


def write_csv(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write `rows` as CSV with a header, in one step."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(record))
    return write_file(path, text.getvalue())


def rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every number of the record on its own, with what it belongs to; index counts from 1."""
    places = {m["name"]: {k: m[k] for k in ("depth", "stack", "kind")} for m in record["modules"]}
    for module in record["modules"]:
        where = {"module": module["name"], **places[module["name"]]}
        yield from ({"quantity": side, **where, "value": module[side]} for side in ("n", "m"))
    sources: dict[str, list[str]] = {}
    for one in record["adapters"]:
        sources.setdefault(one["attribute"], []).append(one["adapter"])
    for one in record["spectra"]:
        where = {"module": one["module"], **places[one["module"]], "attribute": one["attribute"]}
        yield from ({"quantity": q, **where, "value": one[q]} for q in _PER_SPECTRUM if one[q] is not None)
        yield from _indexed("singular_value", where, one["singular_values"])
        yield from _indexed("first_singular_value", where, one["first_singular_values"])
        yield from ({"quantity": "drop", **where, "index": d["index"], "value": d["factor"]} for d in one["drops"])
        for quantity, key in _PER_ADAPTER:
            for adapter, value in zip(sources.get(one["attribute"], []), one[key], strict=False):
                yield {"quantity": quantity, **where, "adapter": adapter, "value": value}
    for one in record["overlaps"]:
        pair = {k: one[k] for k in ("module", "attribute", "other", "side")} | places[one["module"]]
        yield from _indexed("eigenvalue", pair, one["eigenvalues"])
        for part in ("mean", "low", "high"):
            yield from _indexed(f"eigenvalue_random_{part}", pair, record["nulls"][one["null"]][part])
            if one["permuted"]:
                yield {"quantity": f"eigenvalue_permuted_{part}", **pair, "index": 1, "value": one["permuted"][part]}
    for one in record["adapters"]:
        who = {"attribute": one["attribute"], "adapter": one["adapter"]}
        yield from _numbers("adapter", who, one)
    for one in record["pairs"]:
        pair = {k: one[k] for k in ("attribute", "other", "side")}
        yield from _numbers("pair", pair, one)
    for one in record["explained"]:
        yield from _explained(one, places)
        yield from (
            {"quantity": "explained_missing", "module": name, "adapter": one["adapter"], "value": 1}
            for name in one["modules_missing"]
        )


def _numbers(prefix: str, where: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every number of a record under its name; texts and names of it are in `where`."""
    for key, value in record.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield {"quantity": f"{prefix}_{key}", **where, "value": value}


def _indexed(quantity: str, where: Mapping[str, Any], values: list[float]) -> Iterator[dict[str, Any]]:
    return ({"quantity": quantity, **where, "index": i, "value": v} for i, v in enumerate(values, 1))


def _explained(one: Mapping[str, Any], places: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Shares of an adapter as a whole (no module) and module by module; no attribute: jointly."""
    for part in [one, *one["modules"]]:
        where = {"module": part["module"], **places[part["module"]]} if "module" in part else {}
        where = {**where, "adapter": one["adapter"]}
        if "norm" in part:
            yield {"quantity": "explained_norm", **where, "value": part["norm"]}
        yield {"quantity": "explained", **where, "value": part["joint"]}
        yield {"quantity": "explained_expected", **where, "value": part["expected"]}
        for name, share in part["attributes"].items():
            yield {"quantity": "explained", **where, "attribute": name, "value": share["share"]}
            yield {"quantity": "explained_expected", **where, "attribute": name, "value": share["expected"]}
