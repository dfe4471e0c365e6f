"""What does it take to put other values into a loaded adapter, against PEFT's hot swap and against loading anew?

    python benchmarks/hotswap.py [--blocks 6] [--rounds 7] [--quick]

`peft_attrsub.hotswap_adapter` on cores, `peft.utils.hotswap.hotswap_adapter` on LoRA r=16, and load_adapter +
set_adapter + delete_adapter with both. Linears of VGGT's shapes: 6 of its 24 pairs of blocks, 48 of
192 modules, since every time grows with their number. The weights of the base are never touched.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _adapters import vggt_shapes
from _bases import hollow_model, write_basis
from _common import PeakMemory, Timer, header, median, print_anything, summary, table, write_result
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as peft_hotswap

from peft_attrsub import AttrSubspaceConfig, hotswap_adapter

PEER = "LoRA, PEFT's hot swap"
RULES = {
    "seconds": "from the saved adapter, in the page cache, to the values in place; contenders in turn within a round; "
    "two adapters take turns; median over rounds after one that does not count",
    "ratio": f"median over rounds of the contender / {PEER} in the same round",
    "peak_anon_mib": "anonymous memory above its value at the start, sampled every 5 ms, worst of the rounds; "
    "peak_rss_mib: the kernel's high-water mark of resident memory, mapped files included",
    "load_adapter": "load_adapter under another name, set_adapter, delete_adapter of the old one",
    "file_mb": "adapter_model.safetensors in 10^6 bytes",
}


def adapters(folder: Path, config: PeftConfig, shapes: dict) -> list[str]:
    """Two saved adapters with random values."""
    model = get_peft_model(hollow_model(shapes), config)
    paths = []
    for i in range(2):
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder / str(i))
        paths.append(str(folder / str(i)))
    return paths


def load_anew(model: PeftModel, path: str, names: itertools.count) -> None:
    old = model.active_adapter
    new = f"n{next(names)}"
    model.load_adapter(path, new)
    model.set_adapter(new)
    model.delete_adapter(old)


def run(args: argparse.Namespace, work: Path) -> dict[str, dict]:
    shapes = vggt_shapes(1, 64) if args.quick else vggt_shapes(args.blocks)
    per = 4 if args.quick else 64
    basis = write_basis(work / "basis", shapes, 4, per, args.seed)
    targets = sorted({name.rsplit(".", 1)[1] for name in shapes})
    rank = 2 if args.quick else 16
    configs = {
        "LoRA": LoraConfig(r=rank, lora_alpha=rank, target_modules=targets),
        f"cores D={per}": AttrSubspaceConfig(basis=basis, attributes=["attribute-0"]),
        f"cores D={4 * per}": AttrSubspaceConfig(basis=basis),
    }
    jobs: dict[str, tuple[Callable[[str], None], list[str], int]] = {}
    for name, config in configs.items():
        paths = adapters(work / name, config, shapes)
        size = Path(paths[0], "adapter_model.safetensors").stat().st_size
        kept, anew = (PeftModel.from_pretrained(hollow_model(shapes), paths[0]) for _ in range(2))
        if name == "LoRA":
            jobs[PEER] = (
                lambda p, m=kept: peft_hotswap(m, p, adapter_name="default", torch_device="cpu"),
                paths,
                size,
            )
        else:
            jobs[f"{name}, hot swap"] = (lambda p, m=kept: hotswap_adapter(m, p), paths, size)
        names = itertools.count()
        jobs[f"{name}, load_adapter"] = (lambda p, m=anew, c=names: load_anew(m, p, c), paths, size)
    seen: dict[str, list[dict]] = {name: [] for name in jobs}
    for number in range(args.rounds + 1):
        for name, (swap, paths, _) in jobs.items():
            with PeakMemory() as memory, Timer() as timer:
                swap(paths[(number + 1) % 2])
            if number:
                seen[name].append(timer.report() | memory.report())
    return {
        name: {
            "seconds": summary((r["seconds"] for r in seen[name]), 5),
            "cpu_seconds": summary((r["cpu_seconds"] for r in seen[name]), 5),
            "ratio": round(
                median(r["seconds"] / p["seconds"] for r, p in zip(seen[name], seen[PEER], strict=True)), 3
            ),
            "peak_anon_mib": max((r["peak_anon_mib"] for r in seen[name]), key=lambda v: v or 0),
            "peak_rss_mib": max((r["peak_rss_mib"] for r in seen[name]), key=lambda v: v or 0),
            "file_mb": round(size / 1e6, 3),
        }
        for name, (_, _, size) in jobs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="pairs of a frame and a global block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it works, measures nothing")
    parser.add_argument("--output", help="JSON file; default results/hotswap.json, and none with --quick")
    args = parser.parse_args()
    args.rounds = 2 if args.quick else args.rounds
    warnings.simplefilter("ignore")  # PEFT looks for the base model's config and finds none
    modules = len(vggt_shapes(1 if args.quick else args.blocks))
    result = header("hotswap", args.seed, args.quick, rounds=args.rounds, modules=modules)
    with tempfile.TemporaryDirectory() as scratch:
        result["contenders"] = run(args, Path(scratch))
    result["rules"] = RULES
    rows = [
        [name, 1000 * r["seconds"]["median"], r["ratio"], r["peak_anon_mib"], r["peak_rss_mib"], r["file_mb"]]
        for name, r in result["contenders"].items()
    ]
    table(f"Other values, {modules} modules", ["", "ms", "/ PEFT's", "peak anon MiB", "peak RSS MiB", "file MB"], rows)
    write_result(result, "hotswap", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
