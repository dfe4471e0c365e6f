"""The method as PEFT's plugin: importing this module registers it, and does so once."""

from __future__ import annotations

from .adapter_card import keep_card_on_push
from .config import AttrSubspaceConfig
from .model import AttrSubspaceModel
from .registration import register

register(AttrSubspaceConfig, AttrSubspaceModel)
keep_card_on_push(AttrSubspaceConfig)
