"""AbsRel and delta against arithmetic, the solvers against every corner of their objective, and what is skipped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.evaluation.depth import DepthMetrics, apply_alignment, depth_metrics
from peft_attrsub.evaluation.resizing import resize_prediction
from peft_attrsub.evaluation.skipping import SkippedError
from peft_attrsub.evaluation.solvers import adam, irls, l1_error, weighted_median

ALIGNMENTS = ["release", "video", "moge", "median", "none"]
AFFINE = ["release", "video", "moge"]
VIEWS, HEIGHT, WIDTH = 3, 12, 16
K = np.tile(np.array([[20.0, 0, 7.5], [0, 20.0, 5.5], [0, 0, 1]]), (VIEWS, 1, 1))


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Depth between 1 and 3 with structure, and a mask with holes."""
    rng = np.random.default_rng(seed)
    truth = 1 + 2 * rng.random((VIEWS, HEIGHT, WIDTH))
    mask = rng.random(truth.shape) < 0.8
    truth[~mask] = 0
    return truth, mask


def measure(pred: np.ndarray, truth: np.ndarray, mask: np.ndarray, align: str, **more: object) -> DepthMetrics:
    return depth_metrics(pred, truth, mask, align=align, intrinsics=K, **more)  # type: ignore[arg-type]


def best_corner(p: np.ndarray, q: np.ndarray, w: np.ndarray) -> float:
    """The least F among all lines through two of the points (x, y): a minimum of L1 is always one of them."""
    best = np.inf
    for i, j in itertools.combinations(range(len(p)), 2):
        if p[i] != p[j]:
            scale = (q[i] - q[j]) / (p[i] - p[j])
            best = min(best, float((w * np.abs(scale * (p - p[i]) + q[i] - q)).sum()))
    return best


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(3, 25), digits=st.integers(0, 4))
def test_irls_ends_in_the_best_corner(seed: int, count: int, digits: int) -> None:
    """Also with equal values (few digits), exact data (noise 0), weights, and any sign of the scale."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=count).round(digits)
    q = (rng.normal() * p + rng.normal() * rng.choice([0, 0.1, 1, 10], count)).round(digits + 1)
    w = rng.random(count) + 0.1
    if np.ptp(p) == 0:
        return
    scale, shift = irls(p[:, None], q[:, None], w)
    assert l1_error(p[:, None], q[:, None], w, scale, shift) <= best_corner(p, q, w) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_irls_of_points_is_no_worse_than_any_of_many_corners_and_steps(seed: int) -> None:
    """The minimum of the joint problem, by a slow search over the scale: F is convex in it with t the medians."""
    rng = np.random.default_rng(seed)
    q = rng.normal((0, 0, 4), size=(40, 3))
    p = (q - [0.3, -0.2, 0.5]) / 1.7 + 0.05 * rng.normal(size=q.shape)
    w = 1 / q[:, 2]

    def least_at(scale: float) -> float:
        rest = q - scale * p
        return sum(min(float(w @ np.abs(rest[:, c] - t)) for t in rest[:, c]) for c in range(3))

    low, high = 1.0, 2.5
    for _ in range(100):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if least_at(a) < least_at(b) else (a, high)
    scale, shift = irls(p, q, w)
    assert l1_error(p, q, w, scale, shift) == pytest.approx(least_at((low + high) / 2), rel=1e-9)


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(0.1, 5)), min_size=1, max_size=12))
def test_weighted_median_minimises_the_weighted_distance(pairs: list[tuple[float, float]]) -> None:
    values, weights = np.array(pairs).T
    chosen = values[weighted_median(values, weights)]
    best = min(float(weights @ np.abs(values - value)) for value in values)
    assert float(weights @ np.abs(values - chosen)) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_of_a_line_without_extent_only_the_shift_is_found() -> None:
    scale, shift = irls(np.full((5, 1), 2.0), np.array([[1.0], [1.0], [3.0], [9.0], [3.0]]))
    assert scale * 2.0 + shift[0] == 3.0


def test_adam_agrees_with_irls_where_it_has_time_and_not_where_the_shift_is_far() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(1, 3, (500, 1))
    near, far = 1.02 * p + 0.05, 1.02 * p + 8
    scale, shift = adam(p, near, rate=1e-3)
    assert l1_error(p, near, None, scale, shift) / 500 < 3e-3
    scale, shift = adam(p, far, rate=1e-4)
    assert l1_error(p, far, None, scale, shift) / 500 > 0.1
    scale, shift = irls(p, far)
    np.testing.assert_allclose([scale, shift[0]], [1.02, 8], rtol=1e-9)


def test_adam_takes_the_steps_of_torch() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(1, 3, (200, 1))
    q = 1.5 * p + 0.4 + 0.1 * rng.normal(size=p.shape)
    x, y = torch.from_numpy(p[:, 0]), torch.from_numpy(q[:, 0])
    value = torch.tensor([np.median(q) / np.median(p), 0.0], requires_grad=True)
    optimiser = torch.optim.Adam([value], lr=1e-3)
    for _ in range(300):
        optimiser.zero_grad()
        (value[0] * x + value[1] - y).abs().sum().backward()
        optimiser.step()
    scale, shift = adam(p, q, rate=1e-3, iterations=300, tolerance=0.0)
    np.testing.assert_allclose([scale, shift[0]], value.detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_the_truth_itself_has_no_error(align: str) -> None:
    truth, mask = scene()
    result = measure(truth.copy(), truth, mask, align)
    assert result.abs_rel < 1e-9 and result.delta == 1 and result.pixels == mask.sum() and result.frames == VIEWS
    assert result.inverted == 0


@given(seed=st.integers(0, 10**6), scope=st.sampled_from(["frame", "sequence"]), align=st.sampled_from(AFFINE))
@settings(max_examples=30)
def test_inverted_depth_may_have_no_error_and_is_counted(seed: int, scope: str, align: str) -> None:
    """5 - z is as near as z by every fit with a free sign: the sign is all that tells."""
    truth, mask = scene(seed)
    turned = np.random.default_rng(seed).random(VIEWS) < 0.5
    if scope == "sequence":
        turned[:] = turned[0]
    # Rays that are nearly parallel: x and y, which "moge" fits as well, are about 0, and z alone decides.
    k = K * [[1e9, 1, 1], [1, 1e9, 1], [1, 1, 1]]
    pred = np.where(turned[:, None, None], 5 - truth, truth)
    found = depth_metrics(pred, truth, mask, align=align, scope=scope, intrinsics=k)
    assert found.inverted == turned.mean() and found.row()["depth_inverted"] == turned.mean()
    assert found.abs_rel < 1e-6
    one = depth_metrics(pred, truth, mask, align="median", scope=scope)
    assert one.inverted == 0 and (one.abs_rel > 0.1) == turned.any()


@pytest.mark.parametrize("align", AFFINE)
def test_an_affine_change_of_depth_is_undone_and_its_parameters_found(align: str) -> None:
    truth, mask = scene()
    if align == "moge":  # a scaled scene, seen by a camera that stands behind the true one
        pred = (truth - 0.4) / 1.7
        k = K.copy()
        with_own = depth_metrics(truth / 1.7, truth, mask, align=align, intrinsics=K, pred_intrinsics=k)
        assert with_own.abs_rel < 1e-9 and with_own.parameters[0] == pytest.approx((1.7, 0, 0, 0), abs=1e-9)
    else:
        pred = (truth - 0.4) / 1.7
        result = measure(pred, truth, mask, align)
        assert result.abs_rel < 1e-9 and result.delta == 1
        expected = (1 / 1.7, -0.4 / 1.7) if align == "release" else (1.7, 0.4)
        for parameters in result.parameters:
            np.testing.assert_allclose(parameters, expected, rtol=1e-6)
        assert len(result.parameters) == (VIEWS if align == "release" else 1)


def test_moge_undoes_a_shift_in_all_three_directions() -> None:
    """One fronto-parallel pixel row is enough to see x: points are shifted, and the prediction's own K says where."""
    truth, mask = scene()
    pred_k = K.copy()
    flat = np.full_like(truth, 2.0)
    pred_k[:, 0, 2] -= 3  # x' = x + 3 z / fx, which is one shift for a plane of one depth
    result = depth_metrics(flat, flat, mask, align="moge", intrinsics=K, pred_intrinsics=pred_k)
    assert result.abs_rel < 1e-9
    np.testing.assert_allclose(result.parameters[0], (1.0, -0.3, 0, 0), atol=1e-6)


@pytest.mark.parametrize("align", AFFINE)
def test_a_fifth_of_outliers_in_the_fitted_side_does_not_move_the_alignment(align: str) -> None:
    """What is fitted to: the prediction in "release", the truth elsewhere. Least squares would be off by far."""
    clean, _ = scene()
    clean[clean == 0] = 2.0
    rng = np.random.default_rng(1)
    wild = np.where(rng.random(clean.shape) < 0.2, clean * 30, clean)
    mask = np.ones(clean.shape, bool)
    pred, truth = (wild, clean) if align == "release" else (clean, wild)
    result = measure(pred, truth, mask, align)
    for parameters in result.parameters:
        np.testing.assert_allclose(parameters, (1.0, *[0.0] * (len(parameters) - 1)), atol=1e-6)
    assert result.delta == pytest.approx(float((wild == clean).mean()))


@pytest.mark.parametrize("align", ["release", "video"])
def test_a_fifth_of_wrong_predictions_within_the_range_does_not_move_the_alignment(align: str) -> None:
    truth, _ = scene()
    truth[truth == 0] = 2.0
    rng = np.random.default_rng(1)
    pred = (truth - 0.4) / 1.7
    bad = rng.random(truth.shape) < 0.2
    pred[bad] = rng.choice(pred[~bad], int(bad.sum()))
    result = measure(pred, truth, np.ones(truth.shape, bool), align)
    for parameters in result.parameters:
        expected = (1 / 1.7, -0.4 / 1.7) if align == "release" else (1.7, 0.4)
        np.testing.assert_allclose(parameters, expected, rtol=1e-6)


def test_release_measures_in_the_prediction_s_unit_and_frame_by_frame() -> None:
    """Two frames with two scales: one fit for both fails, one fit each does not."""
    truth, mask = scene()
    pred = truth * np.array([1.0, 3.0, 7.0])[:, None, None]
    assert measure(pred, truth, mask, "release").abs_rel < 1e-9
    assert measure(pred, truth, mask, "video").abs_rel > 0.1
    assert measure(pred, truth, mask, "video", scope="frame").abs_rel < 1e-9
    assert measure(pred, truth, mask, "video", scope="frame").scope == "frame"
    assert measure(pred, truth, mask, "release", scope="sequence").abs_rel > 0.1
    # errors e of the prediction are relative to s z + t, not to z
    rng = np.random.default_rng(9)
    pred = 100 * truth + 50 + np.where(rng.random(truth.shape) < 0.3, 4.0, 0.0)
    result = measure(pred, truth, mask, "release")
    z = truth[mask]
    expected = np.abs(pred[mask] - (100 * z + 50)) / (100 * z + 50)
    assert result.abs_rel == pytest.approx(float(expected.mean()), rel=1e-6)


def test_numbers_by_hand() -> None:
    """d = 1.2, 2, 5, 0 against 1, 2, 4, 8: errors .2, 0, .25, 1; 5 / 4 is not below 1.25 and 0 fails."""
    truth = np.array([[[1.0, 2.0], [4.0, 8.0]]])
    pred = np.array([[[1.2, 2.0], [5.0, 0.0]]])
    result = depth_metrics(pred, truth, np.ones_like(truth, bool), align="none")
    assert result.abs_rel == pytest.approx(0.3625) and result.delta == 0.5 and result.parameters == ((),)
    halved = depth_metrics(truth / 2, truth, np.ones_like(truth, bool), align="median")
    assert halved.abs_rel < 1e-12 and halved.parameters == ((2.0,),)
    assert result.row()["depth_pixels"] == 4


def test_frames_count_by_their_pixels() -> None:
    truth = np.ones((2, 4, 4))
    mask = np.ones_like(truth, bool)
    mask[1, 1:] = False  # 16 and 4 pixels
    pred = truth * np.array([1.0, 2.0])[:, None, None]
    result = depth_metrics(pred, truth, mask, align="none")
    assert [frame.pixels for frame in result.per_frame] == [16, 4]
    assert result.abs_rel == pytest.approx(0.2) and result.delta == pytest.approx(0.8)


def test_depth_that_is_not_positive_fails_and_stays_finite() -> None:
    truth = np.full((1, 2, 4), 2.0)
    pred = truth.copy()
    pred[0, 0] = [-1.0, 0.0, -1e9, 1e-30]
    result = depth_metrics(pred, truth, np.ones_like(truth, bool), align="none")
    assert result.delta == 0.5 and np.isfinite(result.abs_rel)
    # release divides by s z + t, which is raised to a thousandth of its median where it is not positive
    truth = np.arange(1.0, 21.0).reshape(1, 4, 5)
    result = depth_metrics(truth - 3, truth, np.ones_like(truth, bool), align="release")
    assert result.delta == pytest.approx(17 / 20) and result.abs_rel < 1e-6


@pytest.mark.parametrize("align", ALIGNMENTS)
def test_what_cannot_be_measured_is_skipped_by_name(align: str) -> None:
    truth, mask = scene()
    one = np.zeros_like(mask)
    one[0][tuple(np.argwhere(mask[0])[0])] = True
    broken, endless = truth.copy(), truth.copy()
    broken[mask] = np.where(np.arange(int(mask.sum())) == 7, np.nan, broken[mask])
    endless[mask] = np.inf
    cases = [
        (truth, truth, np.zeros_like(mask), "no valid pixels"),
        (truth, np.zeros_like(truth), mask, "no valid pixels"),
        (truth, truth, one, "fewer than 3 valid pixels"),
        (broken, truth, mask, "prediction not finite"),
        (endless, truth, mask, "prediction not finite"),
        (truth, broken, mask, "truth not finite"),
    ]
    for pred, z, valid, reason in cases:
        with pytest.raises(SkippedError, match=reason) as caught:
            measure(pred, z, valid, align)
        assert caught.value.reason == reason
    # nan where nobody looks is no reason
    hidden = np.where(mask, truth, np.nan)
    assert measure(hidden, truth, mask, align).abs_rel < 1e-9


def test_a_prediction_of_zeros_is_never_a_silent_success() -> None:
    truth, mask = scene()
    for align, reason in (("release", "aligned depth not positive"), ("median", "prediction not positive")):
        with pytest.raises(SkippedError, match=reason):
            measure(np.zeros_like(truth), truth, mask, align)
    assert measure(np.zeros_like(truth), truth, mask, "video").abs_rel > 0.1
    assert measure(np.zeros_like(truth), truth, mask, "none").delta == 0


def test_a_frame_without_valid_pixels_is_left_out_and_counted() -> None:
    truth, mask = scene()
    mask[1] = False
    pred = truth * 1.1
    pred[1] = np.nan
    for align in ALIGNMENTS:
        result = measure(pred, truth, mask, align)
        assert (result.frames, result.frames_skipped) == (2, 1)
        assert [frame.frame for frame in result.per_frame] == [0, 2]


def test_a_fit_on_some_pixels_measures_all_of_them_and_repeats() -> None:
    truth, mask = scene()
    rng = np.random.default_rng(3)
    pred = 0.5 * truth + 0.2 + 0.01 * rng.normal(size=truth.shape)
    few, again = (measure(pred, truth, mask, "video", fit_pixels=20, seed=5) for _ in range(2))
    whole = measure(pred, truth, mask, "video")
    assert few == again and few.pixels == whole.pixels and few.parameters != whole.parameters
    assert few.abs_rel == pytest.approx(whole.abs_rel, rel=0.2)


def test_adam_is_named_and_near_the_exact_fit_where_it_converges() -> None:
    truth, mask = scene()
    rng = np.random.default_rng(3)
    pred = 1.05 * truth + 0.02 * rng.normal(size=truth.shape)
    exact, adam_ = (measure(pred, truth, mask, "release", solver=solver) for solver in ("irls", "adam"))
    assert adam_.solver == "adam" and adam_.abs_rel == pytest.approx(exact.abs_rel, rel=0.05)


@given(scale=st.floats(0.01, 100), align=st.sampled_from(["release", "video", "moge", "median"]))
@settings(max_examples=20)
def test_the_unit_of_the_prediction_does_not_matter(scale: float, align: str) -> None:
    truth, mask = scene()
    pred = truth + 0.05 * np.random.default_rng(2).normal(size=truth.shape)
    assert measure(scale * pred, truth, mask, align).abs_rel == pytest.approx(
        measure(pred, truth, mask, align).abs_rel, rel=1e-6
    )


def test_apply_alignment_gives_the_depth_that_was_compared() -> None:
    truth, mask = scene()
    pred = (truth - 0.4) / 1.7
    result = measure(pred, truth, mask, "video")
    np.testing.assert_allclose(apply_alignment(pred, result.parameters[0])[mask], truth[mask], rtol=1e-9)
    assert apply_alignment([2.0], (3.0,)) == 6 and apply_alignment([2.0], (3.0, 9, 9, 1.0)) == 7
    assert apply_alignment([2.0], ()) == 2


@pytest.mark.parametrize("scope", ["frame", "sequence"])
@pytest.mark.parametrize("align", ALIGNMENTS)
def test_what_was_compared_gives_the_metric_again(align: str, scope: str) -> None:
    truth, mask = scene()
    mask[1] = False
    pred = 0.6 * truth + 0.1 + 0.05 * np.random.default_rng(2).normal(size=truth.shape)
    result = measure(pred, truth, mask, align, scope=scope)
    d, z = result.compared(pred, truth)
    assert float(np.mean(np.abs(d - z)[mask] / z[mask])) == pytest.approx(result.abs_rel, rel=1e-9)
    assert np.isnan((d - z)[1]).all() and not np.isnan((d - z)[[0, 2]]).any()


def test_torch_tensors_are_taken_as_they_come() -> None:
    truth, mask = scene()
    result = depth_metrics(torch.from_numpy(truth).float(), torch.from_numpy(truth).float(), torch.from_numpy(mask))
    assert result.abs_rel < 1e-6 and result.align == "release" and result.scope == "frame"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"align": "affine"}, "align is 'affine'"),
        ({"solver": "lbfgs"}, "solver is 'lbfgs'"),
        ({"align": "moge", "solver": "adam"}, "there is none"),
        ({"align": "moge", "intrinsics": None}, "give the intrinsics"),
        ({"align": "moge", "intrinsics": K[0]}, "one matrix a frame"),
        ({"scope": "dataset"}, "scope is 'dataset'"),
        ({"fit_pixels": 1}, "fit_pixels is 1"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, object], words: str) -> None:
    truth, mask = scene()
    with pytest.raises(ValueError, match=words):
        depth_metrics(truth, truth, mask, **options)  # type: ignore[arg-type]


def test_arrays_that_do_not_fit_are_refused() -> None:
    truth, mask = scene()
    with pytest.raises(ValueError, match="resize_prediction"):
        depth_metrics(truth[:, ::2], truth, mask)
    with pytest.raises(ValueError, match="expected bool"):
        depth_metrics(truth, truth, mask.astype(np.uint8))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "nearest-exact"])
def test_a_prediction_is_resized_about_pixel_centres(mode: str) -> None:
    """A ramp stays the ramp at (u + 1/2) W'/W - 1/2, away from the edges; torch's cubic bends one by 0.05."""
    ramp = np.tile(np.arange(8.0) + 0.5, (2, 6, 1))
    out = resize_prediction(ramp, (12, 16), mode)
    assert isinstance(out, np.ndarray) and out.shape == (2, 12, 16)
    if mode != "nearest-exact":
        np.testing.assert_allclose(out[:, 4:8, 4:12], np.tile((np.arange(4, 12) + 0.5) / 2, (2, 4, 1)), atol=0.06)
    else:
        np.testing.assert_array_equal(out[0, 0], np.repeat(ramp[0, 0], 2))
    tensor = resize_prediction(torch.from_numpy(ramp).half(), (12, 16), mode)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(resize_prediction(ramp, (6, 8), mode), ramp)


def test_resizing_refuses_what_it_does_not_know() -> None:
    maps = np.zeros((2, 4, 4))
    for pred, size, mode, words in [
        (maps, (2, 2), "lanczos", "mode is 'lanczos'"),
        (maps[0], (2, 2), "bicubic", "expected \\(frames"),
        (maps, (0, 2), "bicubic", "size is"),
    ]:
        with pytest.raises(ValueError, match=words):
            resize_prediction(pred, size, mode)
