"""The pre-training run: steps that depend on the seed and their number alone, checkpoints, and held-out measures."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from training.ema import Ema

from peft_attrsub.datasets.resizing import resize_intrinsics
from peft_attrsub.vggt import VggtConfig, VggtModel
from peft_attrsub.vggt.batch import normalise_scene
from peft_attrsub.vggt.cameras import encode_pose
from peft_attrsub.vggt.losses import CAMERA_WEIGHTS, camera_loss, dense_loss
from peft_attrsub.vggt.precision import AUTO, Precision, choose_precision, keep_precision, parse_precision

from .batches import training_batch
from .hints import Hints, relative_error
from .scenes import Shards

CHECKPOINT, LOG, HELD_OUT = "checkpoint.pt", "log.jsonl", "held-out.jsonl"


@dataclass(frozen=True)
class Plan:
    """The run. Only `steps`, the weights, `evaluate` and `log` may change while it is under way.

    steps: of the whole run; the rate rises over `warmup` steps to `lr`, stays, and falls to 0 over the last `cool`
    share of it. batch: scenes per step, of `views` views, of which `deep` have the dense head at work. small: side
    of the pictures in the first `small_share` of the steps. reach: share of a scene's path that views are drawn
    from; it grows from `reach` to 1 over the first `near_share` of the steps. decay: of weights, beta: of squared
    gradients (AdamW); ema: of the running mean. weights: of the loss's parts. evaluate, log: every so many steps.
    """

    steps: int = 20000
    batch: int = 4
    views: int = 4
    deep: int = 2
    lr: float = 1e-3
    warmup: int = 200
    cool: float = 0.3
    decay: float = 0.05
    beta: float = 0.98
    clip: float = 1.0
    ema: float = 0.998
    small: int = 64
    small_share: float = 0.6
    reach: float = 0.0
    near_share: float = 0.15
    seed: int = 0
    camera_weight: float = 10.0
    depth_weight: float = 3.0
    relative_weight: float = 3.0
    match_weight: float = 0.3
    attend_weight: float = 0.3
    points_weight: float = 2.0
    evaluate: int = 1000
    log: int = 50

    @property
    def weights(self) -> dict[str, float]:
        """Of the loss's parts, by their names."""
        return {key: getattr(self, key) for key in WEIGHTS}

    def rate(self, step: int) -> float:
        """Learning rate of a step: lr min(1, (step + 1) / warmup, (steps - step) / (cool steps))."""
        end = max(self.cool * self.steps, 1)
        return self.lr * min(1.0, (step + 1) / max(self.warmup, 1), max(self.steps - step, 0) / end)

    def window(self, step: int) -> float:
        """Share of the path that views of this step come from."""
        share = min(1.0, step / max(self.near_share * self.steps, 1))
        return self.reach + (1 - self.reach) * share


WEIGHTS = tuple(field.name for field in fields(Plan) if field.name.endswith("_weight"))


class Run:
    """Model, hints, optimiser and running mean of a run in the folder `out`, continued where it was left.

    precision: as `choose_precision` takes it; a run that is continued keeps its own. told: the line to print about it.
    """

    def __init__(
        self, config: VggtConfig, plan: Plan, shards: Shards | None, out: Path, precision: str = AUTO
    ) -> None:
        self.plan, self.shards, self.out = plan, shards, out
        torch.manual_seed(plan.seed)
        self.model = VggtModel(config)
        self.hints = Hints(self.model)
        self.parameters = [p for p in (*self.model.parameters(), *self.hints.parameters()) if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1 and p.shape[0] > 1], "weight_decay": plan.decay},
            {"params": [p for p in self.parameters if not (p.dim() > 1 and p.shape[0] > 1)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, plan.beta), fused=True)
        self.ema = Ema(self.model, plan.ema)
        self.step, self.seconds = 0, 0.0
        #: Step from which on, and the weights of the loss.
        self.weighed: list[tuple[int, dict[str, float]]] = []
        self.precision, self.told = self._choose(precision)
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.precision.scaled)
        self._resume()
        if not self.weighed or self.weighed[-1][1] != self.plan.weights:
            self.weighed.append((self.step, self.plan.weights))

    def _choose(self, requested: str) -> tuple[Precision, str]:
        path, name = self.out / CHECKPOINT, parse_precision(requested, "--precision")
        if not path.exists():
            chosen = choose_precision("cpu", name)
            return chosen, str(chosen)
        # Checkpoints of older versions are of bf16 and do not say so.
        older = {"precision": "bf16", "requested": "unknown", "why": "stored with the run"}
        kept = Precision.of(torch.load(path, weights_only=True, mmap=True).get("precision", older))
        if name not in (AUTO, kept.name):
            raise ValueError(
                f"{path} is of a run with precision={kept.name!r}, not {name!r}: continue it as it was, or choose "
                "another folder."
            )
        return kept, keep_precision(kept, "cpu")

    def _resume(self) -> None:
        path = self.out / CHECKPOINT
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        mine, theirs = _fixed(asdict(self.plan)), _fixed(state["plan"])
        odd = [key for key in mine if mine[key] != theirs.get(key)]
        if odd:
            raise ValueError(
                f"{path} is of a run with {odd[0]}={theirs.get(odd[0])!r}, not {mine[odd[0]]!r}: continue it as it "
                "was, or choose another folder."
            )
        self.model.load_state_dict(state["model"])
        self.hints.load_state_dict(state["hints"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        if self.precision.scaled:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.weighed = [(step, weights) for step, weights in state["weighed"]]
        if self.shards is None:
            self.plan = Plan(**state["plan"])

    def save(self) -> None:
        state = {
            "plan": asdict(self.plan),
            "model": self.model.state_dict(),
            "hints": self.hints.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "weighed": self.weighed,
            "precision": self.precision.record(),
            "scaler": self.scaler.state_dict(),
        }
        beside = self.out / f".{CHECKPOINT}.{os.getpid()}"
        torch.save(state, beside)
        os.replace(beside, self.out / CHECKPOINT)

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Total and its terms for one batch, of images as they are."""
        plan, model, config = self.plan, self.model, self.model.config
        truth = normalise_scene(batch)
        size = truth["depths"].shape[-2:]
        deep = torch.randperm(plan.views, generator=generator)[: plan.deep]
        with self.precision.autocast("cpu"):
            tokens = model.aggregator(batch["images"], {*config.dpt_layers, config.depth - 1})
            poses = model.camera_head(tokens[config.depth - 1][:, :, 0].float())
            depth, confidence = model.depth_head([tokens[i][:, deep] for i in config.dpt_layers], tuple(size))
            terms = self.hints(tokens[config.depth - 1], truth)
        target = encode_pose(truth["extrinsics"], truth["intrinsics"], tuple(size))
        cameras = camera_loss([p.float() for p in poses], target, torch.ones(len(target), dtype=torch.bool))
        seen, mask = truth["depths"][:, deep, ..., None], truth["point_masks"][:, deep]
        # Rendered depth has no outliers to leave out.
        dense = dense_loss(depth.float(), confidence.float(), seen, mask, quantile=None)
        terms |= {f"camera_{k}": v for k, v in cameras.items()} | {f"depth_{k}": v for k, v in dense.items()}
        terms["relative"] = relative_error(depth[..., 0].float(), seen[..., 0], mask)
        total = plan.camera_weight * sum(CAMERA_WEIGHTS[name] * term for name, term in cameras.items())
        total = total + plan.depth_weight * sum(dense.values()) + plan.relative_weight * terms["relative"]
        total = total + plan.points_weight * terms["points"] + plan.match_weight * terms["match"]
        if "attend" in terms:
            total = total + plan.attend_weight * terms["attend"]
        return total, terms

    def one_step(self) -> dict[str, float]:
        """One step of the optimiser; its terms. A gradient that is not finite changes nothing."""
        assert self.shards is not None, "a run without scenes can be measured and exported, not trained"
        plan = self.plan
        batch = training_batch(self.shards, plan.batch, plan.views, plan.window(self.step), plan.seed, self.step)
        if self.step < plan.small_share * plan.steps:
            batch = shrink(batch, plan.small)
        self.model.train()
        self.hints.train()
        total, terms = self.losses(batch, torch.Generator().manual_seed(self.step))
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(self.step)
        if bool(norm.isfinite()):
            self.optimizer.step()
            self.ema.update(self.model)
        self.scaler.update()
        self.step += 1
        return {"loss": float(total.detach()), "norm": float(norm)} | {k: float(v.detach()) for k, v in terms.items()}


def _fixed(plan: dict[str, Any]) -> dict[str, Any]:
    """What of a plan may not change when a run goes on."""
    return {key: value for key, value in plan.items() if key not in ("steps", "evaluate", "log", *WEIGHTS)}


def shrink(batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The batch with square pictures of `size` pixels: colours averaged, depths of the nearest pixel."""
    old = batch["depths"].shape[-1]
    if size >= old:
        return batch
    b, s = batch["depths"].shape[:2]
    images = F.interpolate(batch["images"].flatten(0, 1), (size, size), mode="bilinear", antialias=True)
    nearest = ((torch.arange(size) + 0.5) * old / size - 0.5).round().long()
    intrinsics = resize_intrinsics(batch["intrinsics"], (old, old), (size, size))
    maps = {k: batch[k][..., nearest, :][..., nearest] for k in ("depths", "point_masks")}
    return batch | maps | {"images": images.unflatten(0, (b, s)), "intrinsics": intrinsics}


def train(
    run: Run, minutes: float | None = None, measure: Callable[[], Any] | None = None, save_minutes: float = 3.0
) -> int:
    """Steps until the plan's end, for `minutes`, or to SIGINT or SIGTERM; what is done is saved.

    measure: called every plan.evaluate steps and at the end of the plan. Returns 0, or 128 + n after signal n.
    """
    stopped: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda got, _: stopped.append(got))
    try:
        _steps(run, stopped, minutes, measure, save_minutes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + stopped[0] if stopped else 0


def _steps(
    run: Run, stopped: list[int], minutes: float | None, measure: Callable[[], Any] | None, save_minutes: float
) -> None:
    start = saved = last = time.monotonic()
    sums: dict[str, float] = {}
    count = 0
    while run.step < run.plan.steps and not stopped and (minutes is None or last - start < 60 * minutes):
        for key, value in run.one_step().items():
            sums[key] = sums.get(key, 0.0) + value
        count += 1
        now = time.monotonic()
        run.seconds += now - last
        last = now
        if run.step % run.plan.log == 0 or run.step == run.plan.steps:
            _note(run, {key: value / count for key, value in sums.items()})
            sums, count = {}, 0
        if run.step % run.plan.evaluate == 0 or run.step == run.plan.steps:
            run.save()
            if measure is not None:
                measure()
            saved = last = time.monotonic()
        elif now - saved >= 60 * save_minutes:
            run.save()
            saved = now
    run.save()


def _note(run: Run, means: dict[str, float]) -> None:
    record = {"step": run.step, "seconds": round(run.seconds, 1), "lr": run.plan.rate(run.step - 1)}
    record |= {key: round(value, 4) for key, value in means.items()}
    with (run.out / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), file=sys.stderr, flush=True)
