"""ClearPose for this project: every 100th frame of it, with its cameras read once; or a stand-in for it.

    python examples/vggt/prepare_clearpose.py subset DOWNLOAD --out data/clearpose      # copies; --link saves disk
    python examples/vggt/prepare_clearpose.py cameras data/clearpose_downsample_100     # in place: cameras only
    python examples/vggt/prepare_clearpose.py standin --out data/standin --test 4 --train 8  # drawn; not the real data

subset takes what the paper evaluates and trains on out of the full download (about 350,000 frames): frames 000000,
000100, ... of every scene, with metadata.mat. The public clearpose_downsample_100 is that already, so it needs no
subset; its cameras are cached at first use, or by `cameras` beforehand, which also looks for what is missing.
Whatever stops a run, the same command continues it: a scene's folder is whole or not there.

Exit status: 0 done; 1 scenes could not be prepared, named on stderr; 2 wrong arguments or a full disk; 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("color", "depth", "depth_true", "label", "normal_true")
#: Objects stand still; in a world from cameras of the wrong direction they seem to move further than this, in metres.
STILL = 0.02
RECORD = "subset.json"


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    out = argparse.ArgumentParser(description=first, epilog=rest, **form)
    commands = out.add_subparsers(dest="command", required=True)

    subset = commands.add_parser("subset", help="every 100th frame of the full download", allow_abbrev=False)
    subset.add_argument("root", type=Path, help="folder with set1/scene1, ...")
    subset.add_argument("--out", type=Path, required=True, help="folder to fill; the same layout")
    subset.add_argument("--every", type=int, default=100, help="frames whose id is a multiple of it (default: 100)")
    subset.add_argument(
        "--link",
        choices=("hard", "soft"),
        help="hard or symbolic links instead of copies; hard ones need the same disk",
    )

    cameras = commands.add_parser("cameras", help="read the cameras once, and check", allow_abbrev=False)
    cameras.add_argument("root", type=Path, help="folder with set1/scene1, ...")
    cameras.add_argument("--every", type=int, default=100, help="frames that will be read (default: 100)")
    cameras.add_argument("--cache", type=Path, help="folder for them (default: beside each metadata.mat)")
    for command in (subset, cameras):
        command.add_argument("--split", default="all", help="test, train, authors-test, authors-train or all")

    standin = commands.add_parser("standin", help="drawn glasses in ClearPose's layout", allow_abbrev=False)
    standin.add_argument("--out", type=Path, required=True, help="folder to fill")
    standin.add_argument("--test", type=int, default=4, help="scenes of the test split, up to 19 (default: 4)")
    standin.add_argument("--train", type=int, default=0, help="scenes to train on, up to 32 (default: 0)")
    standin.add_argument("--views", type=int, default=12, help="views per scene (default: 12, which are tested)")
    standin.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("W", "H"), help="pixels")
    standin.add_argument("--supersample", type=int, default=1, help="rays per pixel and axis (default: 1)")
    standin.add_argument("--seed", type=int, default=0, help="other scenes (default: 0)")
    return out


def chosen(root: Path, split: str) -> list[str]:
    """Scenes of the split that are on disk, and a note on those that are not."""
    from peft_attrsub.datasets.clearpose import scenes_on_disk, split_scenes

    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: give the one that holds set1, set2, ...")
    wanted, here = split_scenes(split), scenes_on_disk(root)
    names = here if split == "all" else [name for name in wanted if name in here]
    if not names:
        raise ValueError(f"{root} holds no scene of the split {split!r}: expected {wanted[0]}/metadata.mat and so on.")
    if absent := [name for name in wanted if name not in here]:
        print(f"{len(absent)} of {len(wanted)} scenes are not in {root}: {', '.join(absent)}", file=sys.stderr)
    return names


def summary(cameras: Any, good: list[str], bad: dict[str, str]) -> list[str]:
    """What is to be said of a scene: frames left out, cameras that do not fit its objects."""
    notes = []
    if bad:
        first, reason = next(iter(bad.items()))
        notes.append(f"{len(bad)} of {len(good) + len(bad)} frames left out ({first}: {reason})")
    if (spread := cameras.spread()) > STILL:
        notes.append(f"its objects seem to move by {spread:.3f} m: its poses are not what the documentation says")
    return notes


def place(source: Path, target: Path, link: str | None) -> None:
    """Copy or link one file under its final name; what is there and as large is left alone."""
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return
    beside = target.with_name(f".{target.name}.tmp")
    beside.unlink(missing_ok=True)
    if link == "soft":
        beside.symlink_to(source.resolve())
    elif link == "hard":
        os.link(source.resolve(), beside)
    else:
        shutil.copy2(source, beside)
    os.replace(beside, target)


def subset_scene(source: Path, target: Path, every: int, link: str | None) -> list[str]:
    """One scene to its folder; notes on it. A folder that is there already is left as it is."""
    from peft_attrsub.datasets.clearpose import frame_file, usable_frames
    from peft_attrsub.datasets.clearpose_cameras import CACHE, METADATA, file_stamp, save_cameras, scene_cameras

    record = {"every": every}
    if target.is_dir():
        made = target / RECORD
        found = json.loads(made.read_bytes()) if made.is_file() else None
        if found is None or found.get("every") != every:
            raise ValueError(
                f"{target} was not made with --every {every} ({found or 'it has no ' + RECORD}): give another --out."
            )
        return []
    cameras = scene_cameras(source)
    good, bad = usable_frames(source, cameras, every)
    if not good:
        raise ValueError(f"{source} has no frame that can be read: download it again.")
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for frame in good:
        for kind in KINDS:
            if (picture := frame_file(source, frame, kind)).is_file():
                place(picture, frame_file(partial, frame, kind), link)
    for stale in partial.iterdir():  # of a run that was killed, maybe with another --every
        if stale.suffix == ".tmp" or (stale.suffix == ".png" and stale.name[:6] not in good):
            stale.unlink()
    place(source / METADATA, partial / METADATA, link)
    save_cameras(cameras, partial / CACHE, file_stamp(partial / METADATA))
    (partial / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return summary(cameras, good, bad)


def camera_scene(folder: Path, every: int, cache: Path | None) -> list[str]:
    from peft_attrsub.datasets.clearpose import usable_frames
    from peft_attrsub.datasets.clearpose_cameras import scene_cameras

    cameras = scene_cameras(folder, cache)
    good, bad = usable_frames(folder, cameras, every)
    if not good:
        raise ValueError(f"{folder} has no frame that can be read: download it again.")
    return summary(cameras, good, bad)


def each_scene(args: argparse.Namespace) -> int:
    """subset and cameras: scene by scene; what fails is named, and the rest goes on."""
    from tqdm import tqdm

    if args.every < 1:
        raise ValueError(f"--every is {args.every}: give 1 or more.")
    if args.command == "subset" and args.out.resolve() == args.root.resolve():
        raise ValueError(f"--out is the download itself ({args.out}): give another folder.")
    failed = 0
    names = chosen(args.root, args.split)
    for name in tqdm(names, desc=args.command, unit="scene"):
        try:
            if args.command == "subset":
                notes = subset_scene(args.root / name, args.out / name, args.every, args.link)
            else:
                notes = camera_scene(args.root / name, args.every, args.cache)
        except (FileNotFoundError, ValueError) as error:  # any other OSError, a full disk say, ends the run
            failed += 1
            notes = [str(error)]
        for note in notes:
            tqdm.write(f"{name}: {note}", file=sys.stderr)
    print(f"{len(names) - failed} of {len(names)} scenes are ready in {getattr(args, 'out', args.root)}")
    return int(failed > 0)


def standin(args: argparse.Namespace) -> int:
    from standins.glasses import scene_seed, write_scene
    from tqdm import tqdm

    from peft_attrsub.datasets.clearpose import split_scenes

    names = []
    for split, count in (("test", args.test), ("train", args.train)):
        known = split_scenes(split)
        if not 0 <= count <= len(known):
            raise ValueError(f"--{split} is {count}: ClearPose has {len(known)} such scenes.")
        names += known[:count]
    if args.seed < 0 or args.supersample < 1:
        raise ValueError(f"--seed is {args.seed} and --supersample {args.supersample}: give 0 and 1, or more.")
    width, height = args.size
    with tqdm(total=len(names) * args.views, desc="standin", unit="view") as bar:
        for name in names:
            folder = args.out / name
            write_scene(folder, scene_seed(name, args.seed), args.views, (height, width), args.supersample, bar.update)
    print(f"{len(names)} drawn scenes in {args.out}: a stand-in, not the real ClearPose")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    from peft_attrsub.interrupts import until_stopped

    try:
        return until_stopped(
            "prepare_clearpose", lambda: standin(args) if args.command == "standin" else each_scene(args)
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"prepare_clearpose: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
