"""Rows of the tables: what is fine-tuned, with which basis, and whose learning rate it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .mining import ALPHAS, RULES, shared_dims
from .settings import Study


@dataclass(frozen=True)
class Entry:
    """One row. label: unique. family: whose rates a sweep begins with. options: of ModelSettings. basis: variant that
    is mined. like: label of the entry whose learning rate it takes; None: it has a sweep of its own. raw: columns of
    the attributes side by side, without orthogonalisation. group: "main" or the ablation."""

    label: str
    family: str
    options: dict[str, Any] = field(hash=False)
    basis: str | None = None
    like: str | None = None
    raw: bool = False
    group: str = "main"

    @property
    def method(self) -> str:
        return str(self.options["method"])

    def settings(self, out: Path) -> dict[str, Any]:
        """Of ModelSettings, with the folder of the basis."""
        if self.basis is None:
            return dict(self.options)
        return self.options | {"basis": [str(out / "bases" / self.basis / "basis")]}


def main_entries(study: Study) -> list[Entry]:
    """Tables 1 to 4: every method at its sizes."""
    found = []
    for method in study.methods:
        if method == "full":
            found.append(Entry("full", "full", {"method": "full"}))
        elif method == "lora":
            found += [Entry(f"lora-{r}", "lora", {"method": "lora", "rank": r}) for r in study.ranks]
        elif method in ("pissa", "adalora"):
            family = "lora" if method == "pissa" else method
            found.append(Entry(f"{method}-{study.rank}", family, {"method": method, "rank": study.rank}))
        elif method in ("psv", "random"):
            found += [Entry(f"{method}-{d}", "cores", {"method": method, "dim": [str(d)]}) for d in study.basis_dims]
        elif method == "attrsub":
            found += [cores(study, d) for d in study.dims]
        else:
            raise ValueError(f"methods names {method!r}, which is no method of finetune.py.")
    return found


def cores(study: Study, total: int, label: str = "", **changes: Any) -> Entry:
    """Cores of D = total in the default basis, D / attributes directions of each attribute."""
    options = {"method": "attrsub", "dim": [str(total // len(study.attributes))]} | changes.pop("options", {})
    return Entry(label or f"attrsub-{total}", "cores", options, changes.pop("basis", "default"), **changes)


def reference(study: Study) -> Entry:
    """What ablations are compared with."""
    return cores(study, study.ablation_dim)


def ablation_entries(study: Study) -> list[Entry]:
    """Our own ablations, Table 5 and supplement 1: one change each against `reference`, at the same D."""
    total, like, found = study.ablation_dim, reference(study).label, []

    def add(group: str, label: str, **changes: Any) -> None:
        found.append(cores(study, total, label, group=group, **({"like": like} | changes)))

    for group in study.ablations:
        if group == "columns":
            # Spectral columns are shorter, so that the rate of orthonormal ones does not fit.
            add(group, "spectral columns", options={"columns": "spectral"}, like=None)
            add(group, "raw columns", raw=True)
        elif group == "core":
            add(group, "block-diagonal core", options={"core": "block_diagonal"})
        elif group == "attributes":
            for left_out in study.attributes:
                rest = [name for name in study.attributes if name != left_out]
                changed = {"attributes": rest, "dim": [str(total // len(rest))]}
                add(group, f"without {left_out}", options=changed)
        elif group == "alpha":
            for alpha in ALPHAS:
                add(group, f"one spoiled, alpha {alpha:g}", basis=f"spoiled-{alpha:g}")
        elif group == "rank" and study.source_ranks:
            for rank in sorted({*study.source_ranks, study.source_rank}):
                add(group, f"source rank {rank}, {study.rank_datasets} datasets", basis=f"rank-{rank}")
        elif group == "allocation":
            for rule in RULES:
                add(group, rule, basis=rule, options={"dim": None, "missing": "intersect"})
        elif group == "shared":
            dims = [f"{name}={d}" for name, d in shared_dims(study, total).items()]
            add(group, "shared part first", basis="shared", options={"dim": dims})
    return found


def oracle_basis(benchmark: str) -> str:
    """Name of the basis that is made of full fine-tuning's update on a benchmark."""
    return f"oracle-{benchmark}"


def oracle_entries(study: Study, benchmark: str) -> list[Entry]:
    """Cores in the first singular vectors of full fine-tuning's update: what a basis can bring at all; and, at the
    smallest D, in those of another benchmark's update: what another task has learnt."""
    if "full" not in study.methods or not study.oracle_dims:
        return []

    def entry(label: str, dim: int, of: str) -> Entry:
        return Entry(
            f"{label}-{dim}", "cores", {"method": "attrsub", "dim": [str(dim)]}, oracle_basis(of), group="oracle"
        )

    found = [entry("oracle", dim, benchmark) for dim in study.oracle_dims]
    other = study.benchmarks[(study.benchmarks.index(benchmark) + 1) % len(study.benchmarks)]
    return found if other == benchmark else [*found, entry("foreign", min(study.oracle_dims), other)]


def entries(study: Study, benchmark: str) -> list[Entry]:
    """All rows of a benchmark; the reference of the ablations is among the main ones."""
    found = main_entries(study) + oracle_entries(study, benchmark)
    if benchmark != study.ablated_on or not study.ablations:
        return found
    if reference(study).label not in [entry.label for entry in found]:
        found.append(reference(study))
    return found + ablation_entries(study)
