"""Time and peak memory of VggtModel by number of frames: forward, and a training step with LoRA and with cores.

    python benchmarks/vggt.py [--device cpu|cuda] [--preset small|vggt-1b] [--frames 1 2 4 8] [--rounds 3] [--quick]

On a CPU a smaller model at 224 px (the preset "small": 384 wide, 12 + 12 blocks), on a GPU vggt-1b at 518 px under
bf16 autocast. Weights are random; time and memory do not depend on them. Every case is a process of its own, but for
--quick.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from _common import PeakMemory, Timer, header, load, summary, table, write_result

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.vggt import VggtConfig, VggtModel

SMALL = {
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
FORWARD = ("forward", "forward, all layers kept")
TRAIN = ("LoRA r=16", "cores D=64", "cores D=64, encoder frozen", "cores D=64, checkpointed")
RULES = {
    "seconds": "median of the rounds of one process, after one warm-up",
    "peak_mib": "CPU: anonymous memory above its value before the first forward (weights and adapters are in that "
    "value), sampled every 5 ms, over all rounds; CUDA: torch.cuda.max_memory_allocated above the same",
    "kept_mib": "aggregator outputs alive when the heads start, computed from their shapes",
    "all layers kept": "the same model holding every aggregator output until the heads have run, as the public code "
    "did",
    "training step": "forward, mean of the outputs, backward; adapters on all aggregator linears; no optimiser",
}


def build(preset: str) -> VggtModel:
    sizes = {"small": SMALL, "tiny": TINY, "vggt-1b": {}}[preset]
    torch.manual_seed(0)
    return VggtModel(VggtConfig(**sizes))


def adapted(model: VggtModel, kind: str) -> torch.nn.Module:
    """The model as it is trained in the case `kind`."""
    from peft import LoraConfig, get_peft_model

    targets = r"aggregator\.(frame|global)_blocks\..*(qkv|proj|fc1|fc2)"
    if "frozen" in kind:
        model.freeze_encoder()
    if kind.startswith("LoRA"):
        config: Any = LoraConfig(r=16, lora_alpha=32, target_modules=targets)
    else:
        config = AttrSubspaceConfig(basis="random", dim=64, target_modules=targets, init_weights=False)
    tuned = get_peft_model(model, config)
    if "checkpointed" in kind:
        # The older name warns in the newer transformers.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")()
    return tuned.train()


def measure(job: dict) -> dict:
    """One case in a process of its own."""
    device = torch.device(job["device"])
    model = build(job["preset"]).to(device)
    config, kind = model.config, job["kind"]
    if kind in FORWARD:
        model.eval()
        if "all" in kind:
            keep_all(model)
    run = adapted(model, kind) if kind in TRAIN else model
    size = config.image_size
    images = torch.rand(1, job["frames"], 3, size, size, device=device)

    def step() -> None:
        amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with amp, torch.set_grad_enabled(kind in TRAIN):
            output = run(images)
        if kind in TRAIN:
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
    kept = layers * job["frames"] * tokens * 2 * config.embed_dim * 4 / 2**20
    return job | {"seconds": seconds, "peak_mib": peak, "kept_mib": round(kept, 1), "load": load()}


def keep_all(model: VggtModel) -> None:
    """Hold every aggregator output until the heads have run."""
    aggregator = model.aggregator
    inner = aggregator.forward
    aggregator.forward = lambda images, layers: inner(images, set(range(model.config.depth)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=["small", "vggt-1b"], help="default: vggt-1b on a GPU, else small")
    parser.add_argument("--frames", type=int, nargs="+", help="default: 1 2 4 8 on a CPU, 1 4 8 16 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--output", help="where to write the JSON; default benchmarks/results/vggt[-cuda].json")
    args = parser.parse_args()
    gpu = args.device.startswith("cuda")
    preset = "tiny" if args.quick else args.preset or ("vggt-1b" if gpu else "small")
    frames = args.frames or ([1, 2] if args.quick else [1, 4, 8, 16] if gpu else [1, 2, 4, 8])
    rounds = 1 if args.quick else args.rounds
    config = build("tiny").config if args.quick else VggtConfig(**(SMALL if preset == "small" else {}))
    result = header("vggt", 0, args.quick, preset=preset, device=args.device, frames=frames, rounds=rounds)
    result["rules"], result["model"] = RULES, json.loads(config.to_json_string())
    if gpu:
        result["machine"]["gpu"] = torch.cuda.get_device_name()
    cases = []
    context = multiprocessing.get_context("spawn")
    for count in frames:
        for kind in (*FORWARD, *TRAIN):
            job = {"device": args.device, "preset": preset, "kind": kind, "frames": count, "rounds": rounds}
            if args.quick:
                case = measure(job)
            else:
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    case = pool.submit(measure, job).result()
            cases.append({**case, "seconds": summary(case["seconds"])})
    result["cases"] = cases
    for title, kinds in (("forward", FORWARD), ("training step", TRAIN)):
        rows = [
            [c["kind"], c["frames"], c["seconds"]["median"], c["peak_mib"], c["kept_mib"]]
            for c in cases
            if c["kind"] in kinds
        ]
        table(f"{title}, {preset}, {args.device}", ["case", "frames", "seconds", "peak MiB", "kept MiB"], rows)
    write_result(result, "vggt-cuda" if gpu else "vggt", args.output, args.quick)


if __name__ == "__main__":
    main()
