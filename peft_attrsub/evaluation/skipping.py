"""A sequence that cannot be measured is left out by name: never a crash of the run, never a silent zero."""

from __future__ import annotations


class SkippedError(ValueError):
    """Nothing can be measured here. reason: a few words that tables count, such as "no valid pixels"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


__all__ = ["SkippedError"]
