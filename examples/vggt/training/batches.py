"""Which scenes and which of their views make up every micro-batch of every step, and those batches themselves.

The plan of a step follows from (seed, step) alone. Micro-batch j of A in a step of I images and P shards has

    n ~ U{views_min .. views_max} views of each of B = max(P, (I / A) // n) scenes,  (H, W) pixels,
    W = image_size ,  H = floor(W a / 14) 14 ,  a ~ U(aspect_min, aspect_max) rounded to 0.01 ,

so a step has A B n images, I or a little less. The B scenes are dealt to the P shards one by one, and a process works
on every w-th shard of w processes, each as a batch of its own. With the same P, processes together therefore make
exactly the batches of one process, and a run that continues needs to know no more than its step.
Source: VGGT (arXiv 2503.11651), released training recipe.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from peft_attrsub._machine import free_shared_memory
from peft_attrsub.datasets import MultiViewDataset, Sample
from peft_attrsub.vggt import relative_to_first

from .augment import Augmentation, augment

Batch = dict[str, Any]
# What a stream of random numbers is for; part of its seed.
_PLAN, _COLOURS = 1, 2


@dataclass(frozen=True)
class SceneDraw:
    """One scene of a batch. sequence: its number. frames: numbers of its views, the first defines the world frame.
    seed: of what changes its views at random."""

    sequence: int
    frames: tuple[int, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """One process's part of micro-batch `micro` of `step`: scenes with equally many views, all of `size` (H, W)."""

    step: int
    micro: int
    size: tuple[int, int]
    scenes: tuple[SceneDraw, ...]

    @property
    def images(self) -> int:
        return sum(len(scene.frames) for scene in self.scenes)


@dataclass(frozen=True)
class StepPlan:
    """What every step is made of: `plan.micro_batches(step, rank, world)`.

    seed: of everything. lengths: frames of each sequence. views_min, views_max: views of a scene; where no sequence is
    as long as views_max, up to the longest. images_per_step: over all micro-batches and processes. accumulate: A.
    shards: P, a multiple of the number of processes (None: that number). window: views come from this many times as
    many consecutive frames; None: from the whole sequence.
    A scene is drawn among the sequences that have enough frames, twice in a micro-batch only where those are too few;
    no frame is twice in a scene.
    """

    seed: int
    lengths: tuple[int, ...]
    views_min: int = 4
    views_max: int = 16
    images_per_step: int = 32
    accumulate: int = 1
    shards: int | None = None
    image_size: int = 518
    patch_size: int = 14
    aspect_min: float = 0.33
    aspect_max: float = 1.0
    window: float | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "images_per_step", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more.")
        for name in ("views", "aspect"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if not 0 < low <= high:
                raise ValueError(f"{name}_min is {low} and {name}_max {high}: expected 0 < min <= max.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more.")
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}, no multiple of a patch of {self.patch_size} pixels.")
        if self.window is not None and not self.window >= 1:
            raise ValueError(f"window is {self.window} times the views: give 1 or more, or None.")
        if max(self.lengths, default=0) < self.views_min:
            raise ValueError(
                f"none of the {len(self.lengths)} sequences has the {self.views_min} views of views_min; the longest "
                f"has {max(self.lengths, default=0)}: give longer sequences, or a smaller views_min."
            )

    def micro_batches(self, step: int, rank: int = 0, world: int = 1) -> tuple[MicroBatch, ...]:
        """What process `rank` of `world` works on in `step`, one after the other; equally many on every process."""
        if not 0 <= rank < world:
            raise ValueError(f"process {rank} of {world}: they are counted from 0 to {world - 1}.")
        shards = self.shards or world
        if shards % world:
            raise ValueError(
                f"a plan of {shards} shards cannot be shared by {world} processes: give as many processes as divide "
                f"{shards}, or make a plan for {world}."
            )
        found = []
        for micro in range(self.accumulate):
            size, scenes = self._draw(step, micro, shards)
            for shard in range(rank, shards, world):
                # Turned with the micro-batch, so that no process always has the larger share.
                found.append(MicroBatch(step, micro, size, scenes[(shard + micro) % shards :: shards]))
        return tuple(found)

    def _draw(self, step: int, micro: int, shards: int) -> tuple[tuple[int, int], tuple[SceneDraw, ...]]:
        """Size and all scenes of one micro-batch, over all shards."""
        rng = np.random.default_rng([self.seed, _PLAN, step, micro])
        views = int(rng.integers(self.views_min, min(self.views_max, max(self.lengths)) + 1))
        aspect = round(float(rng.uniform(self.aspect_min, self.aspect_max)), 2)
        # A hundredth is no exact number: 700 * 0.7 / 14 would fall to 34.
        rows = max(1, math.floor(self.image_size * aspect / self.patch_size + 1e-9))
        count = max(shards, self.images_per_step // self.accumulate // views)
        enough = np.flatnonzero(np.asarray(self.lengths) >= views)
        chosen = np.concatenate([rng.permutation(enough) for _ in range(math.ceil(count / len(enough)))])[:count]
        scenes = [
            SceneDraw(
                int(sequence),
                self._frames(int(self.lengths[sequence]), views, rng),
                (self.seed, _COLOURS, step, micro, place),
            )
            for place, sequence in enumerate(chosen)
        ]
        return (rows * self.patch_size, self.image_size), tuple(scenes)

    def _frames(self, length: int, views: int, rng: np.random.Generator) -> tuple[int, ...]:
        reach = length if self.window is None else min(length, math.ceil(views * self.window))
        first = int(rng.integers(0, length))
        # About the first view, and moved inwards at the ends of the sequence.
        low = min(max(0, first - reach // 2), length - reach)
        others = [frame for frame in range(low, low + reach) if frame != first]
        return (first, *(int(frame) for frame in rng.permutation(others)[: views - 1]))


def training_frames(dataset: MultiViewDataset, name: str) -> list[str]:
    """Ids of the frames that a sequence is learnt from: those of the dataset's map of sequences, else all."""
    return dataset.fixed_frames(name) or dataset.frames(name)


class TrainingData(torch.utils.data.Dataset[Batch]):
    """The batches of one process by number: number = step * per_step + place, per_step of them in a step.

    dataset, names: `names[i]` is sequence i of the plan; plan.lengths must fit `training_frames`. A batch holds what
    `Sample.training` says, float32, with a dimension of scenes in front, poses relative to the first view, and the
    frames' ids as "frames". It is the same whoever computes it, and whenever.
    """

    def __init__(
        self,
        dataset: MultiViewDataset,
        names: Sequence[str],
        plan: StepPlan,
        augmentation: Augmentation,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(names) != len(plan.lengths):
            raise ValueError(f"the plan is for {len(plan.lengths)} sequences, {len(names)} were given.")
        self.dataset, self.names, self.plan, self.augmentation = dataset, tuple(names), plan, augmentation
        self.rank, self.world = rank, world
        self.per_step = len(plan.micro_batches(0, rank, world))

    def __getitem__(self, number: int) -> Batch:
        step, place = divmod(number, self.per_step)
        micro = self.plan.micro_batches(step, self.rank, self.world)[place]
        with _one_thread():  # sums over a picture depend on the number of threads in their last digit
            return collate([self.scene(scene, micro.size) for scene in micro.scenes])

    def scene(self, draw: SceneDraw, size: tuple[int, int]) -> Sample:
        """One scene of a batch, read and changed."""
        name = self.names[draw.sequence]
        known = training_frames(self.dataset, name)
        if max(draw.frames) >= len(known):
            raise ValueError(
                f"{name} in {self.dataset.root} has {len(known)} frames, {self.plan.lengths[draw.sequence]} when the "
                "training began: do not change a dataset that is in use."
            )
        sample = self.dataset.read(name, [known[frame] for frame in draw.frames])
        return augment(sample, size, self.augmentation, np.random.default_rng(draw.seed))


def plan_for(dataset: MultiViewDataset, names: Sequence[str], **options: Any) -> StepPlan:
    """The plan for these sequences of a dataset; options are StepPlan's, without lengths."""
    return StepPlan(lengths=tuple(len(training_frames(dataset, name)) for name in names), **options)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size to a batch for VggtLoss; poses become relative to the first view, then float32."""
    parts = []
    for sample in samples:
        if sample.extrinsics is not None:
            sample = replace(sample, extrinsics=relative_to_first(sample.extrinsics))
        parts.append(sample.training())
    batch: Batch = {key: torch.stack([part[key] for part in parts]) for key in parts[0] if key != "seq_name"}
    batch["seq_name"] = [part["seq_name"] for part in parts]
    batch["frames"] = [sample.frames for sample in samples]
    return batch


def read_steps(data: TrainingData, start: int, stop: int, workers: int = 0) -> Iterator[tuple[int, list[Batch]]]:
    """(step, its batches on this process) for start <= step < stop, read ahead by `workers` processes.

    The batches do not depend on workers, and no random generator of the caller is touched. What cannot be read is a
    ValueError with the reader's sentence, also from a worker. Where /dev/shm is too small for the tensors of all
    workers, as in a container by default (64 MB), batches come through pipes instead, at the price of a copy.
    """
    numbers = range(start * data.per_step, stop * data.per_step)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        _Guarded(data, workers),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Without one, DataLoader would draw from the global generator, and a continued run would draw once more.
        generator=torch.Generator().manual_seed(0),
    )
    collected: list[Batch] = []
    for number, batch in zip(numbers, loader, strict=True):
        if isinstance(batch, str):
            raise ValueError(batch)
        if isinstance(batch, bytes):
            batch = pickle.loads(batch)  # of our own worker
        collected.append(batch)
        if len(collected) == data.per_step:
            yield number // data.per_step, collected
            collected = []


class _Guarded(torch.utils.data.Dataset[Any]):
    """A sentence in the place of an error: across processes an error would carry its traceback as its text.

    A batch that shared memory may have no room for is pickled: it then goes through a pipe.
    """

    def __init__(self, data: TrainingData, workers: int = 0) -> None:
        self.data, self.workers = data, workers

    def __getitem__(self, number: int) -> Batch | str | bytes:
        try:
            batch = self.data[number]
        except (OSError, ValueError) as error:
            return str(error)
        size = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
        room = free_shared_memory() if self.workers else None
        # Every worker may be about to put a batch there, and two that are read ahead wait for each.
        if room is not None and room < 3 * self.workers * size:
            # As the loader does to what it collects: tuples become lists.
            return pickle.dumps(torch.utils.data.default_convert(batch), protocol=pickle.HIGHEST_PROTOCOL)
        return batch


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


__all__ = [
    "Batch",
    "MicroBatch",
    "SceneDraw",
    "StepPlan",
    "TrainingData",
    "collate",
    "plan_for",
    "read_steps",
    "training_frames",
]
