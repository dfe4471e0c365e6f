"""The precision of a run: chosen once for the device, stored in the run's folder, and kept when the run continues.

OUT/precision.json    {"precision": "bf16", "requested": "auto", "why": "..."}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from peft_attrsub.evaluation.files import write_atomically
from peft_attrsub.vggt.precision import AUTO, Precision, choose_precision, keep_precision, parse_precision

from .options import TrainSettings

FILE = "precision.json"
#: Parameters are divided over the processes: no process sees all gradients, so a gradient scaler cannot check them.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def accelerate_precision() -> str | None:
    """For Accelerator(mixed_precision=...): "no", since the loop has its own autocast and scaler. None, which means
    the user's configuration, with DeepSpeed, whose engine holds the weights in it."""
    return None if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" else "no"


def resolve(train: TrainSettings, stored: Mapping[str, Any]) -> TrainSettings:
    """The settings with the stored precision in place of "auto". stored: settings of the run that continues, or {}."""
    if train.precision != AUTO or not stored:
        return train
    return replace(train, precision=parse_precision(stored["precision"]))


def settle(train: TrainSettings, out: Path, accelerator: Accelerator, continued: bool) -> tuple[Precision, str]:
    """The precision of the run in `out`, and the line to print before the first step.

    A new run chooses for this device and stores the choice. One that continues, on whatever machine, has what it
    began with; the line then says what this machine would have chosen. train: of a run that continues, as `resolve`
    gave them. One of an older version has no precision.json: its settings name the precision.

    Raises: ValueError for fp16 where parameters are sharded, and for what the device cannot compute.
    """
    path = out / FILE
    if not continued:
        chosen = _chosen(train.precision, accelerator)
        with accelerator.main_process_first():
            # The other processes have what the first one chose: their devices might differ.
            if accelerator.is_main_process:
                write_atomically(path, (json.dumps(chosen.record(), indent=1) + "\n").encode())
        chosen = Precision.kept(path, None)
        return chosen, str(chosen)
    kept = Precision.kept(path, train.precision)
    return kept, keep_precision(kept, accelerator.device)


def _chosen(requested: str, accelerator: Accelerator) -> Precision:
    chosen = choose_precision(accelerator.device, requested)
    if chosen.scaled and accelerator.distributed_type in SHARDED:
        kind = accelerator.distributed_type.value
        if requested != AUTO:
            raise ValueError(
                f"precision fp16 needs a gradient scaler, which {kind} does not go with: use bf16 or fp32."
            )
        return replace(chosen, name="fp32", why=f"{chosen.why}, but fp16 does not go with {kind}")
    return chosen
