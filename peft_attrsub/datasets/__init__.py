"""Multi-view datasets on disk, all read to one contract: `Sample`. `open_benchmark` opens one by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .base import MultiViewDataset, read_sequence_map
from .opening import BENCHMARKS, Protocol, open_benchmark, protocol
from .resizing import crop, resize
from .sample import Sample

if TYPE_CHECKING:
    from .bursts import BurstDataset
    from .clearpose import ClearPoseDataset
    from .rendered import RenderedDataset
    from .scenes import SceneDataset
    from .writing import RenderedWriter

# Readers load with their first use: most programs need one of them.
_LATER = {
    "BurstDataset": "bursts",
    "ClearPoseDataset": "clearpose",
    "RenderedDataset": "rendered",
    "RenderedWriter": "writing",
    "SceneDataset": "scenes",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)


__all__ = [
    "BENCHMARKS",
    "BurstDataset",
    "ClearPoseDataset",
    "MultiViewDataset",
    "Protocol",
    "RenderedDataset",
    "RenderedWriter",
    "Sample",
    "SceneDataset",
    "crop",
    "open_benchmark",
    "protocol",
    "read_sequence_map",
    "resize",
]
