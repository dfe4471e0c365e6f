"""Why a basis is good or bad for a benchmark: how much of the update that full fine-tuning makes lies inside.

    inside = ||A^T dW B||_F^2 / ||dW||_F^2 ,   mean over the matrices of the aggregator ,

dW: what full fine-tuning with its chosen rate and seed 0 has changed; A, B: the orthonormal columns of a row of cores.
By chance D^2 / (n m) lies inside. What a core of that size can learn at all is bounded by it.

The oracle is the basis with the most inside, which nobody has before the task is learnt: with dW = U S V^T

    A = U[:, :D] ,  B = V[:, :D] .

Cores in it say how much the choice of a basis matters at that D.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .entries import main_entries, oracle_basis
from .settings import Study
from .training import Base, build_model
from .tuning import STATE

CORES = ("attrsub", "psv", "random")


def explain(study: Study, out: Path, state: str) -> dict[str, Any]:
    """Label of a row of cores -> `inside`; state: the run of full fine-tuning."""
    updates = changed(study, out / state / STATE)
    found = {}
    for entry in main_entries(study):
        if entry.method in CORES:
            model = build_model(study, entry.settings(out), 0, study.steps).base
            shares = []
            for module, update in updates.items():
                layer = model.get_submodule(module)
                shares.append(inside(update, layer.attrsub_A["default"], layer.attrsub_B["default"]))
            found[entry.label] = fmean(shares)
    return {"inside": found, "modules": len(updates)}


def make_oracle(study: Study, out: Path, benchmark: str, state: str) -> dict[str, Any]:
    """Store the oracle of a benchmark, of the largest of `oracle_dims`; D -> `inside`."""
    from peft_attrsub.basis import Basis

    updates, factors, largest = changed(study, out / state / STATE), {}, max(study.oracle_dims)
    for module, update in updates.items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        factors[module] = (u[:, :largest], s[:largest], vh[:largest].T)
    place = out / "bases" / oracle_basis(benchmark) / "basis"
    Basis.from_factors({"oracle": factors}).save_pretrained(place, overwrite=True)
    shares = {
        str(d): fmean(inside(updates[m], u[:, :d], v[:, :d]) for m, (u, _, v) in factors.items())
        for d in study.oracle_dims
    }
    return {"inside": shares}


def changed(study: Study, path: Path) -> dict[str, Tensor]:
    """Module -> dW (n x m) of what a run of full fine-tuning has changed in the aggregator's matrices."""
    from safetensors.torch import load_file

    from peft_attrsub.vggt import vggt_targets

    model, state = Base.get(study.model), load_file(str(path))
    names = {module: f"{module}.weight" for module in vggt_targets("aggregator", model)}
    return {
        module: state[f"parameter/{name}"].double() - model.get_parameter(name).detach().double()
        for module, name in names.items()
    }


def inside(update: Tensor, a: Tensor, b: Tensor) -> float:
    """||A^T dW B||_F^2 / ||dW||_F^2, 0 where nothing has changed. A (n x D), B (m x D): orthonormal columns."""
    whole = update.square().sum()
    part = (a.double().T @ update @ b.double()).square().sum()
    return float(part / whole) if float(whole) > 0 else 0.0
