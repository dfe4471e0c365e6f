"""Which sequences the paper trains and tests on, as lists and rules; nothing here touches a disk.

Sources: protocol of the paper's release (arXiv 2604.10095), and for `CLEARPOSE_AUTHORS_*` ClearPose's own README.

What is known of each:
  faces      450 test sequences, 50 scenes seen from 3 x 3 tilts, 7 of 42 frames: complete.
  ClearPose  51 scenes, 32 to train and 19 to test: complete.
  THuman     the rule, the last 100 of the sorted ids, and with THuman2.1's 2,445 ids the list.
  2K2K       that the 50 test ids lie between 07184 and 07693. The ids themselves are not published with the paper: the
             rule here, all ids of the test folder in that range, gives them only if that folder holds no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# --- synthetic faces ----------------------------------------------------------------------------------------------

FACE_SCENES = 50
FACE_TILTS = (-5.0, 0.0, 5.0)  # degrees, about both axes of the print
FACE_DISTANCE = 0.30  # of the camera from the print, in a scene within [-1, 1]^3
FACE_FRAMES = (0, 6, 12, 18, 24, 30, 36)  # of 42


def face_view_name(theta: float, phi: float, distance: float = FACE_DISTANCE) -> str:
    """Folder of one view of a print, tilted by theta and phi degrees: "theta-5.00_phi0.00_d0.30"."""
    return f"theta{round(theta, 2) + 0.0:.2f}_phi{round(phi, 2) + 0.0:.2f}_d{distance:.2f}"


def face_sequence_map(scenes: int = FACE_SCENES, frames: Sequence[int] = FACE_FRAMES) -> dict[str, list[str | int]]:
    """The synthetic test set: "00_00|theta-5.00_phi-5.00_d0.30" and so on, 9 for each scene, to its frames."""
    return {
        f"{scene:02d}_00|{face_view_name(theta, phi)}": list(frames)
        for scene in range(scenes)
        for theta in FACE_TILTS
        for phi in FACE_TILTS
    }


# --- ClearPose ----------------------------------------------------------------------------------------------------

_CLEARPOSE_TRAIN = {
    "set1": (1, 2, 3, 4),
    "set2": (1, 3, 4, 5),
    "set3": (1, 3, 4, 11),
    "set4": (1, 2, 3, 4, 5),
    "set5": (1, 2, 3, 4, 5),
    "set6": (1, 2, 3, 4, 5),
    "set7": (1, 2, 3, 4, 5),
}
# The last scene of each set in the order of its letters: of set3 that is scene8, since "scene11" < "scene3".
_CLEARPOSE_TEST = {
    "set1": (5,),
    "set2": (6,),
    "set3": (8,),
    "set4": (6,),
    "set5": (6,),
    "set6": (6,),
    "set7": (6,),
    "set8": (1, 2, 3, 4, 5, 6),
    "set9": (7, 8, 9, 10, 11, 12),
}
_CLEARPOSE_AUTHORS_TRAIN = {
    "set1": (1, 2, 3, 4),
    "set4": (1, 2, 3, 4, 5),
    "set5": (1, 2, 3, 4, 5),
    "set6": (1, 2, 3, 4, 5),
    "set7": (1, 2, 3, 4, 5),
}


def _scenes(table: dict[str, tuple[int, ...]]) -> tuple[tuple[str, str], ...]:
    return tuple((group, f"scene{number}") for group, numbers in table.items() for number in numbers)


#: ("set1", "scene1"), ...: the paper's 32 scenes to train on, its 19 to test on, and all 51.
CLEARPOSE_TRAIN = _scenes(_CLEARPOSE_TRAIN)
CLEARPOSE_TEST = _scenes(_CLEARPOSE_TEST)
CLEARPOSE_ALL = tuple(sorted(CLEARPOSE_TRAIN + CLEARPOSE_TEST, key=lambda pair: (pair[0], int(pair[1][5:]))))
#: The split of ClearPose's own authors, 24 and 27, which the paper does not use.
CLEARPOSE_AUTHORS_TRAIN = _scenes(_CLEARPOSE_AUTHORS_TRAIN)
CLEARPOSE_AUTHORS_TEST = tuple(pair for pair in CLEARPOSE_ALL if pair not in CLEARPOSE_AUTHORS_TRAIN)

CLEARPOSE_SPLITS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": CLEARPOSE_TRAIN,
    "test": CLEARPOSE_TEST,
    "all": CLEARPOSE_ALL,
    "authors-train": CLEARPOSE_AUTHORS_TRAIN,
    "authors-test": CLEARPOSE_AUTHORS_TEST,
}

# --- clothed humans -----------------------------------------------------------------------------------------------

THUMAN_COUNT = 2445  # THuman2.1: ids 0000 to 2444
THUMAN_TEST_COUNT = 100
#: THuman2.1's test ids, 2345 to 2444.
THUMAN_TEST = tuple(f"{number:04d}" for number in range(THUMAN_COUNT - THUMAN_TEST_COUNT, THUMAN_COUNT))
TWO_K_TEST_COUNT = 50
TWO_K_FIRST, TWO_K_LAST = "07184", "07693"


def thuman_split(ids: Iterable[str], split: str = "test", count: int = THUMAN_TEST_COUNT) -> list[str]:
    """The ids to "train" or "test" on, or "all", sorted: the last `count` are the test.

    Where some of `THUMAN_TEST` are among the ids, the test is those, so that a part of THuman2.1 is never split
    elsewhere than the whole (count is not asked then, unless it is another number than 100).
    """
    known = sorted(set(ids))
    if split not in ("train", "test", "all"):
        raise ValueError(f'there is no split {split!r} of THuman: give "train", "test" or "all".')
    if count < 1:
        raise ValueError(f"a test set of {count} people was asked for: give 1 or more.")
    if split == "all":
        return known
    test = set(known[-count:])
    if count == THUMAN_TEST_COUNT and (published := test.intersection(THUMAN_TEST)):
        test = published
    return [name for name in known if (name in test) == (split == "test")]


def two_k_test(ids: Iterable[str]) -> list[str]:
    """2K2K's test ids among those of its test folder: those from 07184 to 07693, sorted.

    Only this range is known, and that there are 50 of them. More than 50 is a ValueError: which ones the paper took
    cannot be told, so a list must be given.
    """
    found = sorted({name for name in ids if name.isdecimal() and TWO_K_FIRST <= name <= TWO_K_LAST})
    if len(found) > TWO_K_TEST_COUNT:
        raise ValueError(
            f"{len(found)} ids lie between {TWO_K_FIRST} and {TWO_K_LAST}, the paper's test set has "
            f"{TWO_K_TEST_COUNT} of that range: give the folder of 2K2K's test set alone, or a list of ids."
        )
    return found


__all__ = [
    "CLEARPOSE_ALL",
    "CLEARPOSE_AUTHORS_TEST",
    "CLEARPOSE_AUTHORS_TRAIN",
    "CLEARPOSE_SPLITS",
    "CLEARPOSE_TEST",
    "CLEARPOSE_TRAIN",
    "FACE_DISTANCE",
    "FACE_FRAMES",
    "FACE_SCENES",
    "FACE_TILTS",
    "THUMAN_COUNT",
    "THUMAN_TEST",
    "THUMAN_TEST_COUNT",
    "TWO_K_FIRST",
    "TWO_K_LAST",
    "TWO_K_TEST_COUNT",
    "face_sequence_map",
    "face_view_name",
    "thuman_split",
    "two_k_test",
]
