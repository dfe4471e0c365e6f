"""The findings a report opens with: each a headline, the sentences that qualify it, and the numbers behind it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..basis.naming import counted

PATTERNS = {
    "at-rank": "one drop at the adapters' rank",
    "beyond-rank": "one drop beyond the adapters' rank",
    "two-step": "two drops or more",
    "below-rank": "one drop below the adapters' rank",
    "none": "no drop",
}
SHORT = {
    "at-rank": "at the rank",
    "beyond-rank": "beyond it",
    "two-step": "two drops",
    "below-rank": "below it",
    "none": "no drop",
}


@dataclass(frozen=True)
class Bar:
    """One row of a tile: parts (kind, share, text) beside a label; shares are of the whole row."""

    label: str
    parts: list[tuple[str, float, str]]
    value: str


@dataclass(frozen=True)
class Finding:
    """`keys`: what the parts of the bars mean, kind and text. `scale`: positions in [0, 1] of the "value", the null
    band's "low" and "high", and "permuted" if known."""

    topic: str
    headline: str
    text: str
    bars: list[Bar] = field(default_factory=list)
    scale: dict[str, float] = field(default_factory=dict)
    keys: list[tuple[str, str]] = field(default_factory=list)


def findings(data: dict[str, Any]) -> list[Finding]:
    """What stands out in an analysis (`Analysis.to_dict()`), in the order a person asks: spectra, dimension,
    overlap, adapters, explained adapters. A topic without data is left out or says why it has none."""
    made = [_spectra(data), _dimension(data), _overlap(data), _adapters(data), _explained(data)]
    return [finding for finding in made if finding is not None]


def percent(share: float) -> str:
    """0.834 -> "83 %" (no line break inside); what would round to 0 or 100 keeps the digits that tell it from them."""
    if 0 < share < 0.01:
        text = f"{100 * share:.2g}"
    elif 0.995 <= share < 1:
        text = ">99.9" if share > 0.999 else f"{100 * share:.1f}"
    else:
        text = f"{100 * share:.0f}"
    return f"{text}\u00a0%"


def verdict(value: float, low: float, high: float) -> str:
    """How an eigenvalue stands to a null band: a smaller one is a direction more nearly shared."""
    if value < low:
        return "more overlap than"
    return "less overlap than" if value > high else "as much overlap as"


def _known(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows if row.get(key) is not None]


def _spectra(data: dict[str, Any]) -> Finding:
    patterns = Counter(_known(data["spectra"], "pattern"))
    if not patterns:
        return Finding(
            "Spectra", "No spectra to read", "This basis was not mined from adapters, or holds no records of it."
        )
    total = patterns.total()
    first, *tied = _most(patterns)
    count = patterns[first]
    bars = []
    for attribute in data["basis"]["attributes"]:
        own = Counter(_known((s for s in data["spectra"] if s["attribute"] == attribute), "pattern"))
        if own:
            parts = [
                (p, own[p] / own.total(), f"{PATTERNS[p]}: {own[p]} of {own.total()}") for p in PATTERNS if own[p]
            ]
            most, *others = _most(own)
            often = percent(own[most] / own.total())
            text = f"a tie: {often} each" if others else f"{often} {SHORT[most]}"
            bars.append(Bar(attribute, parts, text))
    dropping = total - patterns["none"]
    have = f"{dropping} of {total} spectra {'has' if dropping == 1 else 'have'} one"
    if total == 1:
        have = "the one spectrum has one" if dropping else "the one spectrum has none"
    share = percent(count / total)
    headline = f"{PATTERNS[first].capitalize()} in {share} of the spectra"
    if total == 1:
        headline = PATTERNS[first].capitalize()
    elif tied:
        names = " and ".join(PATTERNS[p] for p in (first, *tied))
        headline = f"A tie: {names}, {share} of the spectra each"
    return Finding(
        "Spectra",
        headline,
        f"A drop, a sharp fall of the singular values, marks where a shared subspace ends: {have}.",
        bars,
        keys=[(pattern, SHORT[pattern]) for pattern in PATTERNS if patterns[pattern]],
    )


def _most(counts: Counter[str]) -> list[str]:
    """The most frequent patterns: several where they tie."""
    return [name for name in PATTERNS if counts[name] == max(counts.values())]


def _dimension(data: dict[str, Any]) -> Finding | None:
    dims = [s["dim"] for s in data["spectra"]]
    kept = _known(data["spectra"], "energy_at_dim")
    if not kept:
        return None
    span = f"{min(dims)}" if min(dims) == max(dims) else f"{min(dims)} to {max(dims)}"
    both = [(s["dim"], s["suggested_dim"]) for s in data["spectra"] if s["suggested_dim"] is not None]
    text = (
        "Energy: share of the sum of squared singular values of C; captured: share of the adapters' own squared norm; "
        "medians over the modules."
    )
    if both:
        counts = {
            "the one in use": sum(s == d for d, s in both),
            "larger": sum(s > d for d, s in both),
            "smaller": sum(s < d for d, s in both),
        }
        shares = ", ".join(f"{what} in {percent(count / len(both))}" for what, count in counts.items() if count)
        text += f" The suggested dimension (median {statistics.median(s for _, s in both):g}) is {shares}."
    bars = []
    for attribute in data["basis"]["attributes"]:
        rows = [s for s in data["spectra"] if s["attribute"] == attribute]
        energy, captured = _known(rows, "energy_at_dim"), _known(rows, "captured_energy")
        if energy:
            share = statistics.median(energy)
            value = percent(share)
            if captured:
                value += f", captured {percent(statistics.median(captured))}"
            bars.append(Bar(attribute, [("energy", share, f"energy kept: {percent(share)}")], value))
    noun = "direction keeps" if span == "1" else "directions keep"
    return Finding("Dimension", f"{span} {noun} {percent(statistics.median(kept))} of the energy", text, bars)


def _overlap(data: dict[str, Any]) -> Finding:
    pairs = data["pairs"]
    if not pairs:
        why = (
            "A basis of one attribute has no pairs."
            if len(data["basis"]["attributes"]) < 2
            else "No module has two attributes with directions."
        )
        return Finding("Overlap", "No pair of attributes to compare", why)
    closest = min(pairs, key=lambda pair: pair["median"])
    value, low, high = closest["median"], closest["null_low"], closest["null_high"]
    against = f"{verdict(value, low, high)} random subspaces ({_interval(closest['null_median'], low, high)})"
    scale = {"value": value, "low": low, "high": high}
    mismatched = _mismatched(data, closest)
    if mismatched:
        middle, *ends = mismatched
        same = verdict(value, *ends) == verdict(value, low, high)
        against += " and " if same else f", {verdict(value, *ends)} "
        against += f"mismatched layers of the same kind ({_interval(*mismatched)})"
        scale["permuted"] = middle
    text = f"Median smallest eigenvalue, {closest['side']} side (0 = a shared direction, 1 = orthogonal). "
    text += f"{against[0].upper()}{against[1:]}. "
    text += (
        f"{percent(closest['share_below_null'])} of {counted(closest['modules'], 'module')} "
        f"{'lies' if closest['modules'] == 1 else 'lie'} under the random band."
    )
    names = f"{closest['attribute']} and {closest['other']}"
    tied = sum(f"{pair['median']:.2f}" == f"{value:.2f}" for pair in pairs if pair["side"] == closest["side"])
    if any(pair["median"] < pair["null_low"] for pair in pairs) and tied > 1:
        headline = f"Most overlap: a tie of {tied} pairs, {value:.2f} (random {closest['null_median']:.2f})"
        text = f"One of them: {names}. {text}"
    elif any(pair["median"] < pair["null_low"] for pair in pairs):
        headline = f"Most overlap: {names}, {value:.2f} (random {closest['null_median']:.2f})"
    else:
        headline = "No pair overlaps more than random subspaces"
        text = f"Closest are {names}, {value:.2f}. {text}"
    return Finding("Overlap", headline, text, scale=scale)


def _interval(middle: float, low: float, high: float) -> str:
    return f"{middle:.2f}, 95\u00a0% band {low:.2f}–{high:.2f}"


def _mismatched(data: dict[str, Any], pair: dict[str, Any]) -> tuple[float, float, float] | None:
    """Mean, low and high of the permutation null of a pair and side: medians over the modules that have one."""
    key = ("attribute", "other", "side")
    same = (o for o in data["overlaps"] if all(o[name] == pair[name] for name in key))
    bands = _known(same, "permuted")
    if not bands:
        return None
    mean, low, high = (statistics.median(band[name] for band in bands) for name in ("mean", "low", "high"))
    return mean, low, high


def _adapters(data: dict[str, Any]) -> Finding | None:
    adapters = data["adapters"]
    if not adapters:
        return None
    muted = [a for a in adapters if a["muted"]]
    bars = []
    for attribute in data["basis"]["attributes"]:
        own = [a["muted"] for a in adapters if a["attribute"] == attribute]
        if own:
            count, share = sum(own), sum(own) / len(own)
            text = f"{count} of {len(own)} muted" if count else f"{len(own)}, none muted"
            bars.append(Bar(attribute, [("energy", 1 - share, "not muted"), ("muted", share, "muted")], text))
    if not muted:
        highest = max(adapters, key=lambda a: a["muted_share"])
        text = "Every adapter shapes its attribute's subspace."
        if highest["muted_share"]:
            share = percent(highest["muted_share"])
            text += f" The lowest weights: {highest['adapter']}, muted in {share} of its modules."
        headline = (
            "The one adapter is not muted" if len(adapters) == 1 else f"None of {len(adapters)} adapters is muted"
        )
        return Finding("Adapters", headline, text, bars)
    names = [f"{a['adapter']} ({a['attribute']}, in {percent(a['muted_share'])} of its modules)" for a in muted[:5]]
    rest = f" and {len(muted) - 5} more" if len(muted) > 5 else ""
    verb = "is" if len(muted) == 1 else "are"
    return Finding(
        "Adapters",
        f"{len(muted)} of {counted(len(adapters), 'adapter')} {verb} muted",
        f"Weighted down as unlike the others: {', '.join(names)}{rest}.",
        bars,
    )


def _explained(data: dict[str, Any]) -> Finding | None:
    rows = data["explained"]
    if not rows:
        return None
    best = max(rows, key=lambda row: (not row["source_of"], row["joint"]))
    bars = [
        Bar(
            f"{row['adapter']} (a source)" if row["source_of"] else row["adapter"],
            [("energy", row["joint"], f"joint share {percent(row['joint'])}")],
            f"{percent(row['joint'])} (random {percent(row['expected'])})",
        )
        for row in rows[:5]
    ]
    whose = f"{best['adapter']}, a source of it" if best["source_of"] else best["adapter"]
    own = [row for row in rows if bool(row["source_of"]) == bool(best["source_of"])]
    level = sum(percent(row["joint"]) == percent(best["joint"]) for row in own)
    if level > 1:
        whose = f"each of {level} adapters: a tie"
    return Finding(
        "Explained adapters",
        f"The basis holds {percent(best['joint'])} of {whose}",
        "Share of an adapter's squared norm, all attributes together, and what a random update of the same size would "
        "have. A source of the basis says little: it was mined from it.",
        bars,
    )
