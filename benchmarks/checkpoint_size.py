"""How large is an adapter on disk? LoRA, VeRA, PSOFT and cores on the same 192 linears of VGGT, and the basis once.

    python benchmarks/checkpoint_size.py [--quick]

Saved by save_pretrained. PSOFT decomposes every weight when it is made, so it is saved on one pair of blocks (8
linears) and its tensors are counted 24 times; all others are saved whole.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from _adapters import vggt_shapes
from _bases import hollow_model, write_basis
from _common import header, print_anything, table, write_result
from peft import LoraConfig, PeftConfig, PsoftConfig, VeraConfig, get_peft_model

from peft_attrsub import AttrSubspaceConfig

RULES = {
    "bytes": "all files that save_pretrained writes, in float32; trained: numbers that training changes",
    "counted": "saved on so many pairs of blocks; the tensors of the file are multiplied up to all of them",
    "basis": "4 attributes x 64 directions, once for all adapters; a quarter of it is what D=64 uses",
}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def saved(folder: Path, config: PeftConfig, shapes: dict, pairs: int, of: int) -> dict:
    """Bytes of an adapter on `pairs` of `of` pairs of blocks."""
    base = hollow_model(shapes)
    if isinstance(config, PsoftConfig):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.normal_(std=0.02)
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    tensors = (folder / "adapter_model.safetensors").stat().st_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    factor = of // pairs
    return {"bytes": size(folder) + (factor - 1) * tensors, "trained": factor * trained, "counted": pairs}


def run(work: Path, quick: bool, seed: int) -> dict:
    pairs, width, per = (2, 64, 4) if quick else (24, 1024, 64)
    shapes, one = vggt_shapes(pairs, width), vggt_shapes(1, width)
    small, middle, large = (2, 4, 8) if quick else (16, 64, 256)
    targets = sorted({name.rsplit(".", 1)[1] for name in shapes})
    basis = work / "basis"
    write_basis(basis, shapes, 4, per, seed)
    configs: dict[str, PeftConfig] = {f"LoRA r={r}": LoraConfig(r=r, target_modules=targets) for r in (small, middle)}
    configs[f"VeRA r={large}"] = VeraConfig(r=large, target_modules=targets)
    configs[f"PSOFT r={middle}"] = PsoftConfig(
        r=middle, psoft_alpha=middle, target_modules=targets, psoft_svd="lowrank"
    )
    configs[f"cores D={per}"] = AttrSubspaceConfig(basis=str(basis), attributes=["attribute-0"])
    configs[f"cores D={4 * per}"] = AttrSubspaceConfig(basis=str(basis))
    rows = {}
    for name, config in configs.items():
        scaled = isinstance(config, PsoftConfig)
        rows[name] = saved(work / name, config, one if scaled else shapes, 1 if scaled else pairs, pairs)
        print(f"{name}: {rows[name]['bytes'] / 1e6:.2f} MB", flush=True)
    return {"adapters": rows, "basis_bytes": size(basis), "modules": len(shapes), "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rounds", type=int, default=1, help="taken for the sake of the other scripts: sizes are exact"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it works, measures nothing")
    parser.add_argument("--output", help="JSON file; default results/checkpoint_size.json, and none with --quick")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # PEFT looks for the base model's config and finds none
    result = header("checkpoint_size", args.seed, args.quick, dtype="float32")
    with tempfile.TemporaryDirectory() as scratch:
        result |= run(Path(scratch), args.quick, args.seed)
    result["rules"] = RULES
    rows = [[name, r["trained"], r["bytes"] / 1e6] for name, r in result["adapters"].items()]
    table("On disk", ["", "trained", "MB"], [*rows, ["the basis, once", "-", result["basis_bytes"] / 1e6]])
    write_result(result, "checkpoint_size", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
