"""Synthetic datasets in which one attribute varies: rooms of textured shapes, with depth, cameras and object ids.

    python examples/vggt/generate_scenes.py --attribute texture --datasets 10 --scenes 200 --views 100 --out data/
    accelerate launch examples/vggt/generate_scenes.py --attribute all --out data/         # the paper's forty, shared
    python examples/vggt/generate_scenes.py --attribute texture --out data/ --check   # what is broken, if anything
    python examples/vggt/generate_scenes.py --attribute texture --out data/ --repair  # render that again (a damaged
                                        # dataset.json is made again if all arguments of the generation are given)
    python examples/vggt/generate_scenes.py --attribute all --out data/ --launcher slurm --partition cpu  # a job each

Dataset k of an attribute is the folder OUT/<attribute>_<k>; every scene in it opens in nerfstudio, and its
contact_sheet.png shows what varies. Whatever stops a run, the same command continues it.

Exit status: 0 all is done (or whole); 1 scenes failed (see failures.json) or problems were found; 2 wrong arguments
or a full disk; 130, 143 stopped by Ctrl-C or SIGTERM. With --launcher: 1 jobs failed or were stopped.
"""

from __future__ import annotations

import argparse
import errno
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
    add(
        "--depth",
        choices=("png", "npy", "exr"),
        default="png",
        help="16-bit millimeters, or float32 meters, which nerfstudio then leaves out (default: png)",
    )
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


def recipe_of(args: argparse.Namespace, attribute: str, seed: int) -> Any:
    from peft_attrsub.scenes.recipes import AttributeRecipe

    return AttributeRecipe(
        attribute=attribute,
        seed=seed,
        layout=args.layout,
        trajectory=args.trajectory,
        size=args.size,
        views=args.views,
    )


def textures_of(args: argparse.Namespace) -> list[str] | None:
    """Names of the folders of PBR maps in --textures: a dataset is the same wherever that folder lies."""
    if args.textures is None:
        return None
    from peft_attrsub.scenes.textures import find_maps

    found, unreadable = find_maps(args.textures)
    for name in unreadable:
        print(f"{name} cannot be read: left out", file=sys.stderr)
    return [os.path.relpath(folder, args.textures) for folder in found]


def look_after(args: argparse.Namespace) -> int:
    """--check and --repair: one line per problem; a dataset that cannot be read does not keep the others from it."""
    from peft_attrsub.scenes.check import check_dataset

    known = list(datasets(args))
    if not any(folder.is_dir() for folder, _, _ in known):
        check_dataset(known[0][0])  # says what is missing
    status = 0
    for folder, attribute, seed in known:
        problems: list[Any]
        try:
            problems = repair(args, folder, attribute, seed) if args.repair else check_dataset(folder)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # it is full for the others as well
            problems = [error]
        for problem in problems:
            print(f"{folder.name}: {problem}")
        print(f"{folder.name}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}", flush=True)
        status |= bool(problems)
    return status


def repair(args: argparse.Namespace, folder: Path, attribute: str, seed: int) -> list[Any]:
    """Repair one dataset; its dataset.json, if that cannot be read, is made again from the arguments."""
    from peft_attrsub.scenes.check import repair_dataset
    from peft_attrsub.scenes.dataset import Dataset, make_plan
    from peft_attrsub.scenes.generate import RENDERERS, SAMPLER

    try:
        Dataset.open(folder)
    except (OSError, ValueError) as error:
        if not folder.is_dir():
            raise
        renderer = RENDERERS.get(args.renderer, args.renderer)
        recipe, options, textures = recipe_of(args, attribute, seed), renderer_options(args), textures_of(args)
        plan = make_plan(recipe, SAMPLER, renderer, options, textures, args.jpeg, args.depth)
        print(f"{folder.name}: {error}")
        Dataset.restore(folder, plan, args.scenes)
    return repair_dataset(folder, args.workers, texture_root=args.textures)


def make(args: argparse.Namespace) -> int:
    from peft_attrsub.interrupts import say_stopped
    from peft_attrsub.scenes.generate import generate

    textures = textures_of(args)
    status = 0
    for folder, attribute, seed in datasets(args):
        report = generate(
            folder,
            recipe_of(args, attribute, seed),
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
            say_stopped("generate_scenes")
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
        from peft_attrsub.interrupts import until_stopped

        return until_stopped("generate_scenes", lambda: (look_after if args.check or args.repair else make)(args))
    except (ImportError, OSError, ValueError) as error:
        print(f"generate_scenes: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
