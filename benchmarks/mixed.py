"""What does a batch of 64 samples cost when its samples use 1, 8 or 64 adapters?

    python benchmarks/mixed.py [--tokens 1 32] [--rounds 4] [--quick]

One transformer block of VGGT's size (width 1024, 16 heads, MLP 4096) on 64 short sequences, inference, through stock
PEFT: `model(x, adapter_names=[...])`. Ours beside LoRA of the same trained size (at D=64 that is r=1) and of the same
width, and beside what one does without mixed batches: merge an adapter, run its samples, unmerge, next.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from functools import partial

import torch
from _common import Timer, header, median, print_anything, summary, table, write_result
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig

TARGETS = ["qkv", "proj", "fc1", "fc2"]
MERGING = "merging one at a time"
TARGET_RATIO = 1.3
RULES = {
    "seconds": "one forward pass of the whole batch without gradients; contenders in turn within a round, their order "
    "rotated; median over rounds",
    "ratio_to_one": "median over rounds of the batch with that many adapters / the same contender's batch with one "
    "adapter (named once per sample) in the same round; cpu_ratio_to_one: the same of the CPU seconds of all threads",
    "ratio_to_base": "the same against the frozen base without any adapter",
    "samples": "adapters take turns: sample i uses adapter i mod (number of adapters)",
    "merging": "for each adapter: merge, run its samples as one batch, unmerge; ours is what is merged; fewer rounds",
    "difference": "largest difference from merging / largest output, for our mixed batch with an adapter per sample",
}


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, .)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


def words(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def configs(quick: bool) -> dict[str, object]:
    """{name: PEFT config}; the second has the trained size of the first, the last its width."""
    dim = 8 if quick else 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, object] = {
            f"attrsub D={dim}": AttrSubspaceConfig(
                basis="random", dim=dim, target_modules=TARGETS, init_weights=False, scaling=0.1
            )
        }
        for r in (1, dim):
            found[f"LoRA r={r}"] = LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS, init_lora_weights=False)
    return found


def build(stack: nn.Module, config: object, adapters: int) -> PeftModel:
    """`stack` with that many adapters of one config, each drawn anew."""
    model = get_peft_model(copy.deepcopy(stack), copy.deepcopy(config), adapter_name="0")
    for i in range(1, adapters):
        model.add_adapter(str(i), copy.deepcopy(config))
    return model.eval()


def names(samples: int, adapters: int) -> list[str]:
    return [str(i % adapters) for i in range(samples)]


def merged(model: PeftModel, x: Tensor, adapters: int) -> Tensor:
    """The batch without mixed batches: one adapter after the other, merged into the base."""
    who = torch.arange(len(x)) % adapters
    y = torch.empty_like(x)
    for i in range(adapters):
        model.merge_adapter([str(i)])
        y[who == i] = model(x[who == i])
        model.unmerge_adapter()
    return y


def measure(tokens: int, models: dict[str, PeftModel], base: nn.Module, counts: list[int], args) -> dict:
    samples = counts[-1]
    width = next(p.shape[-1] for n, p in base.named_parameters() if n.endswith("norm1.weight"))
    x = torch.randn(samples, tokens, width, generator=torch.Generator().manual_seed(args.seed))
    calls = {("frozen base", 0): lambda: base(x)}
    for name, model in models.items():
        for count in counts:
            who = names(samples, count)
            calls[name, count] = partial(model, x, adapter_names=who)
    (ours, *_) = models.values()
    seen: dict[tuple[str, int], list[dict]] = {key: [] for key in calls}
    keys = list(calls)
    with torch.no_grad():
        for call in calls.values():
            call()  # warms up
        for round_ in range(args.rounds):
            turn = round_ % len(keys)
            for key in keys[turn:] + keys[:turn]:
                with Timer() as timer:
                    calls[key]()
                seen[key].append(timer.report())
            print(f"{words(tokens)} a sample: round {round_ + 1} of {args.rounds}", flush=True)
        difference = None
        # Slow, and hardly different for shorter samples: merging is measured on the longest only.
        for count in counts if tokens == max(args.tokens) else []:
            runs = seen[MERGING, count] = []
            for _ in range(args.merging_rounds):
                with Timer() as timer:
                    expected = merged(ours, x, count)
                runs.append(timer.report())
            if count == samples:
                gap = (calls[next(iter(models)), count]() - expected).abs().max()
                difference = float(gap / expected.abs().max())
    rows = [row(name, count, seen, models) for name, count in seen]
    return {"tokens": tokens, "samples": samples, "difference": difference, "rows": rows}


def row(name: str, count: int, seen: dict[tuple[str, int], list[dict]], models: dict[str, PeftModel]) -> dict:
    def ratio(other: tuple[str, int], what: str) -> float | None:
        # Merging has fewer rounds than the others: its ratios are of medians.
        own, against = ([run[what] for run in seen[key]] for key in ((name, count), other))
        if len(own) != len(against):
            return round(median(own) / median(against), 4)
        return round(median(a / b for a, b in zip(own, against, strict=True)), 4)

    found = {
        "contender": name,
        "adapters": count,
        "seconds": summary(run["seconds"] for run in seen[name, count]),
        "ratio_to_base": ratio(("frozen base", 0), "seconds"),
    }
    if count:
        found["ratio_to_one"] = ratio((name, 1), "seconds")
        found["cpu_ratio_to_one"] = ratio((name, 1), "cpu_seconds")
    if name in models:
        own = [p.numel() for n, p in models[name].named_parameters() if n.endswith((".0", ".0.weight"))]
        found["trained_parameters_each"] = sum(own)
    return found


def target(case: dict) -> dict:
    """The cost of as many adapters as samples against one."""
    ours = next(r for r in case["rows"] if r["contender"].startswith("attrsub") and r["adapters"] == case["samples"])
    return {
        "target": f"{case['samples']} adapters at most {TARGET_RATIO} x one, {words(case['tokens'])} a sample",
        "measured": f"{ours['ratio_to_one']:.2f} x",
        "reached": ours["ratio_to_one"] <= TARGET_RATIO,
    }


def show(case: dict) -> None:
    rows = []
    for r in case["rows"]:
        name = f"{r['contender']}, {r['adapters']} adapter(s)" if r["adapters"] else r["contender"]
        ratios = [r.get(key, "-") for key in ("ratio_to_base", "ratio_to_one", "cpu_ratio_to_one")]
        rows.append([name, 1000 * r["seconds"]["median"], *ratios])
    title = f"{case['samples']} samples of {words(case['tokens'])}"
    if case["difference"] is not None:
        title += f"; mixed and merged differ by {case['difference']:.1e} of the largest output"
    table(title, ["", "ms", "/ base", "/ one adapter", "CPU / one adapter"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32], help="of a sample")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--merging-rounds", type=int, default=1, help="of merging one at a time, which is slow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: shows that the script works, measures nothing"
    )
    parser.add_argument("--output", help="JSON file; default results/mixed.json, and none with --quick")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.rounds = [1, 3], 2
    width, heads, blocks, counts = (16, 2, 1, [1, 2, 4]) if args.quick else (1024, 16, 1, [1, 8, 64])
    settings = {"rounds": args.rounds, "merging_rounds": args.merging_rounds, "targets": TARGETS}
    settings |= {"width": width, "heads": heads, "blocks": blocks, "dtype": "float32", "device": "cpu"}
    result = header("mixed", args.seed, args.quick, **settings)
    torch.manual_seed(args.seed)
    base = nn.Sequential(*(Block(width, heads) for _ in range(blocks))).requires_grad_(False).eval()
    models = {name: build(base, config, counts[-1]) for name, config in configs(args.quick).items()}
    result["cases"] = [measure(tokens, models, base, counts, args) for tokens in args.tokens]
    result["targets"] = [target(case) for case in result["cases"]]
    result["rules"] = RULES
    for case in result["cases"]:
        show(case)
    write_result(result, "mixed", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
