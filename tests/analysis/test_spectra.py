"""Drops and patterns of spectra: planted ones, the rule written down slowly, and adapters mined end to end."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peft_attrsub import build_basis
from peft_attrsub.analysis import Drop, analyse, find_drops, pattern, suggest_dim
from tests.basis.helpers import save_lora, save_many

from .helpers import drops_slowly, mean_strengths, near_a_threshold, planted

RANK = 16


def spectrum(falls, size=160, decay=0.01, top=1.0, noise=0.0, seed=0):
    """`size` values that fall by exp(decay) each, and by the factor falls[j] between the j-th and the next."""
    logs = -decay * np.arange(size, dtype=np.float64)
    for index, factor in falls.items():
        logs[index:] -= math.log(factor)
    logs += noise * np.random.default_rng(seed).standard_normal(size)
    return torch.from_numpy(top * np.sort(np.exp(logs))[::-1].copy())


PATTERNS = {
    "at-rank": {16: 20.0},
    "beyond-rank": {40: 20.0},
    "two-step": {16: 8.0, 48: 20.0},
    "below-rank": {6: 20.0},
    "none": {},
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_planted_patterns(name, noise):
    values, falls = spectrum(PATTERNS[name], noise=noise), PATTERNS[name]
    drops = find_drops(values, RANK)
    assert [drop.index for drop in drops] == list(falls)
    for drop, factor in zip(drops, falls.values(), strict=True):
        # The fall over h values, and where several touch over up to 2 h - 1 of them, is the factor and a little more.
        assert 0.7 * factor < drop.factor < 1.5 * factor
    assert pattern(drops, RANK) == name
    assert suggest_dim(values, drops) == (max(falls, key=falls.get) if falls else suggest_dim(values, []))


@pytest.mark.parametrize(
    ("index", "expected"), [(13, "below-rank"), (14, "at-rank"), (16, "at-rank"), (18, "at-rank")]
)
def test_near_the_rank_means_within_an_eighth(index, expected):
    assert pattern([Drop(index, 9.0)], RANK) == expected
    assert pattern([Drop(19, 9.0)], RANK) == "beyond-rank"


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_small_ranks_are_at_rank_within_one(rank):
    assert [pattern([Drop(rank + step, 9.0)], rank) for step in (-1, 0, 1, 2)] == [
        "at-rank", "at-rank", "at-rank", "beyond-rank"
    ]  # fmt: skip


def test_three_drops_are_two_step_and_none_is_none():
    assert pattern([Drop(4, 3.0), Drop(16, 3.0), Drop(40, 3.0)], RANK) == "two-step"
    assert pattern([], RANK) == "none"


def test_a_fall_by_less_than_three_is_no_drop():
    assert find_drops(spectrum({16: 2.9}, decay=0.0), RANK) == []
    assert [d.index for d in find_drops(spectrum({16: 3.1}, decay=0.0), RANK)] == [16]


def test_a_fall_must_stand_out_from_the_spectrum_around_it():
    """Factor 4 over h = 2 values is a drop in a flat spectrum, and nothing special where any two fall by e^0.5."""
    assert [d.index for d in find_drops(spectrum({16: 4.0}, decay=0.0), RANK)] == [16]
    assert find_drops(spectrum({16: 4.0}, size=50, decay=0.25), RANK) == [], "4 x 0.5 > ln 4 + 0.5"
    assert [d.index for d in find_drops(spectrum({16: 60.0}, size=50, decay=0.1), RANK)] == [16]


@given(st.floats(0.0, 0.5), st.integers(1, 120), st.integers(1, 64))
def test_exponential_decay_has_no_drop(rate, size, rank):
    """Every value falls as the one before: nothing is a threshold. (Down to 1e-6, where rounding begins.)"""
    size = min(size, int(math.log(1e6) / rate) if rate > 0.12 else size)
    drops = find_drops(spectrum({}, size=max(size, 1), decay=rate), rank)
    assert drops == []


@pytest.mark.parametrize("rate", [0.3, 0.6, 2.0])
def test_exponential_decay_into_rounding_has_no_drop(rate):
    """The values below 1e-6 of the largest are not spectrum, so they cannot make the rest look steep."""
    assert find_drops(spectrum({}, size=160, decay=rate), RANK) == []


def square_spectra(n, count):
    generator = torch.Generator().manual_seed(n)
    return [torch.linalg.svdvals(torch.randn(n, n, generator=generator, dtype=torch.float64)) for _ in range(count)]


@pytest.mark.parametrize(("rank", "at_most"), [(2, 0.1), (8, 0.1), (12, 0.02), (16, 0.02), (64, 0.0)])
def test_the_tail_of_a_square_random_matrix_is_no_drop(rank, at_most):
    """Its last values fall off, ever faster. Two of them alone (h = 1) now and then fall by 3 for no reason."""
    found = [find_drops(values, rank) for values in square_spectra(64, 100)]
    assert sum(map(bool, found)) <= at_most * len(found)


def test_exactly_low_rank():
    for rank in (1, 4, 16):
        values = torch.cat([torch.linspace(2, 1, rank), torch.zeros(9 * rank)])
        drops = find_drops(values, rank)
        assert [d.index for d in drops] == [rank]
        assert pattern(drops, rank) == "at-rank" and suggest_dim(values, drops) == rank
        assert math.isfinite(drops[0].factor) and drops[0].factor > 1e5


def test_rounding_is_not_a_second_drop():
    """A second cliff inside what is rounding (1e-9, then 1e-13 of the largest) is none."""
    values = torch.cat([torch.linspace(2, 1, 16), torch.full((40,), 1e-9), torch.full((40,), 1e-13)]).double()
    assert [d.index for d in find_drops(values, RANK)] == [16]


def test_one_adapter_has_nothing_beyond_its_rank():
    values = spectrum({}, size=RANK, decay=0.1)
    assert find_drops(values, RANK) == [] and pattern([], RANK) == "none"


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [0.0, 0.0], [3.0, 2.0]])
def test_shortest_spectra(values):
    values = torch.tensor(values)
    for rank in (1, 16):
        assert find_drops(values, rank) == []
    assert suggest_dim(values, []) >= 1


@st.composite
def spectra(draw):
    """Flat parts, falls and noise at random, a few lengths, with and without values that are only rounding."""
    size = draw(st.integers(0, 80))
    steps = draw(
        st.lists(
            st.one_of(st.floats(0, 0.3), st.floats(0, 5), st.just(0.0)),
            min_size=size,
            max_size=size,
        )
    )
    top = draw(st.sampled_from([1.0, 3e-5, 7e4]))
    return torch.tensor(top * np.exp(-np.cumsum(steps)), dtype=torch.float64)


@given(spectra(), st.integers(1, 40))
@settings(max_examples=300)
def test_find_drops_is_the_rule_as_stated(values, rank):
    assume(not near_a_threshold(values, rank))
    expected = drops_slowly(values, rank)
    found = find_drops(values, rank)
    assert [d.index for d in found] == [index for index, _ in expected]
    assert [d.factor for d in found] == pytest.approx([factor for _, factor in expected], rel=1e-9)


@given(spectra(), st.integers(1, 40), st.floats(-30, 30))
def test_scale_does_not_matter(values, rank, exponent):
    assume(not near_a_threshold(values, rank, margin=1e-7))
    scaled = values * 2.0 ** round(exponent)
    one, other = find_drops(values, rank), find_drops(scaled, rank)
    assert [d.index for d in one] == [d.index for d in other]
    assert suggest_dim(values, one) == suggest_dim(scaled, other)
    assert pattern(one, rank) == pattern(other, rank)


@given(spectra(), st.integers(1, 40))
def test_drops_are_sane(values, rank):
    drops = find_drops(values, rank)
    indices = [d.index for d in drops]
    assert indices == sorted(set(indices))
    assert all(
        1 <= i <= len(values) - 2 * math.ceil(rank / 8) and d.factor >= 3 for i, d in zip(indices, drops, strict=True)
    )


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_without_a_drop_the_dim_holds_nine_tenths(values):
    values = sorted(values, reverse=True)
    squares = np.square(values)
    shares = np.cumsum(squares) / squares.sum()
    assume(np.abs(shares - 0.9).min() > 1e-9)
    expected = next(d for d, share in enumerate(shares, 1) if share >= 0.9)
    assert suggest_dim(torch.tensor(values, dtype=torch.float64), []) == expected


def test_nine_tenths_exactly_is_enough():
    """3^2 + 0 of 10 and so on: 90 % reached on the spot, in numbers that floats cannot represent."""
    assert suggest_dim(torch.tensor([3.0, 1.0]), []) == 1
    assert suggest_dim(torch.ones(10), []) == 9
    assert suggest_dim(torch.full((30,), 0.1, dtype=torch.float64), []) == 27


def test_with_drops_the_dim_is_the_steepest_ones():
    assert suggest_dim(torch.ones(100), [Drop(16, 8.0), Drop(48, 20.0)]) == 48
    assert suggest_dim(torch.ones(100), [Drop(16, 20.0), Drop(48, 8.0)]) == 16


# ---- adapters mined end to end: C is known by arithmetic ----


def same(k, rank, own=0.0):
    """k adapters with the same `rank` directions."""
    return [{j: 1 + 0.05 * j for j in range(rank)} for _ in range(k)]


def halves(k, rank):
    """The first half of the adapters has other directions than the second: C has 2 rank of them."""
    return [{j + (rank if i >= k // 2 else 0): 1 + 0.05 * j for j in range(rank)} for i in range(k)]


def common_and_own(k, rank):
    """Half of an adapter's directions are everybody's, half are its own: C has those of strength 1 and of 1/k."""
    half = rank // 2
    return [dict.fromkeys([*range(half), *range(half + i * half, 2 * half + i * half)], 1.0) for i in range(k)]


def common_own_and_weak(k, rank):
    """A few directions are everybody's, as many its own, and two its own and weak: 1, 1/k, and far below."""
    rows = []
    for i in range(k):
        own, weak = (range(3 + 3 * i, 6 + 3 * i), range(3 + 3 * k + 2 * i, 5 + 3 * k + 2 * i))
        rows.append({**dict.fromkeys([*range(3), *own], 1.0), **dict.fromkeys(weak, 0.02)})
    return rows


def fading(k, rank):
    """Every direction is one adapter's own, and they fade evenly."""
    return [{i + k * j: math.exp(-0.02 * (i + k * j)) for j in range(rank)} for i in range(k)]


def few(k, rank):
    """Of the `rank` directions only half were ever trained."""
    return [{j: 1.0 if j < rank // 2 else 0.0 for j in range(rank)} for _ in range(k)]


# recipe, number of adapters, pattern, indices of the drops, suggested dim; rank 8, so h = 1
MINED = {
    "at-rank": (same, 6, [8], 8),
    "beyond-rank": (halves, 6, [16], 16),
    "two-step": (common_own_and_weak, 8, [3, 27], 27),
    "none": (fading, 5, [], None),
    "below-rank": (few, 6, [4], 4),
}


def mined(tmp_path, rows, dim=4, n=60, m=50, **saving):
    adapters = planted(n, m, rows)
    return build_basis(save_many(tmp_path, adapters, **saving), dim=dim, progress=False)


def test_the_end_of_a_spectrum_is_no_second_drop(tmp_path):
    """Beyond the 36 directions that adapters have there is rounding alone: the drop is where they part."""
    (found,) = analyse(mined(tmp_path, common_and_own(8, 8)), draws=5).to_dict()["spectra"]
    assert [d["index"] for d in found["drops"]] == [4]
    assert (found["pattern"], found["suggested_dim"]) == ("below-rank", 4)


@pytest.mark.parametrize("name", MINED)
def test_mined_patterns(tmp_path, name):
    recipe, k, indices, suggested = MINED[name]
    rows = recipe(k, 8)
    (found,) = analyse(mined(tmp_path, rows), draws=5).to_dict()["spectra"]
    strengths = mean_strengths(rows)
    values = np.array(found["first_singular_values"])
    present = [s for s in strengths if s > 0]
    assert values[: len(present)] == pytest.approx(present, rel=1e-5)
    assert np.abs(values[len(present) :]).max(initial=0) < 1e-6 * values[0]
    strengths = np.array(found["singular_values"])  # what is decided is decided on these
    assert found["largest"] == strengths[0]
    assert found["rank"] == 8 and found["dim"] == 4
    assert found["pattern"] == name
    assert [d["index"] for d in found["drops"]] == indices
    if suggested is None:  # the fewest directions with nine tenths of the squares
        shares = np.cumsum(np.square(strengths)) / np.sum(np.square(strengths))
        suggested = int(np.searchsorted(shares, 0.9)) + 1
    assert found["suggested_dim"] == suggested
    squares = np.square(strengths)
    assert found["energy_at_dim"] == pytest.approx(squares[:4].sum() / squares.sum(), rel=1e-5)
    assert found["energy_at_suggested"] == pytest.approx(squares[:suggested].sum() / squares.sum(), rel=1e-5)
    if indices:
        assert found["gap"] == max(d["factor"] for d in found["drops"])
    else:
        steps = strengths[:-1] / strengths[1:]
        assert found["gap"] == pytest.approx(steps.max(), rel=1e-4), "one step of the fading over h = 1 values"


def test_mined_from_one_adapter(tmp_path):
    """C is its update: rank 8 and no more values, so nothing can lie beyond; a fall among them is still seen."""
    (found,) = analyse(mined(tmp_path / "flat", same(1, 8)), draws=5).to_dict()["spectra"]
    assert found["singular_values"] == pytest.approx(mean_strengths(same(1, 8)), rel=1e-5)
    assert (found["rank"], found["pattern"], found["weights"]) == (8, "none", [1.0])
    (found,) = analyse(mined(tmp_path / "half", few(1, 8)), draws=5).to_dict()["spectra"]
    assert (found["pattern"], found["suggested_dim"]) == ("below-rank", 4)


def test_two_step_factor_is_the_number_of_adapters(tmp_path):
    """Common directions have strength 1 in C, an adapter's own 1/k."""
    (found,) = analyse(mined(tmp_path, common_and_own(8, 8)), draws=5).to_dict()["spectra"]
    assert found["drops"][0]["factor"] == pytest.approx(8, rel=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_of_the_adapters_is_in_the_spectrum(tmp_path, rslora):
    """alpha = 24, r = 8: times 24 / 8, or 24 / sqrt(8)."""
    rows = same(4, 8)
    (found,) = analyse(mined(tmp_path, rows, lora_alpha=24, use_rslora=rslora), draws=5).to_dict()["spectra"]
    assert found["largest"] == pytest.approx(mean_strengths(rows)[0] * (24 / 8**0.5 if rslora else 3), rel=1e-5)
    assert found["pattern"] == "at-rank" and found["suggested_dim"] == 8


@pytest.mark.parametrize(("ranks", "median"), [((2, 4, 12), 4), ((4, 4, 4), 4), ((3, 12, 12), 12), ((4, 4, 8, 8), 6)])
def test_adapters_of_mixed_rank_count_as_the_median(tmp_path, ranks, median):
    rows = [dict.fromkeys(range(r), 1.0) for r in ranks]
    (found,) = analyse(mined(tmp_path, rows, dim=2), draws=5).to_dict()["spectra"]
    assert found["rank"] == median


def test_rank_pattern_gives_every_module_its_own_rank(tmp_path):
    """Rank 12 in one module and 4 in the other, in the same adapters: each is held against its own."""
    paths = []
    one = planted(60, 50, same(5, 12), seed=1, module="blocks.0.fc")
    other = planted(40, 30, same(5, 4), seed=2, module="blocks.1.fc")
    for i in range(5):
        paths.append(save_lora(tmp_path / f"a-{i}", {**one[i], **other[i]}))
    found = analyse(build_basis(paths, dim=2, progress=False), draws=5).to_dict()["spectra"]
    assert [(s["rank"], s["pattern"], s["suggested_dim"]) for s in found] == [(12, "at-rank", 12), (4, "at-rank", 4)]
