"""What does a training step cost with each adapter? Time of forward + backward, and bytes kept for the backward pass.

    python benchmarks/tuner.py [--tokens 1374 4096] [--blocks 1] [--rounds 4] [--device cuda] [--quick]

A stack of transformer blocks of VGGT's size (width 1024, 16 heads, MLP 4096; no rotary embedding) on one sequence.
The base is frozen and the input requires a gradient, so that the backward pass runs through every block, as it does
below the top of a real network. Each contender adapts the four linears of every block, through stock PEFT.

Also one linear of each of VGGT's shapes, factored and folded (peft_attrsub/tuner/forward_choice.py): where folding
pays, what the two constants of the choice should be on this machine, and what the choice loses; and what is left of
an update when the weights are bfloat16. --device cuda is written but has not been run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings

import torch
from _common import header, median, print_anything, summary, table, write_result
from _forward_modes import RULES as MODE_RULES
from _forward_modes import bfloat16_errors, crossover, fit
from peft import LoraConfig, PsoftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from peft_attrsub import AttrSubspaceConfig

TARGETS = ["qkv", "proj", "fc1", "fc2"]
RULES = {
    **MODE_RULES,
    "seconds": "one forward and one backward pass; contenders in turn within a round, their order rotated; median "
    "over rounds. ratio: median over rounds of contender / frozen base in the same round; cpu_ratio: the same of the "
    "CPU seconds of all threads, which other programs on the machine disturb less",
    "saved_mib": "tensors that autograd keeps for the backward pass (saved-tensor hooks), every storage once and "
    "whole; storages that exist before the step do not count: parameters, frozen bases and projections, the input",
    "gflop": "matrix products of one step as torch's FlopCounterMode counts them; attention is left out where it does "
    "not know the kernel, for all contenders alike",
    "adapters": "as they are initialised by default, without dropout: a no-op costs as much as a trained adapter",
    "peers": "VeRA and PSOFT run on the smallest number of tokens only, to keep the whole run short",
}


class Block(nn.Module):
    """Pre-norm transformer block with layer scale and normalised queries and keys, (T, width) -> (T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        )  # (heads, T, width / heads)
        y = nn.functional.scaled_dot_product_attention(self.q_norm(q)[None], self.k_norm(k)[None], v[None])[0]
        x = x + self.scale1 * self.proj(y.transpose(0, 1).flatten(1))
        return x + self.scale2 * self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def contenders(quick: bool, peers: bool) -> dict[str, object]:
    """{name: PEFT config, None for the frozen base}."""
    small, middle, large = (2, 8, 16) if quick else (16, 64, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, object] = {"frozen base": None}
        found |= {f"LoRA r={r}": LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS) for r in (small, middle, large)}
        if peers:
            found[f"VeRA r={large}"] = VeraConfig(r=large, target_modules=TARGETS)
            found[f"PSOFT r={middle}"] = PsoftConfig(
                r=middle, psoft_alpha=middle, target_modules=TARGETS, psoft_svd="lowrank"
            )
        found |= {
            f"attrsub D={d} {mode}": AttrSubspaceConfig(
                basis="random", dim=d, target_modules=TARGETS, forward_mode=mode
            )
            for d in (middle, large)
            for mode in ("factored", "folded", "auto")
        }
    return found


def build(stack: nn.Module, config: object) -> nn.Module:
    model = copy.deepcopy(stack)
    return model if config is None else get_peft_model(model, config)


def wait(x: Tensor) -> None:
    """Until the accelerator has done what it was asked."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def step(model: nn.Module, x: Tensor, upstream: Tensor) -> tuple[float, float, float]:
    """Seconds of forward and of backward, CPU seconds of both; gradients are dropped afterwards."""
    cpu, start = time.process_time(), time.perf_counter()
    y = model(x)
    wait(x)
    between = time.perf_counter()
    y.backward(upstream)
    wait(x)
    end, cpu = time.perf_counter(), time.process_time() - cpu
    for leaf in (x, *model.parameters()):
        leaf.grad = None
    return between - start, end - between, cpu


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, by the rule in RULES."""
    gc.collect()
    before = {
        t.untyped_storage().data_ptr()
        for t in gc.get_objects()
        if issubclass(type(t), Tensor) and t.device.type != "meta"
    }
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(kept.values())


def flops(model: nn.Module, x: Tensor, upstream: Tensor) -> int:
    """Floating-point operations of the matrix products in one step: what no other program can disturb."""
    with FlopCounterMode(display=False) as counter:
        step(model, x, upstream)
    return counter.get_total_flops()


def measure(tokens: int, depth: int, rounds: int, args: argparse.Namespace) -> dict:
    torch.manual_seed(args.seed)
    width, heads = (32, 2) if args.quick else (1024, 16)
    stack = nn.Sequential(*(Block(width, heads) for _ in range(depth))).requires_grad_(False).to(args.device)
    x = torch.randn(tokens, width, device=args.device, requires_grad=True)
    upstream = torch.randn(tokens, width, device=args.device) / tokens
    configs = contenders(args.quick, peers=tokens == min(args.tokens))
    models = {name: build(stack, config) for name, config in configs.items()}
    saved = {name: saved_bytes(model, x) for name, model in models.items()}
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    names = list(models)
    work = {name: flops(model, x, upstream) for name, model in models.items()}  # warms up, too
    for round_ in range(rounds):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            seen[name].append(step(models[name], x, upstream))
        print(f"{tokens} tokens: round {round_ + 1} of {rounds}", flush=True)
    total = {name: [f + b for f, b, _ in steps] for name, steps in seen.items()}
    cpu = {name: [c for *_, c in steps] for name, steps in seen.items()}
    rows = {
        name: {
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "saved_mib": round(saved[name] / 2**20, 3),
            "saved_over_base_mib": round((saved[name] - saved["frozen base"]) / 2**20, 3),
            "gflop": round(work[name] / 1e9, 3),
            "gflop_ratio": round(work[name] / work["frozen base"], 4),
            "forward_seconds": summary(f for f, *_ in seen[name]),
            "backward_seconds": summary(b for _, b, _ in seen[name]),
            "seconds": summary(total[name]),
            "ratio": paired(total[name], total["frozen base"]),
            "cpu_ratio": paired(cpu[name], cpu["frozen base"]),
        }
        for name, model in models.items()
    }
    return {"tokens": tokens, "blocks": depth, "width": width, "heads": heads, "contenders": rows}


def paired(times: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return round(median(t / b for t, b in zip(times, base, strict=True)), 4)


def show(case: dict) -> None:
    timed = ("forward_seconds", "backward_seconds", "seconds")
    rows = [
        [name, r["trainable_parameters"], r["saved_mib"], r["saved_over_base_mib"]]
        + [1000 * r[key]["median"] for key in timed]
        + [r["ratio"], r["cpu_ratio"], r["gflop_ratio"]]
        for name, r in case["contenders"].items()
    ]
    columns = ["", "trainable", "saved MiB", "over base", "forward ms", "backward ms", "step ms"]
    columns += ["/ base", "CPU / base", "flop / base"]
    table(f"{case['blocks']} block(s) of width {case['width']}, {case['tokens']} tokens", columns, rows)


def targets(cases: list[dict], quick: bool) -> list[dict]:
    """The limits that the project has set itself; times count from 4096 tokens on."""
    small, middle, large = (2, 8, 16) if quick else (16, 64, 256)
    found: list[dict] = []

    def add(target: str, measured: float, limit: float) -> None:
        found.append({"target": target, "measured": measured, "reached": measured <= limit})

    for case in cases:
        rows, tokens = case["contenders"], case["tokens"]
        if tokens >= 4096 or quick:
            for dim, limit in ((middle, 1.08), (large, 1.25)):
                add(
                    f"step at D={dim}, auto, {tokens} tokens <= {limit} x base",
                    rows[f"attrsub D={dim} auto"]["ratio"],
                    limit,
                )
        for dim in (middle, large):
            slower = rows[f"attrsub D={dim} auto"]["ratio"] / rows[f"LoRA r={dim}"]["ratio"]
            add(f"step at D={dim}, auto, {tokens} tokens <= 1 x LoRA r={dim}", round(slower, 4), 1.0)
        saved = rows[f"attrsub D={middle} auto"]["saved_mib"] / rows[f"LoRA r={small}"]["saved_mib"]
        add(f"saved at D={middle}, auto, {tokens} tokens <= 0.70 x LoRA r={small}", round(saved, 4), 0.70)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1374, 4096])
    parser.add_argument("--blocks", type=int, default=1, help="blocks in the stack")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (not run so far)")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: shows that the script works, measures nothing"
    )
    parser.add_argument("--output", help="JSON file; default results/tuner.json, and none with --quick")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.rounds = [12], 2
    settings = {"rounds": args.rounds, "targets": TARGETS, "dtype": "float32", "device": args.device}
    result = header("tuner", args.seed, args.quick, **settings)
    result["cases"] = [measure(tokens, args.blocks, args.rounds, args) for tokens in args.tokens]
    result["crossover"] = crossover(args.quick, max(2, args.rounds - 1), args.seed, args.device)
    result["choice"] = fit(result["crossover"])
    result["bfloat16"] = bfloat16_errors(args.quick, args.seed, args.device)
    result["targets"] = targets(result["cases"], args.quick)
    result["rules"] = RULES
    for case in result["cases"]:
        show(case)
    columns = ["W", "tokens", "D", "pass", "thin ms", "folded ms", "thin / folded", "auto"]
    rows = [
        [f"{r['n']}x{r['m']}", r["tokens"], r["d"], r["pass"], r["thin_ms"], r["folded_ms"], r["ratio"], r["auto"]]
        for r in result["crossover"]
    ]
    table("One linear: what the update adds to the base", columns, rows)
    table("The choice", ["", "value"], [[key, value] for key, value in result["choice"].items()])
    columns = ["|dW| / |W|", "factored", "folded"]
    rows = [[r["relative_update"], r["factored"], r["folded"]] for r in result["bfloat16"]]
    table("bfloat16: relative error of the update against float64", columns, rows)
    columns = ["target", "measured", "reached"]
    table("Targets", columns, [[t[key] for key in columns] for t in result["targets"]])
    write_result(result, "tuner", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
