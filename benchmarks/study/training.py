"""One training run on one core, by the parts of examples/vggt/training: `build`, the plan of batches, and `Loop`.

`training.run.run` itself is not called: it saves checkpoints, an adapter and logs, and would load the adapter again to
measure it, where a run here takes less than a minute and is made anew if it is stopped.
"""

from __future__ import annotations

import copy
import time
import types
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .settings import Study

#: As in the paper's recipe; the warm-up is longer, since runs are short.
WARMUP, DECAY, CLIP = 0.1, 0.05, 0.5
#: Views of a scene come from a window of this many times as many frames.
WINDOW = 2.0


class Base:
    """The base of a study, loaded once per process, made to be fast on the CPU.

    Attention is the plain one in every precision, so that precisions differ by their rounding alone. Fused attention
    takes 1.2 times as long a step in bf16, and the same within 10 % in float32. Heads run in the caller's autocast,
    as vggt-mini's did while it was trained; VggtModel itself keeps them in float32 whatever the autocast, which is
    slower. Without autocast, in float32, there is no difference.
    """

    _held: dict[str, Any] = {}  # noqa: RUF012 (one per process, on purpose)

    @classmethod
    def get(cls, name: str) -> Any:
        """The model in eval mode; to be copied before it is changed."""
        if name not in cls._held:
            from _model import load_base

            model = load_base(name).eval()
            model.set_attn_implementation("eager")
            for head in (model.camera_head, model.depth_head):
                head.forward = types.MethodType(_in_callers_autocast(type(head).forward), head)
            # What autocast is must be known before the model switches it off around its heads.
            model.aggregator.register_forward_pre_hook(_note_autocast)
            cls._held[name] = model
        return cls._held[name]


_AUTOCAST: list[torch.dtype | None] = [None]


def _note_autocast(model: Any, arguments: Any) -> None:
    _AUTOCAST[0] = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _in_callers_autocast(forward: Any) -> Any:
    def run(self: Any, *arguments: Any) -> Any:
        with torch.autocast("cpu", dtype=_AUTOCAST[0], enabled=_AUTOCAST[0] is not None):
            found = forward(self, *arguments)
        return type(found)(part.float() for part in found)

    return run


def pixels(study: Study, config: Any) -> int:
    """Longer side of the pictures, in whole patches."""
    size = study.size or config.image_size
    return max(1, round(size / config.patch_size)) * config.patch_size


def build_model(study: Study, options: dict[str, Any], seed: int, steps: int) -> Any:
    """A copy of the base with a method on its aggregator; the heads stay frozen (see the rules of the study)."""
    from training.methods import build
    from training.options import ModelSettings

    settings = ModelSettings(model=study.model, heads="frozen", gradient_checkpointing=["none"], **options)
    return build(copy.deepcopy(Base.get(study.model)), settings, steps=steps, seed=seed)


def make_batches(
    dataset: Any, names: Sequence[str], study: Study, config: Any, *, seed: int, images: int, aspect: float
) -> Any:
    """Batches of `images` pictures, study.views_tuned of each scene, changed as in the paper's recipe."""
    from training.augment import Augmentation
    from training.batches import TrainingData, plan_for

    size = pixels(study, config)
    plan = plan_for(
        dataset,
        names,
        seed=seed,
        views_min=study.views_tuned,
        views_max=study.views_tuned,
        images_per_step=images,
        image_size=size,
        patch_size=config.patch_size,
        aspect_min=aspect,
        aspect_max=aspect,
        window=WINDOW,
    )
    return TrainingData(dataset, names, plan, Augmentation())


def fit(
    built: Any, batches: Any, study: Study, *, steps: int, lr: float, seed: int, lora_a_ratio: float = 1.0
) -> dict[str, Any]:
    """Train for `steps` steps; the means of the loss over tenths of the run, steps left out, seconds."""
    from accelerate import Accelerator
    from training.batches import read_steps
    from training.guard import learning_rate
    from training.loop import Loop

    from peft_attrsub.vggt import VggtLoss, choose_precision

    optimizer = torch.optim.AdamW(built.optimizer_groups(lora_a_ratio), lr=lr, weight_decay=DECAY)
    loop = Loop(
        Accelerator(cpu=True),
        built.model,
        optimizer,
        VggtLoss(camera_weight=5.0, depth_weight=1.0, depth_gradient="grad", quantile=0.98, nonfinite="skip"),
        built.groups,
        lambda step: learning_rate(step, steps, lr, warmup_share=WARMUP),
        clip=CLIP,
        dtype=choose_precision("cpu", study.precision).dtype,
        seed=seed,
        extra_loss=built.penalty,
        after=[lambda step: built.after_step(step + 1)],
    )
    start, losses, skipped = time.monotonic(), [], 0
    for number, micro in read_steps(batches, 0, steps):
        result = loop.step(number, micro)
        losses.append(result.terms.get("loss", float("nan")))
        skipped += result.skipped is not None and not result.overflow
    built.model.eval()
    return {"losses": tenths(losses), "skipped": skipped, "seconds": round(time.monotonic() - start, 2)}


def tenths(values: Sequence[float]) -> list[float]:
    """Means over ten equal parts of a curve, or the curve itself where it is shorter; NaN-free parts only count."""
    parts = min(10, len(values))
    bounds = [len(values) * i // parts for i in range(parts + 1)]
    found = []
    for low, high in pairwise(bounds):
        good = [value for value in values[low:high] if value == value]
        found.append(round(sum(good) / len(good), 6) if good else None)
    return found


def save_state(built: Any, path: Path) -> None:
    """What was trained, and the method's own memory, for a measurement later on."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    save_file({key: value.detach().contiguous().clone() for key, value in built.state().items()}, str(beside))
    beside.replace(path)


def load_state(built: Any, path: Path) -> None:
    from safetensors.torch import load_file

    built.load_state(load_file(str(path)))
    built.model.eval()
