"""Bases from source adapters: the default one and its variants, and what the default one shows.

default            alpha 1, uniform dimensions
spoiled-A          one adapter of each attribute replaced by noise of ten times its norm, alpha A
rank-R             from source adapters of rank R, on the first datasets of each attribute alone
importance, importance-literal    dimensions by effective rank (supplement)
shared             first the part that all adapters have in common, then each attribute from what is left of it:

    dW' = (1 - U U^T) dW (1 - V V^T) ,   U, V: the subspace "shared" of all adapters together ;

lora_B and lora_A take one factor each, so the residues are adapters of the same rank, which build_basis reads.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .settings import Study
from .sources import adapter_path, factors_of, rewrite, spoil
from .statistics import paired, spread

ALPHAS = (2.0, 1.0, 0.5)
RULES = ("importance", "importance-literal")


def variants(study: Study) -> list[str]:
    """Names of the bases of a study, the default first."""
    chosen = ["default"]
    if "alpha" in study.ablations:
        chosen += [f"spoiled-{alpha:g}" for alpha in ALPHAS]
    if "rank" in study.ablations and study.source_ranks:
        chosen += [f"rank-{rank}" for rank in sorted({*study.source_ranks, study.source_rank})]
    if "allocation" in study.ablations:
        chosen += list(RULES)
    return chosen + (["shared"] if "shared" in study.ablations else [])


def needed(study: Study, variant: str) -> list[tuple[str, int, int]]:
    """(attribute, dataset, rank) of the source adapters that a variant is mined from."""
    rank, count = study.source_rank, study.datasets
    if variant.startswith("rank-"):
        rank, count = int(variant.removeprefix("rank-")), study.rank_datasets
    return [(attribute, index, rank) for attribute in study.attributes for index in range(count)]


def shared_dims(study: Study, total: int) -> dict[str, int]:
    """A quarter of D for what is shared, or a little more, so that the rest falls into equal parts."""
    each = (total - total // 4) // len(study.attributes)
    return {"shared": total - each * len(study.attributes)} | dict.fromkeys(study.attributes, each)


def mine(study: Study, out: Path, variant: str) -> dict[str, Any]:
    """Mine one variant into bases/<variant>/basis; what it holds, and for the default one also what it shows."""
    from peft_attrsub.basis import Basis, build_basis

    place = out / "bases" / variant
    paths: dict[str, list[Path]] = {}
    for attribute, index, rank in needed(study, variant):
        paths.setdefault(attribute, []).append(adapter_path(out, rank, attribute, index))
    settings: dict[str, Any] = {"dim": study.mined_dim, "progress": False, "missing": "error"}
    if variant.startswith("spoiled-"):
        settings["alpha"] = float(variant.removeprefix("spoiled-"))
        for number, row in enumerate(paths.values()):
            target = place / "adapters" / row[0].parent.name
            target.parent.mkdir(parents=True, exist_ok=True)
            spoil(row[0], target, number)
            row[0] = target
    if variant in RULES:
        settings |= {"allocation": variant, "dim": study.ablation_dim // len(study.attributes)}
    if variant == "shared":
        # As many directions are taken away as will be used: what more there is in common stays with the attributes.
        size = shared_dims(study, study.ablation_dim)["shared"]
        common = build_basis([path for row in paths.values() for path in row], **settings | {"dim": size})
        paths = {name: [residue(path, place, common) for path in row] for name, row in paths.items()}
        basis = Basis.combine([common, build_basis(paths, **settings)])
    else:
        basis = build_basis(paths, **settings)
    basis.save_pretrained(place / "basis", overwrite=True)
    found: dict[str, Any] = {"digest": basis.digest, "dims": _dims(basis), "pairs": pairs_of(basis)}
    if variant.startswith("spoiled-"):
        found["weight_of_spoiled"] = _weight_of_first(basis)
        shutil.rmtree(place / "adapters")
    if variant == "shared":
        shutil.rmtree(place / "adapters")
    if variant == "default":
        found |= {"spectra": spectra(basis), "held_out": held_out(study, out)}
    return found


def residue(path: Path, place: Path, common: Any) -> Path:
    """The adapter without the part on both sides that is common to all."""
    target = place / "adapters" / path.parent.name
    target.parent.mkdir(parents=True, exist_ok=True)

    def left(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        u, _, v = (x.double() for x in common.factors(module, "shared"))
        return a - (a @ v) @ v.T, b - u @ (u.T @ b)

    rewrite(path, target, left)
    return target


def _dims(basis: Any) -> dict[str, dict[str, float]]:
    rows = {name: [basis.dim(m, name) for m in basis.modules] for name in basis.attributes}
    return {name: {"mean": fmean(row), "least": min(row), "most": max(row)} for name, row in rows.items()}


def _weight_of_first(basis: Any) -> float:
    """Mean IRLS weight (1: like the others) of the adapter that was spoiled."""
    return fmean(float(basis.weights(m, name)[0]) for name in basis.attributes for m in basis.modules)


def pairs_of(basis: Any) -> list[dict[str, Any]]:
    """Smallest eigenvalue of every two attributes on both sides, beside the random null (paper, section 4)."""
    from peft_attrsub.analysis import analyse

    if len(basis.attributes) < 2:
        return []
    keys = ("attribute", "other", "side", "median", "null_median", "null_low", "permuted_median", "share_below_null")
    return [{key: row[key] for key in keys} for row in analyse(basis).to_dict()["pairs"]]


def spectra(basis: Any) -> dict[str, list[float]]:
    """Attribute -> mean over modules of the singular values of C relative to the largest, at the first iteration."""
    found = {}
    for name in basis.attributes:
        rows = [basis.spectrum(m, name)[0] for m in basis.modules]
        length = min(len(row) for row in rows)
        mean = torch.stack([row[:length] / row[0].clamp_min(1e-30) for row in rows]).mean(0)
        found[name] = [round(float(value), 6) for value in mean]
    return found


# --- do the subspaces exist? ----------------------------------------------------------------------------------------


def held_out(study: Study, out: Path) -> dict[str, Any]:
    """How much of an adapter that was not mined from lies in a mined subspace, beside chance.

        energy = ||U^T dW V||_F^2 / ||dW||_F^2 , mean over modules, U and V mined from the other adapters:
        own       of the same attribute ;
        shuffled  as many adapters drawn from all attributes ;
        random    expected for random subspaces of that size, (d / n) (d / m) .

    `folds` adapters of each attribute are held out in turn. gap: own - shuffled, paired over them.
    """
    count = min(study.folds, study.datasets)
    if study.datasets < 2:
        return {}
    loaded = {
        (a, k): factors_of(adapter_path(out, study.source_rank, a, k))
        for a in study.attributes
        for k in range(study.datasets)
    }
    dim = max(study.ablation_dim // len(study.attributes), 1)
    found: dict[str, Any] = {"dim": dim, "folds": count, "attributes": {}}
    chance = []
    for attribute in study.attributes:
        own, shuffled = {}, {}
        for fold in range(count):
            rest = [key for key in loaded if key != (attribute, fold)]
            same = [key for key in rest if key[0] == attribute]
            # Of every attribute alike, so that the held-out one is among them as often as the others.
            others = random.Random(f"{attribute} {fold}").sample(rest, len(same))
            target = loaded[attribute, fold]
            own[fold] = captured(target, [loaded[key] for key in same], dim)
            shuffled[fold] = captured(target, [loaded[key] for key in others], dim)
        chance += [min(dim, *shape) ** 2 / (shape[0] * shape[1]) for shape in _shapes(loaded[attribute, 0])]
        found["attributes"][attribute] = {
            "own": spread(list(own.values())),
            "shuffled": spread(list(shuffled.values())),
            "gap": paired(own, shuffled, less_is_better=False),
        }
    found["random"] = fmean(chance)
    return found


def _shapes(factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    return [(p.shape[0], q.shape[0]) for p, q in factors.values()]


def captured(
    target: Mapping[str, tuple[Tensor, Tensor]], row: list[Mapping[str, tuple[Tensor, Tensor]]], dim: int
) -> float:
    """Mean over modules of the share of an adapter's energy in the subspace of others."""
    from peft_attrsub.basis import shared_subspace

    shares = []
    for module, (p, q) in target.items():
        found = shared_subspace([one[module][0] for one in row], [one[module][1] for one in row], dim)
        p, q = p.double(), q.double()
        inside = torch.linalg.matrix_norm((found.u.double().T @ p) @ (q.T @ found.v.double())) ** 2
        whole = torch.trace((p.T @ p) @ (q.T @ q))
        shares.append(float(inside / whole) if float(whole) > 0 else 0.0)
    return fmean(shares)
