"""From settings to sequences: what a run learns from, and what it is measured on while it learns."""

from __future__ import annotations

from typing import Any

from peft_attrsub.datasets import MultiViewDataset, open_benchmark

from .heldout import HeldOut, hold_out
from .options import DataSettings

#: Splits that are learnt from where the settings name none; the others have no splits, or are not to be split.
TRAIN_SPLIT = {"clearpose": "train"}


def open_data(settings: DataSettings, patch: int) -> tuple[MultiViewDataset, list[str], HeldOut | None]:
    """(dataset, names to learn from, held-out sequences or None). patch: side of VGGT's patches.

    Held out is what --eval-data or --eval-split names, else a share of the sequences themselves. Raises OSError or
    ValueError with a sentence where a folder does not hold the benchmark, or nothing would be left to learn from.
    """
    dataset = open_learnt(settings)
    elsewhere = (settings.eval_data, settings.eval_split, settings.eval_sequences)
    if any(value is not None for value in elsewhere):
        other = _open(
            settings.benchmark, settings.eval_data or str(settings.data), settings.eval_split, settings.eval_sequences
        )
        if settings.eval_data is None and (both := sorted(set(dataset.names) & set(other.names))):
            raise ValueError(f"{both[0]} is both learnt from and held out: give splits or lists that do not meet.")
        learn, source, names = list(dataset.names), other, other.names[: settings.eval_limit]
    else:
        learn, held = hold_out(dataset.names, settings.eval_share, settings.eval_limit)
        source, names = dataset, tuple(held)
    if not names:
        return dataset, learn, None
    return dataset, learn, HeldOut(source, tuple(names), settings.views_max, settings.image_size, patch)


def open_learnt(settings: DataSettings) -> MultiViewDataset:
    """The dataset that is learnt from, held-out sequences included where nothing names others."""
    if settings.data is None:
        raise ValueError("--data is missing: give the folder of the scenes to learn from.")
    split = settings.split or TRAIN_SPLIT.get(settings.benchmark)
    return _open(settings.benchmark, settings.data, split, settings.sequences)


def _open(benchmark: str, root: str, split: str | None, sequences: str | None) -> MultiViewDataset:
    options: dict[str, Any] = {}
    if split is not None:
        if benchmark not in ("human", "clearpose"):
            raise ValueError(f"--split {split} was given: only human and clearpose have splits, {benchmark} has none.")
        options["split"] = split
    if sequences is not None:
        options["sequences"] = sequences
    return open_benchmark(benchmark, root, **options)
