"""What adapters have in common, with each other and with a basis: base model, modules, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .adapters import LoraAdapter
from .errors import BasisError
from .identity import BaseIdentity, shared_base
from .layout import ModuleLayout
from .naming import natural_key, nearest, some

if TYPE_CHECKING:
    from .basis import Basis


def common_base(adapters: Sequence[LoraAdapter]) -> BaseIdentity | None:
    """The weights that all adapters with a record were trained on; BasisError names two that differ."""
    parts = [(f"adapter {a.source!r}", a.base) for a in adapters]
    return shared_base(parts, "leave one out, or build one basis per base")


def common_base_model(adapters: Sequence[LoraAdapter], expected: str | None) -> str | None:
    """The base model all adapters name; `expected` (the caller's word) must not contradict it.

    Adapters that all record their base weights are compared by these (`common_base`): one may name a folder, another
    the Hub id of the same weights.
    """
    named = {a.base_model: a.source for a in adapters if a.base_model}
    if len(named) > 1 and not all(a.base for a in adapters):
        listing = ", ".join(f"{model!r} ({source})" for model, source in named.items())
        raise BasisError(f"the adapters belong to different base models: {listing}; build one basis per model.")
    found = next(iter(named), None)
    if expected and found and expected != found:
        raise BasisError(f"base_model={expected!r} was given, the adapters name {found!r}.")
    return expected or found


def common_modules(
    adapters: Sequence[LoraAdapter], chosen: Sequence[str] | None, on_missing: str
) -> dict[str, ModuleLayout]:
    """Layouts of the modules to mine, in natural order; all adapters must agree on them."""
    if on_missing not in ("error", "intersect"):
        raise BasisError(f"on_missing={on_missing!r} is unknown: use 'error' or 'intersect'.")
    for adapter in adapters:
        for name, reason in adapter.unusable.items():
            if chosen is None or name in chosen:
                raise BasisError(reason)
    every = set().union(*(a.entries for a in adapters))
    shared = set.intersection(*(set(a.entries) for a in adapters))
    wanted = every
    if chosen is not None:
        unknown = [m for m in chosen if m not in every]
        if unknown:
            near = some(nearest(unknown[0], every))
            raise BasisError(f"no adapter has the module {unknown[0]!r} asked for by modules=; nearest: {near}.")
        wanted = set(chosen)
    lacking = wanted - shared
    if lacking and on_missing == "error":
        lines = []
        for adapter in adapters:
            absent = sorted(lacking - set(adapter.entries), key=natural_key)
            if absent:
                lines.append(f"{adapter.source!r} lacks {some(absent)}")
        raise BasisError(
            f"the adapters cover different modules: {'; '.join(lines)}; "
            "on_missing='intersect' (--on-missing intersect) mines only what all of them have."
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


def check_fits(lora: LoraAdapter, basis: Basis, missing: str) -> None:
    """Refuse a LoRA whose modules the basis lacks (unless missing="skip"), or has in other shapes."""
    if missing not in ("error", "skip"):
        raise BasisError(f"missing={missing!r} is unknown: use 'error' or 'skip'.")
    shared_base(
        [("the basis", basis.config.base), (f"adapter {lora.source!r}", lora.base)],
        "take a basis of the adapter's own base",
    )
    if lora.unusable and missing == "error":
        raise BasisError(
            f"{next(iter(lora.unusable.values()))} Or give missing='skip' (--missing skip), which loses such modules."
        )
    covered = set(basis.modules)
    absent = [m for m in lora.modules if m not in covered]
    if absent and missing == "error":
        near = some(nearest(absent[0], basis.modules)) or "none"
        raise BasisError(
            f"the basis lacks modules of {lora.source!r}: {some(absent)} (nearest: {near}); "
            "missing='skip' (--missing skip) loses them."
        )
    for module in lora.modules:
        if module in covered and lora.entries[module].layout.shape != basis.layout(module).shape:
            raise BasisError(
                f"module {module!r} has shape {lora.entries[module].layout.shape} in {lora.source!r} but "
                f"{basis.layout(module).shape} in the basis: they belong to different models."
            )
    if not covered & set(lora.modules):
        raise BasisError(f"the basis and {lora.source!r} have no module in common.")
