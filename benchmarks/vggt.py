"""Time and peak memory of VggtModel by number of frames: forward, and a training step with LoRA and with cores.

    python benchmarks/vggt.py [--device cpu|cuda] [--frames 1 2 4] [--full] [--quick]
    python benchmarks/vggt.py --device cuda --lora 16 64 256 --dims 64 256 --frames 1 4 8 16

On a CPU a smaller model at 224 px (the preset "small": 384 wide, 12 + 12 blocks) in float32; on a GPU vggt-1b at
518 px under bf16 autocast (fp16 on an older GPU), LoRA 16/64/256 and D = 64/256 with and without checkpointing:
written for a GPU, run so far on CPUs only. Weights are random; time and memory do not depend on them. Every case is a
process of its own, but for --quick.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

import torch
from _common import PeakMemory, Timer, header, load, print_anything, summary, table, write_result

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.vggt import Precision, VggtConfig, VggtModel, choose_precision

SMALL: dict[str, Any] = {
    "image_size": 224,
    "embed_dim": 384,
    "depth": 12,
    "num_heads": 6,
    "encoder_depth": 12,
    "encoder_num_heads": 6,
    "camera_num_heads": 12,
    "dpt_features": 64,
    "dpt_channels": (48, 96, 192, 192),
}
TINY = SMALL | {"image_size": 56, "depth": 4, "encoder_depth": 2}
SIZES: dict[str, dict[str, Any]] = {"small": SMALL, "tiny": TINY, "vggt-1b": {}}
FORWARD = ("forward", "forward, all layers kept")
CHECKPOINTED = ", checkpointed"
PRECISIONS = ("float32", "autocast", "bfloat16")
RULES = {
    "seconds": "median of the rounds of one process, after one warm-up",
    "peak_mib": "CPU: anonymous memory above its value before the first forward (weights and adapters are in that "
    "value), sampled every 5 ms, over all rounds; CUDA: torch.cuda.max_memory_allocated above the same",
    "kept_mib": "aggregator outputs alive when the heads start, computed from their shapes and dtype",
    "all layers kept": "the same model holding every aggregator output until the heads have run, as the public code "
    "did",
    "training step": "forward, mean of the outputs, backward; adapters on all aggregator linears; no optimiser",
    "precision": "float32; autocast: float32 weights under autocast to the dtype `autocast`; bfloat16: weights and "
    "pictures in bf16, adapters as PEFT keeps them (float32)",
}


def build(preset: str) -> VggtModel:
    torch.manual_seed(0)
    return VggtModel(VggtConfig(**SIZES[preset]))


def training_kinds(args: argparse.Namespace, gpu: bool) -> list[str]:
    """Names of the trained cases; `adapted` reads them. Checkpointing of LoRA costs a case each: on a GPU only."""
    lora, dims = [f"LoRA r={rank}" for rank in args.lora], [f"cores D={dim}" for dim in args.dims]
    frozen = [f"{name}, encoder frozen" for name in dims[:1] if args.full]
    return [*lora, *dims, *frozen, *(name + CHECKPOINTED for name in ((*lora, *dims) if gpu else dims))]


def adapted(model: VggtModel, kind: str) -> torch.nn.Module:
    """The model as it is trained in the case `kind`: "LoRA r=16", "cores D=64, checkpointed"."""
    from peft import LoraConfig, get_peft_model

    targets = r"aggregator\.(frame|global)_blocks\..*(qkv|proj|fc1|fc2)"
    size = int(kind.partition("=")[2].partition(",")[0])
    if "frozen" in kind:
        model.freeze_encoder()
    if kind.startswith("LoRA"):
        config: Any = LoraConfig(r=size, lora_alpha=2 * size, target_modules=targets)
    else:
        config = AttrSubspaceConfig(basis="random", dim=size, target_modules=targets, init_weights=False)
    tuned = get_peft_model(model, config)
    if kind.endswith(CHECKPOINTED):
        # The older name warns in the newer transformers.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")()
    return tuned.train()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One case in a process of its own."""
    device, kind = torch.device(job["device"]), job["kind"]
    weights = torch.bfloat16 if job["precision"] == "bfloat16" else torch.float32
    model = build(job["preset"]).to(device, weights)
    config, training = model.config, kind not in FORWARD
    if not training:
        model.eval()
        if "all" in kind:
            keep_all(model)
    run = adapted(model, kind) if training else model
    size = config.image_size
    images = torch.rand(1, job["frames"], 3, size, size, device=device, dtype=weights)

    amp = Precision(job["autocast"] if job["precision"] == "autocast" else "fp32", "")

    def step() -> None:
        with amp.autocast(device), torch.set_grad_enabled(training):
            output = run(images)
        if training:
            (output.pose_enc.mean() + output.depth.mean() + output.depth_conf.mean()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = []
    with PeakMemory() as memory:
        step()
        for _ in range(job["rounds"]):
            with Timer() as timer:
                step()
            seconds.append(timer.report()["seconds"])
    peak = memory.anon
    if device.type == "cuda":
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    tokens = (size // config.patch_size) ** 2 + 1 + config.num_register_tokens
    layers = config.depth if "all" in kind else len({*config.dpt_layers, config.depth - 1})
    width = 4 if job["precision"] == "float32" else 2
    kept = layers * job["frames"] * tokens * 2 * config.embed_dim * width / 2**20
    trainable = sum(p.numel() for p in run.parameters() if p.requires_grad) if training else 0
    found = {"peak_mib": peak, "kept_mib": round(kept, 1), "trainable_parameters": trainable, "load": load()}
    return job | {"seconds": seconds} | found


def keep_all(model: VggtModel) -> None:
    """Hold every aggregator output until the heads have run."""
    aggregator = model.aggregator
    inner = aggregator.forward
    aggregator.forward = lambda images, layers: inner(images, set(range(model.config.depth)))


def one_import() -> BaseContext:
    """Fresh processes that import torch once between them: each starts from a server that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft", "peft_attrsub.vggt"])
    return context


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=["small", "vggt-1b"], help="default: vggt-1b on a GPU, else small")
    parser.add_argument("--frames", type=int, nargs="+", help="default: 1 2 4 on a CPU, 1 4 8 16 on a GPU")
    parser.add_argument("--rounds", type=int, help="default: 2 on a CPU, 5 on a GPU")
    parser.add_argument("--lora", type=int, nargs="*", help="ranks; default: 16 on a CPU, 16 64 256 on a GPU")
    parser.add_argument("--dims", type=int, nargs="*", help="of the cores; default: 64 on a CPU, 64 256 on a GPU")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="default: autocast on a GPU that has bf16 or fp16, else float32"
    )
    parser.add_argument("--full", action="store_true", help="1 2 4 8 frames, three rounds, a frozen encoder too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--output", help="where to write the JSON; default benchmarks/results/vggt[-cuda].json")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    args.full = args.full or args.quick
    frames, rounds = ([1, 4, 8, 16], 5) if gpu else ([1, 2, 4, 8], 3) if args.full else ([1, 2, 4], 2)
    if args.quick:
        args.preset, frames, args.rounds = "tiny", [1, 2], 1
    args.preset = args.preset or ("vggt-1b" if gpu else "small")
    args.frames, args.rounds = args.frames or frames, args.rounds or rounds
    chosen = choose_precision(args.device) if gpu else Precision("fp32", "the default on a CPU")
    args.precision = args.precision or ("float32" if chosen.name == "fp32" else "autocast")
    if args.precision != "float32" and chosen.name == "fp32":
        chosen = choose_precision(args.device, "bf16")  # warns where it is emulated
    args.chosen = chosen
    # An empty list is a choice: none of them.
    args.lora = ([16, 64, 256] if gpu else [16]) if args.lora is None else args.lora
    args.dims = ([64, 256] if gpu else [64]) if args.dims is None else args.dims
    if min([*args.frames, args.rounds, *args.lora, *args.dims]) < 1:
        parser.error("--frames, --rounds, --lora and --dims must be 1 or more.")
    return args


def main() -> None:
    args = arguments()
    gpu = args.device.startswith("cuda")
    shared = {"device": args.device, "preset": args.preset, "precision": args.precision, "rounds": args.rounds}
    shared["autocast"] = args.chosen.name
    result = header("vggt", 0, args.quick, **shared, frames=args.frames, lora=args.lora, dims=args.dims)
    result["precision"] = args.chosen.record()
    result["rules"], result["model"] = RULES, json.loads(VggtConfig(**SIZES[args.preset]).to_json_string())
    if gpu:
        result["machine"]["gpu"] = torch.cuda.get_device_name()
    cases = []
    context, training = one_import(), training_kinds(args, gpu)
    for count in args.frames:
        for kind in (*FORWARD, *training):
            job = {**shared, "kind": kind, "frames": count}
            if args.quick:
                case = measure(job)
            else:
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    case = pool.submit(measure, job).result()
            cases.append({**case, "seconds": summary(case["seconds"])})
            print(f"{kind}, {count} frames: {cases[-1]['seconds']['median']:.2f} s", flush=True)
    result["cases"] = cases
    for title, kinds in (("forward", list(FORWARD)), ("training step", training)):
        rows = [
            [c["kind"], c["frames"], c["seconds"]["median"], c["peak_mib"], c["kept_mib"], c["trainable_parameters"]]
            for c in cases
            if c["kind"] in kinds
        ]
        columns = ["case", "frames", "seconds", "peak MiB", "kept MiB", "trainable"]
        table(f"{title}, {args.preset}, {args.device}, {args.precision}", columns, rows)
    write_result(result, "vggt-cuda" if gpu else "vggt", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
