"""A small resumable job: a chain of hashes, one link a step, saved after each.

    python toy.py OUT STEPS SECONDS [fail|die]

OUT/chain holds the steps done and the last link; OUT/result the last link of all. SIGTERM: ends with 143 after the
step. fail, die: the first attempt ends with an error, or by SIGKILL.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path


def save(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def main() -> int:
    out, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    mode = sys.argv[4] if len(sys.argv) > 4 else ""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    out.mkdir(parents=True, exist_ok=True)
    chain = out / "chain"
    first = not chain.exists()
    step, link = (0, "") if first else (int(chain.read_text().split()[0]), chain.read_text().split()[1])
    while step < steps:
        time.sleep(seconds)
        link, step = hashlib.sha256(f"{link}{step}".encode()).hexdigest(), step + 1
        save(chain, f"{step} {link}")
        print(f"step {step}", flush=True)
        if first and mode == "fail":
            print("toy: this data cannot be read.", file=sys.stderr)
            return 2
        if first and mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if asked:
            print(f"asked {len(asked)} times to stop", flush=True)
            return 143
    save(out / "result", link)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
