"""Depth and point terms: the edges of every rule, trimming, differences, normals, gradients that stay finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_attrsub.vggt import masked
from peft_attrsub.vggt.gradient_losses import difference_loss, normal_loss
from peft_attrsub.vggt.losses import dense_loss

from . import loss_reference as reference
from .loss_inputs import (
    assert_finite_gradients,
)

# Depth and points ---------------------------------------------------------------------------------------------------


def dense_inputs(
    valid: int, size: int = 60, channels: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction, confidence, target, mask of one size x size view with that many valid pixels, scattered."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, 1, size, size, *shape, generator=generator, dtype=torch.float64)

    mask = torch.zeros(size * size, dtype=torch.bool)
    mask[torch.randperm(size * size, generator=generator)[:valid]] = True
    mask = mask.reshape(1, 1, size, size)
    target = noise(channels).masked_fill(~mask[..., None], math.nan)
    return noise(channels).requires_grad_(), (1 + noise().abs()).requires_grad_(), target, mask


def check_dense(prediction: Tensor, confidence: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Hold a dense loss against the loops; its terms."""
    part, gradient = ("depth", "grad") if prediction.shape[-1] == 1 else ("point", "normal")
    found = dense_loss(prediction, confidence, target, mask, gradient)  # type: ignore[arg-type]
    numpy = [x.detach().numpy() for x in (prediction, confidence, target, mask)]
    for name, value in reference.dense_terms(part, *numpy).items():
        assert found[name.removeprefix(f"{part}_")].item() == pytest.approx(value, rel=1e-10, abs=1e-12), name
    assert_finite_gradients(sum(found.values(), torch.zeros(())), prediction, confidence)
    return found


@pytest.mark.parametrize("channels", [1, 3])
# 1021 is the last number of values of which trimming would leave no more than 1000.
@pytest.mark.parametrize("valid", [0, 1, 99, 100, 101, 999, 1000, 1001, 1021, 1022, 1500, 3600])
def test_dense_terms_at_the_edges_of_the_rules(valid: int, channels: int) -> None:
    found = check_dense(*dense_inputs(valid, channels=channels))
    assert (found["reg"].item() == 0) == (valid < 100)


def test_too_few_valid_pixels_give_zero_connected_to_the_prediction() -> None:
    prediction, confidence, target, mask = dense_inputs(99)
    total = sum(dense_loss(prediction, confidence, target, mask).values(), torch.zeros(()))
    assert total.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(total, (prediction, confidence)))


def test_trimming_leaves_out_two_percent() -> None:
    prediction, confidence, target, mask = dense_inputs(3600)
    (gradient,) = torch.autograd.grad(dense_loss(prediction, confidence, target, mask, None)["reg"], prediction)
    assert int((gradient != 0).sum()) == round(0.98 * 3599)
    (gradient,) = torch.autograd.grad(dense_loss(prediction, confidence, target, mask, None, None)["reg"], prediction)
    assert int((gradient != 0).sum()) == 3600


def test_trimming_is_dropped_where_ties_would_leave_too_little() -> None:
    prediction, confidence, target, mask = dense_inputs(3600)
    with torch.no_grad():
        prediction[:], confidence[:] = target + 2.0, 1.0
    assert check_dense(prediction, confidence, target, mask)["reg"].item() == pytest.approx(2.0)


@pytest.mark.parametrize(("share", "valid"), [(0.01, 3600), (0.5, 3600), (0.5, 500)])
def test_large_errors_are_cut_at_a_hundred(share: float, valid: int) -> None:
    """Of few large errors and of many; where they are more than 2 % of many values, all of them are left out."""
    prediction, confidence, target, mask = dense_inputs(valid)
    far = torch.rand(mask.shape) < share
    with torch.no_grad():
        prediction[far] += 1e5
    found = check_dense(prediction, confidence, target, mask)
    if valid <= 1000:
        assert 30 < found["reg"].item() < 70 and found["conf"].item() > 70
        again = dense_loss(prediction, confidence, target, mask)
        (gradient,) = torch.autograd.grad(again["reg"], prediction)
        assert not gradient[far].any() and gradient[~far].any()
    else:
        assert found["reg"].item() < 2


def test_a_quantile_of_many_values_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(200, 200, dtype=torch.float64).requires_grad_()
    mask = torch.rand(200, 200) < 0.7
    exact = masked.trimmed_mean(x, mask)
    monkeypatch.setattr(masked, "MANY", 20_000)
    monkeypatch.setattr(masked, "SAMPLE", 5_000)
    estimated = masked.trimmed_mean(x, mask)
    assert estimated.item() == pytest.approx(exact.item(), abs=0.01) and estimated.item() != exact.item()
    (gradient,) = torch.autograd.grad(estimated, x)
    assert int((gradient != 0).sum()) > 0.9 * int(mask.sum()), "the mean is over all values, not over the sample"
    # Many values, but few valid ones: exact.
    few = torch.arange(40_000).reshape(200, 200) < 15_000
    assert masked.trimmed_mean(x, few).item() == pytest.approx(reference.trimmed(x[few].tolist()))


@given(st.integers(1001, 4000), st.sampled_from([0.5, 0.9, 0.95, 0.98, 0.999, 1.0]), st.integers(0, 99))
@settings(max_examples=25)
def test_trimmed_mean_is_that_of_the_loops(n: int, quantile: float, seed: int) -> None:
    """Integers, so with many ties."""
    x = torch.randint(0, 200, (n,), generator=torch.Generator().manual_seed(seed)).double()
    found = masked.trimmed_mean(x, torch.ones(n, dtype=torch.bool), quantile)
    assert found.item() == pytest.approx(reference.trimmed(x.tolist(), quantile))


def test_a_depth_of_zero_and_an_error_of_zero_have_finite_gradients() -> None:
    for channels in (1, 3):
        prediction, confidence, target, mask = dense_inputs(3600, channels=channels)
        target = target.nan_to_num()
        target[..., :20, :] = 0
        with torch.no_grad():
            prediction[:] = target
        check_dense(prediction, confidence, target, mask)


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_outside_of_the_mask_is_read(channels: int) -> None:
    prediction, confidence, target, mask = dense_inputs(1500, channels=channels)
    clean = check_dense(prediction, confidence, target.nan_to_num(), mask)
    with torch.no_grad():
        for x in (prediction, confidence):
            x[~mask] = math.nan
        target[~mask] = math.inf
    terms = dense_loss(prediction, confidence, target, mask, "grad" if channels == 1 else "normal")
    assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in clean.items()}
    for gradient in torch.autograd.grad(sum(terms.values(), torch.zeros(())), (prediction, confidence)):
        assert gradient.isfinite().all() and not gradient[~mask].any() and gradient[mask].any()


# Differences and normals --------------------------------------------------------------------------------------------


def test_the_gradient_loss_of_a_ramp_and_of_a_constant() -> None:
    """An error that rises by 1 a column: 2^s at scale s, over 15/16, 7/8, 3/4, 1/2 pairs a pixel. A constant: 0."""
    error = torch.arange(16.0).expand(1, 16, 16)[..., None]
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    expected = (1 * 15 / 16 + 2 * 7 / 8 + 4 * 3 / 4 + 8 * 1 / 2) / 4
    for e in (error, error.transpose(1, 2), error.expand(-1, -1, -1, 3)):
        assert difference_loss(e, torch.zeros_like(e), mask).item() == pytest.approx(expected)
    assert difference_loss(error + 5, error, mask).item() == 0


def test_each_difference_is_cut_at_a_hundred() -> None:
    prediction = torch.zeros(1, 2, 2, 1)
    prediction[0, 0, 0] = 1e6
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    assert difference_loss(prediction, torch.zeros_like(prediction), mask).item() == 2 * 100 / 4 / 4


def test_the_normal_loss_of_two_planes_is_one_minus_their_cosine() -> None:
    v, u = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    flat = torch.stack([u, v, torch.zeros_like(u)], -1)[None]
    mask = torch.ones(1, 12, 12, dtype=torch.bool)
    for degrees in (0, 30, 90):
        angle = math.radians(degrees)
        turned = torch.stack([u, v * math.cos(angle), v * math.sin(angle)], -1)[None]
        assert normal_loss(turned * 3 + 1, flat, mask).item() == pytest.approx(1 - math.cos(angle), abs=1e-6)
    assert normal_loss(flat.flip(2), flat, mask).item() == pytest.approx(2), "turned over"
    with pytest.raises(ValueError, match="points of 3 coordinates"):
        normal_loss(flat[..., :1], flat[..., :1], mask)


def test_normals_of_points_that_coincide_do_not_count() -> None:
    """Neither predicted ones nor true ones."""
    mask = torch.ones(1, 6, 6, dtype=torch.bool)
    rough, one = torch.randn(1, 6, 6, 3), torch.ones(1, 6, 6, 3)
    for prediction, target in ((one.clone(), rough), (rough.clone(), one)):
        loss = normal_loss(prediction.requires_grad_(), target, mask)
        assert loss.item() == 0
        assert_finite_gradients(loss, prediction)
