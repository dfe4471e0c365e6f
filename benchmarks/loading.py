"""How long does it take to put a basis into vggt-1b, how much memory, and how many bytes are read?

    python benchmarks/loading.py [--rounds 3] [--work-dir DIR] [--quick]

A basis of 4 attributes x 64 directions on VGGT-1B's 192 aggregator linears, from a local folder in the page cache.
Every round is a process of its own. The base model's weights are allocated and never written or read: they cost no
time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from _adapters import vggt_shapes
from _bases import hollow_model, write_basis
from _common import PeakMemory, Timer, header, print_anything, summary, table, write_result
from peft import PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.vggt import VggtConfig, VggtModel

PARTS = {"attributes": ["attribute-2", "attribute-0"], "dim": 16}
RULES = {
    "seconds": "get_peft_model, or PeftModel.from_pretrained, on a model that is there; the clock starts after the "
    "imports; one process per round, contenders in turn; median over rounds. cpu_seconds adds up all threads",
    "peak_anon_mib": "anonymous memory above its value when the clock starts, sampled every 5 ms; peak_rss_mib: the "
    "kernel's high-water mark of resident memory, mapped files included",
    "held_mib": "what stays: A and B once in the dtype of the base, and the cores in float32",
    "peak_ratio": "peak_anon_mib / held_mib",
    "bytes_read": "bytes of tensors of the basis that left the disk, as basis_bytes_read tells; bytes_needed: "
    "directions x (n + m + 1) x 4 over modules and attributes in use",
}


def base(dtype: torch.dtype, quick: bool) -> nn.Module:
    """vggt-1b, or a few linears, with weights that nobody has written to."""
    if quick:
        return hollow_model(vggt_shapes(1, 64), dtype)
    with torch.device("meta"):
        model = VggtModel(VggtConfig.preset("vggt-1b")).to(dtype)
    return model.to_empty(device="cpu")


def measure(job: dict) -> dict:
    """One round in this process."""
    model = base(getattr(torch, job["dtype"]), job["quick"])
    warnings.simplefilter("ignore")
    with PeakMemory() as memory, Timer() as timer:
        if job["adapter"]:
            adapted = PeftModel.from_pretrained(model, job["adapter"])
        else:
            adapted = get_peft_model(model, AttrSubspaceConfig(basis=job["basis"]))
    layers = [module for module in adapted.modules() if hasattr(module, "attrsub_M")]
    frozen = [held["default"] for layer in layers for held in (layer.attrsub_A, layer.attrsub_B)]
    held = sum(t.nbytes for t in frozen) + sum(layer.attrsub_M["default"].weight.nbytes for layer in layers)
    counts = {"bytes_read": adapted.basis_bytes_read["default"], "held_mib": held / 2**20, "modules": len(layers)}
    return timer.report() | memory.report() | counts


def child(job: dict) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "round.json"
        command = [sys.executable, __file__, "--job", json.dumps(job), "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_bytes())


def row(rounds: list[dict], needed: int) -> dict:
    first = rounds[0]
    peaks = [r["peak_anon_mib"] for r in rounds if r["peak_anon_mib"] is not None]
    return {
        "modules": first["modules"],
        "seconds": summary(r["seconds"] for r in rounds),
        "cpu_seconds": summary(r["cpu_seconds"] for r in rounds),
        "held_mib": round(first["held_mib"], 3),
        "peak_anon_mib": max(peaks, default=None),
        "peak_rss_mib": max((r["peak_rss_mib"] for r in rounds if r["peak_rss_mib"] is not None), default=None),
        "peak_ratio": round(max(peaks) / first["held_mib"], 3) if peaks else None,
        "bytes_read": first["bytes_read"],
        "bytes_needed": needed,
    }


def targets(cases: dict[str, dict]) -> list[dict]:
    whole = cases["4 x 64, base in float32"]
    seconds, ratio = whole["seconds"]["median"], whole["peak_ratio"]
    exact = all(case["bytes_read"] == case["bytes_needed"] for case in cases.values())
    return [
        {"target": "4 x 64 into vggt-1b <= 8 s", "measured": f"{seconds:.2f} s", "reached": seconds <= 8},
        {
            "target": "peak memory <= bases and cores once + 10 %",
            "measured": "unknown" if ratio is None else f"{ratio:.3f} x",
            "reached": ratio is not None and ratio <= 1.1,
        },
        {"target": "reads only what it uses", "measured": "equal" if exact else "more", "reached": exact},
    ]


def run(args: argparse.Namespace, work: Path) -> dict:
    shapes = vggt_shapes(1, 64) if args.quick else vggt_shapes()
    dim = 4 if args.quick else 64
    basis = write_basis(work / f"basis-{len(shapes)}x{dim}", shapes, 4, dim, args.seed)
    third = list(shapes)[::3]
    part = PARTS | {"dim": min(dim, PARTS["dim"])}
    config = AttrSubspaceConfig(basis=basis, target_modules=third, **part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(base(torch.float32, args.quick), config).save_pretrained(work / "part")

    def needed(names: list[str], attributes: int, rows: int) -> int:
        return sum(attributes * rows * (sum(shapes[name]) + 1) * 4 for name in names)

    whole = needed(list(shapes), 4, dim)
    jobs = {
        "4 x 64, base in float32": ({"dtype": "float32", "adapter": None}, whole),
        "4 x 64, base in bfloat16": ({"dtype": "bfloat16", "adapter": None}, whole),
        "adapter on 2 of 4 attributes, 16 of 64, a third of the modules": (
            {"dtype": "float32", "adapter": str(work / "part")},
            needed(third, 2, part["dim"]),
        ),
    }
    seen: dict[str, list[dict]] = {name: [] for name in jobs}
    for number in range(args.rounds):
        for name, (job, _) in jobs.items():
            seen[name].append(child(job | {"basis": basis, "quick": args.quick}))
            print(f"round {number + 1}: {name}: {seen[name][-1]['seconds']:.2f} s", flush=True)
    return {name: row(seen[name], count) for name, (_, count) in jobs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", help="keep the basis (0.8 GB) here for the next run")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it works, measures nothing")
    parser.add_argument("--output", help="JSON file; default results/loading.json, and none with --quick")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        Path(args.output).write_text(json.dumps(measure(json.loads(args.job))), encoding="utf-8")
        return
    args.rounds = 1 if args.quick else args.rounds
    result = header("loading", args.seed, args.quick, rounds=args.rounds, model="vggt-1b")
    with tempfile.TemporaryDirectory() as scratch:
        result["cases"] = run(args, Path(args.work_dir or scratch))
    result |= {"rules": RULES, "targets": targets(result["cases"])}
    columns = ["", "modules", "seconds", "CPU s", "held MiB", "peak MiB", "peak / held", "MB read"]
    keys = ("modules", "held_mib", "peak_anon_mib", "peak_ratio")
    rows = []
    for name, case in result["cases"].items():
        modules, held, peak, ratio = (case[key] for key in keys)
        times = [case["seconds"]["median"], case["cpu_seconds"]["median"]]
        rows.append([name, modules, *times, held, peak, ratio, case["bytes_read"] / 1e6])
    table("Loading", columns, rows)
    table("Targets", ["target", "measured", "reached"], [list(t.values()) for t in result["targets"]])
    write_result(result, "loading", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
