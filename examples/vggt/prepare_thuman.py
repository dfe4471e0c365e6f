"""Pictures, depth and cameras of THuman 2.0 / 2.1 scans: the clothed-people benchmark, from the meshes.

    pip install "peft-attrsub[scenes,vggt]"
    python examples/vggt/prepare_thuman.py render --meshes THuman2.1_Release --out data/thuman  # the test set
    python examples/vggt/prepare_thuman.py render --meshes THuman2.1_Release --out data/thuman_train --split train
    python examples/vggt/prepare_thuman.py standin --out standin/THuman --people 4  # procedural people

THuman is given for research on a signed request (github.com/ytrock/THuman2.0-Dataset). The test is the last 100 of the
sorted ids. --renderer raycast needs no Blender and takes seconds a person, without the paper's soft light. Whatever
stops a run, the same command continues it; accelerate launch shares the people out among processes.

Exit status: 0 all is done; 1 some people could not be rendered; 2 wrong arguments or a full disk; 130 stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _humans import Dataset, main


def find(root: Path, split: str) -> dict[str, Path]:
    from peft_attrsub.datasets.meshes import find_thuman
    from peft_attrsub.datasets.splits import thuman_split

    people = find_thuman(root)
    return {name: people[name] for name in thuman_split(people, split)}


def write(root: Path, index: int, seed: int, detail: int) -> Path:
    """Stand-in number `index`, with the id index: adults, y up, 0.85 to 1.1 tall, textured."""
    from standins.people import sample_person
    from standins.scans import write_thuman

    return write_thuman(root, f"{index:04d}", sample_person(seed), detail)


# Blender's reader of OBJ makes people face -y; the release turns them from there to +x, where the first camera is.
THUMAN = Dataset("THuman", find, up="y", turn=90.0, radius=1.1, write=write, detail=128)


def run(arguments: Sequence[str] | None = None) -> int:
    return main(__doc__ or "", THUMAN, arguments)


if __name__ == "__main__":
    from _console import run as start

    start(run)
