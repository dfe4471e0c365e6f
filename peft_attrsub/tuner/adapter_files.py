"""Adapter folders: adapter_config.json and adapter_model.safetensors, read whole and written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..basis import BasisError
from ..basis.adapters import CONFIG, WEIGHTS, refuse_pickle
from ..basis.files import atomic_folder
from ..basis.tensor_file import write_tensors
from ..basis.typed_json import one_line, read_json
from .config import AttrSubspaceConfig
from .keys import modern
from .registration import SAVED_TYPE


def read_adapter(folder: Path) -> tuple[AttrSubspaceConfig, dict[str, Tensor]]:
    """Config and tensors of a saved attribute-subspace adapter, under today's names (see `keys`)."""
    if not (folder / WEIGHTS).is_file():
        refuse_pickle(folder, str(folder))
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise BasisError(f"{str(folder)!r} is no saved adapter: it needs {CONFIG} and {WEIGHTS}.")
    read_json(folder / CONFIG, "copy or download the adapter again")  # PEFT takes what is not sound, or stumbles
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError) as error:
        raise BasisError(f"{str(folder / CONFIG)!r} is not the config of an adapter: {one_line(error)}.") from error
    if not isinstance(config, AttrSubspaceConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise BasisError(f"{str(folder)!r} holds a {kind} adapter, expected an attribute-subspace adapter.")
    try:
        return config, modern(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise BasisError(f"{str(folder / WEIGHTS)!r} cannot be read: {error}.") from error


def write_adapter(
    folder: str | os.PathLike[str],
    config: PeftConfig,
    tensors: dict[str, Tensor],
    overwrite: bool,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> str:
    """Write an adapter folder in one step and return its name; `inputs` are what it is made from."""
    with atomic_folder(folder, CONFIG, overwrite, kind=type_of(config), inputs=inputs) as beside:
        config.save_pretrained(str(beside))
        write_tensors(tensors, beside / WEIGHTS)
    return os.fspath(folder)


def type_of(config: PeftConfig) -> str:
    """The PEFT type of a config, as its file spells it."""
    whole = SAVED_TYPE if isinstance(config, AttrSubspaceConfig) else str(getattr(config.peft_type, "value", ""))
    return whole.partition(":")[0]
