"""The benchmarks by name: which reader opens one, and the protocol by which the paper measures it.

face        synthetic prints, micro-baseline, 7 frames: Acc, Comp, NC on the pixels of the face
face-real   long bursts of printed faces with a phone's depth, 21 frames: AbsRel, delta
human       clothed people (THuman2.1, 2K2K), 8 of 96 views around: Acc, Comp, NC
clearpose   transparent objects on a table, 12 frames: Acc, Comp, NC over the whole image
scenes      datasets of our own generator; not in the paper
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .base import MultiViewDataset

Split = Literal["all", "train", "test"]
BENCHMARKS = ("face", "face-real", "human", "clearpose", "scenes")


@dataclass(frozen=True)
class Protocol:
    """How a benchmark is measured.

    metrics: "points" (Acc, Comp, NC of point maps) or "depth" (AbsRel, delta). scale: the printed unit of Acc and
    Comp, or of AbsRel. align, icp_threshold: of point maps, in the unit of the truth; depth_align: of depth maps;
    None where they are not used. frames: the rule, in words. unit: what depths are in.
    """

    name: str
    title: str
    metrics: Literal["points", "depth"]
    scale: float
    unit: str
    frames: str
    align: str | None = None
    icp_threshold: float | None = None
    depth_align: str | None = None


def _points(name: str, title: str, scale: float, unit: str, frames: str) -> Protocol:
    return Protocol(name, title, "points", scale, unit, frames, align="sim3+icp", icp_threshold=0.1)


# Source: paper, tables of section 4 (printed units), and its release (frames, alignments, thresholds).
_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _points("face", "Synthetic faces", 1e-3, "scene", "7 of 42, evenly from the first: 0, 6, ..., 36"),
        Protocol(
            "face-real",
            "Real faces",
            "depth",
            1e-2,
            "m",
            "every second of the burst: 21 of 42",
            depth_align="release",
        ),
        _points("human", "Clothed humans", 1e-3, "height", "8 of 96 around, evenly from the first: 0, 12, ..., 84"),
        _points("clearpose", "ClearPose", 1e-2, "m", "12 of the m downsampled frames: int(i (m - 1) / 11)"),
        _points("scenes", "Generated scenes", 1e-2, "m", "all views of a scene"),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of a benchmark, by its name; ValueError for another name."""
    if name not in _PROTOCOLS:
        raise ValueError(f"there is no benchmark {name!r}: give one of {', '.join(BENCHMARKS)}.")
    return _PROTOCOLS[name]


def open_benchmark(name: str, root: str | os.PathLike[str], **options: Any) -> MultiViewDataset:
    """The test sequences of a benchmark under `root`, each with the frames of its protocol.

    options go to the reader: `sequences` fixes sequences and frames (a map or a JSON file of one) for every
    benchmark. face: masks=False counts the whole picture. human: split="train" or "test" takes THuman's part of the
    people in the folder (`splits.thuman_split`), "all" (the default) those that were rendered. face and human:
    views=None reads all frames.
    """
    protocol(name)  # refuses other names
    if name == "face":
        return _face(root, **options)
    if name == "human":
        return _human(root, **options)
    if name == "face-real":
        from .bursts import BurstDataset

        return BurstDataset(root, **options)
    if name == "clearpose":
        from .clearpose import ClearPoseDataset

        return ClearPoseDataset(root, **options)
    from .scenes import SceneDataset

    return SceneDataset(root, **options)


def _face(root: str | os.PathLike[str], **options: Any) -> MultiViewDataset:
    from .rendered import RenderedDataset

    return RenderedDataset(root, **{"views": 7, "masks": True, "unit": "scene", **options})


def _human(root: str | os.PathLike[str], split: Split = "all", **options: Any) -> MultiViewDataset:
    from .rendered import RenderedDataset
    from .splits import thuman_split

    options = {"views": 8, "unit": "height", **options}
    dataset = RenderedDataset(root, **options)
    if split == "all":
        return dataset
    if options.get("sequences") is not None:
        raise ValueError("both sequences and a split were given: a list of sequences is a split already, give one.")
    if not (chosen := thuman_split(dataset.names, split)):
        raise ValueError(f"{root} holds nobody of THuman's split {split!r}: it has {len(dataset)} people.")
    return RenderedDataset(root, **{**options, "sequences": dict.fromkeys(chosen, ())})


__all__ = ["BENCHMARKS", "Protocol", "open_benchmark", "protocol"]
