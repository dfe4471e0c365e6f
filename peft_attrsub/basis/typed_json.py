"""JSON of strangers: parsed strictly, and every value that counts asked for by its type and range.

`read_json` refuses what other readers take in silence: a key given twice, bytes that are not UTF-8, half a Unicode
letter, nesting that no config has. `Fields` holds one object; every error names the file, the key, the value and what
was expected.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from .errors import BasisError

T = TypeVar("T")
#: Levels of objects and lists that a file may have; what Python can write again is a few hundred.
MAX_DEPTH = 64
_REQUIRED: Any = object()
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Twice(ValueError):
    """A key is given twice."""


def read_json(path: Path, advice: str) -> Any:
    """The value in a JSON file. Raises BasisError where it is not sound; `advice` ends the sentence."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        depth = _depth(value)
    except OSError as error:
        raise BasisError(f"{str(path)!r} cannot be read ({error.strerror}): {advice}.") from error
    except (RecursionError, ValueError) as error:
        why = _reason(error)
        raise BasisError(f"{str(path)!r} {why}: {advice}.") from None
    if depth > MAX_DEPTH:
        raise BasisError(f"{str(path)!r} is nested deeper than {MAX_DEPTH} levels: {advice}.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in found if keys.count(key) > 1))
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"is nested deeper than {MAX_DEPTH} levels"
    if isinstance(error, _Twice):
        return f"gives the key {short(str(error))} twice"
    if isinstance(error, UnicodeDecodeError):
        return f"is not valid JSON (byte {error.start} is not UTF-8)"
    if isinstance(error, UnicodeEncodeError):
        return "is not valid JSON (a string holds half a surrogate pair)"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON ({error})"
    return "is not valid JSON (a number has too many digits)"


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [one for part in level for one in (part.values() if isinstance(part, dict) else part)]
    return depth


def short(value: object) -> str:
    """A value as an error shows it: one line, a long one cut."""
    return reprlib.repr(value)


def one_line(error: object, most: int = 200) -> str:
    """What an error of another library says, on one line and cut: it may quote the whole file."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Fields:
    """One JSON object, whose values are taken by name.

    where: the file, and the path inside of it, as errors name it. Every method takes a key and gives its value, or the
    default where the key is absent; without a default it must be there. With a default of None, null is allowed too.
    """

    def __init__(self, value: object, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise BasisError(f"{where} holds {short(value)}, expected a JSON object.")
        self.record: dict[str, Any] = value
        self._taken: set[str] = set()

    def _take(self, key: str, default: T, expected: str, check: Callable[[Any], bool]) -> Any:
        self._taken.add(key)
        if key not in self.record:
            if default is _REQUIRED:
                raise BasisError(f"{self.where} lacks {key!r}, expected {expected}.")
            return default
        value = self.record[key]
        if not (value is None and default is None) and not check(value):
            raise self.wrong(key, value, expected)
        return value

    def wrong(self, key: str, value: object, expected: str) -> BasisError:
        """The error for a value that is not what was expected."""
        return BasisError(f"{self.where} is damaged: {key} is {short(value)}, expected {expected}.")

    def unknown(self) -> dict[str, Any]:
        """What nobody has asked for."""
        return {key: value for key, value in self.record.items() if key not in self._taken}

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: T) -> str | T: ...
    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._take(key, default, "a string", lambda x: isinstance(x, str))

    @overload
    def name(self, key: str) -> str: ...
    @overload
    def name(self, key: str, default: T) -> str | T: ...
    def name(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string that can be printed on one line: control characters have no place in a name."""
        return self._take(key, default, "a string of one line", lambda x: isinstance(x, str) and x.isprintable())

    @overload
    def sha256(self, key: str) -> str: ...
    @overload
    def sha256(self, key: str, default: T) -> str | T: ...
    def sha256(self, key: str, default: Any = _REQUIRED) -> Any:
        """A sha256 in hex."""
        return self._take(key, default, "a sha256 of 64 hex digits", is_sha256)

    @overload
    def whole(self, key: str, low: int | None) -> int: ...
    @overload
    def whole(self, key: str, low: int | None, default: T) -> int | T: ...
    def whole(self, key: str, low: int | None, default: Any = _REQUIRED) -> Any:
        """A whole number, from `low` up where that is given."""
        expected = "a whole number" if low is None else f"a whole number from {low} up"
        return self._take(key, default, expected, lambda x: is_whole(x, low))

    @overload
    def number(self, key: str, limit: float = ...) -> float: ...
    @overload
    def number(self, key: str, limit: float = ..., *, default: T) -> float | T: ...
    def number(self, key: str, limit: float = math.inf, *, default: Any = _REQUIRED) -> Any:
        """A finite number, not larger than `limit` in magnitude."""
        kind = "a finite number" if limit == math.inf else f"a number from -{limit:g} to {limit:g}"
        return self._take(key, default, kind, lambda x: is_number(x, limit))

    def flag(self, key: str, default: bool | None = None) -> bool | None:
        """true or false."""
        found: bool | None = self._take(key, default, "true or false", lambda x: isinstance(x, bool))
        return found

    def one_of(self, key: str, allowed: tuple[str, ...], default: Any = _REQUIRED) -> str:
        """One of several strings."""
        expected = f"one of {', '.join(map(repr, allowed))}"
        found: str = self._take(key, default, expected, lambda x: isinstance(x, str) and x in allowed)
        return found

    def table(self, key: str, expected: str, check: Callable[[Any], bool], default: Any = _REQUIRED) -> dict[str, Any]:
        """An object whose values all pass `check`; null counts as empty where a default is given."""
        asked = f"an object of {expected}"
        found = self._take(key, None if default is not _REQUIRED else default, asked, lambda x: isinstance(x, dict))
        for name, value in (found or {}).items():
            if not check(value):
                raise self.wrong(f"{key}[{short(name)}]", value, expected)
        return found or {}

    def row(self, key: str, expected: str, check: Callable[[Any], bool], default: Any = _REQUIRED) -> list[Any]:
        """A list whose entries all pass `check`; null counts as empty where a default is given."""
        asked = f"a list of {expected}"
        found = self._take(key, None if default is not _REQUIRED else default, asked, lambda x: isinstance(x, list))
        for number, value in enumerate(found or []):
            if not check(value):
                raise self.wrong(f"{key}[{number}]", value, expected)
        return found or []

    def objects(self, key: str, default: Any = _REQUIRED) -> Iterator[Fields]:
        """The objects of a list."""
        for number, value in enumerate(self.row(key, "objects", lambda x: isinstance(x, dict), default)):
            yield Fields(value, f"{self.where}, {key}[{number}]")


def is_whole(value: object, low: int | None = None) -> bool:
    """A whole number, from `low` up, that 64 bits hold; true and false are not numbers."""
    return type(value) is int and (-(2**63) if low is None else low) <= value < 2**64


def is_number(value: object, limit: float = math.inf) -> bool:
    """A finite number, not larger than `limit` in magnitude."""
    if type(value) is int:
        return abs(value) <= min(limit, 2**63)
    return type(value) is float and math.isfinite(value) and abs(value) <= limit


def is_sha256(value: object) -> bool:
    """64 hex digits."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def canonical(record: Mapping[str, Any]) -> bytes:
    """A JSON object as bytes that depend on its meaning only, not on spaces or the order of keys."""
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
