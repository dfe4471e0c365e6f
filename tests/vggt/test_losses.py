"""The whole loss against plain numpy with loops, its camera terms, non-finite values, autocast, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_attrsub.vggt import VggtOutput
from peft_attrsub.vggt.batch import normalise_scene
from peft_attrsub.vggt.losses import VggtLoss, camera_loss, find_nonfinite

from . import loss_reference as reference
from .loss_inputs import (
    NAMES,
    arrays,
    assert_finite_gradients,
    assert_is_reference,
    leaves,
    make_batch,
    make_output,
)
from .small import images, tiny

# All terms against loops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize(
    ("shape", "points"), [((2, 3, 12, 14), True), ((1, 2, 25, 31), True), ((3, 1, 17, 13), False)]
)
def test_every_term_is_that_of_the_loops(shape: tuple[int, ...], points: bool, share: float) -> None:
    batch = make_batch(*shape, share=share)
    output = make_output(batch, points=points)
    found = VggtLoss()(output, batch)
    assert_is_reference(found, output, batch)
    assert_finite_gradients(found.total, *leaves(output))


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 11), st.integers(1, 11), st.floats(0, 1), st.integers(0, 99)
)
def test_every_term_is_that_of_the_loops_at_random(
    scenes: int, views: int, height: int, width: int, share: float, seed: int
) -> None:
    """Images of one pixel or one row too, at which most scales have no pair of neighbours."""
    batch = make_batch(scenes, views, height, width, share, seed)
    output = make_output(batch, seed)
    found = VggtLoss()(output, batch)
    assert_is_reference(found, output, batch)
    assert_finite_gradients(found.total, *leaves(output))


def test_float32_gives_the_float64_result() -> None:
    batch, terms = make_batch(), []
    for dtype in (torch.float32, torch.float64):
        output = make_output(batch)
        for key, value in output.items():
            output[key] = tuple(x.to(dtype) for x in value) if isinstance(value, tuple) else value.to(dtype)
        cast = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        found = VggtLoss()(output, cast)
        assert found.total.dtype == dtype
        terms.append(torch.stack([x.double() for x in found.terms.values()]))
    assert torch.allclose(*terms, rtol=1e-5)


def test_the_names_and_the_total() -> None:
    batch = make_batch()
    output = make_output(batch)
    found = VggtLoss(camera_weight=2.0, depth_weight=3.0, point_weight=0.5)(output, batch)
    assert list(found.terms) == NAMES
    t = {name: term.item() for name, term in found.terms.items()}
    expected = 2 * (t["camera_T"] + t["camera_R"] + 0.5 * t["camera_FoV"])
    expected += 3 * (t["depth_conf"] + t["depth_reg"] + t["depth_grad"])
    expected += 0.5 * (t["point_conf"] + t["point_reg"] + t["point_grad"])
    assert found.total.item() == pytest.approx(expected)
    assert found.nonfinite is None


def test_a_weight_of_zero_and_a_missing_head_leave_a_part_out() -> None:
    batch = make_batch()
    output = make_output(batch)
    assert list(VggtLoss(camera_weight=0, point_weight=0)(output, batch).terms) == NAMES[3:6]
    assert list(VggtLoss(depth_weight=0, point_gradient=None)(output, batch).terms) == [*NAMES[:3], *NAMES[6:8]]
    only = VggtOutput(pose_enc_list=output.pose_enc_list)
    assert list(VggtLoss()(only, batch).terms) == NAMES[:3]
    with pytest.raises(ValueError, match="nothing that the loss weighs"):
        VggtLoss(camera_weight=0)(only, batch)


def test_a_perfect_prediction() -> None:
    """Then errors are 0, and confidence alone is left: -0.2 mean log c."""
    batch = make_batch()
    output = make_output(batch, noise=0.0)
    terms = {name: term.item() for name, term in VggtLoss(quantile=None)(output, batch).terms.items()}
    for name, confidence in (("depth_conf", output.depth_conf), ("point_conf", output.world_points_conf)):
        assert terms.pop(name) == pytest.approx(-0.2 * confidence[batch["point_masks"]].log().mean().item())
    assert max(map(abs, terms.values())) < 1e-12


def test_gradients_are_the_numerical_ones() -> None:
    batch = make_batch(1, 1, 11, 12, share=0.9)
    output = make_output(batch)

    def loss(*inputs: Tensor) -> Tensor:
        made = VggtOutput(pose_enc_list=inputs[:4], depth=inputs[4], depth_conf=inputs[5])
        made.world_points, made.world_points_conf = inputs[6:]
        return VggtLoss()(made, batch).total

    found = VggtLoss()(output, batch)
    assert all(found.terms.values()), "a term of zero would test nothing"
    assert torch.autograd.gradcheck(loss, leaves(output), fast_mode=True)


# Cameras ------------------------------------------------------------------------------------------------------------


def test_the_weights_of_the_iterations() -> None:
    target = torch.zeros(1, 2, 9)
    found = camera_loss([torch.ones(1, 2, 9)] * 4, target, torch.tensor([True]))
    assert [round(x.item(), 6) for x in found.values()] == [0.544] * 3
    for k, weight in enumerate((0.216, 0.36, 0.6, 1.0)):
        encodings = [torch.full((1, 2, 9), float(i == k)) for i in range(4)]
        assert camera_loss(encodings, target, torch.tensor([True]))["T"].item() == pytest.approx(weight / 4)


def test_each_camera_term_reads_its_elements() -> None:
    for i, name in enumerate(["T"] * 3 + ["R"] * 4 + ["FoV"] * 2):
        moved = torch.zeros(1, 1, 9)
        moved[..., i] = 0.5
        found = camera_loss([moved], torch.zeros(1, 1, 9), torch.tensor([True]))
        size = {"T": 3, "R": 4, "FoV": 2}[name]
        assert {k: v.item() for k, v in found.items() if v} == {name: pytest.approx(0.5 / size)}


def test_translations_are_cut_at_a_hundred_elementwise() -> None:
    far = torch.tensor([[[250.0, 50, 0, 250, 0, 0, 0, 250, 0]]], requires_grad=True)
    found = camera_loss([far], torch.zeros(1, 1, 9), torch.tensor([True]))
    assert [found[k].item() for k in ("T", "R", "FoV")] == pytest.approx([150 / 3, 250 / 4, 250 / 2])
    (gradient,) = torch.autograd.grad(found["T"], far)
    assert gradient[0, 0, :2].tolist() == [0.0, pytest.approx(1 / 3)]


@pytest.mark.parametrize(("pixels", "counts"), [(0, False), (100, False), (101, True)])
def test_a_scene_counts_with_more_than_a_hundred_pixels_in_its_first_view(pixels: int, counts: bool) -> None:
    batch = make_batch(2, 2, share=1.0)
    batch["point_masks"][1, 0] = torch.arange(12 * 14).reshape(12, 14) < pixels
    output = make_output(batch)
    found = VggtLoss(depth_weight=0, point_weight=0)(output, batch)
    expected = reference.camera_terms(
        [x.detach().numpy() for x in output.pose_enc_list], reference.normalised(arrays(batch))
    )
    assert {name: term.item() for name, term in found.terms.items()} == pytest.approx(expected)
    first = {key: value[:1] for key, value in batch.items() if isinstance(value, Tensor)}
    only_first = VggtOutput(pose_enc_list=tuple(x[:1] for x in output.pose_enc_list))
    alone = VggtLoss()(only_first, first)
    assert (found.total.item() == pytest.approx(alone.total.item(), rel=1e-12)) == (not counts)
    gradients = torch.autograd.grad(found.total, output.pose_enc_list)
    assert all(bool(g[1].any()) == counts and g[0].any() for g in gradients)


def test_cameras_of_a_dropped_scene_may_be_nan() -> None:
    batch = make_batch(2, 2)
    batch["point_masks"][1] = False
    batch["extrinsics"][1] = math.nan
    batch["intrinsics"][1] = 0
    output = make_output(make_batch(2, 2))
    found = VggtLoss()(output, batch)
    assert found.total.isfinite()
    assert_finite_gradients(found.total, *leaves(output))


def test_no_scene_at_all_gives_zero_connected_to_the_predictions() -> None:
    batch = make_batch(share=0.0)
    output = make_output(batch)
    found = VggtLoss()(output, batch)
    assert {name: term.item() for name, term in found.terms.items()} == dict.fromkeys(NAMES, 0.0)
    for gradient in torch.autograd.grad(found.total, leaves(output)):
        assert not gradient.any() and gradient.isfinite().all()


# Non-finite values --------------------------------------------------------------------------------------------------


def test_find_nonfinite_names_the_first() -> None:
    fine, bad = torch.tensor(1.0), torch.tensor(math.inf)
    assert find_nonfinite({}) is None
    assert find_nonfinite({"a": fine}) is None
    assert find_nonfinite({"a": fine, "b": bad, "c": bad * 0}) == "b"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("pose_enc_list", "camera_T"),
        ("depth", "depth_conf"),
        ("depth_conf", "depth_conf"),
        ("world_points", "point_conf"),
        ("world_points_conf", "point_conf"),
    ],
)
def test_a_nonfinite_prediction_is_named_and_not_hidden(key: str, name: str, value: float) -> None:
    """Neither the bounds at 100 nor the trimming of large errors may make it look fine."""
    batch = make_batch(2, 3, 25, 25, share=1.0)
    output = make_output(batch)
    with torch.no_grad():
        (output[key][-1] if key == "pose_enc_list" else output[key])[0, 1, ..., 0] = value
    with pytest.raises(ValueError, match=f"the term '{name}' of the loss is"):
        VggtLoss()(output, batch)
    skipped = VggtLoss(nonfinite="skip")(output, batch)
    assert skipped.nonfinite == name and skipped.total.item() == 0
    for gradient in torch.autograd.grad(skipped.total, leaves(output)):
        assert not gradient.any() and gradient.isfinite().all()
    kept = VggtLoss(nonfinite="keep")(output, batch)
    assert kept.nonfinite is None and not kept.total.isfinite()


@pytest.mark.parametrize(("key", "name"), [("depths", "depth_conf"), ("world_points", "camera_T")])
def test_nan_at_a_valid_pixel_of_the_truth_is_named(key: str, name: str) -> None:
    """NaN in the points reaches the scale of the scene, and with it everything."""
    batch = make_batch(share=1.0)
    output = make_output(batch)
    batch[key][0, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match=f"'{name}'"):
        VggtLoss()(output, batch)


# Autocast, synchronisation, the model -------------------------------------------------------------------------------


def test_autocast_and_bfloat16_predictions_are_computed_in_float32() -> None:
    batch = {
        k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in make_batch().items()
    }
    output = make_output(batch)
    expected = VggtLoss()(output, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = VggtLoss()(output, batch)
    assert found.total.dtype == torch.float32
    assert torch.equal(torch.stack([*found.terms.values()]), torch.stack([*expected.terms.values()]))
    rounded = VggtOutput(depth=output.depth.bfloat16(), depth_conf=output.depth_conf.bfloat16())
    exact = VggtOutput(depth=rounded.depth.float(), depth_conf=rounded.depth_conf.float())
    assert torch.equal(VggtLoss()(rounded, batch).total, VggtLoss()(exact, batch).total)


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values: whatever would read one (item, boolean indexing) raises."""
    batch = make_batch()
    output = make_output(batch)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        made = VggtOutput(pose_enc_list=tuple(mode.from_tensor(x) for x in output.pose_enc_list))
        for key in ("depth", "depth_conf", "world_points", "world_points_conf"):
            made[key] = mode.from_tensor(output[key])
        found = VggtLoss(nonfinite="keep")(made, fake)
        torch.autograd.grad(found.total, leaves(made))
        with pytest.raises(Exception, match=r"_local_scalar_dense|[Dd]ata.?[Dd]ependent"):
            VggtLoss()(made, fake)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_is_the_same_and_nothing_waits() -> None:
    batch = make_batch()
    output = make_output(batch)
    expected = VggtLoss()(output, batch).total.item()
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch.items()}
    made = VggtOutput(pose_enc_list=tuple(x.cuda() for x in output.pose_enc_list))
    for key in ("depth", "depth_conf", "world_points", "world_points_conf"):
        made[key] = output[key].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = VggtLoss(nonfinite="keep")(made, moved).total
        total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert total.item() == pytest.approx(expected)


def test_a_step_down_the_gradient_of_a_model_lowers_its_loss() -> None:
    model, pixels = tiny().train(), images(views=2, height=28, width=42)
    batch = {
        k: v.float() if isinstance(v, Tensor) and v.dtype == torch.float64 else v
        for k, v in make_batch(1, 2, 28, 42).items()
    }
    before = VggtLoss()(model(pixels), batch)
    assert list(before.terms) == NAMES
    before.total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    assert {name.split(".")[0] for name in gradients} == {"aggregator", "camera_head", "depth_head", "point_head"}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter -= 1e-3 / norm * gradients[name]
    assert VggtLoss()(model(pixels), batch).total < before.total


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depths": None}, "the batch has no 'depths'"),
        ({"extrinsics": None}, "the batch has no 'extrinsics'"),
        ({"depths": torch.ones(3, 12, 14)}, "one scene is a batch of 1"),
        ({"extrinsics": torch.ones(2, 3, 4, 4)}, r"extrinsics has shape \(2, 3, 4, 4\), expected \(2, 3, 3, 4\)"),
        ({"intrinsics": torch.ones(2, 2, 3, 3)}, r"intrinsics has shape .* expected \(2, 3, 3, 3\)"),
        ({"images": torch.ones(2, 3, 3, 14, 12)}, r"images has shape .* expected \(2, 3, 3, 12, 14\)"),
        ({"world_points": torch.ones(2, 3, 12, 14)}, "world_points has shape"),
        ({"point_masks": torch.ones(2, 3, 12, 14)}, "point_masks is torch.float32, expected torch.bool"),
    ],
)
def test_a_wrong_batch_is_refused_by_its_key(changes: dict[str, Tensor | None], said: str) -> None:
    batch = make_batch()
    output = make_output(batch)
    changed = {key: value for key, value in {**batch, **changes}.items() if value is not None}
    for call in (lambda: VggtLoss()(output, changed), lambda: normalise_scene(changed)):
        with pytest.raises(ValueError, match=said):
            call()


def test_an_output_of_another_size_is_refused() -> None:
    output = make_output(make_batch(height=14))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 14, 14, 1\), which does not fit depths of shape"):
        VggtLoss()(output, make_batch())
    with pytest.raises(ValueError, match=r"shape \(2, 2, 9\), which does not fit"):
        VggtLoss()(make_output(make_batch(views=2)), make_batch())


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore', expected 'raise', 'skip' or 'keep'"),
        ({"depth_gradient": "normal"}, "depth_gradient is 'normal'"),
        ({"point_gradient": "sobel"}, "point_gradient 'sobel'"),
        ({"quantile": 98}, "quantile is 98, expected"),
    ],
)
def test_a_wrong_setting_is_refused(settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VggtLoss(**settings_)
