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
    ||dW_i||^2 inside the subspace, per module; the latter two are None for a basis cut to fewer directions than were
    mined. muted_share: share of modules in which it is muted.
    """

    attribute: str
    adapter: str
    revision: str | None
    weights: Tensor
    residuals: Tensor | None
    energies: Tensor | None
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
        weights, residuals, energies = (_stacked(basis, record.name, p) for p in ("weights", "residuals", "energy"))
        assert weights is not None
        muted = (weights < MUTED_WEIGHT * weights.quantile(0.5, 1, keepdim=True)).float().mean(0)
        for i, source in enumerate(record.sources):
            residual, energy = (None if part is None else part[:, i] for part in (residuals, energies))
            about = record.name, source.id, source.revision, weights[:, i], residual, energy, float(muted[i])
            found.append(AdapterRecord(*about))
    return found


def _stacked(basis: Basis, attribute: str, part: str) -> Tensor | None:
    """A record of all modules (modules, k); None where one of them lacks it."""
    if not all(basis.has_record(module, attribute, part) for module in basis.modules):
        return None
    return torch.stack([basis.record(module, attribute, part) for module in basis.modules])
