"""Where a module stands in its model, read from its name: depth, stack and kind.

`aggregator.frame_blocks.7.attn.qkv` stands at depth 7 of the stack `aggregator.frame_blocks` and is of kind `qkv`;
beside `aggregator.global_blocks` its kind reads `frame qkv`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

# Names that only say "a list of layers"; what stands before them tells one stack from another.
_CONTAINERS = {"blocks", "block", "layers", "layer", "h", "resblocks"}
_ENDING = re.compile(r"_(blocks?|layers?)$")


@dataclass(frozen=True)
class Place:
    """depth: first number standing alone in the name (None without one). stack: what stands before it.

    kind: the shortest ending of what stands behind it that is unique in the stack, with the stack's own
    name in front where several stacks have the kind. (depth, kind) belongs to one module only.
    """

    depth: int | None
    stack: str
    kind: str


def place(modules: Sequence[str]) -> dict[str, Place]:
    """The place of every module, in the order given."""
    split = {name: _split(name) for name in modules}
    tails: dict[str, set[str]] = defaultdict(set)
    for _, stack, tail in split.values():
        tails[stack].add(tail)
    short = {stack: {tail: _shortest_ending(tail, group) for tail in group} for stack, group in tails.items()}
    places = {name: Place(depth, stack, short[stack][tail]) for name, (depth, stack, tail) in split.items()}
    stacks_of: dict[str, set[str]] = defaultdict(set)
    for one in places.values():
        stacks_of[one.kind].add(one.stack)
    labels = _stack_labels([stack for stack in tails if stack])
    for name, one in places.items():
        if len(stacks_of[one.kind]) > 1 and one.stack:
            places[name] = replace(one, kind=f"{labels[one.stack]} {one.kind}")
    return _made_unique(places)


def _split(name: str) -> tuple[int | None, str, str]:
    """(depth, stack, tail) of one name."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return None, ".".join(parts[:-1]), parts[-1]
    tail = ".".join(parts[at + 1 :]) or (parts[at - 1] if at else "module")
    return int(parts[at]), ".".join(parts[:at]), tail


def _shortest_ending(name: str, among: Collection[str]) -> str:
    """Shortest dotted ending of `name` that no other name in `among` ends with, not starting at a number."""
    parts = name.split(".")
    for start in range(len(parts) - 1, 0, -1):
        ending = ".".join(parts[start:])
        others = (o for o in among if o != name)
        if not parts[start].isdecimal() and not any(o == ending or o.endswith(f".{ending}") for o in others):
            return ending
    return name


def _stack_labels(stacks: Collection[str]) -> dict[str, str]:
    """A short, distinct label per stack: `frame` for `aggregator.frame_blocks`, `encoder` for `encoder.block`."""
    bare = {}
    for stack in stacks:
        parts = stack.split(".")
        while len(parts) > 1 and parts[-1] in _CONTAINERS:
            parts.pop()
        bare[stack] = ".".join(parts)
    labels = {s: _ENDING.sub("", _shortest_ending(name, bare.values())) for s, name in bare.items()}
    repeated = [label for label in labels.values() if list(labels.values()).count(label) > 1]
    return {stack: stack if label in repeated else label for stack, label in labels.items()}


def _made_unique(places: dict[str, Place]) -> dict[str, Place]:
    """Where two modules still share depth and kind, both get their whole name for a kind."""
    count: dict[tuple[int | None, str], int] = defaultdict(int)
    for one in places.values():
        count[one.depth, one.kind] += 1
    return {name: replace(one, kind=name) if count[one.depth, one.kind] > 1 else one for name, one in places.items()}
