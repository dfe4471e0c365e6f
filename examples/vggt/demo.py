"""The paper's whole story on a laptop's CPU, without a network: from made scenes to a page that shows what it brought.

    python examples/vggt/demo.py [--out runs/demo] [--model vggt-mini] [--workers 2] [--fresh]

1. Tiny datasets of ray-cast scenes, in each of which one attribute varies: texture, geometry, camera, lighting.
2. A LoRA on each of them, and `peft-attrsub build-basis` mines the subspace that the LoRA of an attribute share.
3. Cores in that basis, and a plain LoRA beside them, learn made-up people in rooms, seen from below the ceiling; the
   same frozen heads, data and steps.
4. All are measured on people and rooms nobody has seen, and on generic scenes, for what was forgotten.

A training step is measured first, and --scale auto takes the largest scale that is expected to stay within 6 minutes.
OUT/index.html is written in the first minute, grows with what is done, and shows the result at the end, whichever way
it falls. OUT/summary.json holds its numbers, OUT/demo.json the scale and why it was chosen. Every step is one of the
commands of this folder, printed as it starts, with its log in OUT/steps. Whatever stops a run, the same command
continues it; a second run finds all done.

Runs on Linux and macOS. Exit status: 0 done; 1 a command failed (its log is named); 2 wrong arguments or a package is
missing; 129, 130 and 143 stopped by SIGHUP, Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

MARKER = ".peft-attrsub-demo"  # in every folder made by this script: --fresh may remove it
AUTO, MOST_WORKERS = "auto", 4
# Needed in addition to what peft_attrsub requires. Looked for at the start, and not after minutes.
NEEDED = {
    "open3d": "open3d",
    "PIL": "pillow",
    "plotly": "plotly",
    "scipy": "scipy",
    "trimesh": "trimesh",
    "yaml": "pyyaml",
}


def parser() -> argparse.ArgumentParser:
    from demonstration.scales import SCALES

    first, _, rest = (__doc__ or "").partition("\n")
    out = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = out.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder of everything (default: runs/demo)")
    add("--model", default="vggt-mini", help="the VGGT to tune: folder, or the shipped vggt-mini (default)")
    add(
        "--workers",
        type=int,
        help=f"commands at a time, a core and 1 GB each (default: what fits, at most {MOST_WORKERS})",
    )
    add("--fresh", action="store_true", help="remove what an earlier demo left in --out, and start anew")
    add(
        "--scale",
        choices=(AUTO, *SCALES),
        default=AUTO,
        help="auto (default): laptop, or small on a slow machine; toy only shows that it runs. A demo that is "
        "continued keeps its scale",
    )
    return out


def prepare_folder(out: Path, fresh: bool) -> None:
    """Make `out` ready. ValueError for a folder of somebody else's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder as --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ValueError(f"{out} holds files that this script did not write: give another --out.")
    if fresh and out.is_dir():
        from demonstration.runner import in_use

        if in_use(out):
            raise ValueError(f"another demo is at work in {out}: stop it first, or give another --out.")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MARKER).exists():
        (out / MARKER).touch()


def settings_of(out: Path, model: str, scale: str) -> dict[str, Any]:
    """What the demo in `out` is made with, as in demo.json; its "scale" is None until it has been chosen.

    ValueError where it is made with something else than is asked for; the scale auto fits any.
    """
    from demonstration.show import RECORD

    path = out / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    asked = {"model": model} | ({} if scale == AUTO else {"scale": scale})
    for key, value in asked.items():
        if known.get(key, value) not in (None, value):
            raise ValueError(
                f"{out} holds a demo with {key} {known[key]}, and {value} is asked for: give another --out, or "
                "--fresh."
            )
    size = known.get("image_size") or image_size(model)
    return known | {"model": model, "scale": asked.get("scale", known.get("scale")), "image_size": size}


def image_size(model: str) -> int:
    """Width of the pictures that a VGGT was made for."""
    from peft_attrsub.vggt.shipped import find_shipped

    path = Path(find_shipped(model)) / "config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "image_size" in known:  # without importing torch, which takes seconds
        return int(known["image_size"])
    from _model import load_config

    return int(load_config(model).image_size)


def demonstrate(args: argparse.Namespace) -> int:
    from demonstration.machine import workers
    from demonstration.runner import working

    with working(args.out, lambda text: print(text, flush=True)) as lock:
        settings = settings_of(args.out, args.model, args.scale)
        return continue_demo(args.out, settings, args.workers or workers(MOST_WORKERS), lock)


def continue_demo(out: Path, settings: dict[str, Any], workers: int, lock: int) -> int:
    """Do what is not done; the exit status."""
    from demonstration.page import PAGE
    from demonstration.runner import StepError, run_steps
    from demonstration.show import Show

    page = (out / PAGE).resolve()
    show = Show(out, settings, workers)
    if show.finished_all and page.is_file():
        print(f"all of it is done already; --fresh starts anew\nOpen this page: {page}")
        return 0
    show.say(f"The page is {page}: open it now, it grows with what is done.")
    if show.done and settings["scale"] is not None:
        show.say(
            f"Continued at the scale {settings['scale']}: {len(show.done)} of {len(show.steps)} commands are done."
        )
    try:
        show.know_speed()
        show.update()
        run_steps(out, show.steps, workers, show, lock)
    except StepError as error:
        show.close(f"A command failed: {error}")
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show.close("It was stopped.")
        raise
    for sentence in show.close():
        print(sentence)
    calls = len(show.calls)
    print(f"{show.total:.0f} seconds{f' in {calls} calls' if calls > 1 else ''}")
    print(f"Open this page: {page}", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    from peft_attrsub.interrupts import until_stopped

    def work() -> int:
        if os.name == "nt":
            raise ValueError("Windows is not supported: run it in WSL (wsl --install), where it runs as on Linux.")
        if args.workers is not None and args.workers < 1:
            raise ValueError(f"--workers is {args.workers}: give 1 or more.")
        if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
            where = " on Python 3.11 or 3.12" if missing[0] == "open3d" and sys.version_info >= (3, 13) else ""
            raise ImportError(f"{missing[0]} is not installed: run pip install 'peft-attrsub[demo]'{where}.")
        prepare_folder(args.out, args.fresh)
        return demonstrate(args)

    try:
        # SIGHUP: the terminal closes.
        return until_stopped("demo", work, signals=("SIGTERM", "SIGHUP"))
    except (ImportError, OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
