"""Attribute subspaces for PEFT: mine bases from LoRA adapters, fine-tune by their small cores.

Importing this package registers the method with PEFT as `PeftType.ATTRSUB`, in whatever order the two are imported.
It loads neither PEFT nor torch: the names below are imported on their first use.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names, provide
from .peft_hook import install

if TYPE_CHECKING:
    from . import analysis as analysis
    from . import tuner as tuner
    from .basis import Basis, BasisError, build_basis, gradient_basis, psv_basis, random_basis, select_basis
    from .tuner import (
        AttrSubspaceConfig,
        AttrSubspaceModel,
        attribute_scales,
        calibrate_start,
        disable_attributes,
        explain_forward,
        export_lora,
        hotswap_adapter,
        project_lora,
        set_attribute_scale,
    )
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            ".basis": [
                "Basis",
                "BasisError",
                "build_basis",
                "gradient_basis",
                "psv_basis",
                "random_basis",
                "select_basis",
            ],
            ".tuner": [
                "AttrSubspaceConfig",
                "AttrSubspaceModel",
                "attribute_scales",
                "calibrate_start",
                "disable_attributes",
                "explain_forward",
                "export_lora",
                "hotswap_adapter",
                "project_lora",
                "set_attribute_scale",
            ],
        },
        modules=["analysis", "tuner"],
    )

__version__ = "0.1.0"

# The room of bases may not know the room that measures them: they are introduced to each other here. No room is
# imported for it: another thread that imports one at this moment waits for this file.
provide("sections of a basis' card", "peft_attrsub.analysis.card:card_section")
install()

__all__ = [
    "AttrSubspaceConfig",
    "AttrSubspaceModel",
    "Basis",
    "BasisError",
    "attribute_scales",
    "build_basis",
    "calibrate_start",
    "disable_attributes",
    "explain_forward",
    "export_lora",
    "gradient_basis",
    "hotswap_adapter",
    "project_lora",
    "psv_basis",
    "random_basis",
    "select_basis",
    "set_attribute_scale",
]
