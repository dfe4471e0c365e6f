"""training/guard.py, ema.py and panels.py: rates, clipping, steps that are left out, running means, pictures."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from peft_attrsub.vggt import VggtOutput

VGGT = Path(__file__).parents[2] / "examples" / "vggt"


@pytest.fixture(scope="module")
def training() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(VGGT))
    names = ("guard", "ema", "panels")
    yield SimpleNamespace(**{name: importlib.import_module(f"training.{name}") for name in names})
    sys.path.remove(str(VGGT))


@pytest.fixture(scope="module")
def guard(training: SimpleNamespace) -> ModuleType:
    module: ModuleType = training.guard
    return module


def test_learning_rate_by_hand(guard: ModuleType) -> None:
    def rate(step: int) -> float:
        value: float = guard.learning_rate(step, 100, 1e-5, start=1e-8, final=1e-7, warmup_share=0.1)
        return value

    assert rate(0) == 1e-8
    assert rate(5) == pytest.approx((1e-5 + 1e-8) / 2)
    assert rate(10) == pytest.approx(1e-5)
    assert rate(55) == pytest.approx((1e-5 + 1e-7) / 2)
    assert rate(40) == pytest.approx(1e-7 + (1e-5 - 1e-7) * (1 + math.cos(math.pi / 3)) / 2)
    assert rate(100) == rate(1000) == pytest.approx(1e-7)
    assert guard.learning_rate(0, 10, 1.0, warmup_share=0.0) == 1.0
    with pytest.raises(ValueError, match="0 steps, of which warm up 1"):
        guard.learning_rate(0, 0, 1.0, warmup_share=1.0)


def test_learning_rate_is_pytorchs(guard: ModuleType) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1e-8 / 1e-3, 1.0, total_iters=4),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=76, eta_min=1e-8),
    ]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[4])
    for step in range(80):
        rate = guard.learning_rate(step, 80, 1e-3)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5), step
        optimizer.step()
        schedule.step()


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        made.append(nn.Parameter(torch.zeros(2)))
        made[-1].grad = None if gradient is None else torch.tensor(gradient)
    return made


@pytest.mark.parametrize("by_group", [True, False])
def test_clipping(guard: ModuleType, by_group: bool) -> None:
    groups = {
        "aggregator": parameters([3.0, 0.0], None, [0.0, 4.0]),  # norm 5
        "camera": parameters([0.0, 0.5]),
        "depth": parameters(None),
    }
    norms = guard.clip_gradients(groups, 1.0, by_group=by_group)
    total = math.sqrt(25 + 0.25)
    assert norms == pytest.approx({"aggregator": 5.0, "camera": 0.5, "depth": 0.0, "total": total})
    large, small = (0.2, 1.0) if by_group else (1 / total, 1 / total)
    assert groups["aggregator"][0].grad.tolist() == pytest.approx([3 * large, 0], rel=1e-5)
    assert groups["aggregator"][2].grad.tolist() == pytest.approx([0, 4 * large], rel=1e-5)
    assert groups["camera"][0].grad.tolist() == pytest.approx([0, 0.5 * small], rel=1e-5)


def test_clipping_of_all_is_pytorchs(guard: ModuleType) -> None:
    torch.manual_seed(0)
    mine, theirs = nn.Linear(5, 5), nn.Linear(5, 5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norms = guard.clip_gradients({"w": [mine.weight], "b": [mine.bias]}, 0.5, by_group=False)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    assert norms["total"] == pytest.approx(float(expected))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_small_gradients_are_left_alone_and_no_clipping_only_measures(guard: ModuleType) -> None:
    for limit, gradient in ((1.0, [0.3, 0.4]), (0, [30.0, 40.0]), (None, [30.0, 40.0])):
        (one,) = parameters(gradient)
        assert guard.clip_gradients({"a": [one]}, limit)["a"] == pytest.approx(math.hypot(*gradient))
        assert torch.equal(one.grad, torch.tensor(gradient))
    assert guard.clip_gradients({}, 1.0) == {"total": 0.0}
    with pytest.raises(ValueError, match="clipped at -1"):
        guard.clip_gradients({}, -1.0)
    with pytest.raises(ValueError, match="called 'total'"):
        guard.clip_gradients({"total": []}, 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_spoils_no_other(guard: ModuleType, value: float) -> None:
    groups = {"aggregator": parameters([3.0, 4.0]), "depth": parameters([value, 0.0])}
    norms = guard.clip_gradients(groups, 1.0)
    assert guard.nonfinite_norm(norms) == "gradient of depth"
    assert groups["aggregator"][0].grad.tolist() == [3.0, 4.0]
    assert guard.nonfinite_norm({"aggregator": 1.0}) is None


def test_ten_in_a_row_end_the_run(guard: ModuleType, tmp_path: Path) -> None:
    watch = guard.NanGuard(tmp_path)
    batch = {"images": torch.rand(1, 2, 3, 4, 4), "point_masks": torch.ones(1, 2, 4, 4) > 0, "names": ["a, b"]}
    batch["depths"] = batch["images"][:, :, 0].transpose(2, 3)
    assert not watch.skips(0, None, batch)
    for step in range(1, 10):
        assert watch.skips(step, "camera_T", batch)
    assert not watch.skips(10, None, batch)
    assert (watch.skipped, watch.in_a_row) == (9, 0)
    for step in range(11, 20):
        assert watch.skips(step, "depth_grad", batch)
    assert list(tmp_path.iterdir()) == []
    # A run that is continued here goes on counting.
    other = guard.NanGuard(tmp_path)
    other.load_state_dict(watch.state_dict())
    words = r"10 steps in a row up to step 20 .* because depth_grad .* depth_grad 10 times, camera_T 9 times"
    with pytest.raises(guard.DivergedError, match=words) as error:
        other.skips(20, "depth_grad", batch)
    (path,) = tmp_path.iterdir()
    assert str(path) in str(error.value)
    found = guard.load_batch(path)
    assert found["names"] == ["a, b"]
    assert all(torch.equal(found[key], batch[key]) for key in ("images", "point_masks", "depths"))


def test_a_guard_without_a_batch(guard: ModuleType, tmp_path: Path) -> None:
    watch = guard.NanGuard(tmp_path, limit=1)
    with pytest.raises(guard.DivergedError, match="1 steps in a row"):
        watch.skips(0, "gradient of depth")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected 1 or more"):
        guard.NanGuard(tmp_path, limit=0)


def agreeing(rank: int, folder: str) -> None:
    sys.path.insert(0, str(VGGT))
    guard = importlib.import_module("training.guard")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = [guard.agree(term) for term in (None, "camera_T" if rank else None, ("depth_reg", "depth_grad")[rank])]
    (Path(folder) / f"{rank}").write_text(repr(found))
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that are still running may abort Python's teardown


def test_processes_agree(guard: ModuleType, tmp_path: Path) -> None:
    assert guard.agree("depth_reg") == "depth_reg"
    torch.multiprocessing.start_processes(agreeing, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        assert (tmp_path / f"{rank}").read_text() == "[None, 'camera_T', 'depth_reg']"


def test_running_mean(training: SimpleNamespace) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    mean, expected = training.ema.Ema(model, 0.5), model.weight.detach().clone()
    for n in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        mean.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    with mean.applied(model):
        torch.testing.assert_close(model.weight.detach(), expected)
        assert torch.equal(model.bias, bias)
    assert torch.equal(model.weight, weight)

    def fail() -> None:
        with mean.applied(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(model.weight, weight)


def test_running_mean_goes_on_from_a_checkpoint(training: SimpleNamespace) -> None:
    model = nn.Linear(3, 2).bfloat16()
    one, other = training.ema.Ema(model), training.ema.Ema(nn.Linear(3, 2))
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1.0)
        one.update(model)
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    for mean in (one, other):
        mean.update(model)
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1]) == ["updates", "shadow.weight", "shadow.bias"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["shadow.weight"].dtype == torch.float32
    for state, odd in (
        ({"shadow.weight": torch.zeros(2, 3)}, "bias"),
        (training.ema.Ema(nn.Linear(2, 2)).state_dict(), "weight"),
    ):
        with pytest.raises(ValueError, match=f"other weights than are trained here: see '{odd}'"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"the running mean is 1\.0"):
        training.ema.Ema(model, 1.0)


def scenes() -> tuple[dict[str, object], VggtOutput]:
    """Two scenes of two views, at depth 2 and 8 seen by a long lens: z is 1 in their own units."""
    k = torch.tensor([[1e4, 0, 6.5], [0, 1e4, 6.5], [0, 0, 1]])
    depths = torch.tensor([2.0, 8.0])[:, None, None, None].expand(2, 2, 14, 14).clone()
    depths[1, :, :, :7] = float("nan")
    batch = {
        "images": torch.rand(2, 2, 3, 14, 14),
        "depths": depths,
        "point_masks": depths > 0,
        "extrinsics": torch.eye(4)[:3].expand(2, 2, 3, 4).clone(),
        "intrinsics": k.expand(2, 2, 3, 3).clone(),
        "names": ["a", "b"],
    }
    predicted = torch.tensor([0.8, 1.25])[:, None, None, None, None].expand(2, 2, 14, 14, 1)
    return batch, VggtOutput(depth=predicted.clone().requires_grad_())


def test_panel(training: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    batch, output = scenes()
    titles = []
    draw = training.panels.error_figure

    def spy(images: np.ndarray, d: np.ndarray, z: np.ndarray, mask: np.ndarray, *args: object, **how: object) -> Path:
        titles.append(how["title"])
        np.testing.assert_allclose(z[mask], 1.0, rtol=1e-4)
        path: Path = draw(images, d, z, mask, *args, **how)
        return path

    monkeypatch.setattr(training.panels, "error_figure", spy)
    for scene in (0, 1):
        path = training.panels.draw_panel(batch, output, tmp_path / f"{scene}.png", scene=scene, title=f"step {scene}")
        with image.open(path) as picture:
            assert picture.size[0] > 4 * 320
    assert titles == ["step 0  AbsRel 20.0 %, scale x 1.25", "step 1  AbsRel 25.0 %, scale x 0.8"]
    with pytest.raises(ValueError, match="scene 2 was asked for, and the batch has 2"):
        training.panels.draw_panel(batch, output, tmp_path / "2.png", scene=2)
    with pytest.raises(ValueError, match="no depth to draw"):
        training.panels.draw_panel(batch, VggtOutput(), tmp_path / "3.png")
