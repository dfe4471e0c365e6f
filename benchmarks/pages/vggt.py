"""The page of `vggt.py`."""

from __future__ import annotations

from typing import Any

from pages._words import bullets, join, number, page, plural, prose, rounds, table

TITLE = "VGGT"
QUESTION = (
    "What do a forward pass and a training step of VGGT take by number of frames, and what does keeping fewer layers "
    "save?"
)
FORWARD, KEEPING = "forward", "forward, all layers kept"


def markdown(result: dict[str, Any]) -> str:
    model, settings = result["model"], result["settings"]
    cases = {(c["kind"], c["frames"]): c for c in result["cases"]}
    kinds = list(dict.fromkeys(c["kind"] for c in result["cases"]))
    frames = settings["frames"]
    precision = settings.get("precision", "float32")
    where = "on a CPU" if settings["device"] == "cpu" else f"on one {result['machine'].get('gpu', settings['device'])}"
    words = {
        "float32": "float32",
        "autocast": f"float32 weights under {settings.get('autocast', 'bf16')} autocast",
        "bfloat16": "bf16 weights",
    }
    opening = prose(
        f"`VggtModel` {where}, {words[precision]}: the preset `{settings['preset']}` ({model['embed_dim']} wide,",
        f"{model['encoder_depth']} encoder and {model['depth']} + {model['depth']} aggregator blocks) at",
        f"{model['image_size']} px, random weights. Adapters on all aggregator linears; a training step is forward",
        f"and backward, no optimiser. Seconds ({rounds(settings['rounds'])}) and peak memory above the weights.",
    )

    def cell(kind: str, count: int) -> str:
        case = cases[kind, count]
        return f"{number(case['seconds']['median'])} s, {number(case['peak_mib'])} MiB"

    rows = [[kind, *(cell(kind, count) for count in frames)] for kind in kinds]
    head = ["", *(plural(count, "frame") for count in frames)]
    return page(opening, table(head, rows), _layers(cases, frames[-1]), _against_lora(cases, frames))


def _layers(cases: dict[tuple[str, int], dict[str, Any]], count: int) -> str:
    few, every = cases[FORWARD, count], cases[KEEPING, count]
    peaks = f"{number(few['peak_mib'])} MiB against {number(every['peak_mib'])}"
    return prose(
        f"Keeping only the layers that the heads read holds {number(few['kept_mib'])} MiB of",
        f"{number(every['kept_mib'])} at {plural(count, 'frame')}; the peak of a forward pass is {peaks}.",
    )


def _against_lora(cases: dict[tuple[str, int], dict[str, Any]], frames: list[int]) -> str:
    """Every kind of cores against LoRA of the lowest rank: range over the frames."""
    kinds = [kind for kind in dict.fromkeys(kind for kind, _ in cases) if kind.startswith("cores")]
    rival = next((kind for kind, _ in cases if kind.startswith("LoRA")), None)
    if rival is None or not kinds:
        return ""
    points = []
    for kind in kinds:
        ratios = {
            "time": [cases[kind, n]["seconds"]["median"] / cases[rival, n]["seconds"]["median"] for n in frames],
            "peak": [cases[kind, n]["peak_mib"] / cases[rival, n]["peak_mib"] for n in frames],
        }
        parts = [f"{_span(found)} of its {what}" for what, found in ratios.items()]
        points.append(f"{kind}: {join(parts)}.")
    return page(f"Against {rival}, over these numbers of frames:", bullets(*points))


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low} x" if low == high else f"{low} to {high} x"
