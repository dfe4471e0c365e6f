"""Overlap of every two attributes in every module, on both sides, beside both nulls; and a summary per pair."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..basis import Basis
from .naming import Place
from .overlap import cosines, orthonormal, random_null

SIDES = ("output", "input")
# A float32 basis is orthonormal to this; a bfloat16 one is not, and is made so.
_NEARLY = 1e-4
# (module, attribute, side) -> orthonormal columns
Spaces = dict[tuple[str, str, str], Tensor]


def overlaps(
    basis: Basis, places: Mapping[str, Place], draws: int, mismatches: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One record per module, pair of attributes and side, and the random nulls that they point to."""
    groups: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, at in places.items():
        groups[(at.kind, *basis.layout(name).shape)].append(name)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = pool.map(lambda names: list(_of_kind(basis, names, mismatches, seed)), groups.values())
        found = [record for part in parts for record in part]
    order = {name: i for i, name in enumerate(places)}
    found.sort(key=lambda record: order[record["module"]])
    sizes = sorted({record["null"] for record in found})
    nulls = [_null(size, draws, seed) for size in sizes]
    for record in found:
        record["null"] = sizes.index(record["null"])
    return found, nulls


def _null(size: tuple[int, int, int], draws: int, seed: int) -> dict[str, Any]:
    n, d, d_other = size
    null = random_null(n, d, d_other, draws, seed)
    return {"n": n, "d": d, "d_other": d_other, "mean": null.mean, "low": null.low, "high": null.high}


def _of_kind(basis: Basis, names: Sequence[str], mismatches: int, seed: int) -> Iterator[dict[str, Any]]:
    """Overlaps in all modules of one kind; only their subspaces are in memory."""
    spaces: Spaces = {}
    for name in names:
        for attribute in basis.attributes:
            u, _, v = basis.factors(name, attribute)
            if u.shape[1]:
                for side, columns in zip(SIDES, (u, v), strict=True):
                    spaces[name, attribute, side] = orthonormal(columns.float(), _NEARLY)
    for attribute, other in combinations(basis.attributes, 2):
        for side in SIDES:
            here = [name for name in names if {(name, a, side) for a in (attribute, other)} <= spaces.keys()]
            permuted = _permuted(spaces, here, attribute, other, side, mismatches, seed)
            for name in here:
                q, p = spaces[name, attribute, side], spaces[name, other, side]
                values = 1 - cosines(q, p)
                yield {
                    "module": name,
                    "attribute": attribute,
                    "other": other,
                    "side": side,
                    "eigenvalues": values,
                    "smallest": float(values[0]),
                    "null": (q.shape[0], q.shape[1], p.shape[1]),
                    "permuted": permuted,
                }


def _permuted(
    spaces: Spaces, names: Sequence[str], attribute: str, other: str, side: str, mismatches: int, seed: int
) -> dict[str, float] | None:
    """Mean and 95 % band of the smallest eigenvalue over mismatched layers; None where there is one layer only."""
    chooser = random.Random(f"{seed} {attribute} {other} {side}")
    products = []
    for i, name in enumerate(names):
        rest = [*names[:i], *names[i + 1 :]]
        for partner in chooser.sample(rest, min(mismatches, len(rest))):
            products.append(spaces[name, attribute, side].T @ spaces[partner, other, side])
    if not products:
        return None
    smallest = [1 - min(1.0, float(torch.linalg.matrix_norm(x, 2))) for x in products]
    low, high = np.quantile(smallest, [0.025, 0.975])
    return {"mean": fmean(smallest), "low": float(low), "high": float(high)}


def pair_table(found: Sequence[Mapping[str, Any]], nulls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record per pair of attributes and side: the smallest eigenvalue over modules, beside its nulls."""
    rows: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for record in found:
        rows[record["attribute"], record["other"], record["side"]].append(record)
    table = []
    for (attribute, other, side), records in rows.items():
        smallest = [record["smallest"] for record in records]
        bands = {part: [float(nulls[r["null"]][part][0]) for r in records] for part in ("mean", "low", "high")}
        permuted = [r["permuted"]["mean"] for r in records if r["permuted"]]
        table.append(
            {
                "attribute": attribute,
                "other": other,
                "side": side,
                "modules": len(records),
                "median": median(smallest),
                "low": min(smallest),
                "high": max(smallest),
                "null_median": median(bands["mean"]),
                "null_low": median(bands["low"]),
                "null_high": median(bands["high"]),
                "permuted_median": median(permuted) if permuted else None,
                "share_above_half": fmean(value > 0.5 for value in smallest),
                "share_below_null": fmean(v < low for v, low in zip(smallest, bands["low"], strict=True)),
            }
        )
    return table
