"""The names of the tuner's tensors in state dicts and adapter files.

    attrsub_M.weight                          the core
    attrsub_M.basis                           fingerprint of the basis it belongs to
    attrsub_lora_A.weight, attrsub_lora_B.weight   a plain LoRA
    attrsub_A, attrsub_B                      the basis, where the adapter stores it

In a model the adapter's name comes in before `.weight` and `.basis`, or at the end of `attrsub_A` and `attrsub_B`.
Before version 0.1.0 trained tensors had no `.weight`, cores no fingerprint, and `attrsub_sizes` held the widths of a
stored basis; such files still load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..basis.naming import PEFT_PREFIX

CORE, FINGERPRINT = "attrsub_M.weight", "attrsub_M.basis"
LORA_A, LORA_B = "attrsub_lora_A.weight", "attrsub_lora_B.weight"
BASIS_A, BASIS_B = "attrsub_A", "attrsub_B"
OLD_SIZES = "attrsub_sizes"
_OLD_TRAINED = re.compile(r"(?:^|\.)attrsub_(?:M|lora_A|lora_B)$")


def modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter file under today's names."""
    return {f"{key}.weight" if _OLD_TRAINED.search(key) else key: value for key, value in tensors.items()}


def in_model(name: str, adapter: str) -> str:
    """The name in a model of what an adapter file calls `name`."""
    stem, dot, leaf = name.partition(".")
    return f"{stem}.{adapter}{dot}{leaf}"


def old_blocks(sizes: Tensor, a: Tensor, b: Tensor) -> list[list[int]]:
    """Widths (rows, columns) of each attribute's block, from the tensor that older adapter files hold.

    A file that was cast to a narrow dtype holds rounded widths; with a single attribute those of A and B tell.
    Raises ValueError where the widths do not add up to those of A and B.
    """
    blocks = [[round(x) for x in row] for row in sizes.to(torch.float64).tolist()]
    if len(blocks) == 1:
        return [[a.shape[1], b.shape[1]]]
    if [sum(x) for x in zip(*blocks, strict=True)] != [a.shape[1], b.shape[1]]:
        raise ValueError(
            f"attrsub_sizes gives blocks of {blocks}, which do not add up to the {a.shape[1]} columns of A and "
            f"{b.shape[1]} of B: the file was cast to a dtype that cannot hold them; convert the original again "
            "and leave attrsub_sizes as it is."
        )
    return blocks


def rename_old(state_dict: dict[str, Tensor], prefix: str, adapters: Iterable[str]) -> None:
    """Bring the trained tensors that a model's state dict holds for a layer to today's names, in place."""
    for adapter in adapters:
        for name in (CORE, LORA_A, LORA_B):
            new = prefix + in_model(name, adapter)
            old = new.removesuffix(".weight")
            if old in state_dict:
                state_dict[new] = state_dict.pop(old)


def name_strays(tensors: dict[str, Tensor], prefix: str, adapter: str) -> None:
    """Give what an adapter file holds for a layer the names of the model, in place.

    PEFT renames what the model has a tensor for; a basis that the model does not expect keeps the name of the file.
    """
    for name in (CORE, FINGERPRINT, BASIS_A, BASIS_B, OLD_SIZES):
        for written in (prefix + name, f"{PEFT_PREFIX}{prefix}{name}"):
            if written in tensors:
                tensors[prefix + in_model(name, adapter)] = tensors.pop(written)
