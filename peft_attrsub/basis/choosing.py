"""Which modules of the adapters take part, and under which names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .adapters import LoraAdapter
from .errors import BasisError
from .naming import natural_key, nearest, some

#: Names, or a regular expression that is looked for in names.
Chosen = str | Sequence[str] | None


def compiled(pattern: str, option: str) -> re.Pattern[str]:
    """A regular expression of the user's; BasisError names the option."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise BasisError(f"{option} {pattern!r} is not a regular expression ({error}).") from error


def choose(names: Iterable[str], modules: Chosen, exclude: Chosen) -> set[str]:
    """The names that `modules` asks for and `exclude` does not.

    modules: a list of exact names, a regular expression found in them, or None for all. exclude: a regular expression,
    or several. Raises BasisError for a name or an expression that fits nothing, and where nothing is left.
    """
    every = set(names)
    if isinstance(modules, str):
        wanted = _matching(every, modules, "modules")
    elif modules is None:
        wanted = every
    else:
        unknown = [name for name in modules if name not in every]
        if unknown:
            near = some(nearest(unknown[0], every)) or "none"
            raise BasisError(f"no adapter has the module {unknown[0]!r} asked for by modules=; nearest: {near}.")
        wanted = set(modules)
    for pattern in [exclude] if isinstance(exclude, str) else exclude or ():
        wanted = wanted - _matching(every, pattern, "exclude")
    if not wanted and every:
        raise BasisError(f"exclude={exclude!r} leaves no module of {some(sorted(every, key=natural_key))}.")
    return wanted


def _matching(every: set[str], pattern: str, option: str) -> set[str]:
    expression = compiled(pattern, f"{option}=")
    found = {name for name in every if expression.search(name)}
    if not found:
        raise BasisError(
            f"{option}={pattern!r} is found in no module; there are {some(sorted(every, key=natural_key))}."
        )
    return found


def rename(adapters: Iterable[LoraAdapter], rules: Mapping[str, str] | None) -> None:
    """Give the modules of adapters other names: re.sub(pattern, replacement, name) for every rule in turn.

    Raises BasisError for a bad pattern or replacement, and where two modules of an adapter become one.
    """
    if not rules:
        return
    patterns = [(compiled(old, "rename="), new) for old, new in rules.items()]
    for adapter in adapters:
        names = {}
        for name in [*adapter.entries, *adapter.unusable]:
            names[name] = _renamed(name, patterns)
        taken: dict[str, str] = {}
        for old, new in names.items():
            if not new or taken.setdefault(new, old) != old:
                what = f"{taken[new]!r} and {old!r} both become {new!r}" if new else f"{old!r} becomes empty"
                raise BasisError(f"adapter {adapter.source!r}: by {dict(rules)!r} the modules {what}.")
        adapter.entries = {names[name]: entry for name, entry in adapter.entries.items()}
        adapter.unusable = {names[name]: reason for name, reason in adapter.unusable.items()}


def _renamed(name: str, patterns: Sequence[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in patterns:
        try:
            name = pattern.sub(replacement, name)
        except (re.error, IndexError) as error:
            raise BasisError(
                f"rename= replaces {pattern.pattern!r} by {replacement!r}, which is not a replacement ({error})."
            ) from error
    return name


def renaming_hint(adapters: Sequence[LoraAdapter]) -> str:
    """The rule under which all adapters would have the same modules, as a sentence; "" where there is none.

    Looks for one prefix that stands for another, as between versions of a library.
    """
    sets = {frozenset(adapter.entries) for adapter in adapters}
    if len(sets) != 2:
        return ""
    first, second = sorted(sets, key=lambda names: len(min(names, key=len)), reverse=True)
    name = min(first - second, default=None, key=natural_key)
    if name is None:
        return ""
    parts = name.split(".")
    for other in nearest(name, second - first, n=5):
        its = other.split(".")
        common = 0
        while common < min(len(parts), len(its)) and parts[-1 - common] == its[-1 - common]:
            common += 1
        old, new = (".".join(x[: len(x) - common]) for x in (parts, its))
        old, new = (f"{x}." if x else "" for x in (old, new))
        pattern = "^" + re.escape(old)
        if {new + x.removeprefix(old) if x.startswith(old) else x for x in first} == second:
            rule = f"rename={{{pattern!r}: {new!r}}} (--map '{pattern}={new}')"
            return f" They are the same modules under other names: {rule} makes them agree."
    return ""


__all__ = ["Chosen", "choose", "compiled", "rename", "renaming_hint"]
