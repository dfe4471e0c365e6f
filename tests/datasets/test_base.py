"""What all readers share: sequences by number and by name, frames by their ids, and a file that fixes both."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from peft_attrsub.datasets.base import MultiViewDataset, read_sequence_map
from peft_attrsub.datasets.sample import Sample
from peft_attrsub.datasets.splits import face_sequence_map
from tests.datasets.world import make_sample


class Counted(MultiViewDataset):
    """Three sequences; frames are called 000000, 000100, ... as ClearPose's are, or have names of their own."""

    layout = "expected nothing at all."
    found = ("b", "a", "named")

    def _find(self) -> list[str]:
        return list(self.found)

    def frames(self, name: str) -> list[str]:
        return ["left", "right", "7"] if name == "named" else ["000000", "000100", "000200"]

    def _read(self, name: str, frames: list[str]) -> Sample:
        assert set(frames) <= set(self.frames(name))
        sample = make_sample(size=8)
        known = self.frames(name)
        return sample.views([known.index(frame) for frame in frames])


def read(dataset: MultiViewDataset, name: str, frames: list[Any] | None = None) -> list[str]:
    """Ids, through the numbers that the views of the world are called by."""
    return [dataset.frames(name)[int(frame)] for frame in dataset.read(name, frames).frames]


def test_sequences_and_frames(tmp_path: Path) -> None:
    dataset = Counted(tmp_path)
    assert dataset.names == ("b", "a", "named") and len(dataset) == 3
    assert read(dataset, "a") == ["000000", "000100", "000200"]
    assert read(dataset, "a", [200, "000100", "0", 100]) == ["000200", "000100", "000000", "000100"]
    assert read(dataset, "named", ["right", 7]) == ["right", "7"]
    assert [len(dataset[index]) for index in range(3)] == [3, 3, 3]
    for frames, words in (([50], "no frame '50': it has '000000'"), (["left"], "no frame 'left'"), ([], "no frames")):
        with pytest.raises(ValueError, match=words):
            dataset.read("a", frames)
    with pytest.raises(ValueError, match=r"there is no sequence 'c' in .*: the first one is 'b'"):
        dataset.read("c")
    with pytest.raises(IndexError):
        dataset[3]


def test_a_map_fixes_sequences_and_frames(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"named": ["right"], "b": [200, 0]}))
    for sequences in (path, str(path), {"named": ["right"], "b": [200, 0]}):
        dataset = Counted(tmp_path, sequences)
        assert dataset.names == ("named", "b")
        assert read(dataset, "b") == ["000200", "000000"] and read(dataset, "named") == ["right"]
        assert read(dataset, "b", [100]) == ["000100"]
        with pytest.raises(ValueError, match="no sequence 'a'"):
            dataset.read("a")
    # Sequences without frames are a choice of sequences alone.
    assert read(Counted(tmp_path, {"a": []}), "a") == ["000000", "000100", "000200"]
    with pytest.raises(ValueError, match=r"has no sequence 'x' \(2 of 3 are missing\)"):
        Counted(tmp_path, {"y": [0], "a": [0], "x": [0]})


def test_default_frames_are_the_readers(tmp_path: Path) -> None:
    class Two(Counted):
        def default_frames(self, name: str) -> list[str]:
            return self.frames(name)[:2]

    assert read(Two(tmp_path), "a") == ["000000", "000100"]
    assert read(Two(tmp_path, {"a": [200]}), "a") == ["000200"]


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: give the one that holds the dataset"):
        Counted(tmp_path / "nowhere")

    class Empty(Counted):
        found = ()

    with pytest.raises(ValueError, match="holds no sequence that Empty can read: expected nothing at all"):
        Empty(tmp_path)


def test_the_published_map_of_the_faces_is_read(tmp_path: Path) -> None:
    path = tmp_path / "faces.json"
    path.write_text(json.dumps(face_sequence_map()))
    found = read_sequence_map(path)
    assert len(found) == 450 and found["00_00|theta-5.00_phi0.00_d0.30"] == [0, 6, 12, 18, 24, 30, 36]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not readable JSON"),
        ('{"a": [0', "is not readable JSON"),
        ("[]", "holds no map"),
        ("{}", "holds no map"),
        ('{"a": 3}', "holds no map"),
        ('{"a": []}', "holds no map"),
        ('{"a": [0.5]}', "holds no map"),
        ('{"a": [true]}', "holds no map"),
        ('{"a": {"0": 1}}', "holds no map"),
    ],
)
def test_a_damaged_map_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"map\.json {words}"):
        Counted(tmp_path, path)


def test_datasets_travel_to_workers(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(Counted(tmp_path, {"b": [100]})))
    assert again.names == ("b",) and read(again, "b") == ["000100"]
