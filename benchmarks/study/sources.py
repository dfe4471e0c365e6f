"""Source adapters, spoiled ones, and how far adapters of an attribute agree before anything is mined from them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from .data import ASPECT, dataset_name
from .settings import Study
from .training import build_model, fit, make_batches

#: A spoiled adapter is noise of this many times the norm.
SPOILED = 10.0


def adapter_path(out: Path, rank: int, attribute: str, index: int) -> Path:
    return out / "sources" / f"rank-{rank}" / dataset_name(attribute, index) / "adapter"


def train_source(study: Study, out: Path, attribute: str, index: int, rank: int) -> dict[str, Any]:
    """One LoRA on one attribute dataset, saved and tagged as train_lora_cluster.py does."""
    from train_lora_cluster import publish, tags_of
    from training.methods import save

    from peft_attrsub.datasets import open_benchmark

    name = dataset_name(attribute, index)
    folder = out / "data" / f"{attribute}-{index:02d}" / "set" / name
    dataset = open_benchmark("scenes", folder)
    seed = 1 + index + 1000 * study.attributes.index(attribute)
    built = build_model(study, {"method": "lora", "rank": rank}, 0 if study.same_start else seed, study.source_steps)
    starts = {n: p.detach().clone() for n, p in built.named.items() if "lora_A" in n}
    batches = make_batches(
        dataset,
        dataset.names,
        study,
        built.base.config,
        seed=seed,
        images=study.source_images,
        aspect=ASPECT["generic"],
    )
    curve = fit(
        built,
        batches,
        study,
        steps=study.source_steps,
        lr=study.source_lr,
        seed=seed,
        lora_a_ratio=study.lora_a_ratio,
    )
    final = adapter_path(out, rank, attribute, index)
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    beside = save(built, final.with_name("saved"), tags_of(folder) | {"steps": study.source_steps, "seed": seed})
    publish(beside, final)
    shutil.rmtree(beside)
    moved = [float((built.named[n].detach() - a).norm() / a.norm()) for n, a in starts.items()]
    return curve | {"moved_a": fmean(moved), "trainable": built.trainable}


def factors_of(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (n x r, m x r) of one adapter's update, its scaling in the first, float32."""
    from peft_attrsub.basis import LoraAdapter

    with LoraAdapter(folder) as adapter:
        return {module: tuple(x.float() for x in adapter.read(module)) for module in adapter.entries}


def rewrite(source: Path, target: Path, change: Any) -> None:
    """A copy of an adapter with other factors: change(module, lora_A (r x m), lora_B (n x r)) -> both."""
    from safetensors.torch import load_file, save_file

    beside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    path = beside / "adapter_model.safetensors"
    tensors = load_file(str(path))
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        other = key.replace(".lora_A.", ".lora_B.")
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = change(module, tensors[key].double(), tensors[other].double())
        tensors[key], tensors[other] = a.float().contiguous(), b.float().contiguous()
    save_file(tensors, str(path), metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    beside.replace(target)


def spoil(source: Path, target: Path, seed: int) -> None:
    """Noise in the place of an adapter: in every module of SPOILED times its norm."""
    generator = torch.Generator().manual_seed(seed)

    def noise(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in (a, b))
        norm = torch.linalg.matrix_norm(y @ x)
        return x, y * (SPOILED * torch.linalg.matrix_norm(b @ a) / norm)

    rewrite(source, target, noise)


# --- diagnosis ------------------------------------------------------------------------------------------------------


def directions(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Orthonormal U (n x r) and V (m x r) of an update P Q^T, in double precision."""
    return tuple(torch.linalg.qr(x.double())[0] for x in factors)  # type: ignore[return-value]


def agreement(spaces: Sequence[Tensor]) -> Tensor:
    """(k, k): mean squared cosine of every two of k subspaces (n x r): |U_i^T U_j|_F^2 / r."""
    stacked, rank = torch.cat(list(spaces), 1), spaces[0].shape[1]
    k = len(spaces)
    return (stacked.T @ stacked).square().reshape(k, rank, k, rank).sum((1, 3)) / rank


def within_and_across(table: Tensor, groups: Sequence[int]) -> tuple[float, float]:
    """Mean over pairs of two different members of one group, and over pairs of two groups."""
    label = torch.tensor(groups)
    same = label[:, None] == label[None]
    off = ~torch.eye(len(label), dtype=torch.bool)
    inside, outside = table[same & off], table[~same]
    return (float(inside.mean()) if len(inside) else float("nan")), (
        float(outside.mean()) if len(outside) else float("nan")
    )


def diagnose(study: Study, out: Path) -> dict[str, Any]:
    """How far source adapters agree, side by side with what chance gives.

    within, across: mean squared cosine of two adapters' subspaces, of one attribute and of two. random: its
    expectation for random subspaces, r / n. shuffled: mean and standard deviation of (within - across) when the labels
    are shuffled; z: how many of these the true difference lies above. Adapters with the same start agree on the input
    side from the beginning: there only `within` beside `across` says something.
    """
    labels = [(i, a, k) for i, a in enumerate(study.attributes) for k in range(study.datasets)]
    loaded = [factors_of(adapter_path(out, study.source_rank, a, k)) for _, a, k in labels]
    groups, modules = [i for i, _, _ in labels], list(loaded[0])
    found: dict[str, Any] = {"adapters": len(loaded), "modules": len(modules), "rank": study.source_rank}
    spaces = {m: [directions(one[m]) for one in loaded] for m in modules}
    for place, side in enumerate(("output", "input")):
        tables = [agreement([pair[place] for pair in spaces[m]]) for m in modules]
        mean = torch.stack(tables).mean(0)
        chance = fmean(spaces[m][0][place].shape[1] / spaces[m][0][place].shape[0] for m in modules)
        found[side] = compared(mean, groups, study.shuffles) | {"random": chance}
        found[side]["kinds"] = {}
        for kind in ("qkv", "proj", "fc1", "fc2"):
            own = [table for m, table in zip(modules, tables, strict=True) if m.rsplit(".", 1)[-1] == kind]
            if own:
                inside, outside = within_and_across(torch.stack(own).mean(0), groups)
                found[side]["kinds"][kind] = {"within": inside, "across": outside}
    found["attributes"] = list(study.attributes)
    print(told(found), flush=True)
    return found


def compared(table: Tensor, groups: Sequence[int], shuffles: int) -> dict[str, Any]:
    """within, across, and where their difference lies among those of shuffled labels."""
    inside, outside = within_and_across(table, groups)
    chooser, null, labels = random.Random(0), [], list(groups)
    for _ in range(shuffles):
        chooser.shuffle(labels)
        a, b = within_and_across(table, labels)
        null.append(a - b)
    found: dict[str, Any] = {"within": inside, "across": outside}
    if len(set(groups)) > 1 and len(groups) > len(set(groups)):
        sd = pstdev(null)
        found["shuffled"] = {"mean": fmean(null), "sd": sd}
        found["z"] = (inside - outside - fmean(null)) / sd if sd else None
    return found


def told(found: Mapping[str, Any]) -> str:
    """The diagnosis as lines of text."""
    lines = [f"agreement of {found['adapters']} source adapters of rank {found['rank']} (mean squared cosine):"]
    for side in ("output", "input"):
        one = found[side]
        z = "" if one.get("z") is None else f", {one['z']:.1f} deviations above shuffled labels"
        lines.append(
            f"  {side:6}  within an attribute {one['within']:.3f}, across {one['across']:.3f}, random subspaces "
            f"{one['random']:.3f}{z}"
        )
    return "\n".join(lines)
