"""Made-up people, or prints of drawn portraits, in made rooms: benchmarks for a small model, on which pictures matter.

    python examples/vggt/prepare_rooms.py people --out made/people --scenes 20       # seen from below the ceiling
    python examples/vggt/prepare_rooms.py people --out made/children --scenes 20 --children --seed 1
    python examples/vggt/prepare_rooms.py prints --out made/prints --scenes 20       # from a camera held at a slant

Folders are laid out as the human and the face benchmark read them; all pixels count. Lengths are in heights of a
person of 1.7 m, and in quarters of 4 m for prints, whose scenes lie within [-1, 1]^3. Ray cast, on one core. They
stand in for nothing but a change of domain: numbers on them are not the paper's. What is there is kept, and whatever
stops a run, the same command continues.

Exit status: 0 all is done; 2 wrong arguments, or nothing to be seen; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

#: Metres of the benchmarks' unit of length.
UNITS = {"prints": 4.0, "people": 1.7}
#: Rooms of these seeds after the given one.
FIRST = {"prints": 100_000, "people": 200_000}


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    out = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=form, allow_abbrev=False)
    out.add_argument("what", choices=("people", "prints"))
    add = out.add_argument
    add("--out", type=Path, required=True, help="folder of the sequences")
    add("--scenes", type=int, default=20, help="sequences (default: 20)")
    add("--views", type=int, default=8, help="of each (default: 8)")
    add("--size", type=int, default=80, help="width and height in pixels (default: 80)")
    add(
        "--seed",
        type=int,
        default=0,
        help="of everything; prints of seeds N apart share faces from N / 3 scenes on (default: 0)",
    )
    add("--meshes", type=Path, help="people: folder of their meshes (default: OUT-meshes)")
    add("--detail", type=int, default=40, help="people: cells per height (default: 40)")
    add("--children", action="store_true", help="people: 2K2K's children in the place of THuman's adults")
    add("--triangles", type=int, default=3000, help="of a room, about (default: 3000)")
    add("--texture-size", type=int, default=64, help="pixels along a side of a room's textures (default: 64)")
    return out


def room(args: argparse.Namespace) -> Any:
    """Rooms like those that `pretrain_mini.py` trains on, of seeds of their own."""
    from peft_attrsub.scenes.recipes import AttributeRecipe

    options = {"size": args.size, "views": args.views, "triangles": args.triangles}
    return AttributeRecipe("mixed", args.seed + FIRST[args.what], **options)


def draw_people(args: argparse.Namespace, done: Any = None) -> None:
    """Three people a room, whom cameras below its ceiling look down at."""
    import prepare_2k2k
    import prepare_thuman
    from standins import stages, subjects

    from peft_attrsub.datasets.meshes import find_2k2k, find_thuman
    from peft_attrsub.datasets.writing import is_finished

    script, find, height = prepare_thuman, find_thuman, subjects.ADULT
    if args.children:
        script, find, height = prepare_2k2k, find_2k2k, subjects.CHILD
    meshes = args.meshes or args.out.with_name(f"{args.out.name}-meshes")
    words = [
        "--out",
        str(meshes),
        "--people",
        str(args.scenes),
        "--seed",
        str(args.seed),
        "--detail",
        str(args.detail),
    ]
    if script.run(["standin", *words]) != 0:
        raise ValueError(f"the people of {meshes} could not be drawn.")
    known, recipe = subjects.people(meshes, find), room(args)
    for scene in range(args.scenes):

        def choose(rng: np.random.Generator, scene: int = scene) -> list[Any]:
            chosen = [known[(scene + other) % len(known)] for other in range(stages.SUBJECTS)]
            return [subjects.person(one, height, 90.0, rng) for one in chosen]

        target = args.out / f"{scene:04d}"
        if not is_finished(target):
            made, views = stages.find_stage(recipe, [args.seed, scene], choose, stages.above, args.texture_size)
            stages.write_stage(target, made, views, unit=UNITS["people"], digits=3, masks=False)
        if done is not None:
            done()


def choose_prints(seed: int, scene: int) -> Any:
    """Generator of random numbers -> the prints of a scene."""
    from standins import stages, subjects

    numbers = [seed + stages.SUBJECTS * scene + other for other in range(stages.SUBJECTS)]
    return lambda rng: [subjects.portrait(number, rng) for number in numbers]


def draw_prints(args: argparse.Namespace, done: Any = None) -> None:
    """Three prints a room, before a camera that is held at a slant."""
    from standins import stages

    from peft_attrsub.datasets.splits import face_view_name
    from peft_attrsub.datasets.writing import is_finished

    recipe = room(args)
    for scene in range(args.scenes):
        target = args.out / f"{scene:02d}_00" / face_view_name(0.0, 0.0)
        if not is_finished(target):
            choose = choose_prints(args.seed, scene)
            made, views = stages.find_stage(recipe, [args.seed, scene], choose, stages.rolled, args.texture_size)
            stages.write_stage(target, made, views, unit=UNITS["prints"], digits=8, masks=True)
        if done is not None:
            done()


def draw(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    for option in ("scenes", "views", "size", "triangles", "texture_size"):
        if (value := getattr(args, option)) < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: give 1 or more.")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed}: give 0 or more.")
    with tqdm(total=args.scenes, unit="scene", desc=f"{args.what} in rooms") as bar:
        (draw_people if args.what == "people" else draw_prints)(args, bar.update)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    from peft_attrsub.interrupts import until_stopped

    try:
        return until_stopped("prepare_rooms", lambda: draw(args) or 0)
    except (ImportError, OSError, ValueError) as error:
        print(f"prepare_rooms: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
