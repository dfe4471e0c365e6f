"""Random damage to JSON and to bytes, seeded."""

import copy
import json
import math

#: What may stand where something else was; the strings are JSON that Python's own writer would not write.
VALUES = [
    *(None, True, False, 0, 1, -1, 3, 7, 64, 2**31, 2**63, 10**30, 10**400, -(10**30), 0.5, -0.0, 1e-320, 1e30, 1e308),
    *(math.nan, math.inf, -math.inf, "", "16", "None", "true", "*", "(", "a{99999999999}", "\x1b[31m", "../x", "\0"),
    *("\ud800", "x" * 5000, "é", "NaN", "bfloat16", "texture", [], {}, [[]], [0], [1, 2], [None], ["m"], {"": 0}),
    *({"a": 1}, {"*.m": 4}, {"id": 1}, {"name": "x", "digest": "y"}, [{}], [{"name": "x"}], "0" * 64, ["f" * 64]),
]
_DEEP = "@deep@"


def places(value, at=()):
    """The paths of all values in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places(value[key], (*at, key))


def mutated(record, random, renames=True):
    """(path, text of a JSON file in which one value of `record` is another, lost, renamed, doubled or very deep)."""
    record = copy.deepcopy(record)
    path = random.choice(list(places(record)))
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    last, what = path[-1], random.random()
    if what < 0.1:
        del parent[last]
    elif what < 0.15 and isinstance(parent, dict) and renames:
        parent[f"{last}x"] = parent.pop(last)
    elif what < 0.2 and isinstance(parent[last], list):
        parent[last] = parent[last] + parent[last][:1]
    elif what < 0.25 and type(parent[last]) in (int, float):
        parent[last] = random.choice([parent[last] + 1, -parent[last], float(parent[last])])
    elif what < 0.28:
        parent[last] = _DEEP
    else:
        parent[last] = copy.deepcopy(random.choice(VALUES))
    depth = random.choice([70, 900, 5000, 100_000])
    return path, json.dumps(record).replace(f'"{_DEEP}"', "[" * depth + "]" * depth)


def flipped(data, random):
    """The bytes with one bit flipped."""
    damaged = bytearray(data)
    damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)
