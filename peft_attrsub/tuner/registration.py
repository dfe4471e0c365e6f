"""ATTRSUB as a true member of PEFT's enum of methods.

PEFT looks a method up by its PeftType in a dozen places; only an enum member works in all of them, and PEFT
has no call that adds one.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from peft.utils.peft_types import register_peft_method

NAME = "ATTRSUB"
PREFIX = "attrsub_"

#: What a saved adapter_config.json holds as peft_type. Without this package imported, PEFT fails with a
#: KeyError of exactly this text: the only sentence that can reach a user then.
SAVED_TYPE = "ATTRSUB: run 'pip install peft-attrsub' and 'import peft_attrsub' before loading this adapter"


def peft_type() -> PeftType:
    """PeftType.ATTRSUB, added to the enum on first use.

    Raises RuntimeError if PEFT, or another plugin, has a method of that name.
    """
    existing = PeftType.__members__.get(NAME)
    if existing is not None:
        if not getattr(existing, "_from_peft_attrsub", False):
            raise RuntimeError(
                f"PEFT already has a method called {NAME}, so peft_attrsub cannot register its own: "
                "use a version of peft_attrsub made for this PEFT."
            )
        return existing
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    member._sort_order_ = len(PeftType.__members__)
    member._from_peft_attrsub = True
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    # `PeftType.ATTRSUB` is looked up on the class; the metaclass refuses plain assignment.
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Make the method known to PEFT; calling it again changes nothing."""
    member = peft_type()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is None:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX, is_mixed_compatible=True
        )
        PEFT_TYPE_TO_CONFIG_MAPPING[SAVED_TYPE] = config_cls
    elif known is not config_cls:
        raise RuntimeError(f"PEFT already holds another configuration class for {NAME}: {known!r}.")
