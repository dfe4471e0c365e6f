"""The start of every script of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from peft_attrsub._machine import print_anything


def run(main: Callable[[], int]) -> NoReturn:
    """`main` to the exit status, on a console of any encoding."""
    print_anything()
    raise SystemExit(main())
