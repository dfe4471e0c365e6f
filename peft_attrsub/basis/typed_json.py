"""JSON from strangers, value by value: every one has the type and range that it must have, or there is a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from .errors import BasisError

_HEX = re.compile(r"[0-9a-f]{64}")
# Characters of a value that an error shows.
_SHOWN = 60


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file. Raises BasisError with the advice for anything else, however broken."""
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise BasisError(f"{str(path)!r} is nested too deeply to be read: {advice}.") from None
    except (ValueError, OSError) as error:
        raise BasisError(f"{str(path)!r} is not valid JSON ({error}): {advice}.") from error
    if not isinstance(found, dict):
        raise BasisError(f"{str(path)!r} holds {shown(found)}, expected a JSON object: {advice}.")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def shown(value: object) -> str:
    """A value for an error: on one line, cut when long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class Values:
    """The values of a JSON object under their keys, each checked as it is taken.

    where: what the errors begin with. A key that is absent or null gives the default; all errors are BasisError.
    `rest` holds the keys that have not been asked for.
    """

    def __init__(self, record: object, where: str) -> None:
        self.where = where
        if not isinstance(record, Mapping):
            raise BasisError(f"{where} is {shown(record)}, expected a JSON object.")
        self._record = record
        self._taken: set[str] = set()

    @property
    def rest(self) -> dict[str, Any]:
        return {key: value for key, value in self._record.items() if key not in self._taken}

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise BasisError(f"{self.where}: {key} must be {expected}, got {shown(self._record.get(key))}.")

    def _take(self, key: str) -> Any:
        self._taken.add(key)
        return self._record.get(key)

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, str) or not _sound(value):
            self.refuse(key, "text")
        return value

    def line(self, key: str, default: str | None = None) -> str | None:
        """Text that is printed in one line."""
        value = self.text(key, default)
        if value is not None and not value.isprintable():
            self.refuse(key, "text without control characters")
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self._take(key)
        if value is None:
            return default
        if value not in allowed or not isinstance(value, str):
            self.refuse(key, f"one of {', '.join(allowed)}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def integer(self, key: str, least: int, default: int | None = None) -> int | None:
        value = self._take(key)
        if value is None:
            return default
        if not _is_integer(value, least):
            self.refuse(key, f"an integer of {least} or more")
        return int(value)

    def number(self, key: str, default: float | None = None, least: float | None = None) -> float | None:
        value = self._take(key)
        if value is None:
            return default
        if not _is_number(value) or (least is not None and value < least):
            self.refuse(key, "a finite number" + ("" if least is None else f" of {least:g} or more"))
        return float(value)

    def digest(self, key: str) -> str | None:
        """A sha256 in hex."""
        value = self._take(key)
        if value is not None and not (isinstance(value, str) and _HEX.fullmatch(value)):
            self.refuse(key, "64 hexadecimal digits")
        return value

    def items(self, key: str) -> list[Any]:
        value = self._take(key)
        if value is not None and not isinstance(value, list):
            self.refuse(key, "a list")
        return value or []

    def strings(self, key: str) -> list[str]:
        found = self.items(key)
        if not all(isinstance(value, str) and value.isprintable() and _sound(value) for value in found):
            self.refuse(key, "a list of texts")
        return found

    def table(self, key: str) -> dict[str, Any]:
        value = self._take(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object")
        return value or {}

    def integers_by_name(self, key: str, least: int) -> dict[str, int]:
        return self._by_name(
            key, lambda x: _is_integer(x, least), f"an integer of {least} or more for every name", int
        )

    def numbers_by_name(self, key: str) -> dict[str, float]:
        return self._by_name(key, _is_number, "a finite number for every name", float)

    def digests_by_name(self, key: str) -> dict[str, str]:
        return self._by_name(key, _is_digest, "64 hexadecimal digits for every name", str)

    def digest_lists_by_name(self, key: str) -> dict[str, list[str]]:
        def sound(value: object) -> bool:
            return isinstance(value, list) and all(map(_is_digest, value))

        return self._by_name(key, sound, "a list of 64 hexadecimal digits each for every name", list)

    def _by_name(self, key: str, sound: Callable[[Any], bool], expected: str, kind: Callable[[Any], Any]) -> Any:
        found = self.table(key)
        for value in found.values():
            if not sound(value):
                raise BasisError(f"{self.where}: {key} must have {expected}, got {shown(value)}.")
        return {name: kind(value) for name, value in found.items()}


def _sound(text: str) -> bool:
    """No lone surrogates, which JSON can spell and UTF-8 cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_integer(value: object, least: int) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and least <= value < 2**63  # type: ignore[operator]


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return isfinite(float(value))
    except OverflowError:
        return False


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None
