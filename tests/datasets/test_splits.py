"""The lists of the paper's protocol, against the rules by which its release makes them from the folders on disk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_attrsub.datasets import splits

# The folders of ClearPose, as published.
FOLDERS = {
    "set1": [1, 2, 3, 4, 5],
    "set2": [1, 3, 4, 5, 6],
    "set3": [1, 3, 4, 8, 11],
    **{f"set{number}": [1, 2, 3, 4, 5, 6] for number in range(4, 9)},
    "set9": [7, 8, 9, 10, 11, 12],
}


def test_clearpose_is_the_releases_rule() -> None:
    train, test = set(), set()
    for group, numbers in FOLDERS.items():
        names = sorted(f"scene{number}" for number in numbers)  # by letters: scene1, scene11, scene3, scene4, scene8
        held = names if group in ("set8", "set9") else names[-1:]
        train |= {(group, name) for name in names if name not in held}
        test |= {(group, name) for name in held}
    assert (len(train), len(test)) == (32, 19)
    assert len(splits.CLEARPOSE_TRAIN) == 32 and set(splits.CLEARPOSE_TRAIN) == train
    assert len(splits.CLEARPOSE_TEST) == 19 and set(splits.CLEARPOSE_TEST) == test
    assert len(splits.CLEARPOSE_ALL) == 51 and set(splits.CLEARPOSE_ALL) == train | test
    assert ("set3", "scene8") in test and ("set3", "scene11") in train


def test_clearposes_own_split() -> None:
    own = {("set1", f"scene{number}") for number in range(1, 5)}
    own |= {(f"set{group}", f"scene{number}") for group in range(4, 8) for number in range(1, 6)}
    assert len(own) == 24 and set(splits.CLEARPOSE_AUTHORS_TRAIN) == own
    assert len(splits.CLEARPOSE_AUTHORS_TRAIN) == 24
    assert len(splits.CLEARPOSE_AUTHORS_TEST) == 27
    assert set(splits.CLEARPOSE_AUTHORS_TEST) == set(splits.CLEARPOSE_ALL) - own
    assert {name: len(scenes) for name, scenes in splits.CLEARPOSE_SPLITS.items()} == {
        "train": 32,
        "test": 19,
        "all": 51,
        "authors-train": 24,
        "authors-test": 27,
    }


def test_the_face_test_set() -> None:
    found = splits.face_sequence_map()
    assert len(found) == 450 and all(frames == [0, 6, 12, 18, 24, 30, 36] for frames in found.values())
    names = list(found)
    assert names[0] == "00_00|theta-5.00_phi-5.00_d0.30" and names[-1] == "49_00|theta5.00_phi5.00_d0.30"
    assert "00_00|theta-5.00_phi0.00_d0.30" in found and "17_00|theta0.00_phi0.00_d0.30" in found
    assert not any("-0.00" in name for name in found)
    assert len({name.split("|")[0] for name in found}) == 50 and len({name.split("|")[1] for name in found}) == 9
    assert splits.face_view_name(-0.0, -0.001) == "theta0.00_phi0.00_d0.30"
    assert list(splits.face_sequence_map(1, (3,)).values()) == [[3]] * 9


def test_thuman() -> None:
    everybody = [f"{number:04d}" for number in range(2445)]
    test, train = splits.thuman_split(everybody[::-1], "test"), splits.thuman_split(everybody, "train")
    assert (len(train), len(test)) == (2345, 100)
    assert test == everybody[-100:] == list(splits.THUMAN_TEST) and train == everybody[:-100]
    assert splits.thuman_split(everybody, "all") == everybody
    older = [f"{number:04d}" for number in range(526)]  # THuman2.0
    assert splits.thuman_split(older) == older[426:]
    with pytest.raises(ValueError, match="no split 'val'"):
        splits.thuman_split(everybody, "val")
    with pytest.raises(ValueError, match="1 or more"):
        splits.thuman_split(everybody, count=0)


@given(st.sets(st.integers(0, 2444), min_size=1), st.integers(1, 30))
def test_thuman_splits_in_two(numbers: set[int], count: int) -> None:
    ids = [f"{number:04d}" for number in numbers]
    train, test = (splits.thuman_split(ids, part, count) for part in ("train", "test"))
    assert sorted(train + test) == sorted(ids) and test == sorted(ids)[-count:]
    # A part of THuman2.1 that has people of the test set has none of them in its training set, and nobody else.
    train, test = (splits.thuman_split(ids, part) for part in ("train", "test"))
    assert sorted(train + test) == sorted(ids) and not set(train) & set(splits.THUMAN_TEST)
    if max(numbers) >= 2345:
        assert set(test) <= set(splits.THUMAN_TEST)


def test_2k2k_is_a_range() -> None:
    ids = ["07183", "07184", "07500", "07693", "07694", "00001", "notes", "7300x"]
    assert splits.two_k_test(reversed(ids)) == ["07184", "07500", "07693"]
    fifty = [f"{number:05d}" for number in range(7184, 7234)]
    assert splits.two_k_test(fifty) == fifty
    with pytest.raises(ValueError, match="51 ids lie between 07184 and 07693"):
        splits.two_k_test([*fifty, "07693"])
