"""The data of a study, drawn offline: attribute datasets, generic scenes, and three stand-in benchmarks.

    data/texture-00/set/texture_00/      source dataset 0 of an attribute (generate_scenes' machinery)
    data/generic/set/                    "mixed" scenes, for forgetting
    data/human-train/set/ ...            sets of a benchmark: train, validation, test, cross

cross: 2K2K's children for THuman's adults, phone bursts with noisy depth for rendered prints, and for ClearPose tables
of other patterns with taller glasses of another index, seen from lower down. All seeds begin at FIRST_SEED.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .settings import FIRST_SEED, Study

#: Frames of a sequence on disk, by benchmark, and those between two views that are tested: four views of a person or
#: of glasses are within some 20 degrees. From further apart a base this small takes all cameras for the first, and
#: what is measured is how the points of such views happen to lie.
FRAMES = {"face": 12, "human": 48, "clearpose": 16, "generic": 8}
APART = {"face": 3, "human": 1, "clearpose": 1, "generic": 2}
#: Height / width of the pictures.
ASPECT = {"face": 1.0, "human": 1.0, "clearpose": 0.75, "generic": 1.0}
SETS = ("train", "validation", "test", "cross")
#: Cells per height of a drawn person, and pixels along a side of a print.
DETAIL, PRINT = 48, 256


def draw(study: Study, place: Path, what: str, part: str, index: int, size: int, patch: int) -> dict[str, Any]:
    """Draw one set into `place`; what a killed run left is taken up again. Returns how much there is."""
    place.mkdir(parents=True, exist_ok=True)
    if what in study.attributes or what == "generic":
        return _scenes(study, place, what, index, size)
    count, first = getattr(study, part), FIRST_SEED + 1000 * SETS.index(part)
    {"face": _faces, "human": _people, "clearpose": _glasses}[what](place, part, count, first, size, patch)
    return {"sequences": count, "frames": FRAMES[what]}


def dataset_name(attribute: str, index: int) -> str:
    return f"{attribute}_{index:02d}"


def reader_of(what: str, part: str) -> str:
    """Name of the reader that opens a set."""
    if what == "face" and part == "cross":
        return "face-real"
    return what if what in ("face", "human", "clearpose") else "scenes"


def open_set(out: Path, what: str, part: str, study: Study) -> Any:
    """A drawn set; those that are measured have their frames fixed, by the number of the sequence."""
    from peft_attrsub.datasets import open_benchmark

    root, reader = out / "data" / (what if what == "generic" else f"{what}-{part}") / "set", reader_of(what, part)
    options: dict[str, Any] = {"split": "all"} if reader == "clearpose" else {}
    if reader in ("face", "human"):
        options["views"] = None
    dataset = open_benchmark(reader, root, **options)
    if part == "train":
        return dataset
    return open_benchmark(reader, root, **options, sequences=fixed(dataset, study.views_tuned, APART[what]))


def fixed(dataset: Any, views: int, apart: int) -> dict[str, list[str]]:
    """Sequence -> the frames that are measured: `views` of them, `apart` frames apart, each from another start."""
    found = {}
    for number, name in enumerate(dataset.names):
        known = dataset.frames(name)
        step = min(apart, max(1, (len(known) - 1) // max(1, views - 1)))
        spare = len(known) - step * (views - 1)
        start = 5 * number % max(1, spare)
        found[name] = [known[start + step * view] for view in range(min(views, len(known)))]
    return found


def _scenes(study: Study, place: Path, what: str, index: int, size: int) -> dict[str, Any]:
    """A dataset of our generator, of fewer triangles and smaller textures than by default: pictures are small.

    Those of an attribute are rooms and, every other one, objects on nothing that a camera goes around (the paper makes
    its sources for people so): what they share is to be the attribute, not a place.
    """
    from peft_attrsub.scenes.generate import generate
    from peft_attrsub.scenes.recipes import AttributeRecipe

    mixed = what == "generic"
    recipe = AttributeRecipe(
        attribute="mixed" if mixed else what,
        layout="object" if not mixed and index % 2 else "room",
        trajectory="orbit" if not mixed and index % 2 and what != "camera" else "spline",
        seed=FIRST_SEED + index,
        size=size,
        views=FRAMES["generic"] if mixed else study.views,
        triangles=study.triangles,
    )
    count = study.generic if mixed else study.scenes
    folder = place if mixed else place / dataset_name(what, index)
    options = {"texture_size": study.texture, "threads": 1}
    report = generate(folder, recipe, count, options=options, depth="npy", workers=1)
    if report.signal is not None:
        raise KeyboardInterrupt
    if report.failed:
        raise ValueError(f"{len(report.failed)} scenes of {folder} failed: see its failures.json.")
    return {"sequences": count, "frames": recipe.views}


def _people(place: Path, part: str, count: int, seed: int, size: int, patch: int) -> None:
    """THuman's stand-in, in 2K2K's place children, through the scripts that render the real ones."""
    import prepare_2k2k
    import prepare_thuman

    meshes = place.with_name("meshes")
    script, detail = (prepare_2k2k, DETAIL + 8) if part == "cross" else (prepare_thuman, DETAIL)
    drawn = ["--out", str(meshes), "--people", str(count), "--seed", str(seed), "--detail", str(detail)]
    _finish(script.run(["standin", *drawn]), meshes)
    how = ["--split", "all", "--views", str(FRAMES["human"]), "--size", str(size), "--renderer", "raycast"]
    how += ["--depth", "npy", "--texture-size", "512"]
    _finish(script.run(["render", "--meshes", str(meshes), "--out", str(place), *how]), place)


def _faces(place: Path, part: str, count: int, seed: int, size: int, patch: int) -> None:
    """Prints of drawn portraits, one sequence each, in the nine tilts by turns; or bursts of them."""
    import prepare_faces
    from _prints import Print, print_scene
    from standins.phone import record_burst, write_soap_bundle
    from standins.portraits import draw_portrait
    from tqdm import tqdm

    from peft_attrsub.datasets.bundles import CAMERAS, unpack_bundle
    from peft_attrsub.datasets.splits import face_view_name

    words = ["standin", "--out", str(place), "--size", str(size), "--frames", str(FRAMES["face"]), "--seed", str(seed)]
    args = prepare_faces.parser().parse_args([*words, "--texture-size", str(PRINT), "--depth", "npy"])
    tilts = prepare_faces.tilts(9)
    for scene in range(count):
        portrait, tilt = draw_portrait(seed + scene), tilts[scene % len(tilts)]
        if part == "cross":
            target = place / prepare_faces.RELEASE / f"face_{scene:02d}"
            if (target / CAMERAS).is_file():
                continue
            narrow = max(patch, round(size * 0.75 / patch) * patch)
            options = {"frames": args.frames, "texture_size": PRINT, "fov": (45.0, 50.0)}
            made = print_scene(Print(portrait.image), [seed, scene, 9], tilt, (narrow, size), **options)
            bundle = place.with_name("bundles") / f"face_{scene:02d}"
            with prepare_faces.open_renderer(args, made) as renderer:
                write_soap_bundle(bundle, *record_burst(made.scene, renderer, [seed, scene, 9]))
            # Trusted: this program has just written it.
            unpack_bundle(bundle, target, trust_pickle=True, depth_encoding="metric")
            continue
        target = place / f"{scene:02d}_00" / face_view_name(*tilt)
        one = Print(portrait.image, mask=portrait.mask)
        with tqdm(total=args.frames, disable=True) as bar:
            prepare_faces.render_print(args, one, target, [seed, scene, 0], tilt, bar)


def _glasses(place: Path, part: str, count: int, seed: int, size: int, patch: int) -> None:
    """Scenes of the stand-in for ClearPose, three quarters as high as wide."""
    from standins.glasses import write_scene

    pixels = (max(patch, round(size * ASPECT["clearpose"] / patch) * patch), size)
    for number in range(count):
        folder, key = place / f"set{1 + number // 9}" / f"scene{1 + number % 9}", (seed, number, 0)
        if part == "cross":
            _other_glasses(folder, key, pixels)
        else:
            write_scene(folder, key, FRAMES["clearpose"], pixels)


def _other_glasses(folder: Path, key: Sequence[int], pixels: tuple[int, int]) -> None:
    """A scene of another domain: a striped or spotted table, taller and narrower glasses of lower index, low cameras.

    Written as `standins.glasses.write_scene` does, whole or not at all.
    """
    from dataclasses import replace
    from shutil import rmtree

    from standins import glasses as g

    from peft_attrsub.scenes.storage import write_atomically

    if folder.is_dir():
        return
    partial = folder.with_name(f".{folder.name}.partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rng = np.random.default_rng([*key, 0])
    table = g.draw_table(rng)
    glasses = [_taller(one) for one in table.glasses]
    table = replace(table, glasses=glasses, pattern=_other_pattern(rng), period=0.5 * table.period)
    cameras = [_lower(pose) for pose in g.arc(rng, FRAMES["clearpose"])]
    record = {}
    for number, camera in enumerate(cameras):
        stem, found = f"{100 * number:06d}", g.render(table, camera, pixels, np.random.default_rng([*key, 1 + number]))
        for kind, picture in found.items():
            write_atomically(partial / f"{stem}-{kind}.png", g.encode(kind, picture))
        record[stem] = g.frame_record(table, camera, np.linalg.inv(cameras[0]), found["label"])
    write_atomically(partial / "metadata.mat", g.encode_metadata(record))
    os.replace(partial, folder)


def _taller(glass: Any) -> Any:
    """The same glass at 1.35 of its height and 0.85 of its width, so that none touch, and of a lower index."""
    from dataclasses import replace

    pose = glass.pose.copy()
    if pose[2, 2] < 0:  # it stands upside down, at its own height
        pose[2, 3] *= 1.35
    return replace(glass, meridian=glass.meridian * [0.85, 1.35], pose=pose, ior=1.0 + 0.7 * (glass.ior - 1.0))


def _other_pattern(rng: np.random.Generator) -> np.ndarray:
    """(256, 256, 3) linear: stripes or spots in two strong colours, without the wood's grain."""
    u, v = np.meshgrid(np.arange(256), np.arange(256))
    spots = (u % 64 - 32) ** 2 + (v % 64 - 32) ** 2 < 20**2
    mix = (spots if rng.random() < 0.5 else (u + v) // 16 % 2 == 0)[..., None]
    first, second = rng.uniform(0.02, 0.25, 3), rng.uniform(0.5, 0.9, 3)
    return np.where(mix, first, second)


def _lower(pose: np.ndarray) -> np.ndarray:
    """World from camera at 0.6 of its height above the table and a little nearer, looking at the same middle."""
    out = np.eye(4)
    out[:3, 3] = pose[:3, 3] * [0.95, 0.95, 0.6]
    forward = np.array([0.0, 0.0, 0.05]) - out[:3, 3]
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    out[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    return out


def _finish(status: int, folder: Path) -> None:
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"{folder} could not be drawn (status {status}): see the log.")


def described(folder: Path) -> dict[str, Any]:
    """The record of a generated dataset."""
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
