"""Multi-view datasets on disk, all read to one contract: `Sample`. `open_benchmark` opens one by name."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .base import MultiViewDataset, read_sequence_map
    from .bursts import BurstDataset
    from .clearpose import ClearPoseDataset
    from .opening import BENCHMARKS, Protocol, open_benchmark, protocol
    from .rendered import RenderedDataset
    from .resizing import crop, resize
    from .sample import Sample
    from .scenes import SceneDataset
    from .writing import RenderedWriter
else:
    # Readers load with their first use: most programs need one of them.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".base": ["MultiViewDataset", "read_sequence_map"],
            ".bursts": ["BurstDataset"],
            ".clearpose": ["ClearPoseDataset"],
            ".opening": ["BENCHMARKS", "Protocol", "open_benchmark", "protocol"],
            ".rendered": ["RenderedDataset"],
            ".resizing": ["crop", "resize"],
            ".sample": ["Sample"],
            ".scenes": ["SceneDataset"],
            ".writing": ["RenderedWriter"],
        },
    )

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
