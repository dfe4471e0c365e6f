"""Names of attributes and modules: what is allowed, how they are ordered, which ones are near."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from .errors import BasisError
from .typed_json import short

_ATTRIBUTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Under which PEFT saves the modules of a model.
PEFT_PREFIX = "base_model.model."
#: What torch.compile, FullyShardedDataParallel and activation checkpointing call the module inside of them.
WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Folders that examples/vggt/finetune.py makes in every run. The same as `evaluation.labels.OUTPUTS`: rooms do not
#: import each other, and a test compares the two.
OUTPUTS = ("adapter", "best", "model")


def check_attribute(name: object) -> str:
    """Return `name` if it may name an attribute (it becomes part of tensor names in the basis file)."""
    if not isinstance(name, str) or not _ATTRIBUTE.fullmatch(name):
        raise BasisError(
            f"{short(name)} cannot name an attribute: use 1 to 64 letters, digits, '_' or '-', beginning with a "
            "letter or digit, without dots, spaces or path separators."
        )
    return name


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which blocks.2 comes before blocks.10."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]


def strip_peft_prefix(key: str) -> str:
    """Module names as the base model has them: PEFT saves them under `base_model.model.`."""
    for prefix in (PEFT_PREFIX, "base_model."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def base_name(name: str) -> str:
    """The name of a module or tensor without its wrappers: `layers.0._orig_mod.q` is `layers.0.q`.

    DistributedDataParallel calls the module inside of it `module`, as many base models do: see `saved_names` for
    names in a file, and `peft_attrsub.tuner.names` for those of a model.
    """
    parts = name.split(".")
    return name if WRAPPED.isdisjoint(parts) else ".".join(part for part in parts if part not in WRAPPED)


def saved_names(stems: Iterable[str]) -> dict[str, str]:
    """stem -> name of the module in the base model, for the modules of one adapter file.

    PEFT's prefix and wrappers are removed, and so is a leading `module.` that all of them have: it comes from
    DistributedDataParallel, or says nothing. Raises BasisError where two stems are the same module.
    """
    names = {}
    for stem in stems:
        name = base_name(stem)
        while name.startswith(f"module.{PEFT_PREFIX}"):
            name = name.removeprefix("module.")
        names[stem] = strip_peft_prefix(name)
    while names and all(name.startswith("module.") for name in names.values()):
        names = {stem: name.removeprefix("module.") for stem, name in names.items()}
    first: dict[str, str] = {}
    for stem, name in names.items():
        if first.setdefault(name, stem) != stem:
            raise BasisError(f"{first[name]!r} and {stem!r} are the same module {name!r}: remove one of them.")
    return names


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The names closest to `name`: equal endings first, then by edit distance."""
    pool = list(candidates)
    parts = name.split(".")

    def common_ending(other: str) -> int:
        count = 0
        for a, b in zip(reversed(parts), reversed(other.split(".")), strict=False):
            if a != b:
                break
            count += 1
        return count

    endings = sorted((c for c in pool if common_ending(c)), key=lambda c: (-common_ending(c), natural_key(c)))
    return (endings or difflib.get_close_matches(name, pool, n=n, cutoff=0.3))[:n]


def counted(number: int, noun: str) -> str:
    """ "1 module", "2 modules"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def some(names: Iterable[str], n: int = 3) -> str:
    """A short listing for error texts: the first `n` names and how many more there are."""
    pool = list(names)
    text = ", ".join(repr(name) for name in pool[:n])
    return text if len(pool) <= n else f"{text} and {len(pool) - n} more"
