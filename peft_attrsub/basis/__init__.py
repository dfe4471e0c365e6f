"""What a basis is, how it is stored, and how it is mined from adapters."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .adapters import LoraAdapter
    from .allocation import effective_rank
    from .basis import Basis
    from .build import build_basis
    from .config import BasisConfig
    from .errors import BasisError
    from .gradient import gradient_basis, select_basis
    from .irls import IrlsSettings, SharedSubspace, shared_subspace
    from .layout import ModuleLayout
    from .weights import psv_basis, random_basis
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".adapters": ["LoraAdapter"],
            ".allocation": ["effective_rank"],
            ".basis": ["Basis"],
            ".build": ["build_basis"],
            ".config": ["BasisConfig"],
            ".errors": ["BasisError"],
            ".gradient": ["gradient_basis", "select_basis"],
            ".irls": ["IrlsSettings", "SharedSubspace", "shared_subspace"],
            ".layout": ["ModuleLayout"],
            ".weights": ["psv_basis", "random_basis"],
        },
    )

__all__ = [
    "Basis",
    "BasisConfig",
    "BasisError",
    "IrlsSettings",
    "LoraAdapter",
    "ModuleLayout",
    "SharedSubspace",
    "build_basis",
    "effective_rank",
    "gradient_basis",
    "psv_basis",
    "random_basis",
    "select_basis",
    "shared_subspace",
]
