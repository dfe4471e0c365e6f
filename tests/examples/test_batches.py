"""examples/vggt/training/batches.py: what a step is made of, whoever makes it, and that it is what lies on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.datasets import MultiViewDataset, Sample, resize
from peft_attrsub.vggt import VggtLoss, relative_to_first
from peft_attrsub.vggt.batch import check_batch
from tests.datasets.world import make_sample
from tests.examples.training_tools import on_path, tiny_model

on_path()
from training.augment import Augmentation, augment  # noqa: E402
from training.batches import MicroBatch, StepPlan, TrainingData, collate, plan_for, read_steps  # noqa: E402

LENGTHS = (3, 9, 20, 20, 40, 7, 16, 100)


class Worlds(MultiViewDataset):
    """Three sequences of the small world, of 3, 4 and 5 views; "bad" cannot be read."""

    def _find(self) -> list[str]:
        return ["a", "b", "c"]

    def frames(self, name: str) -> list[str]:
        return [f"{index:02d}" for index in range({"a": 3, "b": 4, "c": 5, "bad": 5}[name])]

    def _read(self, name: str, frames: list[str]) -> Sample:
        if (self.root / f"{name}.broken").exists():
            raise ValueError(f"{name}: frame {frames[0]} is no readable picture: fetch it again.")
        whole = make_sample(len(self.frames(name)))
        return replace(whole.views([int(frame) for frame in frames]), name=name, frames=tuple(frames))


@pytest.fixture
def worlds(tmp_path: Path) -> Worlds:
    return Worlds(tmp_path)


def small_plan(dataset: MultiViewDataset, **more: object) -> StepPlan:
    options = {"seed": 5, "views_min": 2, "views_max": 4, "images_per_step": 8, "image_size": 42, "aspect_min": 0.6}
    return plan_for(dataset, dataset.names, **(options | more))


def micros(plan: StepPlan, steps: int = 200, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
    for step in range(steps):
        yield from plan.micro_batches(step, rank, world)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.sampled_from([16, 32, 48]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([None, 1.0, 2.0, 8.0]),
)
def test_what_a_step_is_made_of(seed: int, step: int, images: int, accumulate: int, window: float | None) -> None:
    plan = StepPlan(seed, LENGTHS, images_per_step=images, accumulate=accumulate, window=window)
    found = plan.micro_batches(step)
    assert len(found) == accumulate and found == plan.micro_batches(step)
    for index, micro in enumerate(found):
        assert (micro.step, micro.micro) == (step, index)
        views = {len(scene.frames) for scene in micro.scenes}
        assert len(views) == 1
        n = views.pop()
        assert 4 <= n <= 16
        assert len(micro.scenes) == max(1, images // accumulate // n)
        assert micro.images == n * len(micro.scenes)
        height, width = micro.size
        assert width == 518 and height % 14 == 0 and 0.33 * 518 - 14 < height <= 518
        chosen = Counter(scene.sequence for scene in micro.scenes)
        long_enough = [number for number, length in enumerate(LENGTHS) if length >= n]
        assert set(chosen) <= set(long_enough)
        # The same scene twice only after all of them once.
        assert max(chosen.values()) <= -(-len(micro.scenes) // len(long_enough))
        for scene in micro.scenes:
            assert len(set(scene.frames)) == n and min(scene.frames) >= 0
            assert max(scene.frames) < LENGTHS[scene.sequence]
            if window is not None:
                assert max(scene.frames) - min(scene.frames) < max(n, np.ceil(n * window))
    assert len({scene.seed for micro in found for scene in micro.scenes}) == sum(len(m.scenes) for m in found)


def test_views_shapes_scenes_and_frames_are_uniform() -> None:
    plan = StepPlan(1, (50,) * 10, views_min=4, views_max=7, images_per_step=32, image_size=140)
    found = list(micros(plan, 3000))
    views = Counter(len(micro.scenes[0].frames) for micro in found)
    assert sorted(views) == [4, 5, 6, 7] and all(abs(count / 3000 - 0.25) < 0.03 for count in views.values())
    heights = Counter(micro.size[0] for micro in found)
    assert sorted(heights) == [14 * rows for rows in range(3, 11)]
    # 8 of the 68 hundredths from 0.33 to 1.00 give three rows, and so on; the highest has only 1.00.
    assert heights[14 * 3] / 3000 == pytest.approx(6.5 / 67, abs=0.02)
    assert heights[14 * 4] / 3000 == pytest.approx(10 / 67, abs=0.02)
    assert heights[140] / 3000 == pytest.approx(0.5 / 67, abs=0.01)
    scenes = Counter(scene.sequence for micro in found for scene in micro.scenes)
    total = sum(scenes.values())
    assert len(scenes) == 10 and all(abs(count / total - 0.1) < 0.01 for count in scenes.values())
    for place in (0, 1, 3):
        frames = Counter(scene.frames[place] for micro in found for scene in micro.scenes)
        assert len(frames) == 50 and max(frames.values()) < 1.3 * sum(frames.values()) / 50


def test_a_hundredth_that_is_no_exact_number() -> None:
    """0.7 of 700 is 35 patches, though 700 * 0.7 / 14 is 34.999..."""
    plan = StepPlan(0, (20,), image_size=700, aspect_min=0.7, aspect_max=0.7)
    assert plan.micro_batches(0)[0].size == (490, 700)
    assert StepPlan(0, (20,), image_size=28, aspect_min=0.1, aspect_max=0.2).micro_batches(0)[0].size == (14, 28)


def test_a_window_reaches_the_whole_sequence_over_time_and_no_further_at_once() -> None:
    plan = StepPlan(2, (30,), views_min=3, views_max=3, images_per_step=3, window=2.0)
    scenes = [micro.scenes[0].frames for micro in micros(plan, 500)]
    assert {frame for frames in scenes for frame in frames} == set(range(30))
    spans = Counter(max(frames) - min(frames) for frames in scenes)
    assert min(spans) == 2 and max(spans) == 5
    assert {frames[0] for frames in scenes} == set(range(30))


def test_shorter_sequences_bound_the_views() -> None:
    found = {len(micro.scenes[0].frames) for micro in micros(StepPlan(0, (5, 6, 3), views_min=4, views_max=16))}
    assert found == {4, 5, 6}


@settings(max_examples=40)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([16, 32, 64]))
def test_processes_together_make_the_batches_of_one(seed: int, world: int, accumulate: int, images: int) -> None:
    plan = StepPlan(seed, LENGTHS, images_per_step=images, accumulate=accumulate, shards=4)
    for step in range(3):
        alone = plan.micro_batches(step)
        shared = [plan.micro_batches(step, rank, world) for rank in range(world)]
        assert {len(one) for one in shared} == {accumulate * 4 // world}
        assert sorted(map(repr, alone)) == sorted(repr(micro) for one in shared for micro in one)
        for index in range(accumulate):  # dealt evenly, and nobody is without a scene
            sizes = [len(micro.scenes) for micro in alone if micro.micro == index]
            assert len(sizes) == 4 and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_no_process_always_has_the_larger_share() -> None:
    """15 images are three scenes of 5: of two processes one has two of them in one micro-batch, one in the next."""
    plan = StepPlan(0, LENGTHS, views_min=5, views_max=5, images_per_step=30, accumulate=2)
    for step in range(5):
        shares = [[len(micro.scenes) for micro in plan.micro_batches(step, rank, 2)] for rank in range(2)]
        assert shares == [[2, 1], [1, 2]]


def test_no_two_scenes_of_a_training_change_alike() -> None:
    plan = StepPlan(0, LENGTHS, accumulate=2)
    seeds = [scene.seed for micro in micros(plan, 50) for scene in micro.scenes]
    assert len(set(seeds)) == len(seeds)
    other = [scene.seed for micro in micros(replace(plan, seed=1), 50) for scene in micro.scenes]
    assert not set(seeds) & set(other)


@pytest.mark.parametrize("world", [2, 4])
def test_shards_divide_the_scenes_of_the_undivided_plan(world: int) -> None:
    """Without a number of shards there is one for each process: the same scenes, as long as there are enough."""
    plan = StepPlan(3, LENGTHS, views_max=8, images_per_step=32)
    for step in range(20):
        whole = plan.micro_batches(step)[0]
        parts = [plan.micro_batches(step, rank, world)[0] for rank in range(world)]
        together = [scene for part in parts for scene in part.scenes]
        assert sorted(together, key=repr) == sorted(whole.scenes, key=repr)
        assert {part.size for part in parts} == {whole.size}


def test_a_batch_is_what_lies_on_disk(worlds: Worlds) -> None:
    plan = small_plan(worlds, accumulate=2)
    data = TrainingData(worlds, worlds.names, plan, Augmentation())
    assert data.per_step == 2
    for step in range(4):
        for place, micro in enumerate(plan.micro_batches(step)):
            batch = data[2 * step + place]
            check_batch(batch)
            assert batch["images"].shape[-2:] == micro.size
            for key, value in batch.items():
                if isinstance(value, torch.Tensor):
                    assert value.dtype == (torch.bool if key == "point_masks" else torch.float32), key
            for index, draw in enumerate(micro.scenes):
                name = worlds.names[draw.sequence]
                plain = worlds.read(name, [worlds.frames(name)[frame] for frame in draw.frames])
                expected = augment(plain, micro.size, Augmentation(), np.random.default_rng(draw.seed))
                assert batch["seq_name"][index] == name and batch["frames"][index] == plain.frames
                for key in ("images", "depths", "point_masks"):
                    assert torch.equal(batch[key][index], getattr(expected, key)), key
                assert torch.equal(batch["intrinsics"][index], expected.intrinsics.float())
                assert plain.extrinsics is not None
                torch.testing.assert_close(
                    batch["extrinsics"][index], relative_to_first(plain.extrinsics).float(), atol=1e-6, rtol=0
                )


def test_the_loss_takes_a_batch(worlds: Worlds) -> None:
    batch = TrainingData(worlds, worlds.names, small_plan(worlds), Augmentation())[0]
    losses = VggtLoss()(tiny_model()(pixel_values=batch["images"]), batch)
    assert losses.nonfinite is None and bool(losses.total.isfinite()) and float(losses.total.detach()) > 0


def test_poses_far_from_the_origin_keep_their_digits() -> None:
    """100 km away (map coordinates), float32 would round a translation to centimetres."""
    sample = make_sample()
    assert sample.extrinsics is not None
    moved = sample.extrinsics.clone()
    moved[..., 3] -= moved[..., :3] @ torch.tensor([1e5, 2e5, 0.0], dtype=torch.float64)
    batch = collate([replace(sample, extrinsics=moved)])
    expected = relative_to_first(sample.extrinsics).float()
    torch.testing.assert_close(batch["extrinsics"][0], expected, atol=1e-6, rtol=0)


def equal(a: list[tuple[int, list[dict]]], b: list[tuple[int, list[dict]]]) -> bool:
    if [step for step, _ in a] != [step for step, _ in b]:
        return False
    pairs = [(x, y) for (_, one), (_, two) in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)]
    return all(
        torch.equal(x[key], y[key]) if isinstance(x[key], torch.Tensor) else x[key] == y[key]
        for x, y in pairs
        for key in (*x, *y)
    )


def test_any_number_of_workers_from_any_step(worlds: Worlds) -> None:
    data = TrainingData(worlds, worlds.names, small_plan(worlds, accumulate=2), Augmentation())
    state = torch.get_rng_state()
    whole = list(read_steps(data, 0, 6))
    assert [step for step, _ in whole] == list(range(6)) and all(len(batches) == 2 for _, batches in whole)
    assert equal(list(read_steps(data, 0, 6, workers=2)), whole)
    assert equal(list(read_steps(data, 4, 6, workers=1)), whole[4:])
    with pytest.MonkeyPatch.context() as patch:  # a container's /dev/shm: batches take the pipe
        patch.setattr("training.batches.free_shared_memory", lambda: 1000)
        assert equal(list(read_steps(data, 0, 6, workers=2)), whole)
    assert equal(list(read_steps(data, 3, 3)), [])
    assert torch.equal(torch.get_rng_state(), state)
    other = TrainingData(worlds, worlds.names, small_plan(worlds, accumulate=2, seed=6), Augmentation())
    assert not equal(list(read_steps(other, 0, 6)), whole)


def test_any_number_of_threads(worlds: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of pictures of this size, of noise, differ in their last digit between one thread and several."""
    noise = torch.rand(5, 3, 518, 518, generator=torch.Generator().manual_seed(0))

    def noisy(name: str, frames: list[str]) -> Sample:
        return replace(resize(make_sample(len(frames)), (518, 518)), images=noise[: len(frames)])

    monkeypatch.setattr(worlds, "_read", noisy)
    plan = small_plan(worlds, views_max=2, images_per_step=2, image_size=518, aspect_min=0.9)
    data = TrainingData(worlds, worlds.names, plan, Augmentation(same_colors=0.0, jitter=1.0, gray=0.0))
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(list(read_steps(data, 0, 2)))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_only_the_names_and_frames_that_were_chosen(tmp_path: Path) -> None:
    dataset = Worlds(tmp_path, {"c": ["04", "1", "02"], "a": []})
    plan = small_plan(dataset, views_min=2, views_max=3)
    assert plan.lengths == (3, 3)
    seen: dict[str, set[str]] = {"a": set(), "c": set()}
    data = TrainingData(dataset, dataset.names, plan, Augmentation.none())
    for number in range(12):
        batch = data[number]
        for name, frames in zip(batch["seq_name"], batch["frames"], strict=True):
            seen[name] |= set(frames)
    assert seen == {"a": {"00", "01", "02"}, "c": {"01", "02", "04"}}
    part = plan_for(dataset, ["a"], seed=0, views_min=2, views_max=3, images_per_step=4, image_size=42)
    assert set(TrainingData(dataset, ["a"], part, Augmentation())[0]["seq_name"]) == {"a"}
    with pytest.raises(ValueError, match="the plan is for 1 sequences, 2 were given"):
        TrainingData(dataset, ["a", "c"], part, Augmentation())


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_the_readers_sentence(worlds: Worlds, workers: int) -> None:
    for name in "abc":
        (worlds.root / f"{name}.broken").touch()
    data = TrainingData(worlds, worlds.names, small_plan(worlds), Augmentation())
    with pytest.raises(ValueError, match=r"^[abc]: frame 0\d is no readable picture: fetch it again\.$"):
        list(read_steps(data, 0, 1, workers=workers))


def test_a_sequence_that_became_shorter(worlds: Worlds) -> None:
    plan = replace(small_plan(worlds), lengths=(50, 50, 50))
    data = TrainingData(worlds, worlds.names, plan, Augmentation())
    with pytest.raises(ValueError, match=r"has \d frames, 50 when the training began"):
        list(read_steps(data, 0, 5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lengths": (2, 3)}, "none of the 2 sequences has the 4 views of views_min; the longest has 3"),
        ({"lengths": ()}, "none of the 0 sequences"),
        ({"views_min": 9, "views_max": 8}, "views_min is 9 and views_max 8"),
        ({"aspect_min": 0.0}, "aspect_min is 0.0"),
        ({"image_size": 20}, "image_size is 20, no multiple of a patch of 14"),
        ({"accumulate": 0}, "accumulate is 0: give 1 or more"),
        ({"window": 0.5}, "window is 0.5 times the views"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_plans_that_cannot_be(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StepPlan(**({"seed": 0, "lengths": LENGTHS} | changes))


def test_processes_that_do_not_fit_a_plan() -> None:
    plan = StepPlan(0, LENGTHS, shards=4)
    with pytest.raises(ValueError, match="a plan of 4 shards cannot be shared by 3 processes"):
        plan.micro_batches(0, 0, 3)
    with pytest.raises(ValueError, match="process 2 of 2: they are counted from 0 to 1"):
        plan.micro_batches(0, 2, 2)
