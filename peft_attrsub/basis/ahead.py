"""Reading ahead: the next tensors leave the disk, and are hashed, while the last ones are worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """`read(name)` for names that will be asked for in the order of `plan`, one call ahead in a thread.

    A name out of turn, or not in the plan, is read when it is asked for; what is held never exceeds one result.
    Reading and hashing let other Python code run meanwhile.
    """

    def __init__(self, read: Callable[[str], T], plan: Iterable[str] = ()) -> None:
        self._read = read
        self._plan = list(dict.fromkeys(plan))
        self._after = {name: i + 1 for i, name in enumerate(self._plan)}
        self._next: tuple[str, Future[T]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="basis-reader")

    def get(self, name: str) -> T:
        """The result for `name`, and the start of reading for the name after it; raises what `read` raises."""
        ready = self._next[1] if self._next and self._next[0] == name else None
        found = self._read(name) if ready is None else ready.result()
        if name in self._after:
            self._start(self._after[name])
        return found

    def _start(self, position: int) -> None:
        self._next = None
        if position < len(self._plan):
            name = self._plan[position]
            self._next = name, self._reader.submit(self._read, name)

    def close(self) -> None:
        """Forget what was read ahead and end the thread."""
        self._next = None
        self._reader.shutdown(wait=True, cancel_futures=True)
