"""Generic scenes for pre-training, ray cast once and kept as memory-mapped shards.

A scene is a recipe "mixed" (everything is drawn anew, mildly) under its own number: three in four are furnished
rooms, the others objects on a floor. A shard is one .npy file of SHARD scenes, whose rows hold, for V views of
N x N pixels:

    images (V, N, N, 3) uint8        depths (V, N, N) float16, planar z in metres, 0 where nothing is
    poses  (V, 3, 4) float32         camera from world, OpenCV axes
    focal  float32, pixels           of all views; the principal point is the middle, (N - 1) / 2

It is written beside and renamed, so an interrupted run goes on with the shards that are missing. A scene depends on
the seed, the size and its number alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Scenes per file.
SHARD = 32
#: Seeds of the recipes; nothing is shared between them.
SEEDS = {"train": 1, "held-out": 2}
#: Triangles of a scene and pixels of a texture: at 80 pixels more would not be seen.
TRIANGLES, TEXTURE = 3000, 64


@dataclass(frozen=True)
class Scenes:
    """Which scenes: the first `count` under `seed`, `views` pictures of `size` x `size` pixels each."""

    seed: int
    count: int
    views: int = 8
    size: int = 80

    def __post_init__(self) -> None:
        if self.count < 1 or self.views < 2 or self.size < 8:
            raise ValueError(
                f"{self.count} scenes of {self.views} views at {self.size} pixels were asked for: expected 1 or more "
                "scenes, 2 or more views, 8 or more pixels."
            )

    @property
    def dtype(self) -> np.dtype:
        """Of one scene, a row of a shard."""
        views, size = self.views, self.size
        return np.dtype(
            [
                ("images", "u1", (views, size, size, 3)),
                ("depths", "f2", (views, size, size)),
                ("poses", "f4", (views, 3, 4)),
                ("focal", "f4"),
            ]
        )

    def shards(self, folder: Path) -> list[Path]:
        """Files of the scenes in order; the last may hold more scenes than are asked for."""
        name = f"seed{self.seed}-{self.views}x{self.size}"
        return [folder / f"{name}-{number:05d}.npy" for number in range(-(-self.count // SHARD))]


def render_scene(scenes: Scenes, index: int) -> np.ndarray:
    """One row of `scenes.dtype`. Raises ImportError without Open3D."""
    # Imported here: training from a finished cache needs no renderer.
    from peft_attrsub.scenes.raycast import RaycastRenderer
    from peft_attrsub.scenes.recipes import AttributeRecipe
    from peft_attrsub.scenes.sampling import sample_scene

    layout = "object" if index % 4 == 3 else "room"
    recipe = AttributeRecipe(
        "mixed",
        scenes.seed,
        layout=layout,
        size=scenes.size,
        views=scenes.views,
        floor=layout == "object",
        triangles=TRIANGLES,
    )
    scene = sample_scene(recipe, index)
    row = np.zeros((), scenes.dtype)
    with RaycastRenderer(scene, shadow_samples=1, threads=1, texture_size=TEXTURE) as renderer:
        for number, camera in enumerate(scene.cameras):
            view = renderer.render(number)
            row["images"][number], row["depths"][number] = view.rgb, view.depth
            row["poses"][number] = np.linalg.inv(np.array(camera.pose))[:3]
    row["focal"] = scene.cameras[0].fx
    return row


def _write_shard(task: tuple[Scenes, Path, int]) -> None:
    scenes, path, number = task
    rows = np.stack([render_scene(scenes, index) for index in range(number * SHARD, (number + 1) * SHARD)])
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        np.save(file, rows)
    os.replace(beside, path)


def make_scenes(scenes: Scenes, folder: Path, workers: int = 1) -> None:
    """Render the shards that `folder` lacks, in `workers` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(scenes, path, number) for number, path in enumerate(scenes.shards(folder)) if not path.exists()]
    if not tasks:
        return
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        if workers == 1:
            written = map(_write_shard, tasks)
        else:
            # spawn: Open3D and torch have threads, which a fork would lose.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(min(workers, len(tasks))))
            written = pool.imap_unordered(_write_shard, tasks)
        for done, _ in enumerate(written, start=1):
            rate = done * SHARD * scenes.views / (time.monotonic() - start)
            print(f"scenes: {done * SHARD} of {len(tasks) * SHARD}, {rate:.0f} images/s", file=sys.stderr, flush=True)


class Shards:
    """The scenes of a cache by their number, read from the disk as they are needed."""

    def __init__(self, scenes: Scenes, folder: Path) -> None:
        self.scenes = scenes
        self._shards = [np.load(path, mmap_mode="r") for path in scenes.shards(folder)]

    def __len__(self) -> int:
        return self.scenes.count

    def __getitem__(self, index: int) -> np.ndarray:
        shard, row = divmod(index, SHARD)
        return self._shards[shard][row]
