"""A dataset: a folder of scenes, the plan they were made by, and one number that stands for all their bytes.

scene_00000/ ...      see storage.py
dataset.json          the plan, seeds, versions; once all is done, the digest over the manifests
failures.json         the scenes that could not be made, with their tracebacks; absent where there are none
contact_sheet.png     a few views of a few scenes
logs/                 what the workers said
.work/                locks and unfinished scenes; may be deleted whenever nothing runs
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from .._files import locked
from .storage import MANIFEST, SceneFormat, json_bytes, read_json, read_manifest, write_atomically

FORMAT = 1
DATASET = "dataset.json"
FAILURES = "failures.json"
SHEET = "contact_sheet.png"
WORK = ".work"
MEND = "Repair it with --repair and the arguments of the command that generated it."
PACKAGES = ("peft-attrsub", "numpy", "pillow", "open3d", "bpy", "OpenEXR")


def scene_name(index: int) -> str:
    return f"scene_{index:05d}"


def make_plan(
    recipe: Any,
    sampler: str,
    renderer: str,
    options: dict[str, Any] | None = None,
    textures: list[str] | None = None,
    jpeg: int | None = None,
    depth: str = "png",
) -> dict[str, Any]:
    """All that the bytes of a scene depend on, as JSON. `recipe` is a dataclass of numbers and strings; `sampler`
    and `renderer` are "module:attribute"; see `generate.generate`."""
    kind = type(recipe)
    if not is_dataclass(recipe) or isinstance(recipe, type) or kind.__module__ == "__main__":
        raise ValueError(
            f"the recipe is a {kind.__name__} of {kind.__module__}: give a dataclass of a module that can be "
            "imported, because the workers make it again."
        )
    for name in (sampler, renderer):
        if name.count(":") != 1:
            raise ValueError(f"{name!r} names no callable: write it as module:attribute.")
    SceneFormat(jpeg, depth)  # refuses what cannot be written
    plan = {
        "recipe": {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": asdict(recipe)},
        "sampler": sampler,
        "textures": textures,
        "renderer": renderer,
        "options": options or {},
        "jpeg": jpeg,
        "depth": depth,
    }
    return dict(json.loads(json_bytes(plan)))  # with lists for tuples, as it will be read again


def plan_tag(plan: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for the plan in every manifest."""
    return hashlib.sha256(json_bytes(plan)).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Python and the installed packages that pixels depend on; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk, finished or not. scenes: how many it has when it is finished."""

    folder: Path
    plan: dict[str, Any]
    scenes: int

    @property
    def tag(self) -> str:
        return plan_tag(self.plan)

    def scene(self, index: int) -> Path:
        return self.folder / scene_name(index)

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """The dataset that a folder holds: FileNotFoundError without, ValueError for a damaged dataset.json."""
        path = Path(folder) / DATASET
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: this is no dataset, or its generation never started.")
        record = read_json(path)
        if "checksum" in record and record["checksum"] != _checksum(record):
            raise ValueError(f"{path} is damaged: its checksum is not that of its content. {MEND}")
        if record.get("format") not in range(1, FORMAT + 1):
            raise ValueError(f"{path} has format {record.get('format')!r}, this version reads up to {FORMAT}.")
        try:
            dataset = cls(Path(folder), dict(record["plan"]), int(record["scenes"]))
            if record["tag"] != dataset.tag:  # datasets of older versions have no checksum
                raise ValueError("its tag is not that of its plan")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). {MEND}") from error
        return dataset

    @classmethod
    def restore(cls, folder: str | Path, plan: dict[str, Any], scenes: int) -> Dataset:
        """Write a damaged or lost dataset.json again. ValueError unless the scenes in the folder were made by `plan`.

        One manifest may be damaged as well: the tag that most of them have decides.
        """
        folder, tags = Path(folder), Counter[str]()
        for path in sorted(folder.glob(f"scene_*/{MANIFEST}")):
            with suppress(OSError, ValueError):
                tags[read_manifest(path.parent)["tag"]] += 1
        dataset = cls(folder, plan, scenes)
        if not tags or tags.most_common(1)[0][0] != dataset.tag:
            found = "its scenes were made with other arguments" if tags else "no scene of it can be read"
            raise ValueError(
                f"{folder / DATASET} cannot be made again: {found}. Give the arguments of the command that generated "
                "it, or delete the folder."
            )
        path = folder / DATASET
        if path.is_dir():
            shutil.rmtree(path)
        write_atomically(path, json_bytes(dataset.record()))
        return dataset

    @classmethod
    def start(cls, folder: str | Path, plan: dict[str, Any], scenes: int) -> Dataset:
        """Start a dataset or continue it; ValueError where the folder was made by another plan."""
        folder = Path(folder)
        if (folder / DATASET).exists():
            old = cls.open(folder)
            if differing := sorted(key for key in plan if plan[key] != old.plan.get(key)):
                was, now = old.plan.get(differing[0]), plan[differing[0]]
                if differing[0] == "recipe" and isinstance(was, dict) and was.get("class") == now["class"]:
                    # A field that the older dataset lacks came later, and with it another way to draw scenes.
                    fields = [dict(recipe["fields"]) for recipe in (was, now)]
                    keys = [key for key in fields[1] if fields[0].get(key) != fields[1][key]]
                    was, now = (
                        ", ".join(f"{key} {f.get(key, 'of an older version')}" for key in keys) for f in fields
                    )
                raise ValueError(
                    f"{folder} was made with another {', '.join(differing)} ({_short(was)}, now {_short(now)}): "
                    "choose another folder, or delete this one."
                )
            if old.scenes > scenes:
                raise ValueError(f"{folder} is a dataset of {old.scenes} scenes, {scenes} were asked for: delete it.")
            dataset = cls(folder, plan, scenes)
            before = read_json(folder / DATASET)
            if before == dataset.record():
                return dataset
            if changed := sorted(key for key, was in before["versions"].items() if versions().get(key) != was):
                print(f"note: {folder} was begun with another version of {', '.join(changed)}.", file=sys.stderr)
        dataset = cls(folder, plan, scenes)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DATASET, json_bytes(dataset.record(digest=False)))
        return dataset

    def finished(self) -> list[int]:
        """The scenes that have their manifest."""
        return [index for index in range(self.scenes) if (self.scene(index) / MANIFEST).exists()]

    def size(self, indices: list[int]) -> int:
        """Bytes of these finished scenes; ValueError where one was made by another plan."""
        total = 0
        for index in indices:
            manifest = read_manifest(self.scene(index))
            if manifest["tag"] != self.tag:
                raise ValueError(
                    f"{self.scene(index)} was made by another recipe: choose another folder or delete it."
                )
            total += manifest["bytes"]
        return total

    # --- failures -----------------------------------------------------------------------------------------------

    def fail(self, index: int, error: str, traceback: str) -> None:
        """Record a failed scene: in a file of its own first, since several nodes may fail at the same time."""
        folder = self.folder / WORK / "failed"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{scene_name(index)}.json", json_bytes({"error": error, "traceback": traceback}))
        self.write_failures()

    def failures(self) -> dict[int, dict[str, str]]:
        """The recorded failures of scenes that have not been finished since."""
        found = {}
        for index in range(self.scenes):
            path = self.folder / WORK / "failed" / f"{scene_name(index)}.json"
            if path.exists():
                if (self.scene(index) / MANIFEST).exists():
                    path.unlink(missing_ok=True)
                else:
                    try:
                        found[index] = {"error": "", "traceback": ""} | read_json(path)
                    except (OSError, ValueError) as error:
                        found[index] = {"error": f"why is not known ({error})", "traceback": ""}
        return found

    def write_failures(self) -> None:
        failures, path = self.failures(), self.folder / FAILURES
        if failures:
            write_atomically(path, json_bytes({scene_name(index): entry for index, entry in failures.items()}))
        else:
            path.unlink(missing_ok=True)

    # --- dataset.json -------------------------------------------------------------------------------------------

    def digest(self) -> str | None:
        """SHA-256 over "name SHA-256(manifest)\\n" of all scenes in order; None while scenes are missing."""
        lines = []
        for index in range(self.scenes):
            path = self.scene(index) / MANIFEST
            if not path.is_file():
                return None
            lines.append(f"{scene_name(index)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def record(self, digest: bool = True) -> dict[str, Any]:
        fields = self.plan["recipe"]["fields"]
        record = {
            "format": FORMAT,
            "plan": self.plan,
            "tag": self.tag,
            "attribute": fields.get("attribute"),
            "seeds": {"dataset": fields.get("seed"), "scene": "[dataset seed, index of the scene]"},
            "scenes": self.scenes,
            "versions": versions(),
            "digest": self.digest() if digest else None,
        }
        return record | {"checksum": _checksum(record)}

    def close(self) -> bool:
        """Bring failures.json and dataset.json up to date; True where every scene is finished.

        Any process may call it at any time: what it writes depends on the scenes alone.
        """
        self.write_failures()
        record = self.record()
        if (self.folder / DATASET).read_bytes() != json_bytes(record):
            write_atomically(self.folder / DATASET, json_bytes(record))
        return record["digest"] is not None

    # --- one run at a time --------------------------------------------------------------------------------------

    @contextmanager
    def workplace(self, rank: int, world: int) -> Iterator[Path]:
        """The folder for this rank's unfinished scenes, emptied, and locked against a second run until the end.

        The lock goes with the process, however it ends. BlockingIOError where another run holds it.
        """
        folder = self.folder / WORK / f"rank-{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"another run is writing to {self.folder}: wait for it, or choose another folder"
        with locked(folder / "lock", busy):
            _empty(folder)
            if rank == 0:
                for other in (self.folder / WORK).glob("rank-*"):
                    if int(other.name.removeprefix("rank-")) >= world:
                        _empty(other)  # left by a run with more processes
            yield folder


def _empty(folder: Path) -> None:
    """Remove the unfinished scenes, and broken ones that were being replaced when a run was killed."""
    for partial in sorted(folder.glob("scene_*")):
        shutil.rmtree(partial, ignore_errors=True)


def _checksum(record: dict[str, Any]) -> str:
    """Of all of dataset.json but the digest, which is compared with the manifests."""
    kept = {key: value for key, value in record.items() if key not in ("digest", "checksum")}
    return hashlib.sha256(json_bytes(kept)).hexdigest()[:16]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
