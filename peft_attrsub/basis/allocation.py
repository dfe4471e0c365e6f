"""How many directions a module gets (paper, supplement 1; method.md section 6).

| rule                | dimension of module l                                                        |
|---------------------|------------------------------------------------------------------------------|
| uniform             | d everywhere (the paper's choice: best or equal in its table)                  |
| importance          | floor(d * ER_l / mean ER), at least 1, then topped up so that the sum is d * L  |
| importance-literal  | d * floor(ER_l / mean ER), as printed: 0 for every module below the mean        |
| energy, energy:0.95 | smallest j with sum_{i<=j} s_i^2 >= share * sum s_i^2 (0.9), at most d          |
| gap                 | the j <= d with the largest drop log s_j - log s_{j+1} above the noise floor   |

ER = (|W|_F / |W|_2)^2 is the effective rank, s the singular values of C with the final weights of the adapters, so
that an adapter which the mining mutes has no say. W is the base weight where the base model is at hand, else C itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import floor, log

from torch import Tensor

from .errors import BasisError

_RULES = ("uniform", "importance", "importance-literal", "energy", "gap")
_DEFAULT_SHARE = 0.9
# Singular values below this share of the largest are rounding, not spectrum.
_NOISE = 1e-6
# A fall by less is no drop where the spectrum also falls to the noise floor.
_LEAST_DROP = 2.0


def parse_rule(allocation: str) -> tuple[str, float]:
    """("energy", 0.95) from "energy:0.95"; every other rule stands alone."""
    rule, _, share = str(allocation).partition(":")
    if rule not in _RULES or (share and rule != "energy"):
        raise BasisError(f"allocation={allocation!r} is unknown: use one of {', '.join(_RULES)} or 'energy:0.95'.")
    try:
        value = float(share) if share else _DEFAULT_SHARE
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise BasisError(f"allocation={allocation!r} asks for no share of energy in (0, 1]: write 'energy:0.95'.")
    return rule, value


def effective_rank(spectrum: Tensor) -> float:
    """(|W|_F / |W|_2)^2 from the singular values of W; 0 for a zero matrix."""
    s = spectrum.double()
    top = float(s.max()) if s.numel() else 0.0
    return float((s / top).square().sum()) if top > 0 else 0.0


def by_energy(share: float, dim: int) -> Callable[[Tensor], int]:
    """The rule "energy" as a function of C's spectrum."""

    def rule(spectrum: Tensor) -> int:
        total = spectrum.double().square().cumsum(0)
        reached = int((total < share * total[-1] * (1 - 1e-12)).sum()) + 1
        return min(reached, dim)

    return rule


def by_gap(dim: int) -> Callable[[Tensor], int]:
    """The rule "gap" as a function of C's spectrum.

    Values under 1e-6 of the largest are rounding: the noise floor. The fall to it, or past the last value, is no drop
    of the spectrum. It counts where nothing above it falls by a factor of 2 or more: then all of it is kept.
    """

    def rule(spectrum: Tensor) -> int:
        values = spectrum.double()
        values = values[values > _NOISE * float(values[0])]
        drops = -values.log().diff()
        if values.shape[0] <= dim and not (drops[:dim] >= log(_LEAST_DROP)).any():
            return values.shape[0]
        return int(drops[:dim].argmax()) + 1

    return rule


def by_importance(ranks: Mapping[str, float], limits: Mapping[str, int], dim: int, literal: bool) -> dict[str, int]:
    """Dimensions of all modules from their effective ranks.

    Args:
        ranks: effective rank per module (0: no update at all). limits: the most a module can hold.
        dim: the mean dimension d. literal: the rule as the paper prints it.
    """
    alive = [name for name, rank in ranks.items() if rank > 0]
    if not alive:
        return dict.fromkeys(ranks, 0)
    mean = sum(ranks[name] for name in alive) / len(alive)
    if literal:
        return {name: min(dim * floor(ranks[name] / mean), limits[name]) if ranks[name] else 0 for name in ranks}
    shares = {name: dim * ranks[name] / mean for name in alive}
    dims = {name: min(max(floor(shares[name]), 1), limits[name]) for name in alive}
    budget = min(dim * len(alive), sum(limits[name] for name in alive))
    # Hand out (or take back) one direction at a time where the share is missed most.
    while sum(dims.values()) != budget:
        step = 1 if sum(dims.values()) < budget else -1
        movable = [n for n in alive if (dims[n] < limits[n] if step > 0 else dims[n] > 1)]
        if not movable:
            break
        chosen = max(movable, key=lambda n: step * (shares[n] - dims[n]))
        dims[chosen] += step
    return {name: dims.get(name, 0) for name in ranks}
