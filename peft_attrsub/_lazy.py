"""Packages that import their modules on the first use of a name (PEP 562), and functions named before their import.

The only file of this package that every room may import; it imports nothing of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, places: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose public names live in its modules.

    Args:
        package: `__name__` of the package. places: {module, relative to the package: names that it holds}. No name may
            equal that of a module of the package, which importing the module would bind under that name. modules:
            those that are attributes themselves without having been imported.

    A type checker sees nothing of this: repeat the imports under `TYPE_CHECKING`, and call this in its `else`.
    """
    where = {name: module for module, names in places.items() for name in names}

    def get(name: str) -> Any:
        holder = sys.modules[package]
        if name in where:
            value = getattr(import_module(where[name], package), name)
        elif name in modules:
            value = import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=holder)
        setattr(holder, name, value)  # the next look-up finds it without this function
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *where, *modules})

    return get, listed


_PROVIDED: dict[str, list[Callable[..., Any] | str]] = {}


def provide(slot: str, function: Callable[..., Any] | str) -> None:
    """Add a function, or "package.module:function", which is imported on use, to a slot; again changes nothing."""
    functions = _PROVIDED.setdefault(slot, [])
    if function not in functions:
        functions.append(function)


def provided(slot: str) -> list[Callable[..., Any]]:
    """The functions of a slot, in the order in which they were added."""
    return [_function(one) for one in _PROVIDED.get(slot, ())]


def _function(one: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(one, str):
        return one
    module, _, name = one.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
