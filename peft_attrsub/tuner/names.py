"""One name for a module, in whatever a model is wrapped: the name that the basis has for it.

A basis and a saved adapter use the module names of the base model that they were made for. The model at hand may be
compiled, wrapped by DDP, FSDP or activation checkpointing, hold the base as a submodule, be a submodule of the base,
or come from a version of transformers with other names. `ModuleNames` leaves out the wrappers (`own`) and then takes
the first of these that applies:

1. module_prefixes of the config leads to at least one module of the basis;
2. the model has all modules of the basis under the same names;
3. the model's own rules for old checkpoints lead from all names of the basis to modules of the model;
4. the model has some modules of the basis under the same names: nothing is renamed, the others are missing;
5. one prefix, and no other place, explains every module whose name ends like one of the basis (see `one_prefix`).

Otherwise nothing is renamed, and `hint` says which prefixes nearly fit. Shapes decide nothing here: the layers of an
encoder and of its decoder often have the same shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..basis.errors import BasisError
from ..basis.naming import WRAPPED, base_name

_SHOWN = 3


class ModuleNames:
    """The names of a model's modules, and what the basis calls them.

    Args:
        model: the model to adapt. known: names in the basis, or in the saved adapter; none: the model's own are kept.
        prefixes: module_prefixes of the config: prefix in the model -> prefix in the basis, "" for none. Used where it
            leads to at least one known name.

    own: name in the model -> the same without wrappers. prefixes: those that are used; empty where the names agree.
    """

    def __init__(self, model: nn.Module, known: Iterable[str] = (), prefixes: Mapping[str, str] | None = None) -> None:
        self.known = frozenset(known)
        self.own, self.wrappers = own_names(model)
        names = {name for name in self.own.values() if name}
        #: What nearly fits, as the end of an error; empty where all is well.
        self.hint = ""
        #: What module_prefixes of the config was when the adapter was made; the model may be wrapped otherwise today.
        self.home = dict(prefixes or {})
        #: Whether that was used: False also where it leads nowhere in this model.
        self.given = bool(self.known.intersection(renamed(names, self.home).values()))
        self.prefixes = self.home if self.given else self._find(model, names)

    def _find(self, model: nn.Module, names: set[str]) -> dict[str, str]:
        same = self.known & names
        if same == self.known:
            return {}
        declared = declared_prefixes(model, names, self.known)
        if declared:
            return declared
        found, candidates = one_prefix(names, self.known)
        if found is not None and not same:
            return dict([found])
        self.hint = _hint(candidates)
        return {}

    def check_given(self) -> None:
        """Raise BasisError where module_prefixes was given for a new adapter and leads to nothing in the basis."""
        if not self.home or self.given:
            return
        if not self.known:
            raise BasisError(
                f"module_prefixes={self.home!r} says what a basis calls the modules of the model, but here the "
                "model's own names count: leave it out."
            )
        raise BasisError(
            f"module_prefixes={self.home!r} leads from no module of the model to one of the basis: write the "
            f"prefix in the model, then the one in the basis, '' for none.{self.hint}"
        )

    def of(self, name: str) -> str:
        """What the basis, and the saved adapter, call a module of the model."""
        own = self._own(name)
        other = apply(own, self.prefixes)
        return own if other is None else other

    def inside(self, name: str) -> bool:
        """False for modules outside of all prefixes: nothing of the basis is meant for them."""
        return apply(self._own(name), self.prefixes) is not None

    def expects(self, module: str) -> bool:
        """Whether a module of the basis should be in the model: not where the model is another part of the base."""
        parts = self.prefixes.values()
        return not parts or any(not part or f"{module}.".startswith(f"{part}.") for part in parts)

    def aliases(self, name: str) -> list[str]:
        """All that a config may call a module: see `of`, then as in the model, bare and wrapped, then as in the model
        that the adapter was made in."""
        if name in self.wrappers:
            return []
        own, other = self._own(name), self.of(name)
        found = [other, own, name]
        if self.home != self.prefixes:
            back = apply(other, {theirs: mine for mine, theirs in self.home.items()})
            found += [] if back is None else [back]
        return list(dict.fromkeys(found))

    @property
    def wrapped_inside(self) -> bool:
        """Whether some module has a wrapper in the middle of its name, so that the bare name is not its ending."""
        return any(not f".{name}".endswith(f".{own}") for name, own in self.own.items() if own)

    def _own(self, name: str) -> str:
        found = self.own.get(name)
        return base_name(name) if found is None else found


def own_names(model: nn.Module) -> tuple[dict[str, str], frozenset[str]]:
    """Name in `model.named_modules()` -> the same without wrappers, and the names of the wrappers themselves."""
    own: dict[str, str] = {}
    parallel: set[str] = set()
    wrappers: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            parallel.add(name)
        parent, _, last = name.rpartition(".")
        if name and (last in WRAPPED or (last == "module" and parent in parallel)):
            own[name] = own[parent]
            wrappers.add(parent)
        else:
            own[name] = join(own[parent], last) if name else ""
    return own, frozenset(wrappers)


def join(prefix: str, name: str) -> str:
    """Two parts of a module's name, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def apply(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The name with the longest prefix that it has replaced; None where it has none of them."""
    if not prefixes:
        return name
    for mine in sorted(prefixes, key=len, reverse=True):
        if not mine or name == mine or name.startswith(f"{mine}."):
            return join(prefixes[mine], name[len(mine) :].removeprefix("."))
    return None


def renamed(names: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """name -> what `prefixes` makes of it, for the names that have one of them."""
    found = {name: apply(name, prefixes) for name in names} if prefixes else {}
    return {name: other for name, other in found.items() if other is not None}


def one_prefix(
    names: Iterable[str], known: Iterable[str]
) -> tuple[tuple[str, str] | None, dict[tuple[str, str], tuple[int, int]]]:
    """The one prefix by which `names` of a model and `known` names of a basis differ, as (in the model, in the basis).

    (p, ""): the model holds the base at p. Every known name is at p, and what ends like a known name is nowhere else.
    ("", p): the model is the part p of the base. Every known name below p is in the model, and no known name
    elsewhere ends like a module of the model.

    Returns the prefix, or None where there is none or more than one, and all that explain at least one module: how
    many modules of the basis each of them explains, and of how many.
    """
    names, known = frozenset(names), frozenset(known)
    inner: dict[str, dict[str, str]] = {}  # prefix in the model -> module of the model -> module of the basis
    for name in names:
        for head, tail in splits(name):
            if tail in known:
                inner.setdefault(head, {})[name] = tail
    outer: dict[str, set[str]] = {}  # prefix in the basis -> modules of the basis
    below: Counter[str] = Counter()
    for name in known:
        for head, tail in splits(name):
            below[head] += 1
            if tail in names:
                outer.setdefault(head, set()).add(name)
    alike, alike_known = (len(set().union(*found.values())) for found in (inner, outer))
    candidates, fitting = {}, []
    for head in sorted(inner):
        reached = len(set(inner[head].values()))
        candidates[head, ""] = (reached, len(known))
        if not outer and reached == len(known) and len(inner[head]) == alike:
            fitting.append((head, ""))
    for head in sorted(outer):
        candidates["", head] = (len(outer[head]), below[head])
        if not inner and len(outer[head]) == below[head] == alike_known:
            fitting.append(("", head))
    return (fitting[0] if len(fitting) == 1 else None), candidates


def splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a dotted name in two: ("a", "b.c"), ("a.b", "c")."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        yield ".".join(parts[:i]), ".".join(parts[i:])


def declared_prefixes(model: nn.Module, names: set[str], known: frozenset[str]) -> dict[str, str]:
    """Prefixes from the model's own rules for checkpoints of older versions, where they find every known name."""
    rename = _renaming(_inner(model))
    if rename is None:
        return {}
    pairs: dict[str, str] = {}
    for name in sorted(known):
        key = rename(f"{name}.weight")
        today = key.removesuffix(".weight")
        if today not in names or pairs.setdefault(today, name) != name:
            return {}
    short = dict(_without_common_end(today, name) for today, name in pairs.items())
    # A shorter form may say more than the rules did, of modules that the basis does not have.
    if {mine: name for mine, name in renamed(names, short).items() if name in known} == pairs:
        return short
    return pairs


def _without_common_end(one: str, two: str) -> tuple[str, str]:
    left, right = one.split("."), two.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    return ".".join(left), ".".join(right)


def _renaming(model: nn.Module) -> Callable[[str], str] | None:
    """How transformers turns the names in a checkpoint of an older version into those of today."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None  # and nothing of transformers is imported for it
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not isinstance(model, PreTrainedModel):
        return None
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    return lambda key: str(rename_source_key(key, rules, [])[0])


def _inner(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers around it."""
    while True:
        parallel = isinstance(model, (DataParallel, DistributedDataParallel))
        wrapped = (m for n, m in model.named_children() if n in WRAPPED or (parallel and n == "module"))
        inner = next(wrapped, None)
        if inner is None:
            return model
        model = inner


def _hint(candidates: Mapping[tuple[str, str], tuple[int, int]]) -> str:
    """What to say of prefixes that nearly fit, those with the fewest modules missing first."""
    told = []
    for (mine, theirs), (count, whole) in candidates.items():
        where = f"below {mine!r} in the model" if mine else f"below {theirs!r} in the basis"
        option = f"module_prefixes={ {mine: theirs} }"
        told.append((whole - count, f"{count} of {whole} modules fit {where} ({option})"))
    if not told:
        return ""
    shown = "; ".join(text for _, text in sorted(told)[:_SHOWN])
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    return f" By their endings, {shown}{more}: give module_prefixes if one of these is meant."


def check_prefixes(prefixes: object) -> dict[str, str] | None:
    """module_prefixes of a config, with the dots at the ends removed. Raises ValueError for anything but names."""
    if prefixes is None:
        return None
    pairs = list(prefixes.items()) if isinstance(prefixes, Mapping) else []
    if not isinstance(prefixes, Mapping) or not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ValueError(
            f"module_prefixes={prefixes!r} should be a dict of names, prefix in the model -> prefix in the basis, "
            "such as {'vggt': ''} for a basis of the model's submodule vggt."
        )
    found = {mine.strip("."): theirs.strip(".") for mine, theirs in pairs}
    return found or None
