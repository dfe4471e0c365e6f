"""Synthetic datasets in which one attribute varies: rooms of textured shapes, with depth, cameras and object ids.

    python examples/vggt/generate_scenes.py --attribute texture --datasets 10 --scenes 200 --views 100 --out data/
    accelerate launch examples/vggt/generate_scenes.py --attribute all --out data/         # the paper's forty, shared
    python examples/vggt/generate_scenes.py --attribute texture --out data/ --check   # what is broken, if anything
    python examples/vggt/generate_scenes.py --attribute texture --out data/ --repair  # render that again
    python examples/vggt/generate_scenes.py --attribute all --out data/ --launcher slurm --partition cpu  # a job each

Dataset k of an attribute is the folder OUT/<attribute>_<k>; every scene in it opens in nerfstudio, and its
contact_sheet.png shows what varies. Whatever stops a run, the same command continues it.

Exit status: 0 all is done (or whole); 1 scenes failed (see failures.json) or problems were found; 2 wrong arguments
or a full disk; 130, 143 stopped by Ctrl-C or SIGTERM. With --launcher: 1 jobs failed or were stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training.launcher import Job, add_options, options_of, script_command, without_options
from training.launcher import launch as run_jobs

ATTRIBUTES = ("texture", "geometry", "camera", "lighting")  # "all": what the paper mines


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    out = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = out.add_argument
    add(
        "--attribute",
        required=True,
        choices=(*ATTRIBUTES, "mixed", "motion", "all"),
        help="what varies within a dataset",
    )
    add("--out", type=Path, required=True, help="folder of the datasets")
    add("--datasets", type=int, default=10, help="datasets per attribute (default: 10)")
    add("--only", type=int, metavar="K", help="of these only dataset K of each attribute")
    add("--scenes", type=int, default=200, help="scenes per dataset (default: 200)")
    add("--views", type=int, default=0, help="views per scene (default: 100, and 42 of a micro-baseline)")
    add("--size", type=int, default=518, help="width and height in pixels (default: 518)")
    add("--layout", choices=("room", "object"), default="room", help="a room, or objects without walls")
    add("--trajectory", choices=("spline", "micro", "orbit"), default="spline", help="how the camera moves")
    add("--textures", type=Path, help="folder of PBR materials (MatSynth's layout) instead of procedural ones")
    add("--seed", type=int, default=0, help="dataset k has the seed 1000 SEED + k (default: 0)")
    add("--renderer", default="raycast", help="raycast, cycles, or module:attribute (default: raycast)")
    add("--samples", type=int, default=4, help="cycles: paths per pixel; 64 without --denoise is the paper's")
    add("--denoise", action=argparse.BooleanOptionalAction, default=True, help="cycles: denoise (default: yes)")
    add("--device", choices=("cpu", "optix", "cuda"), default="cpu", help="cycles: where it runs (default: cpu)")
    add("--supersample", type=int, default=1, help="raycast: rays per pixel and axis (default: 1)")
    add("--depth", choices=("png", "npy", "exr"), default="png", help="16-bit millimetres, or float32 metres")
    add("--jpeg", type=int, metavar="Q", help="store colour as JPEG of quality Q instead of PNG")
    add("--workers", type=int, help="processes (default: one per core; cycles: 1)")
    add("--check", action="store_true", help="only look for what is broken or missing")
    add("--repair", action="store_true", help="only look for that, and render it again")
    add_options(out)
    return out


def datasets(args: argparse.Namespace) -> Iterator[tuple[Path, str, int]]:
    """Folder, attribute and seed of every dataset."""
    for attribute in ATTRIBUTES if args.attribute == "all" else (args.attribute,):
        for number in range(args.datasets) if args.only is None else [args.only]:
            yield args.out / f"{attribute}_{number:02d}", attribute, 1000 * args.seed + number


def renderer_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.renderer == "cycles":
        return {"samples": args.samples, "denoise": args.denoise, "device": args.device}
    return {"supersample": args.supersample} if args.renderer == "raycast" else {}


def look_after(args: argparse.Namespace) -> int:
    """--check and --repair: one line per problem."""
    from peft_attrsub.scenes.check import check_dataset, repair_dataset

    status = 0
    for folder, _, _ in datasets(args):
        problems = (
            repair_dataset(folder, args.workers, texture_root=args.textures) if args.repair else check_dataset(folder)
        )
        for problem in problems:
            print(f"{folder.name}: {problem}")
        print(f"{folder.name}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}", flush=True)
        status |= bool(problems)
    return status


def make(args: argparse.Namespace) -> int:
    from peft_attrsub.scenes.generate import generate
    from peft_attrsub.scenes.sampling import AttributeRecipe

    textures = None
    if args.textures is not None:
        from peft_attrsub.scenes.textures import find_maps

        found, unreadable = find_maps(args.textures)
        # By their names in that folder: a dataset is the same wherever the textures lie.
        textures = [os.path.relpath(folder, args.textures) for folder in found]
        for name in unreadable:
            print(f"{name} cannot be read: left out", file=sys.stderr)
    status = 0
    for folder, attribute, seed in datasets(args):
        recipe = AttributeRecipe(
            attribute=attribute,
            seed=seed,
            layout=args.layout,
            trajectory=args.trajectory,
            size=args.size,
            views=args.views,
        )
        report = generate(
            folder,
            recipe,
            args.scenes,
            renderer=args.renderer,
            options=renderer_options(args),
            textures=textures,
            texture_root=args.textures,
            jpeg=args.jpeg,
            depth=args.depth,
            workers=args.workers,
        )
        if report.failed:
            print(
                f"{folder.name}: {len(report.failed)} scenes failed, see {folder / 'failures.json'}", file=sys.stderr
            )
        if report.signal is not None:
            return report.status
        status |= report.status
    return status


def launch(args: argparse.Namespace, options: Any, arguments: Sequence[str]) -> int:
    """One job per dataset, each this script with the same arguments and --only. OUT/.jobs holds logs and states."""
    if args.check or args.repair:
        raise ValueError("--check and --repair are not for --launcher: they are done at once, without it.")
    place, jobs = args.out / ".jobs", []
    arguments = without_options(arguments)
    if args.workers is None and options.cpus is not None and args.renderer == "raycast":
        arguments += ["--workers", str(options.cpus)]  # not one per core of the node
    for folder, attribute, seed in datasets(args):
        chosen = ["--attribute", attribute, "--only", str(seed - 1000 * args.seed)]
        command = script_command(__file__, [*arguments, *chosen], options)
        jobs.append(Job(folder.name, command, place / folder.name, folder / "dataset.json"))
    return run_jobs(jobs, options, place, "generate-scenes")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    try:
        options = options_of(args)
        if args.only is not None and not 0 <= args.only < args.datasets:
            raise ValueError(f"--only is {args.only}: of {args.datasets} datasets, give 0 to {args.datasets - 1}.")
        if options.launcher is not None:
            return launch(args, options, arguments)
        return look_after(args) if args.check or args.repair else make(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"generate_scenes: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
