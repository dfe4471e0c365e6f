"""The project's requirements at one end of their bounds, a line each, for `make test-oldest` and `make test-newest`.

    python requirements/bounds.py oldest             # "peft==0.20.0": each lower bound, as pip's constraints
    python requirements/bounds.py newest dev demo    # "peft": names alone, so that no upper bound holds anything back

oldest: of the requirements of the package itself. newest: with those of the named extras. Torch is left out of the
newest: its build is the caller's choice. A requirement without a lower bound is an error.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: list[str]) -> list[Requirement]:
    """Requirements of the package and of the extras that apply to this Python."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            raise SystemExit(f"bounds: pyproject.toml has no extra {extra!r}.")
        lines += project["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def oldest() -> list[str]:
    lines = []
    for one in requirements([]):
        lower = [spec.version for spec in one.specifier if spec.operator == ">="]
        if len(lower) != 1:
            raise SystemExit(f"bounds: {one} has no single lower bound: write name>=version in pyproject.toml.")
        lines.append(f"{one.name}=={lower[0]}")
    return lines


def newest(extras: list[str]) -> list[str]:
    return sorted({one.name for one in requirements(extras)} - {"torch"})


if __name__ == "__main__":
    if sys.argv[1:2] not in (["oldest"], ["newest"]):
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} oldest | newest [EXTRA ...]")
    print("\n".join(oldest() if sys.argv[1] == "oldest" else newest(sys.argv[2:])))
