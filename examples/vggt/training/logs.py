"""What a person sees of a run: a progress bar, a line of JSON per logged step, curves, and a summary at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from peft_attrsub.evaluation.files import write_atomically

from .loop import StepResult

LOG = "log.jsonl"


class Log:
    """Of the first process; the others stay silent. out/log.jsonl is cut back to `first` when a run continues, so
    that every step stands in it once."""

    def __init__(
        self, accelerator: Accelerator, out: Path, steps: int, first: int, every: int, tracker: str, name: str
    ) -> None:
        self.accelerator, self.every, self.path = accelerator, every, out / LOG
        self.main = accelerator.is_main_process
        self.tracked = tracker != "none"
        self.images, self.seconds = 0, 0.0
        if self.main:
            self._cut(first)
            self.bar = tqdm(total=steps, initial=first, unit="step", desc=name, dynamic_ncols=True)
        if self.tracked:
            accelerator.init_trackers(name)

    def _cut(self, first: int) -> None:
        """Leave out what a killed run logged after its last checkpoint."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed run
                break
            if record["step"] < first:
                kept.append(line)
        write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())

    def step(self, result: StepResult, memory: int) -> None:
        """Take note of a step. memory: the peak so far, in bytes."""
        self.images += result.images
        self.seconds += result.seconds
        if not self.main:
            return
        rate = self.images / max(self.seconds, 1e-9)
        self.bar.update()
        loss = result.terms.get("loss", math.nan)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} images/s, {memory / 2**30:.1f} GiB")
        if result.overflow:
            self.bar.write(
                f"step {result.step}: {result.skipped} overflowed in fp16 at a loss scale of {result.loss_scale:g}: "
                "the step is left out, the scale is halved"
            )
        elif result.skipped:
            self.bar.write(f"step {result.step}: {result.skipped} is not finite, the step is left out")
        if result.skipped or result.step % self.every == 0:
            values = {f"loss/{key}": value for key, value in result.terms.items()}
            values |= {f"gradient/{key}": value for key, value in result.norms.items()}
            values |= {"lr": result.lr, "images_per_second": rate, "memory_gib": memory / 2**30}
            values |= {} if result.loss_scale is None else {"loss_scale": result.loss_scale}
            self.write(result.step, values, {"skipped": result.skipped} if result.skipped else {})

    def write(self, step: int, values: Mapping[str, float], words: Mapping[str, Any] | None = None) -> None:
        """Numbers of one step, to the file and to the curves; what is not finite is left out of them."""
        if not self.main:
            return
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite, **(words or {})}) + "\n")
        if self.tracked:
            self.accelerator.log(finite, step=step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.main:
            self.bar.write(text)

    def close(self) -> None:
        """End the bar and the curves."""
        if self.main:
            self.bar.close()
        for tracker in self.accelerator.trackers:  # not end_training, which takes the process group along
            tracker.finish()
