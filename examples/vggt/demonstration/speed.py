"""Measure how fast this machine does what the demo consists of, by doing a little of it.

    python examples/vggt/demonstration/speed.py --out OUT --config training.yaml [--model vggt-mini] [--size 80]

A scene is rendered, and a LoRA is trained on it for a few steps, by the code and settings of the demo's trainings.
OUT/speed.json, in seconds of the clock:

    start   to start a command: packages are imported, weights are loaded, an adapter is saved
    scene   to render a scene of VIEWS views
    step    of the training, without the first, which takes longer

and of the model and the machine: parameters, precision, why, processor, instructions. The exit status is 0, or 2 with
a sentence where something is missing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS = 4


def measure(out: Path, config: Path, model: str, size: int) -> dict[str, Any]:
    """The record of speed.json; leaves a scene and a training run in `out`."""
    import torch
    from training.logs import LOG
    from training.run import load_vggt, run
    from training.settings import parse

    from demonstration.plan import VIEWS
    from peft_attrsub._machine import cpu_name
    from peft_attrsub.scenes.generate import generate
    from peft_attrsub.scenes.sampling import AttributeRecipe

    words = ["--method", "lora", "--rank", "8", "--config", str(config), "--model", model, "--steps", str(STEPS)]
    words += ["--log-every", "1", "--data", str(out / "scene"), "--out", str(out / "training")]
    settings = parse(words)
    vggt = load_vggt(settings[0])
    parameters = sum(parameter.numel() for parameter in vggt.parameters())
    start = time.monotonic() - STARTED

    before = time.monotonic()
    report = generate(out / "scene", AttributeRecipe("mixed", seed=8, size=size, views=VIEWS), 1, workers=1)
    if report.signal is not None:
        raise SystemExit(report.status)
    scene = time.monotonic() - before

    shutil.rmtree(out / "training", ignore_errors=True)  # of a measurement that was stopped
    before = time.monotonic()
    summary = run(*settings, vggt=vggt)
    if "stopped" in summary:
        raise SystemExit(128 + int(summary["stopped"]))
    taken = time.monotonic() - before
    records = [json.loads(line) for line in (out / "training" / LOG).read_text(encoding="utf-8").splitlines()]
    # A record's rate is the mean from the first step on.
    images = summary["images"] / summary["steps"]
    ends = [images * (number + 1) / record["images_per_second"] for number, record in enumerate(records)]
    return {
        "start": round(start + taken - ends[-1], 3),
        "scene": round(scene, 3),
        "step": round((ends[-1] - ends[0]) / (len(ends) - 1), 4),
        "parameters": parameters,
        "precision": summary.get("precision", settings[2].precision),
        "processor": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the scene, the run and speed.json")
    add("--config", type=Path, required=True, help="YAML file of settings, as of finetune.py")
    add("--model", default="vggt-mini", help="as of finetune.py (default: vggt-mini)")
    add("--size", type=int, default=80, help="width and height of the scene in pixels (default: 80)")
    args = parser.parse_args(arguments)
    from demonstration.plan import SPEED
    from peft_attrsub.evaluation.files import write_atomically

    try:
        record = measure(args.out, args.config, args.model, args.size)
    except (ImportError, OSError, ValueError) as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    write_atomically(args.out / SPEED, (json.dumps(record, indent=1) + "\n").encode())
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
