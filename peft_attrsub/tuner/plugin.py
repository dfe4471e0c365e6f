"""The method as PEFT's plugin: importing this module registers it, and does so once."""

from __future__ import annotations

from .adapter_card import keep_card_on_push
from .config import AttrSubspaceConfig
from .mixed_models import join_mixed_models
from .model import AttrSubspaceModel
from .registration import peft_type, register
from .transformers_hotswap import accept_hotswap

register(AttrSubspaceConfig, AttrSubspaceModel)
keep_card_on_push(AttrSubspaceConfig)
accept_hotswap()
join_mixed_models(peft_type())
