"""Packages that only an extra of this one brings; importing this file imports none of them."""

from __future__ import annotations

import importlib
from typing import Any

#: What to call a package where its module has another name.
_PACKAGES = {"PIL": "Pillow", "bpy": "Blender's bpy", "open3d": "Open3D"}


def require(module: str, extra: str, feature: str) -> Any:
    """Import and return `module`, which comes with an optional extra of this package.

    Args:
        module: dotted name, e.g. "PIL.Image". extra: as in `pip install "peft-attrsub[extra]"`; the lightest that has
            it. feature: what needs it, at the beginning of a sentence.

    Raises ImportError, which says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        # Not installed, or installed and broken: a missing library of the system, another package's version.
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == top
        why = "" if absent else f" ({error})"
        raise ImportError(
            f'{feature} needs {_PACKAGES.get(top, top)}{why}: pip install "peft-attrsub[{extra}]".', name=top
        ) from error
