"""One contender, one job, one process: python _contenders.py '{"contender": ..., "adapters": [...]}' result.json

Only what a contender needs is imported, before the clock starts: a peer's job also runs in an interpreter that has
the peer and not our package. Errors are computed after time and memory are taken.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from _common import PeakMemory, Timer
from safetensors import safe_open

PREFIX = "base_model.model."
PEERS = {"vlora": "vlora-dev", "lorashare": "lorashare"}


def weights_file(folder: str) -> str:
    return str(Path(folder) / "adapter_model.safetensors")


def scaling(folder: str) -> float:
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return config["lora_alpha"] / config["r"]


def relative_error(b, a, p, q) -> float:
    """||B A - P Q||_F / ||B A||_F from the factors alone, in float64: ||L R||_F^2 = <L^T L, R R^T>."""
    b, a, p, q = (t.double() for t in (b, a, p, q))
    left, right = torch.cat([b, -p], 1), torch.cat([a, q], 0)
    gap = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
    return float((gap / ((b.T @ b) * (a @ a.T)).sum()).sqrt())


def errors(adapters: list[str], approximation) -> dict[str, list[float]]:
    """{module: relative error of each adapter}; approximation(i, module, A, B) gives P [n x .] and Q [. x m]."""
    found: dict[str, list[float]] = {}
    for i, folder in enumerate(adapters):
        with safe_open(weights_file(folder), "pt") as file:
            keys = [key for key in sorted(file.keys()) if key.endswith(".lora_A.weight")]
            for key in keys:
                module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                a, b = file.get_tensor(key), file.get_tensor(f"{PREFIX}{module}.lora_B.weight")
                found.setdefault(module, []).append(relative_error(b, a, *approximation(i, module, a, b)))
    return found


def read_only(job: dict) -> dict:
    """The floor: every tensor of every file copied once into memory and dropped."""
    if job.get("drop_cache"):
        for folder in job["adapters"]:
            with open(weights_file(folder), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with PeakMemory() as memory, Timer() as timer:
        for folder in job["adapters"]:
            with safe_open(weights_file(folder), "pt") as file:
                keys = file.keys()
                for key in keys:
                    file.get_tensor(key).clone()
    size = sum(os.path.getsize(weights_file(f)) for f in job["adapters"])
    return timer.report() | {"memory": memory.report(), "mib": round(size / 2**20, 1)}


def ours(job: dict) -> dict:
    from peft_attrsub import build_basis

    groups = job.get("groups") or {"texture": job["adapters"]}
    with PeakMemory() as memory, Timer() as timer:
        basis = build_basis(groups, dim=job["dim"], progress=False)
    record = basis.config.attributes[0]
    result = timer.report() | {"memory": memory.report(), "iterations": record.iterations}
    if job.get("errors"):
        uv = {module: basis.factors(module, "texture") for module in basis.modules}

        def project(i, module, a, b):
            u, _, v = uv[module]
            return u @ ((u.T @ b) @ (a @ v)), v.T

        result["errors"] = errors(job["adapters"], project)
        result["basis_parameters"] = sum(u.numel() + v.numel() for u, _, v in uv.values())
        result["parameters_per_adapter"] = sum(u.shape[1] * v.shape[1] for u, _, v in uv.values())
    return result


def vlora(job: dict) -> dict:
    """Components are whole flattened factors, one per side; A and B are approximated one by one."""
    from vlora import SharedSubspace, load_adapter

    choice = {"num_components": job["components"]} if job.get("components") else {}
    with PeakMemory() as memory, Timer() as timer:
        space = SharedSubspace.from_adapters([load_adapter(f) for f in job["adapters"]], **choice)
    result = timer.report() | {"memory": memory.report()}
    if job.get("errors"):
        back = [space.reconstruct(f"task_{i}") for i in range(len(job["adapters"]))]
        result["errors"] = errors(
            job["adapters"], lambda i, module, a, b: (back[i].lora_b[module], back[i].lora_a[module])
        )
        tables = (space.components_a, space.components_b, space.means_a, space.means_b)
        result["basis_parameters"] = sum(t.numel() for table in tables for t in table.values())
        task = space.tasks["task_0"]
        result["parameters_per_adapter"] = sum(
            t.numel() for side in (task.loadings_a, task.loadings_b) for t in side.values()
        )
        result["components"] = space.num_components
    return result


def lorashare(job: dict) -> dict:
    """Components are vectors of length n or m, `dim` per side; A and B are approximated one by one."""
    from lorashare import SHAREModel

    named = {f"adapter-{i}": folder for i, folder in enumerate(job["adapters"])}
    with PeakMemory() as memory, Timer() as timer:
        share = SHAREModel.from_adapters(
            named, num_components=job["dim"], device="cpu", layer_by_layer=job.get("layer_by_layer", False)
        )
    result = timer.report() | {"memory": memory.report()}
    if job.get("errors"):
        back = {i: share.reconstruct(name) for i, name in enumerate(named)}
        result["errors"] = errors(
            job["adapters"],
            lambda i, module, a, b: (
                back[i][f"{PREFIX}{module}.lora_B.weight"],
                back[i][f"{PREFIX}{module}.lora_A.weight"],
            ),
        )
        result["basis_parameters"] = sum(t.numel() for t in share.components.values())
        result["parameters_per_adapter"] = sum(t.numel() for t in share.all_loadings["adapter-0"].values())
    return result


def dense(job: dict) -> dict:
    """The same IRLS as it stands on paper, for one module: n x m updates, n x m mean, full SVD, `iterations` times."""
    from peft_attrsub import build_basis

    (module,) = job["modules"]
    dim, eps = job["dim"], 1e-6
    with PeakMemory() as memory, Timer() as timer:
        updates = []
        for folder in job["adapters"]:
            with safe_open(weights_file(folder), "pt") as file:
                a = file.get_tensor(f"{PREFIX}{module}.lora_A.weight")
                b = file.get_tensor(f"{PREFIX}{module}.lora_B.weight")
            updates.append(scaling(folder) * b @ a)
        scale = torch.stack([d.norm() for d in updates]).median()
        weights = torch.ones(len(updates))
        for _ in range(job["iterations"]):
            mean = sum(w * d for w, d in zip(weights, updates, strict=True)) / weights.sum()
            u, s, vh = torch.linalg.svd(mean, full_matrices=False)
            low = (u[:, :dim] * s[:dim]) @ vh[:dim]
            distance = torch.stack([(low - d).norm() for d in updates])
            weights = ((eps * scale) ** 2 + distance.square()) ** -0.5  # alpha = 1
    result = timer.report() | {"memory": memory.report()}
    u, s, v = build_basis({"texture": job["adapters"]}, dim=dim, progress=False).factors(module, "texture")
    result["difference_from_ours"] = float(((u * s) @ v.T - low).norm() / low.norm())
    return result


def probe(job: dict) -> dict:
    """Which peers this interpreter has, without importing them."""
    return {
        name: importlib.metadata.version(package) if importlib.util.find_spec(name) else "not installed"
        for name, package in PEERS.items()
    }


CONTENDERS = {f.__name__: f for f in (read_only, ours, vlora, lorashare, dense, probe)}


def run(job: dict) -> dict:
    name = {"ours": "peft_attrsub", "dense": "peft_attrsub"}.get(job["contender"], job["contender"])
    if name in ("peft_attrsub", *PEERS):
        importlib.import_module(name)  # before the memory baseline
    return CONTENDERS[job["contender"]](job)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(sys.argv[1]))), encoding="utf-8")
