"""Work split over the processes of `accelerate launch`; a single process passes through untouched."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from .errors import BasisError


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_available() and dist.is_initialized())


def process_share(items: list[str]) -> tuple[list[str], bool]:
    """This process' share of the items, and whether it is the main process."""
    if not _launched():
        return items, True
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Left to itself, accelerate starts no process group where there is no accelerator.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)
    return items[state.process_index :: state.num_processes], state.is_main_process


def is_main_process() -> bool:
    """Whether this process is the one that speaks."""
    return process_share([])[1]


def gather(found: dict[str, Any], failure: BasisError | None) -> dict[str, Any]:
    """The results of all processes, in every process; the failure of one ends all of them alike."""
    if not _launched():
        if failure:
            raise failure
        return found
    from accelerate.utils import gather_object

    merged: dict[str, Any] = {}
    parts = gather_object([(found, str(failure) if failure else None)])
    for part, reason in parts:
        if reason:
            raise BasisError(reason)
        merged.update(part)
    return merged
