"""Attribute subspaces for PEFT: mine bases from LoRA adapters, fine-tune by their small cores.

Importing this package registers the method with PEFT as `PeftType.ATTRSUB`.
"""

from .analysis.card import card_section
from .basis import Basis, BasisError, build_basis, psv_basis, random_basis
from .basis.card import add_section
from .tuner import AttrSubspaceConfig, AttrSubspaceModel, export_lora, project_lora
from .tuner.choice import explain_forward
from .tuner.hotswap import hotswap_adapter

__version__ = "0.1.0"

# The room of bases may not know the room that measures them: they are introduced to each other here.
add_section(card_section)

__all__ = [
    "AttrSubspaceConfig",
    "AttrSubspaceModel",
    "Basis",
    "BasisError",
    "build_basis",
    "explain_forward",
    "export_lora",
    "hotswap_adapter",
    "project_lora",
    "psv_basis",
    "random_basis",
]
