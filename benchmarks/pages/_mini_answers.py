"""The answers of `mini_study.py`, in sentences that follow from its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study.statistics import row_spread

from pages._words import bullets, join, number, percent, plural

Row = Mapping[str, Any]
SETS = {"test": "in domain", "cross": "across", "generic": "where it came from"}
NAMES = {"acc": "Acc", "comp": "Comp", "nc": "NC", "abs_rel": "AbsRel", "delta": "δ1.25"}
#: The columns that answers count; the other ones are in the tables, and their verdicts in the JSON.
COUNTED = ("acc", "abs_rel")
METHODS = {
    "none": "none",
    "full": "full",
    "lora": "LoRA r=",
    "pissa": "PiSSA r=",
    "adalora": "AdaLoRA r=",
    "psv": "PSV D=",
    "random": "random D=",
    "attrsub": "mined D=",
    "oracle": "oracle D=",
    "foreign": "foreign oracle D=",
}


def answers(result: Row) -> str:
    """All questions of the study, each with what was found."""
    found = result["answers"]
    return bullets(
        _looked(result),
        _exist(found),
        _agree(result),
        _apart(found),
        *(_versus(result, other) for other in ("psv", "random")),
        _why(result),
        _fewer(result),
        _losses(result),
        _forgetting(result),
    )


def _looked(result: Row) -> str:
    """AbsRel with others' pictures over AbsRel with one's own, least and most over the tuned rows of a benchmark."""
    parts = []
    for benchmark in result["settings"]["benchmarks"]:
        ratios = [
            row["blind"]["abs_rel"] / own
            for row in result["rows"]
            if (row["benchmark"], row["group"]) == (benchmark, "main")
            and row["method"] != "none"
            and row.get("blind")
            and (own := row["seeds"].get("0", {}).get("test", {}).get("abs_rel"))
        ]
        if ratios:
            parts.append(f"{benchmark} {number(min(ratios))} to {number(max(ratios))} times")
    if not parts:
        return ""
    return (
        "**Do tuned models look at the pictures?** With those of another sequence AbsRel is " + "; ".join(parts) + "."
    )


def _exist(answers: Row) -> str:
    found = answers["exist"]
    if not found:
        return "**Do the subspaces exist?** Not measured."
    rows = found["attributes"]
    above = [name for name, row in rows.items() if row["gap"]["verdict"] == "better"]
    below = [name for name, row in rows.items() if row["gap"]["verdict"] == "worse"]
    own, mixed = (sum(row[key]["mean"] for row in rows.values()) / len(rows) for key in ("own", "shuffled"))
    said = f"beyond two standard errors for {join(above)}" if above else "for no attribute beyond two standard errors"
    return " ".join(
        [
            f"**Do the subspaces exist?** Of an adapter that was held out, {percent(own)} of the energy lies in the",
            f"{found['dim']} directions mined from others of its attribute, {percent(mixed)} in those mined from as",
            f"many of all attributes (shuffled), {percent(found['random'])} in random ones. Own above shuffled {said}"
            + (f"; below it for {join(below)}." if below else "."),
            "Shuffled far above random: most of what is mined is common to all attributes."
            if mixed > 2 * found["random"] and own < 2 * mixed
            else "",
        ]
    ).strip()


def _agree(result: Row) -> str:
    found = result["diagnosis"]
    if not found:
        return ""
    parts = []
    for side in ("output", "input"):
        one = found[side]
        z = one.get("z")
        apart = "" if z is None else f" ({z:+.1f} deviations from shuffled labels)"
        parts.append(
            f"on the {side} side {number(one['within'])} within an attribute, {number(one['across'])} across, "
            f"{number(one['random'])} at random{apart}"
        )
    return "**Do source adapters agree?** Mean squared cosine " + "; ".join(parts) + "."


def _apart(answers: Row) -> str:
    found = answers["apart"]
    if not found:
        return "**Are attributes disentangled?** Not measured."
    parts = []
    for name, row in found.items():
        basis, side = name.split()
        parts.append(
            f"{basis} basis, {side} side: {row['like_random']} of {row['pairs']} pairs overlap no more than random "
            f"subspaces (smallest eigenvalue {number(row['smallest'])}, random {number(row['null'])})"
        )
    return "**Are attributes disentangled?** " + "; ".join(parts) + "."


def _counts(comparisons: Sequence[Row]) -> str:
    """ "(3 comparisons) in domain Acc better 2, no difference 1; AbsRel worse 3 | across ...", of COUNTED columns."""
    parts = []
    for part, words in SETS.items():
        said = []
        for name in COUNTED:
            given = [
                v["verdict"] for one in comparisons for v in one["verdicts"] if (v["set"], v["column"]) == (part, name)
            ]
            if given:
                counts = [f"{word} {given.count(word)}" for word in sorted(set(given))]
                said.append(f"{NAMES[name]} {', '.join(counts)}")
        parts += [f"{words} {'; '.join(said)}"] if said else []
    return f"({plural(len(comparisons), 'comparison')}) " + " | ".join(parts) + "."


def _versus(result: Row, other: str) -> str:
    chosen = [one for one in result["answers"]["same_size"] if one["other"].startswith(f"{other}-")]
    if not chosen:
        return ""
    title = {"psv": "PSV", "random": "a random basis"}[other]
    return f"**Is the mined basis better than {title} at equal D?** {_counts(chosen)}"


def _why(result: Row) -> str:
    """What each basis could have learnt of full fine-tuning's update."""
    parts = []
    for benchmark, found in result["explained"].items():
        if found is not None and "inside" in found:
            said = [f"{label_of(label)} {percent(share)}" for label, share in found["inside"].items()]
            parts.append(f"{benchmark}: {', '.join(said)}")
    if not parts:
        return ""
    said = "**Why?** Of the energy of full fine-tuning's update there lies inside: " + "; ".join(parts) + "."
    return said + _best(result)


def _best(result: Row) -> str:
    """AbsRel in domain of the oracle beside the other bases of its D."""
    rows = {(row["benchmark"], row["label"]): row for row in result["rows"]}
    parts: dict[str, list[str]] = {}
    for one in result["answers"]["oracle"]:
        found = [mean_of(rows[one["benchmark"], one[key]], "test", "abs_rel") for key in ("one", "other")]
        values = [value for value in found if value is not None]
        if len(values) == 2:
            own, other = (number(100 * value) for value in values)
            row = parts.setdefault(f"{one['benchmark']} {label_of(one['one'])} {own}", [])
            row.append(f"{label_of(one['other']).partition(' ')[0]} {other}")
    if not parts:
        return ""
    said = "; ".join(f"{first} ({', '.join(others)})" for first, others in parts.items())
    return (
        f" With the oracle, the singular vectors of that update (foreign: of another benchmark's), AbsRel is: {said}."
    )


def _fewer(result: Row) -> str:
    chosen = result["answers"]["fewer"]
    if not chosen:
        return "**Better than LoRA with four times fewer parameters?** No two rows are that far apart."
    return f"**Better than LoRA with at least four times fewer parameters?** {_counts(chosen)}"


def _losses(result: Row) -> str:
    """Where LoRA of at least four times the size is ahead in Acc or AbsRel: by mined row, set and rank."""
    if not result["answers"]["fewer"]:
        return ""
    lost: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in result["answers"]["fewer"]:
        for part in SETS:
            verdicts = [v for v in one["verdicts"] if v["set"] == part and v["column"] in COUNTED]
            if any(v["verdict"] == "worse" for v in verdicts):
                row = lost.setdefault((one["benchmark"], label_of(one["one"])), {})
                row.setdefault(SETS[part], []).append(one["other"].partition("-")[2])
    if not lost:
        return "**When is it not?** In none of these comparisons is Acc or AbsRel worse beyond two standard errors."
    said = [
        f"{benchmark} {label} ({'; '.join(f'{words}: r = {join(ranks)}' for words, ranks in sets.items())})"
        for (benchmark, label), sets in lost.items()
    ]
    return (
        "**When is it not?** Behind a LoRA of at least four times its size in Acc or AbsRel: " + ", ".join(said) + "."
    )


def _forgetting(result: Row) -> str:
    """AbsRel on generic scenes: the mean change of each method against the base, over benchmarks."""
    base = {row["benchmark"]: mean_of(row, "generic", "abs_rel") for row in result["rows"] if row["method"] == "none"}
    changes: dict[str, list[float]] = {}
    for row in result["rows"]:
        now, before = mean_of(row, "generic", "abs_rel"), base.get(row["benchmark"])
        if row["group"] == "main" and row["method"] != "none" and now is not None and before:
            changes.setdefault(label_of(row["label"]), []).append(now / before - 1)
    if not changes:
        return ""
    means = sorted((sum(values) / len(values), label) for label, values in changes.items())
    (least, one), (most, other) = means[0], means[-1]
    cores = [f"{label} {100 * value:+.0f} %" for value, label in means if label.startswith(METHODS["attrsub"])]
    return (
        f"**What is forgotten?** AbsRel on generic scenes changes by {100 * least:+.0f} % ({one}) to "
        f"{100 * most:+.0f} % ({other}), mean over benchmarks" + (f"; {', '.join(cores)}." if cores else ".")
    )


def label_of(label: str) -> str:
    method, _, size = label.partition("-")
    return METHODS[method] + size if method in METHODS and (size.isdigit() or not size) else label


def mean_of(row: Row, part: str, name: str) -> float | None:
    return row_spread(row, part, name)["mean"]
