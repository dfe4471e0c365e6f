"""Made-up analyses of any size, in the form of `Analysis.to_dict()`: what the report is built and tested with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

ATTRIBUTES = ("texture", "geometry", "camera", "lighting")
KINDS = ("qkv", "proj", "fc1", "fc2")
PATHS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
SIZES = {"qkv": (3072, 1024), "proj": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}
RULES = {
    "drop": "A drop is where the log singular values fall by at least ln 3 and four times their median fall.",
    "pattern": "at-rank: one drop within h of the adapters' rank; beyond-rank: one drop behind it; two-step: two or "
    "more drops; below-rank: one drop before it; none: no drop.",
    "suggested_dim": "The index of the deepest drop; without a drop the smallest d with 90 % of the sum of squares.",
    "muted": "An adapter is muted where its weight is under 0.25 of the module's median, and named when that is so "
    "in more than half of the modules.",
    "null": "200 pairs of random subspaces of the same sizes: mean and 95 % band.",
    "permutation": "The same attributes, taken from layers of the same kind that do not match.",
    "captured": "The share of an adapter's squared norm that lies in the basis.",
}


def synthetic(
    attributes: Sequence[str] = ATTRIBUTES,
    depths: int = 24,
    stacks: Sequence[str] = ("frame", "global"),
    kinds: Sequence[str] = KINDS,
    loose: Sequence[str] = (),
    adapters: int = 10,
    rank: int = 16,
    dim: int = 16,
    muted: Sequence[str] = ("lighting-3",),
    stored: Sequence[str] = (),
    empty: Sequence[str] = (),
    explained: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """An analysis of `depths` layers of every stack and kind, and of the modules `loose` that have no depth.

    `muted` names adapters of small weight; attributes in `stored` were not mined (no records, no pattern), and in
    modules of the kinds `empty` no attribute has a direction.
    """
    random = np.random.default_rng(seed)
    modules = _modules(depths, stacks, kinds, loose)
    names = {a: [f"{a}-{i}" for i in range(adapters)] for a in attributes}
    spectra = []
    for module in modules:
        d = 0 if module["kind"] in empty else dim
        for attribute in attributes:
            weights = [
                0.05 if name in muted else round(float(random.uniform(0.8, 1.2)), 4) for name in names[attribute]
            ]
            spectra.append(_spectrum(random, module, attribute, attributes, depths, rank, d, adapters, weights))
            if attribute in stored:
                spectra[-1] |= _not_mined(spectra[-1]["singular_values"][:d])
    nulls = [_null(dim)] if dim else []
    overlaps = [
        _overlap(random, module, pair, side, nulls[0])
        for module in modules
        if dim and module["kind"] not in empty
        for pair in combinations(attributes, 2)
        for side in ("output", "input")
    ]
    mined = [a for a in attributes if a not in stored]
    return {
        "format": 1,
        "basis": {
            "name": "basis",
            "source": "studio/vggt-attributes",
            "base_model": "facebook/VGGT-1B",
            "digest": "4f0c" * 16,
            "dtype": "float32",
            "attributes": list(attributes),
            "modules": len(modules),
            "command": "peft-attrsub build-basis adapters/* -o basis --dim 16",
        },
        "settings": {"draws": 200, "mismatches": 5, "seed": seed},
        "rules": RULES,
        "modules": modules,
        "spectra": spectra,
        "nulls": nulls,
        "overlaps": overlaps,
        "pairs": _pairs(overlaps, nulls, attributes),
        "adapters": [_adapter(spectra, a, i, names[a][i]) for a in mined for i in range(adapters)],
        "explained": [_explained(random, f"clearpose-{i}", modules, attributes, dim) for i in range(explained)],
    }


def _modules(
    depths: int, stacks: Sequence[str], kinds: Sequence[str], loose: Sequence[str]
) -> list[dict[str, str | int | None]]:
    made: list[dict[str, str | int | None]] = []
    for stack in stacks:
        for depth in range(depths):
            for kind in kinds:
                n, m = SIZES.get(kind, (768, 768))
                name = f"aggregator.{stack}_blocks.{depth}.{PATHS.get(kind, kind)}"
                label = f"{stack} {kind}" if len(stacks) > 1 else kind
                made.append(
                    {
                        "name": name,
                        "depth": depth,
                        "stack": f"aggregator.{stack}_blocks",
                        "kind": label,
                        "n": n,
                        "m": m,
                    }
                )
    made += [{"name": name, "depth": None, "stack": "", "kind": name, "n": 256, "m": 2048} for name in loose]
    return made


def _spectrum(
    random: np.random.Generator,
    module: dict[str, Any],
    attribute: str,
    attributes: Sequence[str],
    depths: int,
    rank: int,
    dim: int,
    adapters: int,
    weights: list[float],
) -> dict[str, Any]:
    """Slowly falling values with a fall of about 12 where the paper sees one: at the rank, beyond it, twice, never."""
    relative = (module["depth"] or 0) / max(1, depths)
    shift = list(attributes).index(attribute)
    at = [rank]
    if relative < 0.11:
        at = []
    elif 0.17 <= relative < 0.33 - 0.03 * shift:
        at = [2 * rank + shift]
    elif 0.5 <= relative < 0.75 - 0.06 * shift:
        at = [rank, 3 * rank]
    at = [index for index in at if index < adapters * rank]
    size = max(2, adapters * rank)
    logs = -2.2 * np.arange(size) / size - 0.4 * np.log1p(np.arange(size)) + 0.02 * random.standard_normal(size)
    factors = {index: round(float(random.uniform(6, 25)), 2) for index in at}
    for index, factor in factors.items():
        logs[index:] -= np.log(factor)
    attention = module["kind"].endswith(("qkv", "proj"))
    largest = 0.4 * 2.2 ** (shift - 1) * np.exp(-2.5 * relative if attention else 0) * random.uniform(0.8, 1.25)
    values = np.sort(largest * np.exp(logs - logs[0]))[::-1]
    energy = np.cumsum(values**2) / np.sum(values**2)
    if module["depth"] is None or len(at) == 0:
        pattern = "none"
    else:
        pattern = "two-step" if len(at) > 1 else "at-rank" if at[0] == rank else "beyond-rank"
    suggested = at[0] if at else int(np.searchsorted(energy, 0.9)) + 1
    return {
        "module": module["name"],
        "attribute": attribute,
        "rank": rank,
        "dim": dim,
        "singular_values": [float(f"{v:.6g}") for v in values],
        "first_singular_values": [float(f"{v:.6g}") for v in values * 1.1],
        "drops": [{"index": index, "factor": factors[index]} for index in at],
        "pattern": pattern,
        "gap": max(factors.values(), default=2.1),
        "suggested_dim": suggested,
        "energy_at_dim": float(f"{energy[dim - 1]:.6g}") if dim else 0.0,
        "energy_at_suggested": float(f"{energy[suggested - 1]:.6g}"),
        "captured_energy": float(f"{random.uniform(0.25, 0.7):.6g}") if dim else 0.0,
        "largest": float(f"{values[0]:.6g}"),
        "weights": weights,
        "residuals": [float(f"{v:.6g}") for v in random.uniform(0.4, 0.9, adapters)],
        "energies": [float(f"{v:.6g}") for v in random.uniform(0.2, 0.7, adapters)],
    }


def _not_mined(values: list[float]) -> dict[str, Any]:
    """What is left of a spectrum without records: the stored S."""
    unknown = ("rank", "pattern", "gap", "suggested_dim", "energy_at_dim", "energy_at_suggested", "captured_energy")
    left: dict[str, Any] = dict.fromkeys(unknown)
    return left | {
        "singular_values": values,
        "first_singular_values": [],
        "largest": values[0] if values else None,
        "drops": [],
        "weights": [],
        "residuals": [],
        "energies": [],
    }


def _null(dim: int) -> dict[str, Any]:
    mean = [round(0.8 + 0.19 * i / dim, 4) for i in range(dim)]
    low, high = ([round(min(1.0, v + step), 4) for v in mean] for step in (-0.02, 0.015))
    return {"n": 1024, "d": dim, "d_other": dim, "mean": mean, "low": low, "high": high}


def _overlap(
    random: np.random.Generator, module: dict[str, Any], pair: tuple[str, str], side: str, null: dict[str, Any]
) -> dict[str, Any]:
    """Eigenvalues under the null, more so for the first pair, as related attributes have them."""
    closeness = 0.35 if "camera" not in pair else 0.12
    start = np.clip(null["mean"][0] - closeness * random.uniform(0.5, 1.4), 0, 1)
    values = np.sort(np.clip(start + (1 - start) * np.linspace(0, 0.97, len(null["mean"])) ** 0.7, 0, 1))
    middle = null["mean"][0] - 0.05
    return {
        "module": module["name"],
        "attribute": pair[0],
        "other": pair[1],
        "side": side,
        "eigenvalues": [float(f"{v:.6g}") for v in values],
        "smallest": float(f"{values[0]:.6g}"),
        "null": 0,
        "permuted": {"mean": round(middle, 4), "low": round(middle - 0.06, 4), "high": round(middle + 0.05, 4)}
        if module["depth"] is not None
        else None,
    }


def _pairs(
    overlaps: list[dict[str, Any]], nulls: list[dict[str, Any]], attributes: Sequence[str]
) -> list[dict[str, Any]]:
    pairs = []
    for side in ("output", "input"):
        for a, b in combinations(attributes, 2):
            rows = [o for o in overlaps if (o["attribute"], o["other"], o["side"]) == (a, b, side)]
            if not rows:
                continue
            smallest = [o["smallest"] for o in rows]
            null = {key: [nulls[o["null"]][key][0] for o in rows] for key in ("mean", "low", "high")}
            permuted = [o["permuted"]["mean"] for o in rows if o["permuted"]]
            pairs.append(
                {
                    "attribute": a,
                    "other": b,
                    "side": side,
                    "modules": len(rows),
                    "median": float(np.median(smallest)),
                    "low": min(smallest),
                    "high": max(smallest),
                    "null_median": float(np.median(null["mean"])),
                    "null_low": float(np.median(null["low"])),
                    "null_high": float(np.median(null["high"])),
                    "permuted_median": float(np.median(permuted)) if permuted else None,
                    "share_above_half": float(np.mean([s > 0.5 for s in smallest])),
                    "share_below_null": float(
                        np.mean([s < low for s, low in zip(smallest, null["low"], strict=True)])
                    ),
                }
            )
    return pairs


def _adapter(spectra: list[dict[str, Any]], attribute: str, index: int, name: str) -> dict[str, Any]:
    rows = [s for s in spectra if s["attribute"] == attribute]
    weights = [s["weights"][index] for s in rows]
    share = float(np.mean([s["weights"][index] < 0.25 * np.median(s["weights"]) for s in rows]))
    return {
        "attribute": attribute,
        "adapter": f"adapters/{name}",
        "revision": None,
        "weight_median": float(np.median(weights)),
        "weight_min": min(weights),
        "weight_max": max(weights),
        "residual_median": float(np.median([s["residuals"][index] for s in rows])),
        "energy_median": float(np.median([s["energies"][index] for s in rows])),
        "muted_share": share,
        "muted": share > 0.5,
    }


def _explained(
    random: np.random.Generator, name: str, modules: list[dict[str, Any]], attributes: Sequence[str], dim: int
) -> dict[str, Any]:
    rows = []
    for module in modules:
        size = module["n"] * module["m"]
        shares = {
            a: {
                "share": float(f"{random.uniform(0.001, 0.04) * (i + 1):.6g}"),
                "expected": float(f"{dim**2 / size:.6g}"),
            }
            for i, a in enumerate(attributes)
        }
        joint = min(1.0, 1.4 * sum(s["share"] for s in shares.values()))
        expected = (dim * len(attributes)) ** 2 / size
        rows.append(
            {
                "module": module["name"],
                "norm": float(f"{random.uniform(0.5, 2):.6g}"),
                "joint": float(f"{joint:.6g}"),
                "expected": float(f"{expected:.6g}"),
                "attributes": shares,
            }
        )
    total = sum(r["norm"] for r in rows)

    def over_all(pick: Any) -> float:
        return float(sum(r["norm"] * pick(r) for r in rows) / total)

    return {
        "adapter": f"adapters/{name}",
        "source_of": [],
        "modules_missing": [],
        "joint": over_all(lambda r: r["joint"]),
        "expected": over_all(lambda r: r["expected"]),
        "attributes": {
            a: {k: over_all(lambda r, a=a, k=k: r["attributes"][a][k]) for k in ("share", "expected")}
            for a in attributes
        },
        "modules": rows,
    }
