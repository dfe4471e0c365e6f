"""The page of `mini_study.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study.statistics import spread

from pages._words import bullets, join, number, page, percent, plural, prose, table

TITLE = "The paper's tables in miniature"
QUESTION = (
    "Do attribute subspaces exist in a small VGGT, are they apart, and is fine-tuning in them better than the rest at "
    "equal or fewer parameters?"
)
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


def markdown(result: Row) -> str:
    parts = [_opening(result), "### Answers", _answers(result)]
    for number_, benchmark in enumerate(result["settings"]["benchmarks"], 1):
        parts += [f"### Table {number_}: {result['units'][benchmark]['title']}, a stand-in", _table(result, benchmark)]
    parts += ["### Table 4: the mined basis beside PSV and random ones at equal D", _same_size(result)]
    if result["answers"]["oracle"]:
        parts += ["### What the best basis would bring", _oracle(result)]
    parts += ["### Table 5, supplement 1 and our ablations", _ablations(result)]
    parts += ["### What was mined", _mined(result), "### How to read it", _rules(result)]
    shown = {"mini_study_accuracy": "Accuracy against trained parameters", "mini_study_basis": "Spectra and overlaps"}
    parts += [f"![{words}](figures/{stem}.png)" for stem, words in shown.items() if stem in _drawn(result)]
    return page(*parts)


def figures(result: Row) -> dict[str, Any]:
    """Accuracy against parameters with error bars; spectra and overlaps of the default basis with nulls."""
    from study import figures as drawn

    made = {"mini_study_accuracy": drawn.accuracy, "mini_study_basis": drawn.basis}
    return {stem: made[stem](result) for stem in _drawn(result)}


def _drawn(result: Row) -> list[str]:
    """Stems of the figures that there are numbers for."""
    stems = ["mini_study_accuracy"] if any(row["method"] != "none" for row in result["rows"]) else []
    return stems + (["mini_study_basis"] if (result["bases"].get("default") or {}).get("spectra") else [])


# --- the opening ----------------------------------------------------------------------------------------------------


def _opening(result: Row) -> str:
    settings, model = result["settings"], result["model"]
    minutes = sum(result["minutes"].values())
    sources = result["sources"].get(f"rank-{settings['source_rank']}") or {"adapters": 0}
    missing = result["missing"]
    return prose(
        f"`{model['name']}`, {number(model['parameters'] / 1e6)} million parameters of which",
        f"{number(model['aggregator'] / 1e6)} are the aggregator's, {model['pixels']} pixels;",
        f"{plural(sources['adapters'], 'source adapter')} of rank {settings['source_rank']},",
        f"{settings['source_steps']} steps each, on datasets of {settings['scenes']} scenes x {settings['views']}",
        f"views (the paper's have 200 x 100); every method {plural(settings['steps'], 'step')} of",
        f"{plural(settings['images'], 'image')} on {settings['share']:g} of {settings['train']} scenes,",
        f"{plural(settings['seeds'], 'seed')}. `{result['command']}` took {number(minutes / 60)} hours of one core.",
        "All data is drawn: these are not the paper's benchmarks, and none of its numbers.",
        f"**{plural(missing, 'run')} of the plan are missing here.**" if missing else "",
    )


# --- the answers ----------------------------------------------------------------------------------------------------


def _answers(result: Row) -> str:
    answers = result["answers"]
    return bullets(
        _looked(result),
        _exist(answers),
        _agree(result),
        _apart(answers),
        *(_versus(result, "same_size", other) for other in ("psv", "random")),
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


def _versus(result: Row, key: str, other: str) -> str:
    chosen = [one for one in result["answers"][key] if one["other"].startswith(f"{other}-")]
    if not chosen:
        return ""
    title = {"psv": "PSV", "random": "a random basis"}[other]
    return f"**Is the mined basis better than {title} at equal D?** {_counts(chosen)}"


def _why(result: Row) -> str:
    """What each basis could have learnt of full fine-tuning's update."""
    parts = []
    for benchmark, found in result["explained"].items():
        if found is not None and "inside" in found:
            said = [f"{_label(label)} {percent(share)}" for label, share in found["inside"].items()]
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
        found = [_mean(rows[one["benchmark"], one[key]], "test", "abs_rel") for key in ("one", "other")]
        values = [value for value in found if value is not None]
        if len(values) == 2:
            own, other = (number(100 * value) for value in values)
            row = parts.setdefault(f"{one['benchmark']} {_label(one['one'])} {own}", [])
            row.append(f"{_label(one['other']).partition(' ')[0]} {other}")
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
                row = lost.setdefault((one["benchmark"], _label(one["one"])), {})
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
    base = {row["benchmark"]: _mean(row, "generic", "abs_rel") for row in result["rows"] if row["method"] == "none"}
    changes: dict[str, list[float]] = {}
    for row in result["rows"]:
        now, before = _mean(row, "generic", "abs_rel"), base.get(row["benchmark"])
        if row["group"] == "main" and row["method"] != "none" and now is not None and before:
            changes.setdefault(_label(row["label"]), []).append(now / before - 1)
    if not changes:
        return ""
    means = sorted((sum(values) / len(values), label) for label, values in changes.items())
    (least, one), (most, other) = means[0], means[-1]
    cores = [f"{label} {100 * value:+.0f} %" for value, label in means if label.startswith(METHODS["attrsub"])]
    return (
        f"**What is forgotten?** AbsRel on generic scenes changes by {100 * least:+.0f} % ({one}) to "
        f"{100 * most:+.0f} % ({other}), mean over benchmarks" + (f"; {', '.join(cores)}." if cores else ".")
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def _label(label: str) -> str:
    method, _, size = label.partition("-")
    return METHODS[method] + size if method in METHODS and (size.isdigit() or not size) else label


def _mean(row: Row, part: str, name: str) -> float | None:
    return spread([one[part].get(name) for one in row["seeds"].values()])["mean"]


def _cell(row: Row, part: str, name: str, scale: float) -> str:
    """Mean ± standard deviation over seeds, in the printed unit."""
    factor = 1 / scale if name in ("acc", "comp") else 100
    found = spread([one[part].get(name) for one in row["seeds"].values()])
    if found["mean"] is None:
        return "-"
    mean = number(found["mean"] * factor)
    return mean if found["sd"] is None else f"{mean} ± {number(found['sd'] * factor, 2)}"


def _columns(result: Row, benchmark: str) -> list[tuple[str, str]]:
    points = [("test", name) for name in ("acc", "comp", "nc", "abs_rel")]
    across = ("abs_rel", "delta") if result["units"][benchmark]["cross"] == "depth" else ("acc", "comp", "nc")
    return points + [("cross", name) for name in across] + [("generic", "abs_rel"), ("generic", "acc")]


def _table(result: Row, benchmark: str) -> str:
    rows = [row for row in result["rows"] if row["benchmark"] == benchmark and row["group"] == "main"]
    rows.sort(key=lambda row: (list(METHODS).index(row["method"]), row["trainable"]))
    scale, columns = result["units"][benchmark]["scale"], _columns(result, benchmark)
    body = []
    for row in rows:
        seconds = spread([one.get("seconds") for one in row["seeds"].values()])["mean"]
        rate = f"{row['rate']:g}" + (" (border)" if row.get("border") else "") if row.get("rate") else "-"
        cells = [_cell(row, part, name, scale) for part, name in columns]
        blind = (row.get("blind") or {}).get("abs_rel")
        cells.append("-" if blind is None else number(100 * blind))
        body.append([_label(row["label"]), number(row["trainable"]), *cells, rate, seconds])
    heads = [f"{NAMES[name]} {SETS[part]}" for part, name in columns] + ["AbsRel with others' pictures"]
    legend = prose(
        f"Acc and Comp in {scale:g} {result['units'][benchmark]['unit']}, the rest in percent; mean ± standard",
        "deviation over seeds; seconds of the training on one core.",
    )
    return page(table(["", "parameters", *heads, "rate", "seconds"], body), legend)


def _verdict(one: Row, part: str, name: str, scale: float) -> str:
    for v in one["verdicts"]:
        if (v["set"], v["column"]) == (part, name):
            factor = 1 / scale if name in ("acc", "comp") else 100
            error = "" if v["se"] is None else f" ± {number(v['se'] * factor, 2)}"
            return (
                f"{'-' if v['difference'] < 0 else '+'}{number(abs(v['difference']) * factor)}{error}, {v['verdict']}"
            )
    return "-"


def _same_size(result: Row) -> str:
    body = [_compared(result, one) for one in result["answers"]["same_size"]]
    if not body:
        return "Not measured."
    return page(table(["benchmark", "", "against", *_heads()], body), _difference())


def _oracle(result: Row) -> str:
    body = [_compared(result, one) for one in result["answers"]["oracle"]]
    shares = [
        f"{benchmark} {join([f'D={d} {percent(value)}' for d, value in found['inside'].items()])}"
        for benchmark, found in result["oracle"].items()
        if found
    ]
    note = prose(_difference(), f"Of the update there lies inside the oracle: {'; '.join(shares)}.")
    return page(table(["benchmark", "", "against", *_heads()], body), note)


def _heads() -> list[str]:
    return ["Acc in domain", "AbsRel in domain", "Acc across", "AbsRel across", "AbsRel where it came from"]


def _compared(result: Row, one: Row) -> list[str]:
    scale = result["units"][one["benchmark"]]["scale"]
    pairs = [("test", "acc"), ("test", "abs_rel"), ("cross", "acc"), ("cross", "abs_rel"), ("generic", "abs_rel")]
    names = [one["benchmark"], _label(one["one"]), _label(one["other"])]
    return names + [_verdict(one, part, name, scale) for part, name in pairs]


def _difference() -> str:
    return prose("Differences at equal seeds ± their standard error; less is better in all of these columns.")


def _ablations(result: Row) -> str:
    groups = {(row["benchmark"], row["label"]): row for row in result["rows"]}
    body = []
    for one in result["answers"]["ablations"]:
        row = groups[one["benchmark"], one["one"]]
        bench, label, _, *cells = _compared(result, one)
        body.append([bench, row["group"], label, number(row["trainable"]), *cells])
    if not body:
        return "Not measured."
    other = _label(result["answers"]["ablations"][0]["other"])
    kept = sum(row.get("orthonormal_modules", 0) for row in groups.values())
    note = f"In {plural(kept, 'module')} raw columns were dependent, and orthonormal ones stayed." if kept else ""
    heads = ["benchmark", "changed", "", "parameters", *_heads()]
    return page(prose(f"Each against {other}, by one change."), table(heads, body), prose(_difference(), note))


def _mined(result: Row) -> str:
    body = []
    for name, found in result["bases"].items():
        if not found:
            continue
        dims = ", ".join(
            f"{a} {number(float(d['mean']))} ({d['least']} to {d['most']})" for a, d in found["dims"].items()
        )
        weight = found.get("weight_of_spoiled")
        body.append([name, dims, "-" if weight is None else number(float(weight))])
    if not body:
        return "Nothing yet."
    return table(["basis", "directions per module: mean (least to most)", "weight of the spoiled adapter"], body)


def _rules(result: Row) -> str:
    borders = [f"{one['benchmark']} {_label(one['label'])}" for one in result["sweeps"] if one["border"]]
    note = f"The best rate stayed on the border of what was tried for {join(borders)}." if borders else ""
    return bullets(*result["rules"].values(), note)
