"""What adapters have in common, with each other and with a basis: base model, modules, shapes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .adapters import LoraAdapter
from .base_names import BaseName, base_name_of, best_name
from .choosing import Chosen, choose, renaming_hint
from .errors import BasisError
from .identity import BaseIdentity, shared_base
from .layout import ModuleLayout
from .naming import natural_key, nearest, some
from .processes import is_main_process

if TYPE_CHECKING:
    from .basis import Basis


def common_base(adapters: Sequence[LoraAdapter]) -> BaseIdentity | None:
    """The weights that all adapters with a record were trained on; BasisError names two that differ."""
    parts = [(f"adapter {a.source!r}", a.base) for a in adapters]
    return shared_base(parts, "leave one out, or build one basis per base")


def common_base_model(adapters: Sequence[LoraAdapter], given: str | None) -> tuple[str | None, str | None]:
    """The base model that the adapters name, as it may be published, and its revision.

    given: the caller's word, which decides; a note tells what it overrides. Adapters that all record their base
    weights are compared by these (`common_base`): one may name a folder, another the Hub id of the same weights. Names
    that mean one model (see `base_names`) are recognized as one, with a note.
    """
    named: dict[BaseName, str] = {}
    revisions: dict[str, str] = {}
    for adapter in adapters:
        if not adapter.base_model:
            continue
        name = base_name_of(adapter.base_model)
        named.setdefault(name, adapter.source)
        revision = name.revision or adapter.config.get("revision")
        if isinstance(revision, str) and revision != "main":
            revisions.setdefault(revision, adapter.source)
    first = next(iter(named), None)
    different = [name for name in named if first is not None and not name.same_as(first)]
    listing = ", ".join(f"{name.name!r} ({source})" for name, source in named.items())
    if given:
        mine = base_name_of(given)
        if any(not name.same_as(mine) for name in named):
            _note(f"base_model={mine.name!r} is recorded as it was given; the adapters name {listing}.")
        return mine.name, mine.revision or _one_revision(revisions)
    if different and not all(a.base for a in adapters):
        raise BasisError(
            f"the adapters belong to different base models: {listing}; build one basis per model, or say with "
            "base_model= (--base-model) that they are one."
        )
    if first is None:
        return None, None
    best = best_name(named)
    if len({name.name for name in named}) > 1:
        _note(f"the adapters name their base model in several ways ({listing}); recorded as {best.name!r}.")
    return best.name, _one_revision(revisions)


def _one_revision(revisions: dict[str, str]) -> str | None:
    if len(revisions) > 1:
        listing = ", ".join(f"{revision} ({source})" for revision, source in revisions.items())
        _note(f"the adapters were trained on several revisions of the base model: {listing}.")
    return ", ".join(revisions) or None


def _note(text: str) -> None:
    if is_main_process():
        warnings.warn(text, stacklevel=4)


def common_modules(
    adapters: Sequence[LoraAdapter], modules: Chosen, missing: str, exclude: Chosen = None
) -> dict[str, ModuleLayout]:
    """Layouts of the modules to mine, in natural order; all adapters must agree on them."""
    check_missing(missing)
    every = set().union(*({*a.entries, *a.unusable} for a in adapters))
    wanted = choose(every, modules, exclude)
    for adapter in adapters:
        for name, reason in adapter.unusable.items():
            if name in wanted:
                raise BasisError(reason)
    shared = set.intersection(*(set(a.entries) for a in adapters))
    lacking = wanted - shared
    if lacking and missing == "error":
        lines = []
        for adapter in adapters:
            absent = sorted(lacking - set(adapter.entries), key=natural_key)
            if absent:
                lines.append(f"{adapter.source!r} lacks {some(absent)}")
        raise BasisError(
            f"the adapters cover different modules: {'; '.join(lines)}; "
            "missing='intersect' (--missing intersect) mines only what all of them have."
            f"{renaming_hint(adapters)}"
        )
    names = sorted(wanted & shared, key=natural_key)
    if not names:
        raise BasisError("the adapters have no module in common, so there is nothing to mine.")
    first = adapters[0]
    for adapter in adapters[1:]:
        for name in names:
            a, b = first.entries[name].layout, adapter.entries[name].layout
            if a != b:
                raise BasisError(
                    f"module {name!r} has shape {a.shape} ({a.kind}) in {first.source!r} but {b.shape} ({b.kind}) "
                    f"in {adapter.source!r}: the adapters belong to different models."
                )
    return {name: first.entries[name].layout for name in names}


def check_missing(value: str) -> None:
    """Refuse a value of `missing` that is not one."""
    if value not in ("error", "intersect"):
        raise BasisError(f"missing={value!r} is unknown: use 'error' or 'intersect'.")


def check_fits(lora: LoraAdapter, basis: Basis, missing: str) -> None:
    """Refuse a LoRA whose modules the basis lacks (unless missing="intersect"), or has in other shapes."""
    check_missing(missing)
    shared_base(
        [("the basis", basis.config.base), (f"adapter {lora.source!r}", lora.base)],
        "take a basis of the adapter's own base",
    )
    if lora.unusable and missing == "error":
        raise BasisError(
            f"{next(iter(lora.unusable.values()))} Or give missing='intersect' (--missing intersect), which loses "
            "such modules."
        )
    covered = set(basis.modules)
    absent = [m for m in lora.modules if m not in covered]
    if absent and missing == "error":
        near = some(nearest(absent[0], basis.modules)) or "none"
        raise BasisError(
            f"the basis lacks modules of {lora.source!r}: {some(absent)} (nearest: {near}); "
            "missing='intersect' (--missing intersect) loses them."
        )
    for module in lora.modules:
        if module in covered and lora.entries[module].layout.shape != basis.layout(module).shape:
            raise BasisError(
                f"module {module!r} has shape {lora.entries[module].layout.shape} in {lora.source!r} but "
                f"{basis.layout(module).shape} in the basis: they belong to different models."
            )
    if not covered & set(lora.modules):
        raise BasisError(f"the basis and {lora.source!r} have no module in common.")
