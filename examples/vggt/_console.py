"""The start of every script of this folder."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """`main` to the exit status, on a console of any encoding.

    A character that the console lacks is written as "?" and does not end the run. As `print_anything` of
    peft_attrsub._machine does it, without the import of the package, which --help need not wait for.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    raise SystemExit(main())
