"""Registers the tuner with PEFT as soon as PEFT is imported, whichever of the two packages comes first.

Importing peft_attrsub promises that PEFT knows the method. Importing PEFT for that would cost every command and every
worker process seconds of CPU, and most of them never use it. So `install` puts a finder at the head of sys.meta_path,
which wraps the loader of the module "peft" and of no other: once PEFT's own `__init__` has run, and before anyone who
waits for that import goes on, the tuner is imported and registered. The finder then removes itself.

Threads that import `peft`, `peft_attrsub` and `peft_attrsub.tuner` at the same time do not block each other. The
thread that imports PEFT holds the import lock of "peft" and imports modules of the tuner. A thread that imports the
tuner holds the lock of the package `peft_attrsub.tuner` and asks for PEFT before it imports any module of the tuner,
and the import system takes no lock of a parent package that is in sys.modules. For the same reason Python itself does
not protect a thread that imports a module by its full name, such as peft_attrsub.tuner.layer, while another one is
still importing the package around it: import from the packages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PEFT = "peft"
PLUGIN = "peft_attrsub.tuner.plugin"


def install() -> None:
    """Register the tuner now if PEFT has been imported, else as soon as it is; calling this again changes nothing."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    # Looked up after the finder is in place: another thread may be importing PEFT at this moment.
    peft = sys.modules.get(PEFT)
    if peft is not None:
        watch(peft)


def register() -> None:
    """Import the tuner, which registers itself; then the finder has done its work."""
    import_module(PLUGIN)
    # A new list: another thread may be going through the old one, and removing an item would make it skip the next.
    sys.meta_path = [finder for finder in sys.meta_path if finder is not FINDER]


def watch(peft: ModuleType) -> None:
    """Register at the end of an import of PEFT that this file's loader is not part of; at once where it has ended."""
    spec = getattr(peft, "__spec__", None)
    if spec is not None and getattr(spec, "_initializing", False):
        spec.__class__ = WatchedSpec
        if spec._initializing:
            return
        spec.__class__ = ModuleSpec  # another thread has finished it between the two looks
    register()


class WatchedSpec(ModuleSpec):
    """Spec of a PEFT whose import began before the finder was there.

    Either another thread was importing it, or PEFT itself, through some plugin, imports peft_attrsub. There is no
    public sign of the end of such an import: what Python does last, on success and on failure, is to clear the spec's
    `_initializing`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if PEFT in sys.modules:
                register()


class RegisteringLoader(Loader):
    """PEFT's own loader, with the registration after it; everything else that is asked of it is the loader's own."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # PEFT sees itself as if nobody had wrapped anything, and so does `importlib.reload` later.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        FINDER.loading = module
        try:
            self.loader.exec_module(module)
        finally:
            FINDER.loading = None
        register()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # not while `copy` or `pickle` builds an empty one
            raise AttributeError(name)
        return getattr(self.loader, name)


class PeftFinder(MetaPathFinder):
    """Finds PEFT as the finders behind it do, and wraps its loader."""

    loading: ModuleType | None = None  # PEFT, while a wrapped loader executes it

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{PEFT}."):
            # PEFT imports its modules. If not through our loader, it was found just before this finder was there.
            peft = sys.modules.get(PEFT)
            if peft is not None and peft is not self.loading:
                watch(peft)
            return None
        if fullname != PEFT:
            return None
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else []
        for finder in behind:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                # A folder called "peft" that holds no package has no loader.
                if spec.loader is not None:
                    spec.loader = RegisteringLoader(spec.loader)
                return spec
        return None


FINDER = PeftFinder()
