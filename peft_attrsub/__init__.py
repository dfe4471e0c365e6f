"""Attribute subspaces for PEFT: mine bases from LoRA adapters, fine-tune by their small cores.

Importing this package registers the method with PEFT as `PeftType.ATTRSUB`.
"""

from .basis import Basis, BasisError, build_basis, psv_basis, random_basis
from .tuner import AttrSubspaceConfig, AttrSubspaceModel, export_lora, project_lora

__version__ = "0.1.0"

__all__ = [
    "AttrSubspaceConfig",
    "AttrSubspaceModel",
    "Basis",
    "BasisError",
    "build_basis",
    "export_lora",
    "project_lora",
    "psv_basis",
    "random_basis",
]
