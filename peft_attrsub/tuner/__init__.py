"""The PEFT method dW = A M B^T; importing this room registers it with PEFT."""

# Before any module of this room: it is the import of PEFT that registers the method, see peft_attrsub/peft_hook.py.
import peft  # noqa: F401

from . import plugin  # noqa: F401
from .calibrate import calibrate_start
from .config import AttrSubspaceConfig
from .dials import attribute_scales, disable_attributes, set_attribute_scale
from .explain_forward import explain_forward
from .hotswap import hotswap_adapter
from .layer import AttrSubspaceLayer
from .lora_export import export_lora
from .lora_import import Projection, project_lora
from .model import AttrSubspaceModel
from .registration import register

__all__ = [
    "AttrSubspaceConfig",
    "AttrSubspaceLayer",
    "AttrSubspaceModel",
    "Projection",
    "attribute_scales",
    "calibrate_start",
    "disable_attributes",
    "explain_forward",
    "export_lora",
    "hotswap_adapter",
    "project_lora",
    "register",
    "set_attribute_scale",
]
