"""adapter_config.json of a LoRA adapter: read, checked value by value, and refused where dW is not s lora_B lora_A."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BasisError
from .files import ADAPTER_CONFIG
from .identity import BaseIdentity
from .naming import some
from .typed_json import Fields, is_number, is_whole, read_json, short

# Settings under which lora_B @ lora_A is not the change of the base weight.
REFUSED = {
    "use_dora": "DoRA rescales the weight's columns, so its update is not low-rank",
    "lora_bias": "lora_bias adds a bias to lora_B, which a basis cannot hold",
    "target_parameters": "target_parameters (MoE experts) adapts stacked parameters, which a basis cannot hold",
    "alora_invocation_tokens": "an activated LoRA changes the model only after certain tokens",
    "use_qalora": "QA-LoRA pools the input, so lora_A does not match the weight's shape",
    "use_bdlora": "block-diagonal LoRA stores its factors in another layout",
    "kasa_config": "KaSA trains a diagonal beside the factors",
    "monteclora_config": "MonteCLoRA samples its factors",
    "layer_replication": "layer_replication renames the modules",
}
# These initialisations move a part of W into the adapter: lora_B @ lora_A is then not the change of W.
_MOVES_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Settings that are not reported as unknown: fields of peft.LoraConfig, today's and older ones, that say nothing
#: about dW or are refused above. Listed here because importing PEFT costs seconds.
NOT_REPORTED = {
    *REFUSED,
    *("alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "runtime_config"),
    *("target_modules", "velora_config", "enable_lora", "merge_weights"),
    *("auto_mapping", "init_lora_weights", "trainable_token_indices"),  # looked at below
}
#: Beyond it, squares of updates leave the range of float32.
_MAX_ALPHA = 1e6


def read_lora_config(folder: Path, source: str) -> dict[str, Any]:
    """The config of the LoRA adapter in `folder`; `source` is what the user called it.

    Raises BasisError where the file is missing or damaged, where a value that counts has another type or range than
    PEFT writes, and for methods whose update is not lora_B lora_A. Warns about what a basis does not hold, and about
    settings that this version does not know.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise BasisError(f"adapter {source!r} has no {ADAPTER_CONFIG}: without it the scaling of its LoRA is unknown.")
    record = read_json(path, "copy or download the adapter again")
    if not isinstance(record, dict):
        raise BasisError(f"{str(path)!r} holds {short(record)}, expected the JSON object that PEFT saves.")
    told = Fields(record, repr(str(path)))
    kind = told.text("peft_type", "").upper().rpartition(".")[2]
    if kind != "LORA":
        raise BasisError(f"adapter {source!r} is of PEFT type {short(kind)}: a basis is mined from LORA adapters.")
    start = check_values(told)
    for key, reason in REFUSED.items():
        if record.get(key):
            raise BasisError(f"adapter {source!r} uses {key}: {reason}; train it without {key}.")
    if start.startswith(_MOVES_WEIGHT):
        raise BasisError(
            f"adapter {source!r} was initialised by {start!r}, which moves a part of the base weight "
            "into it: convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...) first."
        )
    strange = sorted(key for key, value in told.unknown().items() if value and key not in NOT_REPORTED)
    if strange:
        warnings.warn(
            f"adapter {source!r} has settings that this version does not know: {some(strange)}; they are ignored. If "
            "one changes how LoRA works, upgrade peft_attrsub or leave the adapter out.",
            stacklevel=4,
        )
    return record


def declared_extras(config: Mapping[str, Any]) -> list[str]:
    """What a config says was trained next to the LoRA."""
    extras = [key for key in ("modules_to_save", "trainable_token_indices") if config.get(key)]
    return extras + (["bias"] if config.get("bias", "none") != "none" else [])


def check_values(told: Fields) -> str:
    """Check the type and range of everything that counts; the initialisation, in small letters."""
    if "r" in told.record:
        told.whole("r", 1)
    if "lora_alpha" in told.record:
        told.number("lora_alpha", _MAX_ALPHA)
    _check_pattern(told, "rank_pattern", "whole numbers from 1 up", lambda x: is_whole(x, 1))
    expected = f"numbers from -{_MAX_ALPHA:g} to {_MAX_ALPHA:g}"
    _check_pattern(told, "alpha_pattern", expected, lambda x: is_number(x, _MAX_ALPHA))
    for key in ("use_rslora", "use_dora", "lora_bias", "use_qalora", "fan_in_fan_out"):
        told.flag(key)
    for key in ("base_model_name_or_path", "revision", "task_type"):
        told.text(key, None)
    told.one_of("bias", ("none", "all", "lora_only"), "none")
    told.row("modules_to_save", "names of modules", lambda x: isinstance(x, str), None)
    start = told.record.get("init_lora_weights")
    if start is not None and not isinstance(start, bool):
        start = told.text("init_lora_weights")
    mapping = told.record.get("auto_mapping")
    training = mapping.get("training") if isinstance(mapping, Mapping) else None
    base = training.get("base") if isinstance(training, Mapping) else None
    if isinstance(base, dict) and "digest" in base:  # ours: another tool may have anything there
        BaseIdentity.read(base, f"{told.where}, auto_mapping.training.base")
    return str(start or "").lower()


def _check_pattern(told: Fields, key: str, expected: str, check: Any) -> None:
    """Refuse a pattern that PEFT could not match with the names of modules."""
    for pattern in told.table(key, expected, check, None):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Python finds odd in a pattern is not the user's
                re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise BasisError(
                f"{told.where} is damaged: {key} has the key {short(pattern)}, expected a regular "
                f"expression ({error})."
            ) from None
