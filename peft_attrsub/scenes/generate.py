"""Make a dataset: scenes in parallel, one folder each, interrupted and continued at will.

Every scene depends on the recipe, its seed and the scene's number alone, and gets its name when it is whole. So
whatever stops a run, the same command continues it, and the result has the bytes of an undisturbed run.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from .._machine import cores_per_process
from .dataset import SHEET, Dataset, make_plan, scene_name
from .maps import TEXTURES
from .pool import Job, Pool

SAMPLER = "peft_attrsub.scenes.sampling:sample_scene"
RENDERERS = {
    "raycast": "peft_attrsub.scenes.raycast:RaycastRenderer",
    "cycles": "peft_attrsub.scenes.cycles:CyclesRenderer",
}
RESERVE = 256 << 20  # bytes that a run leaves free on the disk
# Bytes per pixel, measured on rendered views, for the look at the disk before the first scene.
TYPICAL = {"rgb": 1.3, "jpeg": 0.25, "png": 0.35, "npy": 4.0, "exr": 3.7, "ids": 0.05}


@dataclass(frozen=True)
class Report:
    """What a run did. scenes: this process's share; done: finished, before or now; rendered: now; failed: the scenes
    that were given up; signal: the number of the one that stopped the run, or None."""

    folder: Path
    scenes: int
    done: int
    rendered: int
    failed: list[int] = field(default_factory=list)
    signal: int | None = None

    @property
    def status(self) -> int:
        """For the process to exit with: 0 all done, 1 some failed, 128 + n stopped by signal n."""
        if self.signal is not None:
            return 128 + self.signal
        return 0 if self.done == self.scenes else 1


class Progress:
    """One line: on a terminal it is overwritten, elsewhere a new one comes at most every ten seconds."""

    def __init__(self, name: str, total: int, done: int, size: int, views: int | None) -> None:
        self.name, self.total, self.done, self.size, self.views = name, total, done, size, views
        self.failed, self.rendered, self.start, self.last = 0, 0, time.monotonic(), 0.0

    def line(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-6)
        parts = [self.name, f"{self.done}/{self.total} scenes"]
        if self.rendered:
            if self.views:
                parts.append(f"{self.rendered * self.views / seconds:.1f} images/s")
            left = int((self.total - self.done - self.failed) * seconds / self.rendered)
            parts.append(f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        parts.append(f"{_readable(self.size)} on disk")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return "  ".join(parts)

    def show(self, last: bool = False) -> None:
        terminal = sys.stderr.isatty()
        if terminal:
            print(f"\r\x1b[K{self.line()}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or time.monotonic() - self.last >= 10:
            self.last = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)


def generate(
    out: str | Path,
    recipe: Any,
    scenes: int,
    views: int | None = None,
    renderer: str = "raycast",
    *,
    options: dict[str, Any] | None = None,
    sampler: str = SAMPLER,
    textures: list[str] | None = None,
    texture_root: str | Path | None = None,
    jpeg: int | None = None,
    depth: str = "png",
    workers: int | None = None,
    recycle: int = 50,
    reserve: int = RESERVE,
) -> Report:
    """Make the dataset of `recipe` in the folder `out`, or what is still missing of it.

    scenes, views: how many, and how many cameras each (None: the recipe's own number). renderer: "raycast", "cycles",
    or "module:attribute" of a callable (scene, **options) -> view.Renderer. sampler: "module:attribute" of a callable
    (recipe, index) -> Scene, also called with `textures=` where a list of texture folders is given. texture_root: the
    folder in which relative ones of these lie; it is not stored, so the same textures elsewhere give the same bytes.
    jpeg, depth: see storage.SceneFormat. workers: processes (None: one per core, or 1 for cycles, which uses all cores
    itself), each replaced after `recycle` scenes. reserve: bytes to leave free.

    A scene that fails is tried again with the same seed, then recorded in failures.json and skipped; the next run
    tries it once more. SIGINT and SIGTERM stop after the views in work. With RANK and WORLD_SIZE in the environment
    (`accelerate launch`, torchrun, Slurm's wrappers) this process makes the scenes with index % WORLD_SIZE == RANK.

    Raises ValueError for arguments that do not fit or a folder of another recipe, OSError for a full disk or a second
    run in the same folder, ImportError for a missing package, both before a second scene is tried.
    """
    if not is_dataclass(recipe) or isinstance(recipe, type):
        raise ValueError(f"the recipe is {recipe!r}: give an AttributeRecipe.")
    if scenes < 1 or (views is not None and views < 1):
        raise ValueError(f"{scenes} scenes of {views} views were asked for: both must be 1 or more.")
    if views is not None:
        recipe = replace(recipe, views=views)
    plan = make_plan(recipe, sampler, RENDERERS.get(renderer, renderer), options, textures, jpeg, depth)
    return run(Dataset.start(out, plan, scenes), None, workers, recycle, reserve, texture_root)


def run(
    dataset: Dataset,
    redo: dict[int, list[int] | None] | None = None,
    workers: int | None = None,
    recycle: int = 50,
    reserve: int = RESERVE,
    texture_root: str | Path | None = None,
) -> Report:
    """Make the missing scenes, and those in `redo` again: all of them (None) or only some of their views."""
    rank, world = share()
    redo = {index: part for index, part in (redo or {}).items() if index % world == rank}
    mine = range(rank, dataset.scenes, world)
    with dataset.workplace(rank, world) as partials:
        done = {index for index in dataset.finished() if index % world == rank} - set(redo)
        jobs = [
            Job(index, str(partials / scene_name(index)), str(dataset.scene(index)), redo.get(index), index in redo)
            for index in mine
            if index not in done
        ]
        size = dataset.size(sorted(done))
        fields = dataset.plan["recipe"]["fields"]
        progress = Progress(dataset.folder.name, len(mine), len(done), size, fields.get("views"))
        disk = Disk(dataset, reserve)
        disk.before(len(jobs), size / len(done) if done else None)
        workers = default_workers(dataset.plan["renderer"]) if workers is None else workers
        # Several workers share the cores; one alone leaves the choice to its renderer.
        busy = min(workers, len(jobs))
        threads = max(1, cores_per_process() // busy) if busy > 1 else None
        pool = Pool(
            {"plan": dataset.plan, "tag": dataset.tag, "threads": threads},
            workers,
            dataset.folder / "logs",
            f"rank{rank}-worker",
            recycle,
            {} if texture_root is None else {TEXTURES: str(Path(texture_root).resolve())},
        )
        failed: list[int] = []
        full: OSError | None = None
        # closing: an error here must not leave workers behind for as long as its traceback lives.
        with (
            handled_signals(pool) as seen,
            visible_device(dataset.plan["options"]),
            closing(pool.run(jobs)) as results,
        ):
            for result in results:
                if result.kind == "missing":
                    raise ImportError(f"no scene can be made: {result.error}")
                if result.kind == "no device":
                    raise ValueError(f"no scene can be made: {result.error}")
                if result.kind == "disk":
                    full = OSError(errno.ENOSPC, f"the disk of {dataset.folder} is full: {AFTER_FULL}")
                elif result.kind == "done":
                    progress.done, progress.rendered = progress.done + 1, progress.rendered + 1
                    progress.size += result.bytes
                    full = full or disk.during(progress.size / progress.done, pool.workers)
                elif result.kind in ("error", "died"):
                    failed.append(result.index)
                    progress.failed += 1
                    dataset.fail(result.index, result.error, result.traceback)
                pool.draining = full is not None
                progress.show()
        progress.show(last=True)
        if full is not None:
            raise full
        if not seen and dataset.close() and (jobs or not (dataset.folder / SHEET).exists()):
            from .sheet import contact_sheet

            contact_sheet(dataset.folder)
    return Report(
        dataset.folder, len(mine), progress.done, progress.rendered, sorted(failed), seen[0] if seen else None
    )


def share() -> tuple[int, int]:
    """(RANK, WORLD_SIZE) of the environment, (0, 1) without; ValueError where they make no sense."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE {world!r}: unset both, or let the launcher set them.")
    return int(rank), int(world)


def default_workers(renderer: str) -> int:
    """One per core of `cores_per_process`; 1 for Cycles, which takes all."""
    return 1 if renderer == RENDERERS["cycles"] else cores_per_process()


AFTER_FULL = "make room and run the same command again, it continues where it stopped."


@dataclass(frozen=True)
class Disk:
    """Looks at the free space before a run and after every scene."""

    dataset: Dataset
    reserve: int

    def before(self, scenes: int, each: float | None) -> None:
        """OSError where `scenes` more of them, `each` bytes or a typical size, do not fit."""
        plan = self.dataset.plan
        if each is None:
            fields = plan["recipe"]["fields"]
            size, views = fields.get("size"), fields.get("views")
            pixels = size * size * views if isinstance(size, int) and isinstance(views, int) else 0
            colour = TYPICAL["rgb"] if plan["jpeg"] is None else TYPICAL["jpeg"]
            each = pixels * (colour + TYPICAL[plan["depth"]] + TYPICAL["ids"])
        free, wanted = shutil.disk_usage(self.dataset.folder).free, scenes * each
        if scenes and free < wanted + self.reserve:
            raise OSError(
                errno.ENOSPC,
                f"{self.dataset.folder}: {scenes} scenes need about {_readable(wanted)} and {_readable(self.reserve)} "
                f"are kept free, but only {_readable(free)} are: make room, choose another folder, or store JPEG",
            )

    def during(self, each: float, workers: int) -> OSError | None:
        """What to raise where the scenes in work may no longer fit."""
        free = shutil.disk_usage(self.dataset.folder).free
        if free >= self.reserve + workers * each:
            return None
        return OSError(errno.ENOSPC, f"{_readable(free)} are free for {self.dataset.folder}: {AFTER_FULL}")


@contextmanager
def handled_signals(pool: Pool) -> Iterator[list[int]]:
    """While it is open, SIGINT and SIGTERM stop the pool, a second one at once; yields the signals that came."""
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        pool.stopping, pool.kill = True, bool(seen)
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield seen  # only the main thread may set handlers
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: list[Callable[[int, Any], Any] | int | None] = [signal.signal(number, handle) for number in numbers]
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def visible_device(options: dict[str, Any]) -> Iterator[None]:
    """One GPU per local rank: the workers of rank n see the n-th of the devices, where the options name a GPU."""
    local = os.environ.get("LOCAL_RANK", "")
    if options.get("device", "cpu") == "cpu" or not local.isdecimal():
        yield
        return
    key = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(key)
    devices = before.split(",") if before else []
    os.environ[key] = devices[int(local) % len(devices)] if devices else local
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _readable(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
