"""The data of a study, drawn offline: attribute datasets, generic scenes, and three stand-in benchmarks.

    data/texture-00/set/texture_00/      source dataset 0 of an attribute (generate_scenes' machinery)
    data/generic/set/                    "mixed" scenes, for forgetting
    data/human-train/set/ ...            sets of a benchmark: train, validation, test, cross

Prints and people stand in rooms (examples/vggt/prepare_rooms.py), glasses on tables (`tables`). cross: phone bursts
with noisy depth for rendered prints, 2K2K's children for THuman's adults, and for ClearPose tables of other patterns
with taller glasses of another index, seen from lower down. All seeds begin at FIRST_SEED.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from .settings import FIRST_SEED, Study

#: Frames of a sequence on disk, and those between two views that are tested.
FRAMES, APART = 8, 2
#: Height / width of the pictures.
ASPECT = {"face": 1.0, "human": 1.0, "clearpose": 0.75, "generic": 1.0}
SETS = ("train", "validation", "test", "cross")


def draw(study: Study, place: Path, what: str, part: str, index: int, size: int, patch: int) -> dict[str, Any]:
    """Draw one set into `place`; what a killed run left is taken up again. Returns how much there is."""
    place.mkdir(parents=True, exist_ok=True)
    if what in study.attributes or what == "generic":
        return _scenes(study, place, what, index, size)
    count, first = getattr(study, part), FIRST_SEED + 1000 * SETS.index(part)
    {"face": _faces, "human": _people, "clearpose": _glasses}[what](study, place, part, count, first, size, patch)
    return {"sequences": count, "frames": FRAMES}


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
    return open_benchmark(reader, root, **options, sequences=fixed(dataset, study.views_tuned, APART))


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
        views=FRAMES if mixed else study.views,
        triangles=study.triangles,
    )
    count = study.generic if mixed else study.scenes
    folder = place if mixed else place / dataset_name(what, index)
    options = {"texture_size": study.texture, "threads": 1}
    report = generate(folder, recipe, count, options=options, depth="npy", workers=1)
    if report.signal is not None:
        signal.raise_signal(report.signal)
    if report.failed:
        raise ValueError(f"{len(report.failed)} scenes of {folder} failed: see its failures.json.")
    return {"sequences": count, "frames": recipe.views}


def _rooms(study: Study, what: str, place: Path, part: str, count: int, seed: int, size: int) -> Any:
    """Arguments of prepare_rooms.py."""
    import prepare_rooms

    words = [what, "--out", str(place), "--scenes", str(count), "--views", str(FRAMES), "--size", str(size)]
    words += ["--seed", str(seed), "--triangles", str(study.triangles), "--texture-size", str(study.texture)]
    words += ["--meshes", str(place.with_name("meshes"))] if what == "people" else []
    words += ["--children"] if what == "people" and part == "cross" else []
    return prepare_rooms.parser().parse_args(words)


def _people(study: Study, place: Path, part: str, count: int, seed: int, size: int, patch: int) -> None:
    """Three people of THuman's stand-in in a room, in 2K2K's place children, seen from below the ceiling."""
    import prepare_rooms

    prepare_rooms.draw_people(_rooms(study, "people", place, part, count, seed, size))


def _faces(study: Study, place: Path, part: str, count: int, seed: int, size: int, patch: int) -> None:
    """Three prints of drawn portraits in a room, from a camera that is held at a slant; or bursts of such."""
    import prepare_faces
    import prepare_rooms
    from standins.phone import record_burst, write_soap_bundle
    from standins.stages import find_stage, rolled

    from peft_attrsub.datasets.bundles import CAMERAS, unpack_bundle
    from peft_attrsub.scenes.raycast import RaycastRenderer

    args = _rooms(study, "prints", place, part, count, seed, size)
    if part != "cross":
        prepare_rooms.draw_prints(args)
        return
    narrow = (size, max(patch, round(size * 0.75 / patch) * patch))
    for scene in range(count):
        target = place / prepare_faces.RELEASE / f"face_{scene:02d}"
        if (target / CAMERAS).is_file():
            continue
        chosen, key = prepare_rooms.choose_prints(seed, scene), [seed, scene]
        made, _ = find_stage(prepare_rooms.room(args), key, chosen, rolled, study.texture, narrow)
        bundle = place.with_name("bundles") / f"face_{scene:02d}"
        with RaycastRenderer(made.scene, 2, mesh=made.mesh, maps=made.maps, threads=1) as renderer:
            write_soap_bundle(bundle, *record_burst(made.scene, renderer, key))
        # Trusted: this program has just written it.
        unpack_bundle(bundle, target, trust_pickle=True, depth_encoding="metric")


def _glasses(study: Study, place: Path, part: str, count: int, seed: int, size: int, patch: int) -> None:
    """Scenes of the stand-in for ClearPose, three quarters as high as wide."""
    from standins.glasses import write_scene

    from .tables import draw_other, draw_table

    pixels = (max(patch, round(size * ASPECT["clearpose"] / patch) * patch), size)
    for number in range(count):
        folder = place / f"set{1 + number // 9}" / f"scene{1 + number % 9}"
        drawn = draw_other if part == "cross" else draw_table
        write_scene(folder, (seed, number, 0), FRAMES, pixels, draw=drawn)


def described(folder: Path) -> dict[str, Any]:
    """The record of a generated dataset."""
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
