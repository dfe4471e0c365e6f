"""examples/vggt/training/loop.py: the gradient of a step, limits, NaN, and two processes that are as good as one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from peft_attrsub.vggt import VggtLoss
from tests.examples.training_tools import on_path, random_batch, tiny_model

on_path()
from training.guard import DivergedError, NanGuard  # noqa: E402
from training.loop import Loop, count_images  # noqa: E402

ROOT = Path(__file__).parents[2]


def groups_of(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    return {
        name: list(getattr(model, f"{name}_head" if name != "aggregator" else name).parameters())
        for name in ("aggregator", "camera", "depth")
    }


def make_loop(model: torch.nn.Module, rate: float = 0.0, **more: object) -> Loop:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = VggtLoss(nonfinite="skip")
    return Loop(accelerator, model, optimizer, loss, groups_of(model), lambda step: rate, **more)  # type: ignore[arg-type]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def weighted_gradient(batches: list[dict]) -> dict[str, torch.Tensor]:
    """The slow way: the gradient of each micro-batch alone, weighted by its share of the images."""
    total = sum(count_images(batch) for batch in batches)
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        model = tiny_model()
        VggtLoss()(model(pixel_values=batch["images"]), batch).total.backward()
        for name, gradient in gradients(model).items():
            sums[name] = sums.get(name, torch.zeros(())) + gradient * count_images(batch) / total
    return sums


def step_change(loop: Loop, model: torch.nn.Module, batches: list[dict]) -> dict[str, torch.Tensor]:
    """What plain gradient descent of rate 1 subtracts in one step: the gradient, after its limits."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loop.step(0, batches)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


def test_the_gradient_of_a_step_is_the_mean_over_its_images() -> None:
    batches = [random_batch(0, 1, 2), random_batch(1, 2, 3, (42, 28)), random_batch(2, 1, 4)]
    model = tiny_model()
    change = step_change(make_loop(model, rate=1.0), model, batches)
    expected = weighted_gradient(batches)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(change[name], gradient, rtol=1e-4, atol=1e-5)


def test_terms_are_means_over_the_images_too() -> None:
    batches = [random_batch(0, 1, 2), random_batch(1, 2, 3)]
    model = tiny_model()
    alone = [float(VggtLoss()(model(pixel_values=b["images"]), b).total.detach()) for b in batches]
    result = make_loop(model).step(0, batches)
    assert result.images == 8 and result.skipped is None
    assert result.terms["loss"] == pytest.approx((2 * alone[0] + 6 * alone[1]) / 8, rel=1e-5)
    assert {"camera_T", "camera_R", "camera_FoV", "depth_conf", "depth_reg", "depth_grad"} <= set(result.terms)


@pytest.mark.parametrize("by_group", [False, True])
def test_gradients_are_limited_by_group_or_together(by_group: bool) -> None:
    batches = [random_batch(0)]
    free = weighted_gradient(batches)
    model = tiny_model()
    loop = make_loop(model, rate=1.0, clip=0.01, clip_groups=by_group)
    change = step_change(loop, model, batches)
    part = {name: name.split(".")[0].removesuffix("_head") for name in free}
    norms = {
        g: math.sqrt(sum(float(free[n].square().sum()) for n in free if part[n] == g)) for g in set(part.values())
    }
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    assert min(norms.values()) > 0.01
    for name, gradient in free.items():
        limited = gradient * 0.01 / (norms[part[name]] if by_group else whole)
        torch.testing.assert_close(change[name], limited, rtol=1e-3, atol=1e-6)


def test_a_step_with_nan_changes_nothing_and_names_the_term() -> None:
    batches = [random_batch(0), random_batch(1)]
    batches[1]["images"][0, 0, 0, 0, 0] = float("nan")
    model = tiny_model()
    loop = make_loop(model, rate=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = loop.step(3, batches)
    assert result.skipped is not None and result.skipped.startswith(("camera", "depth"))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
        assert parameter.grad is None
    assert loop.bad_batch is not None and loop.bad_batch["seq_name"] == ["random-1-0"]
    assert loop.step(4, [random_batch(2)]).skipped is None


def test_what_is_drawn_in_a_step_follows_from_its_number() -> None:
    loop = make_loop(tiny_model(), seed=5)
    drawn = []
    for number in (1, 2, 1):
        loop.seed_all(number)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[2] != drawn[1]


def test_fp16_is_scaled_and_its_gradients_are_those_of_float32() -> None:
    batches = [random_batch(0, 1, 2), random_batch(1, 2, 3)]
    expected = weighted_gradient(batches)
    model = tiny_model()
    loop = make_loop(model, rate=1.0, dtype=torch.float16)
    change = step_change(loop, model, batches)
    assert loop.scaler is not None and loop.scaler.is_enabled()
    for name, gradient in expected.items():
        # fp16 has ten bits; without the scaler small gradients would be 0.
        assert (change[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-4, name
    assert make_loop(tiny_model(), dtype=torch.bfloat16).scaler is None and make_loop(tiny_model()).scaler is None


def test_limits_hold_for_the_gradient_and_not_for_the_scaled_one() -> None:
    batches, model = [random_batch(0)], tiny_model()
    loop = make_loop(model, rate=1.0, dtype=torch.float16, clip=0.01)
    norms = loop.step(0, batches).norms
    exact = make_loop(tiny_model()).step(0, batches).norms
    assert norms["total"] == pytest.approx(exact["total"], rel=0.02) and norms["total"] > 0.01
    model = tiny_model()
    change = step_change(make_loop(model, rate=1.0, dtype=torch.float16, clip=0.01), model, batches)
    assert math.sqrt(sum(float(d.square().sum()) for d in change.values())) == pytest.approx(0.01, rel=1e-3)


def test_an_overflow_halves_the_scale_and_is_not_the_guards_business(tmp_path: Path) -> None:
    """From a scale at which every gradient overflows down to one that fits: steps left out, none of them counted."""
    model, guard = tiny_model(), NanGuard(tmp_path, limit=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    loop = make_loop(model, rate=1e-3, dtype=torch.float16, scaler=scaler, guard=guard)
    acted: list[int] = []
    loop.after.append(acted.append)
    results, before = [], {name: p.detach().clone() for name, p in model.named_parameters()}
    while not results or results[-1].overflow:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        results.append(loop.step(len(results), [random_batch(0)]))
    assert len(results) > 5 and all(str(one.skipped).startswith("gradient of") for one in results[:-1])
    assert [one.loss_scale for one in results] == [2.0 ** (40 - n) for n in range(len(results))]
    assert results[-1].skipped is None and acted == [len(results) - 1]
    assert (guard.skipped, guard.in_a_row, guard.overflows) == (0, 0, len(results) - 1)
    again = NanGuard(tmp_path)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()
    again.load_state_dict({key: value for key, value in guard.state_dict().items() if key != "overflows"})


def test_a_gradient_that_no_scale_can_save_ends_the_run(tmp_path: Path) -> None:
    model, guard = tiny_model(), NanGuard(tmp_path, limit=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop = make_loop(model, dtype=torch.float16, scaler=scaler, guard=guard)
    for parameter in model.camera_head.parameters():
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    overflows = [loop.step(number, [random_batch(0)]).overflow for number in range(3)]
    assert overflows == [True, True, False] and guard.in_a_row == 1
    with pytest.raises(DivergedError, match=r"2 steps in a row up to step 3 .* because gradient of camera"):
        loop.step(3, [random_batch(0)])


def test_a_loss_that_is_not_finite_counts_with_a_scaler_too(tmp_path: Path) -> None:
    batch, guard = random_batch(0), NanGuard(tmp_path, limit=5)
    batch["images"][0, 0, 0, 0, 0] = float("nan")
    loop = make_loop(tiny_model(), dtype=torch.float16, guard=guard)
    result = loop.step(0, [batch])
    assert not result.overflow and str(result.skipped).startswith(("camera", "depth")) and guard.skipped == 1


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    # Not accelerate launch, which starts one process on a CPU whatever it is told.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        command = [*launch, "--nproc_per_node", str(processes), __file__, str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out, weights_only=True))
    assert [one.pop("processes").item() for one in found] == [1, 2]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


def main(out: str) -> None:
    """Two steps of two micro-batches: one process takes both of them, two take one each."""
    accelerator = Accelerator(cpu=True)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    groups = groups_of(model)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    loop = Loop(accelerator, prepared, optimizer, VggtLoss(nonfinite="skip"), groups, lambda step: 1e-3, clip=0.5)
    for step in range(2):
        batches = [random_batch(10 * step, 1, 2), random_batch(10 * step + 1, 2, 3)]
        loop.step(step, batches[accelerator.process_index :: accelerator.num_processes])
    if accelerator.is_main_process:
        found = {name: p.detach() for name, p in model.named_parameters()}
        torch.save(found | {"processes": torch.tensor(accelerator.num_processes)}, out)


if __name__ == "__main__":
    main(sys.argv[1])
