"""A whole run in a process of its own, to be killed: `python drive.py OUT SCENES WORKERS [generate's arguments]`.

The package's own __init__ is left out, as the workers do it. Exits with the status.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "peft_attrsub" / "scenes" / "worker.py"))["stand_in"](str(ROOT / "peft_attrsub"))

    from peft_attrsub.scenes.generate import generate
    from tests.scenes import tiny

    out, scenes, workers, *rest = sys.argv[1:]
    report = generate(
        out,
        tiny.TinyRecipe(os.environ.get("TINY_ATTRIBUTE", "texture")),
        int(scenes),
        renderer=f"{tiny.HERE}:TinyRenderer",
        sampler=f"{tiny.HERE}:sample",
        workers=int(workers),
        **(json.loads(rest[0]) if rest else {}),
    )
    raise SystemExit(report.status)
