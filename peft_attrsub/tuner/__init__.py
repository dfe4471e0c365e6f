"""The PEFT method dW = A M B^T; importing this room registers it with PEFT."""

from .adapter_card import keep_card_on_push
from .config import AttrSubspaceConfig
from .layer import AttrSubspaceLayer
from .lora_export import export_lora
from .lora_import import Projection, project_lora
from .model import AttrSubspaceModel
from .registration import register

register(AttrSubspaceConfig, AttrSubspaceModel)
keep_card_on_push(AttrSubspaceConfig)

__all__ = [
    "AttrSubspaceConfig",
    "AttrSubspaceLayer",
    "AttrSubspaceModel",
    "Projection",
    "export_lora",
    "project_lora",
    "register",
]
