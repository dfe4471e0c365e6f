"""The page of `mini_study.py`."""

from __future__ import annotations

from typing import Any

from study.statistics import row_spread, spread

from pages._mini_answers import METHODS, NAMES, SETS, Row, answers, label_of
from pages._words import bullets, join, number, page, percent, plural, prose, table

TITLE = "The paper's tables in miniature"
QUESTION = (
    "Do attribute subspaces exist in a small VGGT, are they apart, and is fine-tuning in them better than the rest at "
    "equal or fewer parameters?"
)


def markdown(result: Row) -> str:
    parts = [_opening(result), _offset(result), "### Answers", answers(result)]
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


def _offset(result: Row) -> str:
    """What to know of results that are older than the conversion between pixel conventions."""
    if result.get("pixels") == "centers":
        return ""
    return prose(
        "**These runs are older than two corrections.** Acc, Comp and NC of the models were measured with predictions",
        "half a pixel off the truth, and the learning rates were chosen by them; AbsRel, the bases and the training",
        "are not affected otherwise. And some of the texture and lighting scenes that the sources saw were nearly one",
        "color or flatly lit; such scenes are drawn again now.",
    )


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


# --- tables ---------------------------------------------------------------------------------------------------------


def _cell(row: Row, part: str, name: str, scale: float) -> str:
    """Mean ± standard deviation over seeds, in the printed unit."""
    factor = 1 / scale if name in ("acc", "comp") else 100
    found = row_spread(row, part, name)
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
        body.append([label_of(row["label"]), number(row["trainable"]), *cells, rate, seconds])
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
    names = [one["benchmark"], label_of(one["one"]), label_of(one["other"])]
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
    other = label_of(result["answers"]["ablations"][0]["other"])
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
    borders = [f"{one['benchmark']} {label_of(one['label'])}" for one in result["sweeps"] if one["border"]]
    note = f"The best rate stayed on the border of what was tried for {join(borders)}." if borders else ""
    return bullets(*result["rules"].values(), note)
