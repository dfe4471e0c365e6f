"""README.md of this folder: what it names exists, and every test that bears a PEFT name is in it."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEXT = (HERE / "README.md").read_text()
#: The suites that the tables are about; the others in the folder are about trainers and wrappers.
SUITES = (
    "cases.py merging_cases.py test_config.py test_custom_models.py test_initialization.py test_low_level_api.py "
    "test_classification_models.py"
)


def defined_tests(path: Path) -> set[str]:
    return set(re.findall(r"^ *def (test_\w+)", path.read_text(), flags=re.MULTILINE))


def listed() -> set[tuple[Path, str]]:
    """(file, test) for every test in the right column of a table."""
    found = set()
    for line in TEXT.splitlines():
        if not line.startswith("| "):
            continue
        path = None
        for word in re.findall(r"`([^`]+)`", line.split("|")[2]):
            if word.endswith(".py"):
                path = ROOT / word if "/" in word else HERE / word
            elif word.startswith("test_"):
                assert path, line
                found.add((path, word))
    return found


def test_every_listed_test_exists():
    missing = [f"{path.name}: {name}" for path, name in listed() if name not in defined_tests(path)]
    assert len(listed()) > 100 and not missing, missing


def test_every_case_is_listed():
    here = {(HERE / name, test) for name in SUITES.split() for test in defined_tests(HERE / name)}
    ours = {"test_a_relative_basis_is_found_from_the_adapter_and_from_the_working_directory"}  # not one of PEFT's
    unlisted = sorted(test for _, test in here - listed() if test not in ours)
    assert not unlisted, unlisted
