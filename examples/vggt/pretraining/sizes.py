"""The two runs that there are: the real one, and a toy to try the script."""

from __future__ import annotations

from dataclasses import replace

from peft_attrsub.vggt import VggtConfig

from .run import Plan

_TOY = {
    "image_size": 32,
    "embed_dim": 32,
    "depth": 2,
    "encoder_depth": 1,
    "dpt_features": 16,
    "dpt_channels": (16, 16, 16, 16),
}


def sizes(toy: bool = False, steps: int | None = None) -> tuple[VggtConfig, Plan]:
    """Model and plan; steps: in place of the plan's own."""
    config = VggtConfig.preset("vggt-mini", **(_TOY if toy else {}), dpt_frames_chunk=0)
    # On a CPU, plain products are faster than its fused kernel for sequences this short, above all backward.
    config._attn_implementation = "eager"
    plan = Plan(steps=8, batch=2, warmup=2, small=24, evaluate=4) if toy else Plan()
    return config, plan if steps is None else replace(plan, steps=steps)
