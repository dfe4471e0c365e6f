"""How many commands of the demo fit on the machine at a time."""

from __future__ import annotations

from peft_attrsub._machine import available_cores, free_memory

#: Bytes that one command of the demo needs at its peak, with some to spare.
NEEDED = 2**30


def workers(most: int, root: str = "/") -> int:
    """Commands at a time: one per core that this process may use, as many as fit into the free memory, at most `most`.

    root: where the system's files are; see `peft_attrsub._machine`.
    """
    free = free_memory(root)
    fitting = most if free is None else free // NEEDED
    return max(1, min(most, available_cores(root), fitting))
