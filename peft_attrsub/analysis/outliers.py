"""Which adapters the robust mean muted: final IRLS weights and residuals over all modules (method.md section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..basis import Basis

#: An adapter counts as muted in a module where its weight is below this share of the median weight there ...
MUTED_WEIGHT = 0.25
#: ... and is named when that is so in more than this share of the modules.
MUTED_MODULES = 0.5

MUTED_RULE = (
    "An adapter is muted in a module where its final weight is under a quarter of the median weight there; it is "
    "named when that is so in more than half of the modules. Weights have mean 1."
)


@dataclass(frozen=True)
class AdapterRecord:
    """One source adapter of one attribute.

    weights, residuals, energies (modules): its final IRLS weight, ||L - dW_i|| / ||dW_i||, and the share of
    ||dW_i||^2 inside the subspace, per module. muted_share: share of modules in which it is muted.
    """

    attribute: str
    adapter: str
    revision: str | None
    weights: Tensor
    residuals: Tensor
    energies: Tensor
    muted_share: float

    @property
    def muted(self) -> bool:
        return self.muted_share > MUTED_MODULES


def adapter_table(basis: Basis) -> list[AdapterRecord]:
    """Every source adapter of the basis, attribute by attribute; attributes that were not mined have none."""
    found = []
    for record in basis.config.attributes:
        if not record.sources:
            continue
        weights, residuals, energies = (
            torch.stack([basis.record(m, record.name, part) for m in basis.modules])  # [modules, k]
            for part in ("weights", "residuals", "energy")
        )
        muted = (weights < MUTED_WEIGHT * weights.median(1, keepdim=True).values).float().mean(0)
        for i, source in enumerate(record.sources):
            columns = weights[:, i], residuals[:, i], energies[:, i]
            found.append(AdapterRecord(record.name, source.id, source.revision, *columns, float(muted[i])))
    return found
