"""Pictures, depth and cameras of 2K2K scans: clothed people that no training has seen, from the meshes.

    pip install "peft-attrsub[scenes,vggt]"
    python examples/vggt/prepare_2k2k.py render --meshes 2K2K --out data/2k2k  # the test set
    python examples/vggt/prepare_2k2k.py render --meshes 2K2K --out data/2k2k --ids 07184 07200
    python examples/vggt/prepare_2k2k.py standin --out standin/2K2K --people 4  # procedural people

2K2K is for non-commercial use (github.com/ketiVision/2K2K, polygom-team/2K2K on the Hub). Of the paper's 50 test ids
only the range is known, 07184 to 07693: the test here is everybody of the folder `test` in it; --ids chooses others.
The unit of the files is about a centimetre: people are made 1.0 tall, as THuman's (--normalise-height). Colours of
vertices become a texture. --renderer raycast needs no Blender. Whatever stops a run, the same command continues it;
accelerate launch shares the people out among processes.

Exit status: 0 all is done; 1 some people could not be rendered; 2 wrong arguments or a full disk; 130 stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _humans import Dataset, main

FIRST_ID = 7184


def find(root: Path, split: str) -> dict[str, Path]:
    from peft_attrsub.datasets.meshes import find_2k2k
    from peft_attrsub.datasets.splits import two_k_test

    people = find_2k2k(root, split)
    return {name: people[name] for name in two_k_test(people)} if split == "test" else people


def write(root: Path, index: int, seed: int, detail: int) -> Path:
    """Stand-in number `index`, with the id 07184 + index: children, about 115 tall, every third with z up."""
    from standins.people import sample_person
    from standins.scans import write_2k2k

    up = "z" if index % 3 == 2 else "y"
    return write_2k2k(root, f"{FIRST_ID + index:05d}", sample_person(seed, child=True), detail, up)


# The release turns the PLY about x alone: people face -y, and the first camera sees them from the side.
TWO_K = Dataset("2K2K", find, up="auto", turn=0.0, radius=1.5, write=write, detail=160)


def run(arguments: Sequence[str] | None = None) -> int:
    return main(__doc__ or "", TWO_K, arguments)


if __name__ == "__main__":
    from _console import run as start

    start(run)
