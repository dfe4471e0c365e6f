"""Where the weights are that come with a clone of this repository, under a name in place of a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

#: Name -> folder in the clone.
SHIPPED = {"vggt-mini": "examples/vggt/vggt-mini"}
_CLONE = Path(__file__).resolve().parents[2]


def find_shipped(name: Any) -> Any:
    """The clone's folder of a shipped model; any other name, and a local folder of that name, as given.

    Raises OSError where the package stands in no clone, as an installed wheel does.
    """
    if not isinstance(name, str) or name not in SHIPPED or os.path.isdir(name):
        return name
    folder = _CLONE / SHIPPED[name]
    if not (folder / "config.json").is_file():
        raise OSError(
            f"the weights of {name!r} are in {SHIPPED[name]} of a clone of this repository, and this package is "
            "installed without one: give the path of that folder, or make one with examples/vggt/pretrain_mini.py."
        )
    return str(folder)


__all__ = ["SHIPPED", "find_shipped"]
