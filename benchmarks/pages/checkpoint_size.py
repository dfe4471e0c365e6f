"""The page of `checkpoint_size.py`."""

from __future__ import annotations

from typing import Any

from pages._words import number, page, prose, table

TITLE = "Size on disk"
QUESTION = "How large is an adapter on disk, for LoRA, VeRA, PSOFT and cores on the same linears, and the basis once?"


def markdown(result: dict[str, Any]) -> str:
    adapters, pairs = result["adapters"], result["pairs"]
    scaled = [name for name, row in adapters.items() if row["counted"] != pairs]
    opening = prose(
        f"{result['modules']} linears of VGGT's aggregator, {result['settings']['dtype']}, every file that",
        "save_pretrained writes.",
        f"{' and '.join(scaled)}: saved on one of {pairs} pairs of blocks and multiplied." if scaled else "",
    )
    cores = [row["bytes"] for name, row in adapters.items() if name.startswith("cores")]
    columns = ("", "trained numbers", "MB", "adapters of it in the size of the basis")
    basis = result["basis_bytes"]
    rows = [
        (name, number(row["trained"]), number(row["bytes"] / 1e6), number(basis / row["bytes"]))
        for name, row in adapters.items()
    ]
    rows.append(("the basis, once for all adapters", "-", number(basis / 1e6), "-"))
    lora = next((row["bytes"] for name, row in adapters.items() if name.startswith("LoRA")), None)
    closing = ""
    if lora and cores and lora > cores[0]:
        count = basis / (lora - cores[0])
        closing = prose(
            f"With the basis of {number(basis / 1e6)} MB counted, the smallest cores take less disk than the smallest",
            f"LoRA from {number(count)} adapters on.",
        )
    return page(opening, table(columns, rows), closing)
