"""The paper's whole story on a laptop's CPU, without a network: from made scenes to a page that shows what it brought.

    python examples/vggt/demo.py [--out runs/demo] [--model vggt-mini] [--workers 2] [--fresh]

1. Tiny datasets of ray-cast scenes, in each of which one attribute varies: texture, geometry, camera, lighting.
2. A LoRA on each of them, and `peft-attrsub build-basis` mines the subspace that the LoRA of an attribute share.
3. Cores in that basis, and a plain LoRA beside them, learn made-up people in rooms, seen from below the ceiling; the
   same frozen heads, data and steps.
4. All are measured on people and rooms nobody has seen, and on generic scenes, for what was forgotten.

Every step is one of the commands of this folder, printed as it starts, with its log in OUT/steps. OUT/index.html shows
the result, whichever way it falls, and OUT/summary.json holds its numbers. Whatever stops a run, the same command
continues it; a second run finds all done.

Exit status: 0 done; 1 a command failed (its log is named); 2 wrong arguments or a package is missing; 130 and 143
stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

MARKER = ".peft-attrsub-demo"  # in every folder made by this script: --fresh may remove it
# Beside peft_attrsub's own requirements: looked for now, and not after minutes.
NEEDED = {
    "open3d": "open3d",
    "PIL": "pillow",
    "plotly": "plotly",
    "scipy": "scipy",
    "trimesh": "trimesh",
    "yaml": "pyyaml",
}


def parser() -> argparse.ArgumentParser:
    from demonstration.plan import SCALES

    first, _, rest = (__doc__ or "").partition("\n")
    out = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = out.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder of everything (default: runs/demo)")
    add("--model", default="vggt-mini", help="the VGGT to tune: folder, or the shipped vggt-mini (default)")
    add("--workers", type=int, help="commands at a time, a core each (default: one per core, at most 4)")
    add("--fresh", action="store_true", help="remove what an earlier demo left in --out, and start anew")
    add(
        "--scale",
        choices=tuple(SCALES),
        default="laptop",
        help="laptop (default), or toy, which only shows that it runs",
    )
    return out


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_folder(out: Path, fresh: bool) -> None:
    """Make `out` ready. ValueError for a folder of somebody else's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder as --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ValueError(f"{out} holds files that this script did not write: give another --out.")
    if fresh and out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).exists():
        (out / MARKER).touch()


def settings_of(out: Path, model: str, scale: str) -> dict[str, Any]:
    """What the demo in `out` is made with; ValueError where that is something else than is asked for."""
    from peft_attrsub.evaluation.files import write_atomically

    path = out / "demo.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        for key, value in (("model", model), ("scale", scale)):
            if known[key] != value:
                raise ValueError(
                    f"{out} holds a demo with {key} {known[key]}, and {value} is asked for: give another --out, or "
                    "--fresh."
                )
        return dict(known)
    from _model import load_base

    base = load_base(model)
    settings = {
        "model": model,
        "scale": scale,
        "image_size": base.config.image_size,
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
    }
    write_atomically(path, (json.dumps(settings, indent=1) + "\n").encode())
    return settings


def demonstrate(args: argparse.Namespace) -> int:
    from demonstration.page import PAGE, write_page
    from demonstration.plan import SCALES, plan, write_settings
    from demonstration.runner import StepError, run_steps

    start = time.monotonic()
    settings = settings_of(args.out, args.model, args.scale)
    scale = SCALES[args.scale]
    write_settings(args.out, settings["image_size"], scale)
    steps = plan(args.out, args.model, settings["image_size"], scale)
    try:
        worked = run_steps(args.out, steps, args.workers or min(4, cores()))
    except StepError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    if worked or not (args.out / PAGE).is_file():
        for sentence in write_page(args.out, settings, steps):
            print(sentence)
        print(f"{time.monotonic() - start:.0f} seconds")
    else:
        print("all of it is done already; --fresh starts anew")
    print(f"Open this page: {(args.out / PAGE).resolve()}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.workers is not None and args.workers < 1:
            raise ValueError(f"--workers is {args.workers}: give 1 or more.")
        if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
            where = " on Python 3.11 or 3.12" if missing[0] == "open3d" and sys.version_info >= (3, 13) else ""
            raise ImportError(f"{missing[0]} is not installed: run pip install 'peft-attrsub[demo]'{where}.")
        prepare_folder(args.out, args.fresh)
        return demonstrate(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
