"""Is a dataset what its manifests say, and do its depth maps and cameras fit each other? And make it so again."""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._machine import available_cores
from . import pixels
from .agreement import PosedDepth, contradictions, pairs_to_compare, pose_problem
from .dataset import DATASET, SHEET, Dataset, scene_name
from .description import Scene
from .generate import RESERVE, run
from .posed import moving_ids
from .storage import DESCRIPTION, MANIFEST, TRANSFORMS, SceneFormat, json_bytes, read_json, read_manifest, read_scene

FILES_PER_VIEW = 3  # color, depth, object ids
CONTRADICTIONS = 0.02  # share of points; silhouettes and surfaces thinner than a pixel account for less


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. scene: its number, None for the whole dataset; redo: the views to render again to
    mend it, [] for none of them, None for all."""

    scene: int | None
    text: str
    redo: list[int] | None = None

    def __str__(self) -> str:
        return self.text if self.scene is None else f"{scene_name(self.scene)}: {self.text}"


def check_scene(dataset: Dataset, index: int, pairs: int = 3) -> list[Problem]:
    """What is wrong with one scene: files, sizes, hashes, depth, and `pairs` pairs of neighbouring views."""
    folder = dataset.scene(index)
    try:
        manifest = read_manifest(folder)
        plan = dataset.plan
        if manifest["tag"] != dataset.tag or any(manifest[key] != plan[key] for key in ("jpeg", "depth")):
            return [Problem(index, "it was made by another plan than the dataset's.")]
        if manifest["index"] != index or (folder / MANIFEST).read_bytes() != json_bytes(manifest):
            return [Problem(index, "its manifest is damaged, or another scene's.")]
        form = SceneFormat(manifest["jpeg"], manifest["depth"])
        size, views = (manifest["height"], manifest["width"]), manifest["views"]
    except FileNotFoundError:
        return [Problem(index, "it is not finished: it has no manifest.")]
    except (OSError, KeyError, ValueError) as error:
        return [Problem(index, f"its manifest cannot be read ({error}).")]
    if views != len(manifest["files"]) // FILES_PER_VIEW:
        return [Problem(index, f"its manifest has {len(manifest['files'])} files for {views} views.")]

    owner = {name: view for view in range(views) for name in form.names(view).values()}
    wanted = {DESCRIPTION, TRANSFORMS, *owner}
    found: list[Problem] = []
    if odd := sorted(wanted ^ set(manifest["files"])):
        return [Problem(index, f"its manifest does not fit its {views} views: {odd[0]}.")]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in wanted and name != MANIFEST:
            found.append(Problem(index, f"{name} does not belong there.", []))
    for name in sorted(wanted):
        if problem := _check_file(folder, name, manifest["files"][name], size, form):
            found.append(Problem(index, f"{name} {problem}", [owner[name]] if name in owner else []))
    return found or _check_geometry(dataset, index, views, pairs)


def _check_file(
    folder: Path, name: str, entry: dict[str, Any], size: tuple[int, int], form: SceneFormat
) -> str | None:
    path = folder / name
    if not path.exists():
        return "is missing."
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    if len(data) != entry["bytes"]:
        return f"has {len(data)} bytes, its manifest says {entry['bytes']}."
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        return "has other bytes than its manifest says."
    kind = name.partition("/")[0]
    try:
        if kind == "depth":
            array = pixels.decode_depth(data, path)
            if not np.isfinite(array).all() or (array < 0).any():
                return "has depths that are negative or not finite."
        elif kind in ("images", "masks"):
            array = pixels.decode(data, path)
        else:
            return None
    except ValueError as error:
        return str(error)
    expected = (*size, 3) if kind == "images" else size
    return None if array.shape == expected else f"has the shape {array.shape}, expected {expected}."


def _check_geometry(dataset: Dataset, index: int, views: int, pairs: int) -> list[Problem]:
    """Neighbouring views must not contradict each other; both ways, at most `pairs` of them, evenly spread."""
    folder = dataset.scene(index)
    try:
        frames = read_json(folder / TRANSFORMS)["frames"]
        scene = Scene.from_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (KeyError, ValueError) as error:
        return [Problem(index, str(error), [])]
    if not len(frames) == len(scene.cameras) == views:
        return [Problem(index, f"{len(frames)} frames and {len(scene.cameras)} cameras for {views} views.")]
    try:
        moving = moving_ids(scene)  # they are elsewhere in the next view
    except ValueError as error:
        return [Problem(index, str(error), [])]
    stride = max(1, min(scene.width, scene.height) // 128)
    # Silhouettes are a larger part of a small picture.
    limit = CONTRADICTIONS * max(1.0, 128 / min(scene.width, scene.height))
    found, neighbours = [], views - 1
    for place in range(min(pairs, neighbours)):
        first = place * neighbours // min(pairs, neighbours)
        for order in ([first, first + 1], [first + 1, first]):
            arrays = read_scene(folder, order)
            mask = ~np.isin(arrays["ids"][0], moving) if moving else None
            share = contradictions(arrays["depth"], arrays["extrinsic"], arrays["intrinsic"], mask, stride)
            if share > limit:
                text = f"views {order[0]} and {order[1]} contradict each other in {share:.1%} of the points."
                found.append(Problem(index, f"{text} Depth and cameras do not fit."))
    if found and (fault := pose_problem(_posed(folder, views, moving), pairs_to_compare(views))):
        found = [Problem(index, fault)]  # which convention they look like, if it is one
    return found


def _posed(folder: Path, views: int, moving: list[int]) -> dict[int, PosedDepth]:
    order = sorted({view for pair in pairs_to_compare(views) for view in pair})
    arrays = read_scene(folder, order)
    masks = ~np.isin(arrays["ids"], moving)
    parts = zip(arrays["depth"], arrays["extrinsic"], arrays["intrinsic"], masks, strict=True)
    return {view: PosedDepth(*part) for view, part in zip(order, parts, strict=True)}


def check_dataset(folder: str | Path, pairs: int = 3, workers: int | None = None) -> list[Problem]:
    """Everything that is wrong with a dataset, in order; an empty list where nothing is.

    Looks at every file of every scene (size, SHA-256, picture size, finite depth), at `pairs` pairs of views per
    scene (`contradictions`), and at dataset.json. workers: threads. OSError or ValueError where the folder is no
    dataset at all.
    """
    dataset = Dataset.open(folder)
    failures = dataset.failures()
    found: list[Problem] = []
    with ThreadPoolExecutor(workers or min(8, available_cores())) as threads:
        check: Callable[[int], list[Problem]] = lambda index: check_scene(dataset, index, pairs)  # noqa: E731
        for index, problems in enumerate(threads.map(check, range(dataset.scenes))):
            if index in failures:
                problems = [Problem(index, f"it failed: {failures[index]['error']}")]
            found += problems
    expected = {scene_name(index) for index in range(dataset.scenes)}
    for path in sorted(dataset.folder.glob("scene_*")):
        if path.name not in expected:
            found.append(Problem(None, f"{path.name} does not belong to the {dataset.scenes} scenes: move it away."))
    record = read_json(dataset.folder / DATASET)
    digest = record.get("digest")
    if digest != dataset.digest() and (digest is not None or not found):
        found.append(Problem(None, f"{DATASET} does not fit the manifests: its digest is not theirs."))
    elif (dataset.folder / DATASET).read_bytes() != json_bytes(record):
        found.append(Problem(None, f"{DATASET} is damaged: it is not as it was written."))
    if digest is not None and (fault := _sheet_fault(dataset.folder / SHEET)):
        found.append(Problem(None, fault))
    return found


def _sheet_fault(path: Path) -> str | None:
    if not path.exists():
        return f"{SHEET} is missing."
    try:
        pixels.decode(path.read_bytes(), path)
    except (OSError, ValueError):
        return f"{SHEET} is no readable picture."
    return None


def repair_dataset(
    folder: str | Path,
    workers: int | None = None,
    pairs: int = 3,
    reserve: int = RESERVE,
    texture_root: str | Path | None = None,
) -> list[Problem]:
    """Check a dataset, render again only what is broken or missing, and return what is wrong after that.

    Single views are rendered again where the rest of their scene is intact and they come out with the bytes that the
    manifest has; else the whole scene is. `workers`, `reserve`, `texture_root`, and the errors: see
    `generate.generate`.
    """
    redo: dict[int, list[int] | None] = {}
    problems = check_dataset(folder, pairs)
    for problem in problems:
        if problem.scene is not None:
            before = redo.get(problem.scene, [])
            both = None if before is None or problem.redo is None else sorted({*before, *problem.redo})
            redo[problem.scene] = both
    if not problems:
        return []
    dataset = Dataset.open(folder)
    if (sheet := dataset.folder / SHEET).exists() and _sheet_fault(sheet):
        shutil.rmtree(sheet) if sheet.is_dir() else sheet.unlink()
    if (number := run(dataset, redo, workers, reserve=reserve, texture_root=texture_root).signal) is not None:
        signal.raise_signal(number)  # to whoever handles it, now that the workers have ended
    return check_dataset(folder, pairs)
