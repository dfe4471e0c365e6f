"""What prepare_thuman.py and prepare_2k2k.py share: rings of cameras around scans of people, rendered to disk.

Protocol of the paper's release (arXiv 2604.10095): n cameras on a level circle about the middle of the person's
bounding box, azimuth 360 i / n degrees, counter-clockwise from above, starting at +x; 1024 x 1024 pixels; a 35 mm lens
on a 32 mm sensor, so f = 35/32 W = 1120 pixels and a field of view of 49.13 degrees; light from all sides, of a
strength in [0.55, 0.75] that follows from the id; white background; Cycles with 64 samples.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

FOCAL = 35.0 / 32.0  # of the width
CROP_SIZE, CROP_BORDER = 518, 0.1
CYCLES_BOUNCES = 4


class MaterialMaps(NamedTuple):
    """albedo (S, S, 3) linear, first row at v = 0; roughness, metallic (S, S); normal (S, S, 3); float32."""

    albedo: np.ndarray
    roughness: np.ndarray
    metallic: np.ndarray
    normal: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """What differs. find: root and split -> {id: file}. up, turn: see `datasets.meshes.place`. radius: of the
    ring. write: root, index, seed, detail -> one stand-in on disk, its folder. detail: of
    those, cells per height."""

    name: str
    find: Callable[[Path, str], dict[str, Path]]
    up: str
    turn: float
    radius: float
    write: Callable[[Path, int, int, int], Path]
    detail: int


def parser(doc: str, dataset: Dataset) -> argparse.ArgumentParser:
    first, _, rest = doc.partition("\n")
    out = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = out.add_subparsers(dest="command", required=True)
    add = commands.add_parser("render", help="pictures, depth and cameras of scans", allow_abbrev=False).add_argument
    add("--meshes", type=Path, required=True, help=f"folder of {dataset.name}, as downloaded")
    add("--out", type=Path, required=True, help="folder of the rendered people, one folder per id")
    add("--split", choices=("test", "train", "all"), default="test", help="which people (default: test)")
    add("--ids", nargs="+", metavar="ID", help="these people alone, whatever the split")
    add("--views", type=int, default=96, help="cameras on the circle (default: 96)")
    add("--size", type=int, default=1024, help="width and height in pixels (default: 1024)")
    add("--radius", type=float, default=dataset.radius, help=f"of the circle (default: {dataset.radius})")
    add(
        "--normalise-height",
        type=float,
        default=1.0,
        metavar="H",
        help="every person is made H tall; 0: the size of the file, as the release has it (default: 1.0)",
    )
    add("--up", choices=("auto", "y", "z"), default=dataset.up, help=f"axis that points up (default: {dataset.up})")
    add(
        "--turn",
        type=float,
        default=dataset.turn,
        help=f"degrees the person is turned about the vertical (default: {dataset.turn:g}, as the release has it)",
    )
    add(
        "--crop",
        action="store_true",
        help=f"zoom to the person, with a border of {CROP_BORDER}: every view has its own focal length",
    )
    add("--crop-size", type=int, default=CROP_SIZE, help=f"pixels of --crop (default: {CROP_SIZE})")
    add("--renderer", choices=("cycles", "raycast"), default="cycles", help="default: cycles, the paper's look")
    add("--samples", type=int, default=64, help="cycles: paths per pixel (default: 64)")
    add("--denoise", action=argparse.BooleanOptionalAction, default=False, help="cycles: denoise (default: no)")
    add("--device", choices=("cpu", "optix", "cuda"), default="cpu", help="cycles: where it runs (default: cpu)")
    add("--supersample", type=int, default=2, help="raycast: rays per pixel and axis (default: 2)")
    add("--texture-size", type=int, default=2048, help="larger textures are made smaller (default: 2048)")
    add("--depth", choices=("exr", "npy"), default="exr", help="files of the depth maps (default: exr)")
    add("--grey", action="store_true", help="paint people without colour grey instead of leaving them out")
    add = commands.add_parser("standin", help="procedural people in the same files", allow_abbrev=False).add_argument
    add("--out", type=Path, required=True, help="folder to be filled like the download")
    add("--people", type=int, default=4, help="how many (default: 4)")
    add("--seed", type=int, default=0, help="person k has the seed 1000 SEED + k (default: 0)")
    add("--detail", type=int, default=dataset.detail, help=f"cells per height (default: {dataset.detail})")
    return out


def main(doc: str, dataset: Dataset, arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 0 all is done, 1 some people failed, 2 wrong arguments, 130 or 143 stopped."""
    args = parser(doc, dataset).parse_args(arguments)
    from peft_attrsub.interrupts import until_stopped

    name = Path(sys.argv[0]).stem
    try:
        return until_stopped(
            name, lambda: render(args, dataset) if args.command == "render" else standin(args, dataset)
        )
    except (ImportError, OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def standin(args: argparse.Namespace, dataset: Dataset) -> int:
    from tqdm import tqdm

    if args.people < 1 or args.detail < 24 or args.seed < 0:
        raise ValueError(
            f"--people {args.people} --detail {args.detail} --seed {args.seed}: give 1, 24 and 0, or more of each."
        )
    for index in tqdm(range(args.people), unit="person", desc=f"stand-in for {dataset.name}"):
        dataset.write(args.out, index, 1000 * args.seed + index, args.detail)
    return 0


def render(args: argparse.Namespace, dataset: Dataset) -> int:
    """Render whoever is not there yet; with several processes, each its share."""
    from tqdm import tqdm

    from peft_attrsub.scenes.generate import share

    check(args)
    people = chosen(args, dataset)
    rank, world = share()
    mine = dict(list(people.items())[rank::world])
    failed: list[str] = []
    with tqdm(total=len(mine) * args.views, unit="view", disable=rank > 0) as progress:
        for name, path in mine.items():
            progress.set_description(name)
            try:
                for note in render_person(args, name, path, progress.update):
                    progress.write(f"{name}: {note}", file=sys.stderr)
            except (OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                failed.append(name)
                progress.write(f"{name} is left out: {error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(mine)} people could not be rendered: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def check(args: argparse.Namespace) -> None:
    for option in ("views", "size", "crop_size", "samples", "supersample", "texture_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option)}: give 1 or more.")
    if args.texture_size & (args.texture_size - 1):
        raise ValueError(f"--texture-size {args.texture_size}: give a power of two.")
    if not 0 < args.radius < float("inf") or not 0 <= args.normalise_height < float("inf"):
        raise ValueError("--radius must be greater than 0, --normalise-height 0 (as it is) or greater.")
    if args.normalise_height >= 2 * args.radius:
        raise ValueError(f"a person {args.normalise_height:g} tall does not fit a circle of radius {args.radius:g}.")


def chosen(args: argparse.Namespace, dataset: Dataset) -> dict[str, Path]:
    people = dataset.find(args.meshes, "all" if args.ids else args.split)
    if not args.ids:
        if not people:
            raise ValueError(f"{args.meshes} has nobody in the split {args.split!r}: give another --split, or --ids.")
        return people
    if missing := sorted(set(args.ids) - set(people)):
        raise ValueError(f"{args.meshes} has no {missing[0]} ({len(missing)} of {len(args.ids)} ids are missing).")
    return {name: people[name] for name in dict.fromkeys(args.ids)}


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the pixels of a person; kept with each of them, so that two protocols never mix in one folder."""
    keys = ["views", "size", "radius", "normalise_height", "up", "turn", "crop", "renderer", "texture_size", "depth"]
    keys += ["crop_size"] if args.crop else []
    keys += ["samples", "denoise"] if args.renderer == "cycles" else ["supersample"]
    return {key: getattr(args, key) for key in keys}


def render_person(args: argparse.Namespace, name: str, path: Path, done: Callable[[int], Any]) -> list[str]:
    """Render one person, from where an earlier run stopped; returns notes for people."""
    from peft_attrsub.datasets.meshes import bake_colors, load_mesh, place
    from peft_attrsub.datasets.writing import CAMERAS, RenderedWriter, is_finished
    from peft_attrsub.scenes.storage import extrinsic

    folder = args.out / name
    if is_finished(folder):
        was = json.loads(json.loads((folder / CAMERAS).read_bytes()).get("tag") or "{}").get("protocol")
        if was != protocol(args):
            raise ValueError(f"{folder} was rendered by another protocol ({was}): delete it, or choose another --out.")
        done(args.views)
        return []
    mesh, placement = place(load_mesh(path, args.grey), args.up, args.normalise_height, args.turn)
    reach = float(np.linalg.norm(mesh.vertices[:, :2], axis=1).max())
    if reach >= args.radius:
        raise ValueError(f"{path} reaches out {reach:.2f} from its middle, beyond the cameras: is its up axis right?")
    scene = scene_of(args, name, mesh.vertices)
    cut = sum(max(half_extents(camera, mesh.vertices)) > 1 for camera in ring(args.views, args.radius, args.size))
    notes = [f"the picture's border cuts the person off in {cut} of {args.views} views"] if cut else []
    tag = {"protocol": protocol(args), "file": path.name, "placement": asdict(placement), "cut_off": cut}
    with RenderedWriter(folder, digits=3, depth=args.depth, tag=json.dumps(tag, sort_keys=True)) as writer:
        missing = [index for index in range(args.views) if not writer.has(index)]
        done(args.views - len(missing))
        if missing:
            limit = args.texture_size if mesh.colors is None else None
            mesh = bake_colors(mesh)
            assert mesh.texture is not None
            with renderer_of(args, scene, scene_mesh(mesh), maps_of(mesh.texture, limit)) as renderer:
                for index in missing:
                    view, camera = renderer.render(index), scene.cameras[index]
                    w2c = np.eye(4)
                    w2c[:3] = extrinsic(camera)
                    lens = (camera.fx, camera.fy, camera.cx, camera.cy)
                    writer.add(index, on_white(view.rgb, view.ids), view.depth, w2c, *lens)
                    done(1)
        writer.finish()
    return notes


def ring(views: int, radius: float, size: int) -> list[Any]:
    """Cameras on a level circle of `radius`, looking at the origin: (radius cos a, radius sin a, 0), a = 360 i / n."""
    from peft_attrsub.scenes.description import Camera

    out = []
    for index in range(views):
        angle = 2 * np.pi * index / views
        ahead = -np.array([np.cos(angle), np.sin(angle), 0.0]).round(15)
        down = np.array([0.0, 0.0, -1.0])
        pose = np.eye(4)
        pose[:3] = np.stack([np.cross(down, ahead), down, ahead, -radius * ahead], axis=1)
        out.append(Camera(pose.tolist(), FOCAL * size, FOCAL * size, size / 2, size / 2))
    return out


def half_extents(camera: Any, points: np.ndarray) -> tuple[float, float]:
    """How far points (N, 3) reach from the middle of a camera's picture, across and down, in halves of its size."""
    pose = np.asarray(camera.pose)
    x, y, z = ((points - pose[:3, 3]) @ pose[:3, :3]).T
    return float(np.abs(x / z).max() * camera.fx / camera.cx), float(np.abs(y / z).max() * camera.fy / camera.cy)


def zoomed(camera: Any, points: np.ndarray, size: int) -> Any:
    """The camera whose picture of `size` pixels is the middle part of this one's that holds the points.

    The part reaches (1 + border) times as far as the points, and not beyond the picture. Its focal length is rounded
    down to whole pixels: the crop is rendered through that lens, not resampled, so depth and cameras stay exact.
    """
    from dataclasses import replace

    share = min((1 + CROP_BORDER) * max(half_extents(camera, points)), 1.0)
    focal = float(int(camera.fx / camera.cx / share * size / 2))
    return replace(camera, fx=focal, fy=focal, cx=size / 2, cy=size / 2)


def scene_of(args: argparse.Namespace, name: str, vertices: np.ndarray) -> Any:
    """One person in even light. The ray caster, in which nothing shades the light from all sides, has half of that
    and two suns: from the upper left behind the first camera, and from the other side."""
    from peft_attrsub.scenes.description import Light, Material, Scene

    code = crc32(name.encode())
    strength = 0.55 + 0.2 * code / 2**32
    lights, even = [], strength
    if args.renderer == "raycast":
        even = 0.5 * strength
        white = [1.0, 1.0, 1.0]
        lights = [
            Light("sun", white, 3.2 * strength, direction=[-0.7, 0.4, -0.6]),
            Light("sun", white, 1.6 * strength, direction=[0.7, -0.5, -0.3]),
        ]
    cameras, size = ring(args.views, args.radius, args.size), args.size
    if args.crop:
        size = args.crop_size
        cameras = [zoomed(camera, vertices, size) for camera in cameras]
    material = Material("plain", [[0.5, 0.5, 0.5]], scale=1.0, roughness=0.9)
    background = [even] * 3
    return Scene("human", code, 0, size, size, [material], [], lights, cameras, background)


def scene_mesh(mesh: Any) -> Any:
    from peft_attrsub.scenes.meshes import Mesh

    count = len(mesh.triangles)
    ones = np.ones(count, np.int32)
    return Mesh(mesh.vertices, mesh.triangles, mesh.uv, mesh.normals, np.zeros(count, np.int32), ones)


def maps_of(texture: np.ndarray, limit: int | None) -> MaterialMaps:
    """A texture (H, W, 3) sRGB, first row on top, as a material's maps: square, its side a power of two.

    Others are resampled to the square of the next power of two, at most `limit`. None: stay as it is; the atlas of
    vertex colours must not be resampled.
    """
    from peft_attrsub._extras import require
    from peft_attrsub.scenes.view import decode_srgb

    side = texture.shape[0]
    if limit is not None:
        side = min(limit, 1 << (max(*texture.shape[:2], 4) - 1).bit_length())
        if texture.shape[:2] != (side, side):
            image = require("PIL.Image", "vggt", "reading textures")
            texture = np.asarray(image.fromarray(texture).resize((side, side), image.Resampling.LANCZOS))
    flat = np.zeros((1, 1, 3), np.float32)
    flat[..., 2] = 1
    return MaterialMaps(
        decode_srgb(texture[::-1]),
        np.broadcast_to(np.float32(0.9), (side, side)),
        np.broadcast_to(np.float32(0), (side, side)),
        np.broadcast_to(flat, (side, side, 3)),
    )


def renderer_of(args: argparse.Namespace, scene: Any, mesh: Any, maps: MaterialMaps) -> Any:
    if args.renderer == "cycles":
        from peft_attrsub.scenes.cycles import CyclesRenderer

        options: dict[str, Any] = {"samples": args.samples, "denoise": args.denoise, "device": args.device}
        return CyclesRenderer(scene, **options, bounces=CYCLES_BOUNCES, mesh=mesh, maps=[maps])
    from peft_attrsub.scenes.raycast import RaycastRenderer

    return RaycastRenderer(scene, args.supersample, mesh=mesh, maps=[maps])


def on_white(rgb: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """RGBA (H, W, 4) uint8: opaque where the person is, else white and clear."""
    out = np.full((*rgb.shape[:2], 4), 255, np.uint8)
    person = ids > 0
    out[person, :3] = rgb[person]
    out[~person, 3] = 0
    return out
