"""One run, from settings to a saved adapter: everything around the loop.

OUT/settings.yaml     what the run was made with; it is continued with the same, or refused
OUT/precision.json    which precision was chosen for the device, and why
OUT/base.json         which weights it began with: name, revision, sha256, seed where untrained
OUT/checkpoints/      step-00000500/ ..., the last ones and the best
OUT/log.jsonl         numbers of every logged step; OUT/panels/ pictures of a held-out sequence
OUT/adapter/          what PEFT loads (OUT/model/ with method full), OUT/best/ the same at the best evaluation
OUT/summary.json      written last: its presence means that the run is done
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from _model import identify, load_base, load_config
from accelerate import Accelerator

from peft_attrsub import calibrate_start
from peft_attrsub.basis.identity import BaseIdentity
from peft_attrsub.datasets import MultiViewDataset
from peft_attrsub.evaluation.files import write_atomically
from peft_attrsub.vggt import Precision, VggtLoss, VggtModel

from . import checkpoints
from .augment import Augmentation
from .batches import TrainingData, plan_for, read_steps
from .checks import BASE, check_run_base
from .ema import Ema
from .guard import NanGuard, learning_rate
from .heldout import HeldOut, evaluate, merged
from .logs import Log
from .loop import Loop
from .memory import describe, free_memory, peak_memory, plan_memory
from .methods import Built, build, recompute, save
from .options import DataSettings, ModelSettings, TrainSettings
from .precision import accelerate_precision, resolve, settle
from .settings import to_yaml
from .sources import open_data
from .stopper import Stopper

SETTINGS, SUMMARY, MEMORY = "settings.yaml", "summary.json", "memory.json"
#: Fields of DataSettings that the plan of a step is made from.
PLAN = ("views_min", "views_max", "images_per_step", "image_size", "aspect_min", "aspect_max")
#: What may differ when a run is continued: it changes no number of it.
FREE = ("data", "eval_data", "workers", "out", "log_every", "tracker", "keep", "auto_memory", "check")


def load_vggt(settings: ModelSettings) -> VggtModel:
    """The base that the settings name; evaluate.py loads the same."""
    return load_base(settings.model, settings.random_weights)


def run(
    model: ModelSettings,
    data: DataSettings,
    train: TrainSettings,
    *,
    vggt: VggtModel | None = None,
    base: BaseIdentity | None = None,
    tags: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Train, or go on training, and return what summary.json holds; {"stopped": signal} where a signal ended it.

    vggt: the base, where it is loaded already; a LoRA's layers are taken off it again at the end, other methods may
    change it. base: what `_model.identify` says of it, where that is known already; it goes into the adapter's config.
    tags: JSON values for that too. Raises ValueError or OSError with a sentence, before the
    first step where the reason can be known.
    """
    if train.out is None:
        raise ValueError("--out is missing: give the folder of the run.")
    out = Path(train.out)
    tracker = None if train.tracker == "none" else train.tracker
    accelerator = accelerator or Accelerator(
        # Without a device accelerate has to be told, or it would not see the other processes of torchrun.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=accelerate_precision(),
        log_with=tracker,
        project_dir=str(out),
    )
    stored = _stored_settings(out)
    train = resolve(train, stored)
    if stored:
        _same_settings(out, stored, model, data, train)
    if (done := _finished(out)) is not None:
        return done
    # The config alone: data that does not fit is refused before gigabytes of weights are read.
    config = vggt.config if vggt is not None else load_config(model.model, model.random_weights)
    patch = config.patch_size
    data.check_patch(patch)
    dataset, learn, held = open_data(data, patch)
    loaded = vggt or load_vggt(model)
    base = base or identify(loaded, model.model, model.random_weights)
    check_run_base(out, base)
    built = build(loaded, model, steps=train.steps, seed=train.seed, base=base)
    try:
        # Only now: settings that cannot work leave no folder that refuses others.
        precision, told = settle(train, out, accelerator, continued=bool(stored))
        train = replace(train, precision=precision.name)
        _keep_settings(out, to_yaml(model, data, train), base, accelerator)
        with Stopper() as stopper:
            if train.auto_memory:
                train = _fit_memory(built, data, train, out, accelerator)
            tags = dict(tags or {}) | {"base": base.to_dict()}
            work = _Work(accelerator, built, dataset, learn, held, data, train, precision, out, tags, out.name)
            return work.go(stopper, told)
    finally:
        if vggt is not None and vggt is not built.model:
            built.model.unload()  # type: ignore[operator]  # PEFT's, of an adapter


def _finished(out: Path) -> dict[str, Any] | None:
    path = out / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _values(*settings: Any) -> dict[str, Any]:
    """What decides the numbers of a run, as YAML and JSON hold it."""
    values: dict[str, Any] = {}
    for part in settings:
        values |= asdict(part)
    return {key: value for key, value in json.loads(json.dumps(values)).items() if key not in FREE}


def _stored_settings(out: Path) -> dict[str, Any]:
    """The settings of the run in a folder; {} where there is none yet."""
    path = out / SETTINGS
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}


def _same_settings(out: Path, before: Mapping[str, Any], *settings: Any) -> None:
    """ValueError, naming the first difference, where the folder holds a run of other settings."""
    now = _values(*settings)
    for key in now:
        if before.get(key) != now[key]:
            raise ValueError(
                f"{out} holds a run with {key} = {before.get(key)!r}, and this one has {now[key]!r}: give another "
                "folder, or remove that one."
            )


def _keep_settings(out: Path, text: str, base: BaseIdentity, accelerator: Accelerator) -> None:
    if accelerator.is_main_process and not (out / SETTINGS).exists():
        write_atomically(out / BASE, (json.dumps(base.to_dict(), indent=1) + "\n").encode())
        write_atomically(out / SETTINGS, text.encode())
    accelerator.wait_for_everyone()


def _fit_memory(
    built: Built, data: DataSettings, train: TrainSettings, out: Path, accelerator: Accelerator
) -> TrainSettings:
    """--auto-memory: the settings with as many micro-batches as it takes, and the blocks that recompute switched.

    A run that is continued keeps its division, since other micro-batches would be another run.
    """
    path = out / MEMORY
    with accelerator.main_process_first():
        if not path.exists():
            plan = plan_memory(
                built.base.config,
                describe(built.model),
                image_size=data.image_size,
                views=data.views_max,
                images_per_step=data.images_per_step,
                free_bytes=free_memory(accelerator.device),
                processes=accelerator.num_processes,
                precision=train.precision,
                ema=train.ema > 0,
            )
            record = {"accumulate": plan.accumulate, "checkpoint_blocks": plan.checkpoint_blocks, "why": plan.why}
            write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    record = json.loads(path.read_text(encoding="utf-8"))
    accelerator.print(record["why"])
    recompute(built.base, record["checkpoint_blocks"])
    return replace(train, accumulate=record["accumulate"])


class _Work:
    """The pieces of one run, put together."""

    def __init__(
        self,
        accelerator: Accelerator,
        built: Built,
        dataset: MultiViewDataset,
        learn: Sequence[str],
        held: HeldOut | None,
        data: DataSettings,
        train: TrainSettings,
        precision: Precision,
        out: Path,
        tags: Mapping[str, Any] | None,
        name: str,
    ) -> None:
        self.accelerator, self.built, self.held, self.train, self.out = accelerator, built, held, train, out
        self.tags, self.name, self.workers = dict(tags or {}), name, data.workers
        self.precision = precision
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if precision.scaled else None
        plan = plan_for(
            dataset,
            learn,
            seed=train.seed,
            accumulate=train.accumulate,
            window=data.window if data.frames == "nearby" else None,
            patch_size=built.base.config.patch_size,
            **{key: getattr(data, key) for key in PLAN},
        )
        rank, world = accelerator.process_index, accelerator.num_processes
        self.batches = TrainingData(dataset, learn, plan, Augmentation.of(data), rank, world)
        self.loss = VggtLoss(
            camera_weight=train.camera_weight,
            depth_weight=train.depth_weight,
            depth_gradient="grad" if train.depth_gradient else None,
            quantile=None if train.quantile == 1 else train.quantile,
            nonfinite="skip",
        )
        if built.settings.calibrate and checkpoints.latest(self.folder) is None:
            self.calibrate()
        optimizer = torch.optim.AdamW(
            built.optimizer_groups(train.lora_a_ratio),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
        )
        self.model, self.optimizer = accelerator.prepare(built.model, optimizer)
        self.guard = NanGuard(out, train.max_skipped)
        self.ema = Ema(built.model, train.ema) if train.ema else None
        self.best: float | None = None
        self.seconds, self.images = 0.0, 0

    def calibrate(self) -> None:
        """Find the scales of the consensus start on the data of the first steps, which training then begins with."""
        device, model = self.accelerator.device, self.built.model
        steps = read_steps(self.batches, 0, self.built.settings.calibrate, workers=0)
        batches = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            for _, micro in steps
            for batch in micro
        ]

        def loss_fn(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
            dtype = self.precision.dtype
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = model(pixel_values=batch["images"])
            return self.loss(output, batch).total

        calibrate_start(model.to(device), batches, loss_fn, verbose=self.accelerator.is_main_process)

    def go(self, stopper: Stopper, told: str) -> dict[str, Any]:
        """Every step that is left, or those up to a signal. told: the line about the precision."""
        train = self.train
        first = self.resume()
        log = Log(self.accelerator, self.out, train.steps, first, train.log_every, train.tracker, self.name)
        if first == 0:
            log.say(f"base: {BaseIdentity.of(self.tags['base'])}")
            log.say(self.built.table)
        if told:
            log.say(told)
        loop = self.loop()
        try:
            for number, micro in read_steps(self.batches, first, train.steps, self.workers):
                result = loop.step(number, micro)
                self.seconds, self.images = self.seconds + result.seconds, self.images + result.images
                log.step(result, peak_memory(self.accelerator.device))
                taken = number + 1
                stopping = self.anybody(stopper.asked is not None)
                metric = None
                if self.held and train.eval_every and (taken % train.eval_every == 0 or taken == train.steps):
                    metric = self.measure(taken, log)
                if taken % train.checkpoint_every == 0 or taken == train.steps or stopping or metric is not None:
                    self.checkpoint(taken, metric)
                if stopping and taken < train.steps:
                    log.say(f"stopped by a signal after step {taken}: the same command continues")
                    return {"stopped": stopper.asked or signal.SIGTERM, "steps": taken}
        finally:
            log.close()
        return self.finish()

    def loop(self) -> Loop:
        train = self.train

        def rate(step: int) -> float:
            return learning_rate(
                step,
                train.steps,
                train.lr,
                start=train.lr_start,
                final=train.lr_final,
                warmup_share=train.warmup_share,
            )

        after = [lambda step: self.built.after_step(step + 1)]
        if self.ema is not None:
            average = self.ema
            after.append(lambda step: average.update(self.built.model))
        return Loop(
            self.accelerator,
            self.model,
            self.optimizer,
            self.loss,
            self.built.groups,
            rate,
            clip=train.clip,
            clip_groups=train.clip_groups,
            dtype=self.precision.dtype,
            scaler=self.scaler,
            seed=train.seed,
            extra_loss=self.built.penalty,
            after=after,
            guard=self.guard,
        )

    def anybody(self, wish: bool) -> bool:
        """Whether any process has the wish; all learn of it at the same step."""
        if self.accelerator.num_processes == 1:
            return wish
        flag = torch.tensor(float(wish), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def measure(self, taken: int, log: Log) -> float | None:
        """Evaluate on what is held out; the loss, by which the best checkpoint is chosen."""
        assert self.held is not None
        train, accelerator = self.train, self.accelerator
        panel = None
        if train.panel_every and taken % train.panel_every == 0 and accelerator.is_main_process:
            panel = self.out / "panels" / f"step-{taken:08d}.png"
        with self.averaged():
            sums = evaluate(
                self.built.model,
                self.held,
                self.loss,
                accelerator.device,
                accelerator.process_index,
                accelerator.num_processes,
                panel,
            )
        if accelerator.num_processes > 1:
            values = torch.tensor(list(sums.values()), dtype=torch.float64, device=accelerator.device)
            total = accelerator.reduce(values, reduction="sum").tolist()
            sums = dict(zip(sums, total, strict=True))
        means = merged(sums)
        log.write(taken, {f"eval/{key}": value for key, value in means.items()})
        log.say(f"step {taken}: " + ", ".join(f"held-out {key} {value:.4f}" for key, value in means.items()))
        loss = means.get("loss")
        if loss is not None and (self.best is None or loss < self.best):
            self.best = loss
            self.export("best", taken)
        return loss

    def averaged(self) -> Any:
        """Inside, the model has the running mean of its weights, where one is kept."""
        return nullcontext() if self.ema is None else self.ema.applied(self.built.model)

    def export(self, name: str, taken: int) -> None:
        """Save the adapter (or the model) for people; the first process does."""
        if self.accelerator.is_main_process:
            with self.averaged():
                save(self.built, self.out / name, self.tags | {"steps": taken, "seed": self.train.seed})

    def checkpoint(self, taken: int, metric: float | None) -> None:
        """The state after `taken` steps; what a step draws follows from its number, so no generator is stored."""
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {
                "model": self.built.state(),
                "optimizer": self.optimizer.state_dict(),
                "guard": self.guard.state_dict(),
                "counts": {"best": self.best, "seconds": self.seconds, "images": self.images},
            }
            if self.ema is not None:
                state["ema"] = self.ema.state_dict()
            if self.scaler is not None:
                state["scaler"] = self.scaler.state_dict()
            checkpoints.save(self.folder, taken, state, keep=self.train.keep, metric=metric)
        self.accelerator.wait_for_everyone()

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def resume(self) -> int:
        """Take up the last checkpoint, if there is one; how many steps are done."""
        last = checkpoints.latest(self.folder)
        if last is None:
            return 0
        state = checkpoints.load(last)
        self.built.load_state(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        self.best, self.seconds, self.images = (state["counts"][key] for key in ("best", "seconds", "images"))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        return last.step

    def finish(self) -> dict[str, Any]:
        """The adapter and the summary."""
        self.export("model" if self.built.settings.method == "full" else "adapter", self.train.steps)
        summary = {
            "steps": self.train.steps,
            "trainable_parameters": self.built.trainable,
            "best_eval_loss": self.best,
            "skipped_steps": self.guard.skipped,
            "skipped_terms": dict(self.guard.terms),
            "overflows": self.guard.overflows,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.images / max(self.seconds, 1e-9), 2),
            "peak_memory_gib": round(peak_memory(self.accelerator.device) / 2**30, 3),
            "processes": self.accelerator.num_processes,
            "precision": self.precision.record(),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "tags": self.tags,
        }
        if self.accelerator.is_main_process:
            write_atomically(self.out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
            print(
                f"{self.out}: {self.train.steps} steps, {self.images} images, {summary['images_per_second']} images/s,"
                f" peak memory {summary['peak_memory_gib']} GiB, {self.guard.skipped} steps left out",
                flush=True,
            )
        self.accelerator.wait_for_everyone()
        return summary
