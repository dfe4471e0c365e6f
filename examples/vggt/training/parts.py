"""What is trained where: cores, LoRA, full and frozen, counted by part of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

#: Parts in the order in which data goes through them.
PARTS = ("encoder", "aggregator", "camera", "depth", "point")
KINDS = ("cores", "lora", "full", "frozen")
_WRAPPERS = ("base_model.", "model.", "module.", "_orig_mod.")
_TOPS = {"camera_head": "camera", "depth_head": "depth", "point_head": "point"}


def part_of(name: str) -> str:
    """The part that a parameter or module belongs to, by its name, with PEFT's or DDP's prefixes or without."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    if name.startswith("aggregator.patch_embed."):
        return "encoder"
    return _TOPS.get(name.partition(".")[0], "aggregator")


@dataclass
class Parts:
    """tensors, numbers: (part, kind) -> how many modules (of kinds full and frozen: tensors), how many parameters.

    bases: numbers in the frozen A and B of cores, which are no part of the model itself.
    """

    tensors: Counter[tuple[str, str]] = field(default_factory=Counter)
    numbers: Counter[tuple[str, str]] = field(default_factory=Counter)
    bases: int = 0

    def trained(self, part: str | None = None) -> int:
        """Parameters that are trained, of one part or of all."""
        return sum(n for (p, kind), n in self.numbers.items() if kind != "frozen" and part in (None, p))

    def table(self) -> str:
        """Text: a line per part, a column per kind with how many modules and how many parameters."""
        rows = [["", "cores", "LoRA", "full", "frozen", "trained"]]
        present = [part for part in PARTS if any((part, kind) in self.numbers for kind in KINDS)]
        for part in present:
            cells = [self._cell(part, kind) for kind in KINDS]
            rows.append([part, *cells, f"{self.trained(part):,}"])
        rows.append(["total", *(self._total(kind) for kind in KINDS), f"{self.trained():,}"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        if self.bases:
            lines.append(f"the bases of the cores hold {self.bases:,} numbers, frozen")
        return "\n".join(lines)

    def _cell(self, part: str, kind: str) -> str:
        count, size = self.tensors[part, kind], self.numbers[part, kind]
        return f"{count} x, {size:,}" if count else "-"

    def _total(self, kind: str) -> str:
        count = sum(n for (_, k), n in self.tensors.items() if k == kind)
        size = sum(n for (_, k), n in self.numbers.items() if k == kind)
        return f"{count} x, {size:,}" if count else "-"


def count_parts(model: nn.Module) -> Parts:
    """Count a model, adapted or not."""
    found = Parts()
    adapted: set[tuple[str, str, str]] = set()
    for name, parameter in model.named_parameters():
        if not {"original_module", "ranknum"}.isdisjoint(name.split(".")):
            continue  # the frozen twin of a head that is trained in full; AdaLoRA's count of ranks
        kind = _kind(name) if parameter.requires_grad else "frozen"
        part = part_of(name)
        found.numbers[part, kind] += parameter.numel()
        if kind in ("cores", "lora"):
            adapted.add((part, kind, name.partition(".attrsub_")[0].partition(".lora_")[0]))
        else:
            found.tensors[part, kind] += 1
    found.tensors.update(Counter((part, kind) for part, kind, _ in adapted))
    found.bases = sum(_bases(module) for module in model.modules() if isinstance(module, BaseTunerLayer))
    return found


def _kind(name: str) -> str:
    words = name.split(".")
    if "attrsub_M" in words:
        return "cores"
    lora = ("lora_A", "lora_B", "lora_E", "attrsub_lora_A", "attrsub_lora_B")
    return "lora" if any(word in lora for word in words) else "full"


def _bases(module: nn.Module) -> int:
    held = [getattr(module, name, None) for name in ("attrsub_A", "attrsub_B")]
    return sum(store[adapter].numel() for store in held if store is not None for adapter in store)


__all__ = ["PARTS", "Parts", "count_parts", "part_of"]
