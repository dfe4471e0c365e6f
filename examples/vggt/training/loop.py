"""The one training loop: micro-batches to steps, steps to checkpoints, on one device or many by accelerate.

The gradient of a step is the mean over its images, whatever shapes its micro-batches have:

    g = sum_j (n_j / n) grad L_j ,   n_j images in micro-batch j, n = sum_j n_j over all processes.

Two processes that share the micro-batches of a step therefore do what one process does alone with all of them. What
is drawn at random in a step follows from (seed, step, process) alone, and so does its data: a run that continues from
a checkpoint makes the steps that an undisturbed one makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from peft_attrsub.vggt import VggtLoss

from .guard import NanGuard, agree, clip_gradients, is_of_gradient, nonfinite_norm

Batch = dict[str, Any]


@dataclass
class StepResult:
    """What one step did. terms: means over its images, by name, "loss" among them. norms: of the gradient by group and
    in "total", before clipping. images: over all processes. skipped: the name of what was not finite, or None.
    loss_scale: of the gradient scaler in this step, None without one. overflow: the step is left out because a
    gradient overflowed at that scale, which the scaler then halves."""

    step: int
    terms: dict[str, float]
    norms: dict[str, float]
    images: int
    seconds: float
    lr: float
    skipped: str | None = None
    loss_scale: float | None = None
    overflow: bool = False


@dataclass
class Loop:
    """Everything a step needs. model: as accelerate prepared it. groups: trained parameters by their part.

    clip: largest norm, of each group or (clip_groups False) of all together; 0: no limit. lr: of a step; a group of
    the optimiser may have a "ratio" to it. dtype: of autocast, None for float32. scaler: of the loss, by default one
    for float16, where small gradients would underflow, and a disabled one for other dtypes. after: called with the
    step once the optimiser has moved (AdaLoRA's ranks, an average).
    guard: counts the steps that are left out, and ends the run. bad_batch: the micro-batch behind the last of them.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: VggtLoss
    groups: dict[str, list[nn.Parameter]]
    lr: Callable[[int], float]
    clip: float = 0.0
    clip_groups: bool = False
    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    seed: int = 0
    extra_loss: Callable[[], Tensor | None] = lambda: None
    after: list[Callable[[int], None]] = field(default_factory=list)
    guard: NanGuard | None = None
    bad_batch: Batch | None = None

    def __post_init__(self) -> None:
        if self.scaler is None and self.dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(self.accelerator.device.type)

    def step(self, number: int, micro: Iterable[Batch]) -> StepResult:
        """One step of the optimiser on this process's micro-batches, which must be as many as the others'."""
        start = time.monotonic()
        self.seed_all(number)
        batches = list(micro)
        world = self.accelerator.num_processes
        mine = sum(count_images(batch) for batch in batches)
        total = int(self._sum(torch.tensor(float(mine))))
        sums: dict[str, float] = {}
        bad: str | None = None
        self.bad_batch = batches[-1]
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            quiet = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
            with quiet:
                # accelerate and DDP take the mean over processes: times `world` it is their sum.
                terms, name = self._backward(batch, world * count_images(batch) / total)
            if name is not None and bad is None:
                bad, self.bad_batch = name, batch
            share = count_images(batch) / total
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + share * value
        terms = {key: float(self._sum(torch.tensor(value))) for key, value in sorted(sums.items())}
        scaler = self._scaler()
        loss_scale = None if scaler is None else scaler.get_scale()
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.groups, self.clip, by_group=self.clip_groups)
        # All processes leave a step out, or none.
        bad = agree(bad or nonfinite_norm(norms), self.accelerator.device)
        # At a scale of 1 or less the gradient itself is out of range, and the guard counts it.
        overflow = is_of_gradient(bad) and loss_scale is not None and loss_scale > 1
        left_out = overflow or (self.guard.skips(number, bad, self.bad_batch) if self.guard else bad is not None)
        if overflow and self.guard:
            self.guard.overflows += 1
        if scaler is not None:
            scaler.update()
        rate = self.lr(number)
        if not left_out:
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("ratio", 1.0)
            self.optimizer.step()
            for act in self.after:
                act(number)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        return StepResult(number, terms, norms, total, seconds, rate, bad, loss_scale, overflow)

    def _backward(self, batch: Batch, weight: float) -> tuple[dict[str, float], str | None]:
        device = self.accelerator.device
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
            output = self.model(pixel_values=batch["images"])
        found = self.loss(output, batch)
        total = found.total
        more = self.extra_loss()
        if more is not None:
            total = total + more
        scaler = self.scaler
        self.accelerator.backward(total * weight if scaler is None else scaler.scale(total * weight))
        terms = {key: float(value.detach()) for key, value in found.terms.items()}
        terms["loss"] = float(found.total.detach())
        # A mean with a NaN in it says nothing: such a micro-batch is named instead.
        return {key: value for key, value in terms.items() if np.isfinite(value)}, found.nonfinite

    def _scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler where it is enabled and there are gradients to scale back."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        return self.scaler if any(p.grad is not None for p in trained) else None

    def _sum(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.to(self.accelerator.device), reduction="sum").cpu()

    def seed_all(self, number: int) -> None:
        """Make what step `number` draws on this process a function of the seed, the step and the process alone."""
        words = f"{self.seed} {number} {self.accelerator.process_index}".encode()
        value = int.from_bytes(hashlib.sha256(words).digest()[:4], "little")
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)


def count_images(batch: Batch) -> int:
    """Scenes times views."""
    return int(batch["images"].shape[0] * batch["images"].shape[1])
