"""The trained model as a folder: weights in bfloat16, config, image processor, training log, and a card."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from peft_attrsub.evaluation.files import write_atomically
from peft_attrsub.vggt import VggtConfig, VggtImageProcessor

from .run import HELD_OUT, LOG, Run
from .scenes import SEEDS

#: Lines of the losses that the training log keeps at most.
LINES = 200
_METADATA = {"format": "pt"}


def export(run: Run, found: Mapping[str, Any], folder: Path, scenes: int, note: str = "") -> None:
    """Write the running mean of the weights to `folder`.

    found: its measures. scenes: how many it learnt from. note: what else is to be said of the run on its card.
    """
    config = run.model.config
    with run.ema.applied(run.model):
        weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in run.model.state_dict().items()}
    write_atomically(folder / "model.safetensors", save(weights, metadata=_METADATA))
    with tempfile.TemporaryDirectory() as beside:
        # Read as float32 by default: bfloat16 is for the file alone.
        config.dtype = torch.float32
        # Chunks bound the memory of those who use it; the training had none.
        config.dpt_frames_chunk = VggtConfig().dpt_frames_chunk
        config.architectures = [type(run.model).__name__]
        config.save_pretrained(beside)
        VggtImageProcessor(image_size=config.image_size, patch_size=config.patch_size).save_pretrained(beside)
        for name in ("config.json", "preprocessor_config.json"):
            write_atomically(folder / name, Path(beside, name).read_bytes())
    record = log_of(run, found, scenes) | ({"note": note} if note else {})
    write_atomically(folder / "training_log.json", (json.dumps(record, indent=1) + "\n").encode())
    parameters = sum(tensor.numel() for tensor in weights.values())
    write_atomically(folder / "README.md", card(run, found, scenes, parameters, note).encode())


def log_of(run: Run, found: Mapping[str, Any], scenes: int) -> dict[str, Any]:
    """Plan, measures and thinned losses, in words that hold on any machine."""
    losses, heldout = _lines(run.out / LOG), _lines(run.out / HELD_OUT)
    every = max(1, -(-len(losses) // LINES))
    return {
        "plan": asdict(run.plan),
        "weights": [{"from_step": step} | weights for step, weights in run.weighed],
        "scenes": {"seed": SEEDS["train"], "count": scenes, "views": 8},
        "steps": run.step,
        "precision": run.precision.record(),
        "hours": round(run.seconds / 3600, 2),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "result": dict(found),
        "held_out": heldout,
        "losses": losses[::every],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a log in the order of their steps, each step once, as it was last."""
    if not path.exists():
        return []
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        found[record["step"]] = record
    return [found[step] for step in sorted(found)]


def card(run: Run, found: Mapping[str, Any], scenes: int, parameters: int, note: str) -> str:
    """README.md of the folder."""
    config, trivial, direction = run.model.config, found["trivial"], found["translation_degrees"]
    values = {
        "size": config.image_size,
        "millions": f"{parameters / 1e6:.1f}",
        "heads": ", ".join(config.heads),
        "held_out": found["scenes"],
        "pairs": found["pairs"],
        "views": run.plan.views,
        "abs_rel": f"{found['abs_rel']:.4f}",
        "flat": f"{trivial['abs_rel']:.4f}",
        "rotation": f"{found['rotation_degrees']:.1f}",
        "still": f"{trivial['rotation_degrees']:.1f}",
        "direction": "not measured" if direction is None else f"{direction:.1f}",
        "scenes": scenes,
        "planned": run.plan.steps,
        "steps": run.step,
        "batch": run.plan.batch,
        "hours": f"{run.seconds / 3600:.1f}",
        "precision": _PRECISIONS[run.precision.name],
        "note": f"\n{note}\n" if note else "",
    }
    return _CARD.format(**values)


_PRECISIONS = {"bf16": "bfloat16 autocast", "fp16": "float16 autocast", "fp32": "float32"}
_CARD = """---
license: apache-2.0
library_name: transformers
tags: [vggt, depth-estimation, camera-pose]
---

# vggt-mini

A VGGT (Visual Geometry Grounded Transformer) of {millions} M parameters, trained from scratch on made scenes, to try
methods of fine-tuning in minutes on a CPU. It has seen nothing but rooms and objects made of boxes, balls and
cylinders, at {size} x {size} pixels, and is of no use for photographs.

```python
from peft_attrsub.vggt import VggtModel

model = VggtModel.from_pretrained("vggt-mini")  # in a clone of peft-attrsub; elsewhere the path of this folder
```

The weights are stored in bfloat16 and loaded as float32. Heads: {heads}.

## What it reaches

On {held_out} held-out scenes of the same kind, {views} views each ({pairs} pairs of views):

| | this model | trivial answer |
|---|---|---|
| depth, AbsRel after one scale per scene | {abs_rel} | {flat} (constant) |
| relative rotation, median error, degrees | {rotation} | {still} (none) |
| relative translation, median error of its direction, degrees | {direction} | 90 (any) |

## How it was made

`examples/vggt/pretrain_mini.py --scenes {scenes} --steps {planned}`: {steps} steps of {batch} scenes with {views}
views each, {hours} hours on a CPU in {precision}. The scenes are those of `peft_attrsub.scenes` (recipe
"mixed": everything varies mildly), ray cast. The losses are VGGT's for cameras and depth, and hints that only
training sees: matches between views, a point map from a linear layer, and the error of depth relative to it
(`examples/vggt/pretraining/hints.py`). The weights are the running mean. `training_log.json` has plan and curves.
{note}"""
