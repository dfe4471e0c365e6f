"""Acc, Comp and NC: cases whose answer is known, and a reference that looks at every distance."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_attrsub.evaluation.alignment import Similarity
from peft_attrsub.evaluation.points import point_metrics
from peft_attrsub.evaluation.skipping import SkippedError


def turn(rng: np.random.Generator) -> np.ndarray:
    q = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return q * np.sign(np.linalg.det(q))


def sheet(rng: np.random.Generator, count: int) -> np.ndarray:
    """Points of a bumpy surface about one unit across."""
    u, v = rng.uniform(-0.5, 0.5, (2, count))
    return np.stack([u, v, 2 + 0.1 * np.sin(6 * u) * np.cos(4 * v)], axis=1)


def slow_normals(points: np.ndarray, k: int) -> np.ndarray:
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    nearest = [points[np.argsort(row)[:k]] for row in apart]
    return np.stack([np.linalg.svd(near - near.mean(0))[2][-1] for near in nearest])


def slow_metrics(pred: np.ndarray, truth: np.ndarray, k: int) -> dict[str, float]:
    """Every distance between two clouds that are aligned already."""
    apart = np.linalg.norm(pred[:, None] - truth[None], axis=2)
    n_pred, n_truth = slow_normals(pred, k), slow_normals(truth, k)
    agree = np.abs(n_pred @ n_truth.T)
    nc_pred = agree[np.arange(len(pred)), apart.argmin(1)].mean()
    nc_truth = agree[apart.argmin(0), np.arange(len(truth))].mean()
    return {
        "acc": apart.min(1).mean(),
        "acc_median": np.median(apart.min(1)),
        "comp": apart.min(0).mean(),
        "comp_median": np.median(apart.min(0)),
        "nc_pred": nc_pred,
        "nc_truth": nc_truth,
        "nc": (nc_pred + nc_truth) / 2,
    }


@given(
    st.integers(0, 2**31),
    st.integers(10, 120),
    st.integers(5, 30),
    st.sampled_from(["sim3+icp", "sim3", "scale", "median", "none"]),
)
@settings(max_examples=30, deadline=None)
def test_metrics_are_the_slow_ones(seed: int, count: int, k: int, align: str) -> None:
    rng = np.random.default_rng(seed)
    truth = sheet(rng, count)
    pred = (truth + 0.02 * rng.normal(size=truth.shape)) / rng.uniform(0.5, 2)
    found = point_metrics(pred, truth, align=align, neighbours=k, workers=1)
    if align == "none":
        moved = pred
    elif align == "scale":
        moved = pred * (pred * truth).sum() / (pred**2).sum()
    elif align == "median":
        centres = np.median(pred, axis=0), np.median(truth, axis=0)
        spreads = [np.median(np.linalg.norm(p - c, axis=1)) for p, c in zip((pred, truth), centres, strict=True)]
        moved = (pred - centres[0]) * spreads[1] / spreads[0] + centres[1]
    else:
        moved = found.aligned(pred)  # test_alignment.py answers for Umeyama and ICP
    np.testing.assert_allclose(found.aligned(pred), moved, atol=1e-9)
    for name, value in slow_metrics(moved, truth, k).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-6), name
    assert (found.points, found.queries, found.align) == (count, count, align)
    assert (found.icp_fitness is not None) == (found.icp_threshold == 0.1) == (align == "sim3+icp")


@given(st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_a_similar_cloud_is_perfect(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = sheet(rng, 400)
    pred = Similarity(rng.uniform(0.01, 100), turn(rng), rng.normal(size=3) * 10).apply(truth)
    for align in ("sim3+icp", "sim3"):
        found = point_metrics(pred, truth, align=align, workers=1)
        assert max(found.acc, found.acc_median, found.comp, found.comp_median) < 1e-9
        assert min(found.nc, found.nc_pred, found.nc_truth) == pytest.approx(1, abs=1e-9)
        np.testing.assert_allclose(found.aligned(pred), truth, atol=1e-9)
    assert point_metrics(pred, truth).icp_fitness == 1


@pytest.mark.parametrize("offset", [0.001, 0.05, 3.0])
def test_a_plane_beside_itself_is_as_far_as_it_was_moved(offset: float) -> None:
    rng = np.random.default_rng(0)
    u, v = np.meshgrid(np.linspace(-1, 1, 40), np.linspace(-1, 1, 40))
    frame = turn(rng)
    truth = np.stack([u, v, np.full_like(u, 5)], axis=-1).reshape(-1, 3) @ frame.T
    pred = truth + offset * frame[:, 2]
    found = point_metrics(pred, truth, align="none")
    expected = {"acc": offset, "acc_median": offset, "comp": offset, "comp_median": offset, "nc": 1}
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)
    assert found.icp_threshold is None and found.icp_fitness is None and found.icp_rmse is None
    # Any alignment that may move it brings it back.
    assert point_metrics(pred, truth, align="sim3").acc < 1e-9


def test_normals_at_random_agree_by_a_half() -> None:
    # Little discs at the same places, each turned at random: the mean of |cos| over a ball is 1/2.
    rng = np.random.default_rng(1)
    centres = np.stack(np.meshgrid(*[np.arange(12.0)] * 3), axis=-1).reshape(-1, 1, 3)
    flat = 0.05 * rng.normal(size=(30, 3)) * [1, 1, 0]
    pred, truth = (
        (centres + np.stack([flat @ turn(rng).T for _ in centres])).reshape(-1, 3) for _ in ("pred", "truth")
    )
    found = point_metrics(pred, truth, align="none")
    assert (found.nc, found.nc_pred, found.nc_truth) == pytest.approx((0.5, 0.5, 0.5), abs=0.03)


def test_icp_repairs_what_outliers_did_to_the_similarity() -> None:
    rng = np.random.default_rng(2)
    truth = sheet(rng, 5000)
    pred = truth + 0.001 * rng.normal(size=truth.shape)
    pred[:250] += [0.4, 0.0, 0.6]  # 5 % of the pixels, all to one side
    before, after = point_metrics(pred, truth, align="sim3"), point_metrics(pred, truth)
    assert after.acc_median < 0.7 * before.acc_median
    assert after.icp_fitness == pytest.approx(0.95, abs=0.01)
    assert 0 < after.icp_rmse < 0.1
    # No pair within a threshold this small: the similarity stays.
    far = point_metrics(pred, truth, icp_threshold=1e-9)
    assert far.icp_fitness == 0 and far.acc == pytest.approx(before.acc)


def test_only_those_who_ask_are_thinned_out() -> None:
    rng = np.random.default_rng(3)
    pred, truth = sheet(rng, 20_000), sheet(rng, 20_000)  # the same surface, but not the same points
    exact, some = (point_metrics(pred, truth, align="none", max_queries=n) for n in (None, 5000))
    assert (exact.queries, some.queries, some.points) == (20_000, 5000, 20_000)
    for name in ("acc", "acc_median", "comp", "comp_median", "nc", "nc_pred", "nc_truth"):
        assert getattr(some, name) == pytest.approx(getattr(exact, name), rel=0.05), name
    # A quarter of both clouds would be twice as far apart.
    thinned = point_metrics(pred[::4], truth[::4], align="none")
    assert thinned.acc > 1.5 * exact.acc and thinned.comp > 1.5 * exact.comp
    # Which points ask follows from the seed.
    accs = [point_metrics(pred, truth, align="none", max_queries=100, seed=seed).acc for seed in (1, 1, 2)]
    assert accs[0] == accs[1] != accs[2]


def test_exact_leaves_out_no_point() -> None:
    rng = np.random.default_rng(6)
    truth = sheet(rng, 4000)
    pred = truth + 0.01 * rng.normal(size=truth.shape)
    exact = point_metrics(pred, truth, exact=True, max_queries=5, icp_points=5)
    whole, few = (point_metrics(pred, truth, max_queries=None, icp_points=n) for n in (None, 50))
    assert (exact.acc, exact.comp, exact.nc, exact.icp_rmse) == (whole.acc, whole.comp, whole.nc, whole.icp_rmse)
    assert exact.queries == 4000
    assert few.icp_rmse != exact.icp_rmse


def test_many_points_asking_once_are_enough_for_a_perfect_cloud() -> None:
    truth = sheet(np.random.default_rng(4), 3000)
    found = point_metrics(truth, truth, max_queries=1, icp_points=100)
    assert found.acc < 1e-9 and found.comp < 1e-9 and found.nc == pytest.approx(1)


GOOD = np.random.default_rng(5).normal(size=(9, 3))


@pytest.mark.parametrize(
    ("pred", "truth", "reason"),
    [
        (GOOD[:0], GOOD[:0], "no valid pixels"),
        (GOOD[:1], GOOD[:1], "fewer than 3 valid pixels"),
        (GOOD[:2], GOOD[:2], "fewer than 3 valid pixels"),
        (np.where(np.eye(9, 3) > 0, np.nan, GOOD), GOOD, "prediction is not finite"),
        (np.where(np.eye(9, 3) > 0, np.inf, GOOD), GOOD, "prediction is not finite"),
        (GOOD, np.where(np.eye(9, 3) > 0, -np.inf, GOOD), "truth is not finite"),
        (np.full((9, 3), 0.1), GOOD, "prediction is all in one place"),
        (np.zeros((9, 3)), GOOD, "prediction is all in one place"),
        (GOOD, np.full((9, 3), 0.1), "truth is all in one place"),
    ],
)
@pytest.mark.parametrize("align", ["sim3+icp", "scale", "none"])
def test_what_cannot_be_measured_is_left_out_by_name(
    pred: np.ndarray, truth: np.ndarray, reason: str, align: str
) -> None:
    with pytest.raises(SkippedError) as caught:
        point_metrics(pred, truth, align=align)
    assert caught.value.reason == reason


def test_without_a_positive_scale_nothing_is_measured() -> None:
    for align, pred, truth in (
        ("scale", -GOOD, GOOD),
        ("median", np.concatenate([np.zeros((9, 3)), GOOD[:4]]), np.concatenate([GOOD, GOOD[:4]])),
    ):
        with pytest.raises(SkippedError, match="no positive scale"):
            point_metrics(pred, truth, align=align)


def test_three_pixels_and_two_places_are_enough() -> None:
    for points in (GOOD[:3], GOOD[[0, 0, 1]]):
        found = point_metrics(2 * points + 1, points)
        assert found.acc < 1e-9 and found.comp < 1e-9


def test_tensors_of_single_precision_are_welcome() -> None:
    pred, truth = GOOD.astype(np.float32), (GOOD + 0.01).astype(np.float32)
    assert point_metrics(torch.from_numpy(pred), torch.from_numpy(truth)).acc == point_metrics(pred, truth).acc


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"align is 'sim3 icp', expected one of sim3\+icp, sim3, scale"):
        point_metrics(GOOD, GOOD, align="sim3 icp")
    with pytest.raises(ValueError, match="9 predicted and 8 true points"):
        point_metrics(GOOD, GOOD[:8])
    with pytest.raises(ValueError, match=r"predicted points are of shape \(9, 3, 1\)"):
        point_metrics(GOOD[..., None], GOOD[..., None])
    with pytest.raises(ValueError, match="threshold"):
        point_metrics(GOOD, GOOD, icp_threshold=-1)
    with pytest.raises(ValueError, match="k = 1"):
        point_metrics(GOOD, GOOD, neighbours=1)


def test_a_missing_scipy_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match=r'pip install "peft-attrsub\[eval\]"'):
        point_metrics(GOOD, GOOD)
