"""The page of `tuner.py`."""

from __future__ import annotations

from typing import Any

from pages._words import bullets, number, page, percent, prose, rounds, table, targets

TITLE = "A training step"
QUESTION = "What does a training step cost with each adapter, what does it keep, and when is the update folded into W?"
BASE = "frozen base"


def markdown(result: dict[str, Any]) -> str:
    cases = result["cases"]
    shape = cases[0]
    settings = result["settings"]
    where = "on a CPU" if settings["device"] == "cpu" else f"on {settings['device']}"
    opening = prose(
        f"Blocks of VGGT's size (width {shape['width']}, {shape['heads']} heads), {settings['dtype']}, {where};",
        "adapters on all four linears; forward and backward. Times are ratios to the frozen base in the same round,",
        f"{rounds(settings['rounds'])}; kept: what autograd holds for the backward pass, beyond the base.",
    )
    reached = targets(result) if "targets" in result else ""
    return page(opening, *map(_case, cases), reached, _crossover(result), _narrow(result))


def _case(case: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{row['trainable_parameters']:,}",
            row["seconds"]["median"],
            row["ratio"],
            row["cpu_ratio"],
            row["gflop_ratio"],
            row["saved_mib"],
            float(row["saved_over_base_mib"]),
        )
        for name, row in case["contenders"].items()
    ]
    blocks = "one block" if case["blocks"] == 1 else f"{case['blocks']} blocks"
    head = (f"{case['tokens']} tokens, {blocks}", "trained", "seconds", "/ base", "CPU / base", "FLOP / base")
    return table((*head, "kept, MiB", "over base"), rows)


def _crossover(result: dict[str, Any]) -> str:
    """Every shape, tokens and width: thin / folded of the three passes, and what auto takes."""
    if "crossover" not in result:
        return ""
    found: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in result["crossover"]:
        found.setdefault((f"{row['n']} x {row['m']}", row["tokens"], row["d"]), {})[row["pass"]] = row
    names = ("forward", "backward", "inference")
    rows = [(*key, *(_ratio(passes[name]) for name in names)) for key, passes in found.items()]
    choice = result["choice"]
    words = prose(
        'One linear, factored over folded: above 1 folding is faster; bold is what `forward_mode="auto"` folds.',
        "Forward and backward are those of training, inference is a forward pass without gradients.",
    )
    points = bullets(
        f"The choice (`TRAFFIC` = {number(choice['traffic'])}, `FOLDING` = {number(choice['folding'])} in"
        f" `peft_attrsub/tuner/forward_choice.py`) loses {percent(choice['lost'])} of the time of these passes against"
        " always taking the faster way.",
        f"The constants that would suit this run best, {number(choice['fitted_traffic'])} and"
        f" {number(choice['fitted_folding'])}, lose {percent(choice['fitted_lost'])}.",
    )
    return page(words, table(("W", "tokens", "D", *names), rows), points)


def _ratio(row: dict[str, Any]) -> str:
    ratio = number(row["ratio"])
    return f"**{ratio}**" if row["auto"] == "folded" else ratio


def _narrow(result: dict[str, Any]) -> str:
    if "bfloat16" not in result:
        return ""
    words = prose(
        "In bfloat16 `auto` never folds: W + A M B^T is rounded to W's last place. Relative error of the update that",
        "reaches the output, against float64:",
    )
    rows = [(number(row["relative_update"]), row["factored"], row["folded"]) for row in result["bfloat16"]]
    return page(words, table(("update / W (Frobenius)", "factored", "folded"), rows))
