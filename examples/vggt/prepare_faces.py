"""The face benchmark's data: bundles unpacked, prints rendered, and stand-ins where there is neither.

    python examples/vggt/prepare_faces.py unpack processed-bundle-*/ --out data/face-real --trust-pickle
    accelerate launch examples/vggt/prepare_faces.py render --faces photos/ --out data/face
    python examples/vggt/prepare_faces.py standin --out data/ --scenes 2

unpack   bursts of printed faces from the SoaP and HNDR apps, to OUT/SoaP/datasets/<bundle>/{images,depths} with
         cameras.json. Bundles are pickled, and unpickling can run any code: --trust-pickle says that you know who
         made them.
render   every face of a folder (pictures, or folders of PBR maps) printed on a card in a room: nine tilts, 42 frames
         a few millimetres apart, to OUT/<nn>_00/<tilt>/. 450 sequences for 50 faces.
standin  drawn portraits, no real data: OUT/face (flat prints), OUT/face-relief (heads in their place), OUT/bundles (as
         a phone stores them) and OUT/face-real (these unpacked). Numbers on them are not the paper's.

Whatever stops a run, the same command continues it. Several processes (accelerate launch) share the sequences.

Exit status: 0 all is done; 1 some bundles failed; 2 wrong arguments or files; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png")
RELEASE = Path("SoaP") / "datasets"  # where the paper's release looks for bursts


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    out = argparse.ArgumentParser(description=first, epilog=rest, formatter_class=form, allow_abbrev=False)
    commands = out.add_subparsers(dest="command", required=True)
    add = commands.add_parser("unpack", help="SoaP and HNDR bundles to pictures and arrays", allow_abbrev=False)
    add.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE", help="frame_bundle.npz, or a folder of some")
    add.add_argument("--trust-pickle", action="store_true", help="unpickle them: only if you know who made them")
    add.add_argument("--depth-encoding", choices=("auto", "metric", "inverse"), default="auto")
    add.add_argument("--image", choices=("jpg", "png"), default="jpg", help="format of the pictures (default: jpg)")
    add.add_argument("--out", type=Path, required=True)
    add = commands.add_parser("render", help="a folder of faces, as prints in rooms", allow_abbrev=False)
    add.add_argument("--faces", type=Path, required=True, help="folder of pictures, or of folders of PBR maps")
    add.add_argument("--mask-dir", type=Path, help="<face>.png each: white is what counts (default: all of the card)")
    _add_rendering(add, size=512, views=9)
    add = commands.add_parser("standin", help="all of it with drawn portraits", allow_abbrev=False)
    add.add_argument("--scenes", type=int, default=2, help="portraits (default: 2)")
    _add_rendering(add, size=224, views=1)
    return out


def _add_rendering(out: argparse.ArgumentParser, size: int, views: int) -> None:
    add = out.add_argument
    add("--out", type=Path, required=True)
    add("--size", type=int, default=size, help=f"width and height in pixels (default: {size})")
    add("--views", type=int, default=views, help=f"of the nine tilts, the smallest first (default: {views})")
    add("--frames", type=int, default=42, help="frames of a sequence (default: 42)")
    add("--seed", type=int, default=0)
    add("--renderer", choices=("raycast", "cycles"), default="raycast", help="cycles: Blender's path tracer")
    add("--supersample", type=int, default=2, help="raycast: rays per pixel and axis (default: 2)")
    add("--samples", type=int, default=64, help="cycles: paths per pixel (default: 64, the paper's)")
    add("--denoise", action=argparse.BooleanOptionalAction, default=False, help="cycles: denoise (default: no)")
    add("--device", choices=("cpu", "optix", "cuda"), default="cpu", help="cycles: where it runs (default: cpu)")
    add("--texture-size", type=int, default=1024, help="pixels along a side of the print, a power of two")
    add("--depth", choices=("exr", "npy"), default="exr", help="format of the depth maps (default: exr)")


# --- unpack -------------------------------------------------------------------------------------------------------


def find_bundles(given: Sequence[Path]) -> dict[str, Path]:
    """Name of each sequence to its file: that of the bundle's folder, without "processed-"."""
    found: dict[str, Path] = {}
    for path in given:
        files = [path] if path.is_file() else [path / "frame_bundle.npz"]
        if path.is_dir() and not files[0].is_file():
            files = sorted(path.glob("*/frame_bundle.npz"))
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"{path} is no frame_bundle.npz, nor a folder of one or of several.")
        for file in files:
            named = file.stem if file.stem != "frame_bundle" else file.resolve().parent.name
            name = named.removeprefix("processed-")
            if name in found and found[name].resolve() != file.resolve():
                raise ValueError(f"{found[name]} and {file} would both be called {name}: rename one of them.")
            found[name] = file
    return found


def unpack(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from peft_attrsub.datasets.bundles import CAMERAS, unpack_bundle

    status = 0
    bundles = find_bundles(args.bundles)
    for name, path in list(bundles.items())[_rank() :: _processes()]:
        target = args.out / RELEASE / name
        if (target / CAMERAS).is_file():
            print(f"{name}: unpacked already")
            continue
        with tqdm(desc=name, unit="frame", disable=_rank() > 0) as bar:

            def step(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                unpack_bundle(
                    path,
                    target,
                    trust_pickle=args.trust_pickle,
                    depth_encoding=args.depth_encoding,
                    image=args.image,
                    progress=step,
                )
            except (OSError, ValueError) as error:
                print(f"prepare_faces: {error}", file=sys.stderr)
                status = 1
    return status


# --- render -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """A picture to print: name, its file, and the folder of its PBR maps where it has others than colour."""

    name: str
    picture: Path
    maps: Path | None = None


def find_faces(folder: Path) -> list[Face]:
    """Faces in the order of their names: pictures in the folder, or else its folders of PBR maps."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one that holds pictures of faces.")
    pictures = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES and path.name[0] != "."]
    if pictures:
        return [Face(path.stem, path) for path in pictures]
    from peft_attrsub.scenes.textures import find_maps

    faces = []
    for maps in find_maps(folder).folders:
        colours = [path for path in sorted(Path(maps).iterdir()) if "color" in path.stem or "albedo" in path.stem]
        if colours:
            faces.append(Face(Path(maps).name, colours[0], Path(maps)))
    return faces


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, upright. FileNotFoundError or ValueError names the file."""
    from peft_attrsub._pictures import decode_picture, to_rgba

    try:
        return np.ascontiguousarray(to_rgba(decode_picture(path, upright=True))[..., :3])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a readable picture ({error}): remove it, or fetch it again.") from error


def tilts(views: int) -> list[tuple[float, float]]:
    """(theta, phi) in degrees, the smallest first."""
    from _prints import TILTS

    every = [(theta, phi) for theta in TILTS for phi in TILTS]
    if not 1 <= views <= len(every):
        raise ValueError(f"--views {views} was given: 1 to {len(every)} are possible.")
    return sorted(every, key=lambda tilt: (abs(tilt[0]) + abs(tilt[1]), tilt))[:views]


def sequences(args: argparse.Namespace, scenes: int) -> Iterator[tuple[int, int, str, tuple[float, float]]]:
    """Scene, view, "00_00/theta0.00_phi0.00_d0.30" and tilt of every sequence that is this process's to make."""
    from peft_attrsub.datasets.splits import face_view_name

    every = [
        (scene, view, f"{scene:02d}_00/{face_view_name(*tilt)}", tilt)
        for scene in range(scenes)
        for view, tilt in enumerate(tilts(args.views))
    ]
    yield from every[_rank() :: _processes()]


def open_renderer(args: argparse.Namespace, made: Any) -> Any:
    if args.renderer == "cycles":
        from peft_attrsub.scenes.cycles import CyclesRenderer

        return CyclesRenderer(made.scene, args.samples, args.denoise, args.device, mesh=made.mesh, maps=made.maps)
    from peft_attrsub.scenes.raycast import RaycastRenderer

    return RaycastRenderer(made.scene, args.supersample, mesh=made.mesh, maps=made.maps)


def tag_of(args: argparse.Namespace, one: Any) -> str:
    """A line that stands for how a sequence is made: another one is made otherwise."""
    keys = ["size", "frames", "seed", "renderer", "texture_size"]
    keys += ["samples", "denoise"] if args.renderer == "cycles" else ["supersample"]
    digest = hashlib.sha256(one.image.tobytes())
    for part in (one.mask, one.height):
        digest.update(b"" if part is None else part.tobytes())
    words = [f"{key}={getattr(args, key)}" for key in keys]
    return " ".join(["prints-1", *words, f"face={digest.hexdigest()[:16]}"])


def render_print(
    args: argparse.Namespace, one: Any, target: Path, seed: Sequence[int], tilt: tuple[float, float], bar: Any
) -> None:
    """One sequence, from where an earlier run left it."""
    from _prints import print_scene

    from peft_attrsub.datasets.writing import CAMERAS, RenderedWriter, is_finished

    tag = tag_of(args, one)
    if is_finished(target):
        made_as = json.loads((target / CAMERAS).read_bytes()).get("tag")
        if made_as != tag:
            raise ValueError(f"{target} was made otherwise ({made_as}): delete it, or choose another --out.")
        bar.update(args.frames)
        return
    size = (args.size, args.size)
    made = print_scene(one, seed, tilt, size, frames=args.frames, texture_size=args.texture_size)
    with RenderedWriter(target, digits=8, depth=args.depth, tag=tag) as writer:
        missing = [index for index in range(args.frames) if not writer.has(index)]
        bar.update(args.frames - len(missing))
        if missing:
            with open_renderer(args, made) as renderer:
                for index in missing:
                    view, camera = renderer.render(index), made.scene.cameras[index]
                    rgba = np.concatenate([view.rgb, np.full((*view.rgb.shape[:2], 1), 255, np.uint8)], axis=2)
                    lens = (camera.fx, camera.fy, camera.cx, camera.cy)
                    mask = made.mask(index, view, one.mask)
                    writer.add(index, rgba, view.depth, np.linalg.inv(np.array(camera.pose)), *lens, mask=mask)
                    bar.update()
        writer.finish()


def render(args: argparse.Namespace) -> int:
    from _prints import Print
    from tqdm import tqdm

    faces = find_faces(args.faces)
    if not faces:
        raise ValueError(f"{args.faces} holds no pictures ({', '.join(PICTURES)}) and no folders of PBR maps.")
    mine = list(sequences(args, len(faces)))
    _note(args.out, {f"{number:02d}_00": face.name for number, face in enumerate(faces)})
    with tqdm(total=len(mine) * args.frames, unit="frame", disable=_rank() > 0) as bar:
        for scene, view, name, tilt in mine:
            face = faces[scene]
            mask = None
            if args.mask_dir is not None:
                mask = read_picture(args.mask_dir / f"{face.name}.png").max(axis=2) > 127
            maps = None if face.maps is None else str(face.maps)
            one = Print(read_picture(face.picture), maps, mask)
            bar.set_description(name)
            render_print(args, one, args.out / name, [args.seed, scene, view], tilt, bar)
    return 0


# --- standin ------------------------------------------------------------------------------------------------------


def standin(args: argparse.Namespace) -> int:
    from _prints import Print, print_scene
    from standins.phone import record_burst, write_soap_bundle
    from standins.portraits import draw_portrait
    from tqdm import tqdm

    from peft_attrsub.datasets.bundles import CAMERAS, unpack_bundle

    if args.scenes < 1:
        raise ValueError(f"--scenes {args.scenes} was given: 1 or more are needed.")
    mine = list(sequences(args, args.scenes))
    bursts = [scene for scene in range(args.scenes) if scene % _processes() == _rank()]
    with tqdm(total=(2 * len(mine) + len(bursts)) * args.frames, unit="frame", disable=_rank() > 0) as bar:
        for scene, view, name, tilt in mine:
            portrait = draw_portrait(1000 * args.seed + scene)
            for kind, height in (("face", None), ("face-relief", portrait.height)):
                bar.set_description(f"{kind}/{name}")
                one = Print(portrait.image, mask=portrait.mask, height=height)
                render_print(args, one, args.out / kind / name, [args.seed, scene, view], tilt, bar)
        for scene in bursts:
            name = f"face_{scene:02d}"
            bar.set_description(name)
            bundle, target = args.out / "bundles" / f"processed-{name}", args.out / "face-real" / RELEASE / name
            if not (bundle / "frame_bundle.npz").is_file():
                one = Print(draw_portrait(1000 * args.seed + scene).image)
                seed, size = [args.seed, scene, 9], (args.size * 3 // 4, args.size)
                # So narrow that most of what the phone sees is the print.
                options = {"frames": args.frames, "texture_size": args.texture_size, "fov": (45.0, 50.0)}
                made = print_scene(one, seed, (0, 0), size, **options)
                with open_renderer(args, made) as renderer:
                    write_soap_bundle(bundle, *record_burst(made.scene, renderer, seed))
            bar.update(args.frames)
            if not (target / CAMERAS).is_file():
                # Trusted: this program has just written it.
                unpack_bundle(bundle, target, trust_pickle=True, depth_encoding="metric")
    return 0


# ------------------------------------------------------------------------------------------------------------------


def _note(folder: Path, record: dict[str, str]) -> None:
    """faces.json: which scene shows which face."""
    from peft_attrsub.scenes.storage import json_bytes, write_atomically

    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "faces.json", json_bytes(record))


def _rank() -> int:
    """Number of this process among those that accelerate or torchrun started: they share the work."""
    return int(os.environ.get("RANK", "0"))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.command == "unpack":
            return unpack(args)
        side = args.texture_size
        if min(args.size, args.frames, side) < 2 or side & (side - 1) or args.seed < 0:
            raise ValueError(
                f"--size {args.size} --frames {args.frames} --texture-size {side} --seed {args.seed} were given: 2 or "
                "more pixels and frames are needed, a power of two for the texture, and a seed of 0 or more."
            )
        from peft_attrsub.interrupts import until_stopped
        from peft_attrsub.scenes.generate import visible_device

        with visible_device({"device": args.device}):
            return until_stopped("prepare_faces", lambda: render(args) if args.command == "render" else standin(args))
    except (ImportError, OSError, ValueError) as error:
        print(f"prepare_faces: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from _console import run

    run(main)
