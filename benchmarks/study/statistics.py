"""Means with deviations, differences paired by seed, and the verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """mean, sd (of n - 1; None for one value) and n of the finite values."""
    good = [value for value in values if value is not None and math.isfinite(value)]
    if not good:
        return {"mean": None, "sd": None, "n": 0}
    return {"mean": fmean(good), "sd": stdev(good) if len(good) > 1 else None, "n": len(good)}


def row_spread(row: Mapping[str, Any], part: str, name: str) -> dict[str, Any]:
    """`spread` over the seeds of a row of the result, of one column of one set."""
    return spread([one[part].get(name) for one in row["seeds"].values()])


def paired(one: Mapping[Any, float | None], other: Mapping[Any, float | None], less_is_better: bool) -> dict[str, Any]:
    """one - other over the seeds that both have: mean difference, its standard error, and a verdict on `one`.

        d_s = one_s - other_s ,   se = sd(d) / sqrt(n) ,   "better" or "worse" where |mean d| > 2 se ,

    else "no difference". "one seed" where no error can be known, "nothing" where no seed is in both.
    """
    seeds = [s for s in one if s in other and _finite(one[s]) and _finite(other[s])]
    differences = [float(one[s]) - float(other[s]) for s in seeds]  # type: ignore[arg-type]
    if not differences:
        return {"difference": None, "se": None, "n": 0, "verdict": "nothing"}
    mean = fmean(differences)
    if len(differences) == 1:
        return {"difference": mean, "se": None, "n": 1, "verdict": "one seed"}
    se = stdev(differences) / math.sqrt(len(differences))
    verdict = "no difference"
    if abs(mean) > 2 * se:
        verdict = "better" if (mean < 0) == less_is_better else "worse"
    return {"difference": mean, "se": se, "n": len(differences), "verdict": verdict}


def tally(verdicts: Sequence[str]) -> dict[str, int]:
    """How often each verdict was given."""
    return {word: verdicts.count(word) for word in ("better", "no difference", "worse", "one seed", "nothing")}


def choose_rate(
    scores: Mapping[float, float | None], step: float, most: int, first: Sequence[float]
) -> tuple[str, float, bool]:
    """What a sweep does next: ("try", rate, False), or ("take", rate, whether the best lies on the border).

    scores: rate -> score, less is better, None or infinite for a run that failed; of all rates of `first`, and of
    those that were tried since. The best at an end is followed for at most `most` more rates on that side.
    """
    ordered = sorted(scores)
    best = min(ordered, key=lambda rate: (_or_infinite(scores[rate]), rate))
    if not math.isfinite(_or_infinite(scores[best])):
        # Everything diverged: only smaller rates can help.
        best = ordered[0]
    for end, beyond, edge in ((ordered[0], 1 / step, min(first)), (ordered[-1], step, max(first))):
        if best == end:
            tried = round(abs(math.log(end / edge)) / math.log(step))
            if tried < most:
                return "try", rounded(end * beyond), False
            return "take", best, True
    return "take", best, False


def rounded(rate: float) -> float:
    """To two digits, with 3.2 written as 3: 0.001, 0.003, 0.01."""
    value = float(f"{rate:.1e}")
    exponent = math.floor(math.log10(value))
    return float(f"{3 if 3.0 <= value / 10**exponent < 3.5 else round(value / 10**exponent)}e{exponent}")


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _or_infinite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf
