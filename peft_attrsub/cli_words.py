"""What the words on the command line mean: which adapters belong to which attribute, how directions are named."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .basis.errors import BasisError
from .basis.files import ADAPTER_CONFIG
from .basis.naming import check_attribute, natural_key


def group_adapters(arguments: list[str]) -> dict[str, list[str]]:
    """attribute -> adapters, from the words on the command line (see `build-basis --help`)."""
    groups: dict[str, list[str]] = {}
    for argument in arguments:
        name, explicit, path = argument.partition("=")
        if explicit and not os.path.exists(argument):
            check_attribute(name)
            groups.setdefault(name, []).extend(_adapters_in(path) or [path])
            continue
        if os.path.exists(argument):
            argument = os.path.normpath(argument)
        inside = _adapters_in(argument)
        name = Path(argument).resolve().name if inside else _stem(argument)
        try:
            check_attribute(name)
        except BasisError as error:
            raise BasisError(f"{error} Say it outright: attribute={argument}") from None
        groups.setdefault(name, []).extend(inside or [argument])
    for name, members in groups.items():
        twice = next((m for i, m in enumerate(members) if m in members[:i]), None)
        if twice:
            raise BasisError(f"adapter {twice!r} is given twice for attribute {name!r}: give it once.")
    return groups


def _adapters_in(folder: str) -> list[str]:
    """Adapters directly inside a folder that is no adapter itself."""
    path = Path(folder)
    if not path.is_dir() or (path / ADAPTER_CONFIG).exists():
        return []
    names = [child for child in path.iterdir() if (child / ADAPTER_CONFIG).is_file()]
    if not names:
        raise BasisError(f"{folder!r} holds neither an adapter ({ADAPTER_CONFIG}) nor folders of adapters.")
    return [str(child) for child in sorted(names, key=lambda p: natural_key(p.name))]


def _stem(argument: str) -> str:
    """'texture' from 'adapters/texture-0', 'runs/texture-0/adapter', 'user/texture_3', 'texture-1.safetensors'."""
    from .evaluation.labels import run_label

    path = Path(argument)
    name = run_label(path.parent if path.name == "adapter_model.safetensors" else path)
    name = name.removesuffix(".safetensors").partition("@")[0]
    return re.sub(r"[-_. ]?\d+$", "", name) or name


def split_attributes(text: str) -> list[str] | dict[str, int]:
    """['light', 'texture'] from 'light,texture'; {'light': 4, 'texture': 8} from 'light=4,texture=8'."""
    words = [word.partition("=") for word in text.split(",")]
    names = [name.strip() for name, _, _ in words]
    if not any(equals for _, equals, _ in words):
        return names
    if not all(size.strip().isdecimal() for _, _, size in words) or len(set(names)) != len(names):
        raise BasisError(
            f"--attributes {text!r}: give name=directions for every attribute, each once, or names alone."
        )
    return {name: int(size) for name, (_, _, size) in zip(names, words, strict=True)}
