"""Work split over the processes of `accelerate launch`; a single process passes through untouched."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_available() and dist.is_initialized())


def process_share(items: list[str]) -> tuple[list[str], bool]:
    """This process' share of the items, and whether it is the main process."""
    if not _launched():
        return items, True
    from accelerate import PartialState

    state = PartialState()
    return items[state.process_index :: state.num_processes], state.is_main_process


def gather(found: dict[str, Any]) -> dict[str, Any]:
    """The results of all processes, in every process."""
    if not _launched():
        return found
    from accelerate.utils import gather_object

    merged: dict[str, Any] = {}
    for part in gather_object([found]):
        merged.update(part)
    return merged
