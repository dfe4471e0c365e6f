"""What every reader is: a torch dataset of sequences, by number or by name, with the frames fixed by a file or not."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .sample import Sample

Frames = Sequence[str | int]


def read_sequence_map(path: str | os.PathLike[str]) -> dict[str, list[str | int]]:
    """Name of a sequence -> ids of its frames, from a JSON file {"00_00|theta-5.00_phi0.00_d0.30": [0, 6, ...]}."""
    try:
        record = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): expected {{sequence: [frames]}}.") from error
    good = isinstance(record, dict) and all(
        isinstance(frames, list) and frames and all(type(frame) in (int, str) for frame in frames)
        for frames in record.values()
    )
    if not good or not record:
        raise ValueError(f"{path} holds no map of sequences: expected {{sequence: [frame, frame, ...], ...}}.")
    return record


class MultiViewDataset(torch.utils.data.Dataset[Sample], ABC):
    """Sequences of views: `dataset[0]`, `dataset.read("name", frames)`, `len(dataset)`, `dataset.names`.

    A reader says what sequences there are (`_find`), what frames one has (`frames`) and reads them (`_read`).
    sequences: a map from name to frame ids, or the JSON file of one: only these sequences, with these frames; in a
    map, an empty list of frames chooses the sequence and leaves its frames as they are.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        sequences: Mapping[str, Frames] | str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is no folder: give the one that holds the dataset.")
        if isinstance(sequences, (str, os.PathLike)):
            sequences = read_sequence_map(sequences)
        found = self._find()
        if sequences is not None:
            if missing := sorted(set(sequences) - set(found)):
                raise ValueError(
                    f"{self.root} has no sequence {missing[0]!r} ({len(missing)} of {len(sequences)} are missing): "
                    "the list of sequences belongs to another dataset, or not all of it was downloaded."
                )
            found = list(sequences)
        if not found:
            raise ValueError(f"{self.root} holds no sequence that {type(self).__name__} can read: {self.layout}")
        self.names: tuple[str, ...] = tuple(found)
        self._chosen = {name: [str(frame) for frame in frames] for name, frames in (sequences or {}).items()}

    #: One sentence for people whose folder does not fit: what is expected in it.
    layout: str = "see its documentation."

    @abstractmethod
    def _find(self) -> list[str]:
        """Names of the sequences under the root, in their order."""

    @abstractmethod
    def frames(self, name: str) -> list[str]:
        """Ids of all frames of a sequence, in their order."""

    @abstractmethod
    def _read(self, name: str, frames: list[str]) -> Sample:
        """These frames of a sequence, of which each is one of `frames(name)`."""

    def default_frames(self, name: str) -> list[str]:
        """The frames that `dataset[i]` gives where no file fixes them: all."""
        return self.frames(name)

    def fixed_frames(self, name: str) -> list[str] | None:
        """The frames that the map of sequences fixes for one, or None."""
        return self._chosen.get(name) or None

    def moving(self, name: str) -> list[int]:
        """Labels of what moves from view to view of a sequence: no two views need agree on where it is."""
        return []

    def read(self, name: str, frames: Frames | None = None) -> Sample:
        """One sequence: the given frames in the given order, else those of the map, else `default_frames`."""
        if name not in self.names:
            raise ValueError(f"there is no sequence {name!r} in {self.root}: the first one is {self.names[0]!r}.")
        if frames is None:
            wanted = self.fixed_frames(name) or self.default_frames(name)
        else:
            wanted = [str(frame) for frame in frames]
        known = self.frames(name)
        if not wanted:
            raise ValueError(f"{name} in {self.root} has no frames to read.")
        by_number = {int(frame): frame for frame in known if frame.isdecimal()}
        resolved = []
        for frame in wanted:
            match = frame if frame in known else by_number.get(int(frame)) if frame.isdecimal() else None
            if match is None:
                raise ValueError(f"{name} in {self.root} has no frame {frame!r}: it has {known[0]!r} to {known[-1]!r}")
            resolved.append(match)
        return self._read(name, resolved)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return self.read(self.names[index])


__all__ = ["MultiViewDataset", "read_sequence_map"]
