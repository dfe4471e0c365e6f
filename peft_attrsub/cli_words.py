"""What the words on the command line mean: which adapters belong to which attribute, how directions are named."""

from __future__ import annotations

import glob
import os
import re
import warnings
from pathlib import Path

from .basis.errors import BasisError
from .basis.files import ADAPTER_CONFIG
from .basis.naming import OUTPUTS, check_attribute, natural_key

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def group_adapters(arguments: list[str], checkpoint: str = "last") -> dict[str, list[str]]:
    """attribute -> adapters, from the words on the command line (see `build-basis --help`).

    checkpoint: "last" or a step, for folders of runs that hold checkpoints.
    """
    if checkpoint != "last" and not checkpoint.isdecimal():
        raise BasisError(f"--checkpoint {checkpoint} is not a step: give a number, or last.")
    groups: dict[str, list[str]] = {}
    for argument in arguments:
        name, explicit, path = argument.partition("=")
        if explicit and not os.path.exists(argument):
            check_attribute(name)
            for word in expand(path):
                groups.setdefault(name, []).extend(_adapters_of(word, checkpoint)[1])
            continue
        for word in expand(argument):
            name, found = _adapters_of(word, checkpoint)
            try:
                check_attribute(name)
            except BasisError as error:
                raise BasisError(f"{error} Name it: attribute={word}") from None
            groups.setdefault(name, []).extend(found)
    for name, members in groups.items():
        twice = next((m for i, m in enumerate(members) if m in members[:i]), None)
        if twice:
            raise BasisError(f"adapter {twice!r} is given twice for attribute {name!r}: give it once.")
    return groups


def expand(word: str) -> list[str]:
    """A word with ~ and with wildcards that the shell has left, as paths that exist; others as they are."""
    if word.startswith("~") and not os.path.exists(word):
        word = os.path.expanduser(word)
    if os.path.lexists(word) or not glob.has_magic(word):
        return [word]
    found = sorted(glob.glob(word), key=natural_key)
    if not found:
        raise BasisError(f"{word!r} matches no file or folder here.")
    return found


def _adapters_of(word: str, checkpoint: str) -> tuple[str, list[str]]:
    """The attribute that a word suggests, and its adapters. Raises BasisError for a word that is neither here nor a
    Hub id."""
    path = Path(word)
    if path.is_dir():
        adapter = _adapter_in(path, checkpoint)
        if adapter is not None:
            return _stem(word if adapter == path else os.path.normpath(word)), [os.path.normpath(adapter)]
        inside = [
            _adapter_in(child, checkpoint) for child in sorted(path.iterdir(), key=lambda p: natural_key(p.name))
        ]
        found = [os.path.normpath(one) for one in inside if one is not None]
        if not found:
            raise BasisError(f"{word!r} holds neither an adapter ({ADAPTER_CONFIG}) nor folders of adapters.")
        return path.resolve().name, found
    check_word(word, "adapter", file_ending=".safetensors")
    return _stem(word), [word]


def check_word(word: str, what: str, file_ending: str | None = None) -> None:
    """Refuse a word that is no folder, no file of the right kind, and cannot be a Hub id either.

    What is not here is said to be not here, before anything about the Hub.
    """
    path = Path(word)
    if path.is_dir():
        return
    if path.is_file():
        if file_ending is None or path.suffix != file_ending:
            kinds = "a folder" if file_ending is None else f"a folder or a {file_ending} file"
            raise BasisError(f"{word!r} is a file and not a saved {what}: give {kinds}.")
        return
    if path.is_symlink():
        raise BasisError(f"{word!r} is a link to {os.readlink(word)!r}, which does not exist.")
    name = word.partition("@")[0]
    is_path = os.path.isabs(word) or word.startswith((".", "~")) or word.endswith(("/", os.sep))
    parent = Path(name).parent
    is_path |= "/" not in name or (parent != Path() and parent.is_dir()) or name.endswith(".safetensors")
    if is_path:
        raise BasisError(f"there is no file or folder {word!r} here; on the Hub it would be called user/name.")


def _adapter_in(folder: Path, checkpoint: str) -> Path | None:
    """The adapter of a run: the folder itself, its `adapter` or the like, or one of its checkpoints."""
    if not folder.is_dir():
        return None
    steps = {}
    for child in folder.iterdir():
        match = _CHECKPOINT.fullmatch(child.name)
        if match is not None and (child / ADAPTER_CONFIG).is_file():
            steps[int(match[1])] = child
    if checkpoint != "last" and steps:
        if int(checkpoint) not in steps:
            raise BasisError(
                f"{str(folder)!r} has no checkpoint {checkpoint}: it has {', '.join(map(str, sorted(steps)))}."
            )
        return steps[int(checkpoint)]
    final = next((place for place in (folder, *(folder / name for name in OUTPUTS)) if _is_adapter(place)), None)
    if final is not None or not steps:
        return final
    last = max(steps)
    warnings.warn(f"{str(folder)!r} holds no final adapter: its last checkpoint, {last}, is taken.", stacklevel=2)
    return steps[last]


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _stem(argument: str) -> str:
    """'texture' from 'adapters/texture-0', 'runs/texture-0/adapter', 'user/texture_3', 'texture-1.safetensors'."""
    from .evaluation.labels import run_label

    path = Path(os.path.normpath(argument)) if os.path.exists(argument) else Path(argument)
    if _CHECKPOINT.fullmatch(path.name) and path.parent.name:
        path = path.parent
    name = run_label(path.parent if path.name == "adapter_model.safetensors" else path)
    name = name.removesuffix(".safetensors").partition("@")[0]
    return re.sub(r"[-_. ]?\d+$", "", name) or name


def split_rules(words: list[str]) -> dict[str, str]:
    """{pattern: replacement} from words OLD=NEW; the last "=" counts, since a pattern may hold others."""
    rules = {}
    for word in words:
        old, equals, new = word.rpartition("=")
        if not equals or not old:
            raise BasisError(f"--map {word!r}: give OLD=NEW, a regular expression and what replaces it.")
        rules[old] = new
    return rules


def split_names(words: list[str]) -> dict[str, str]:
    """{old: new} from words OLD=NEW, each attribute once."""
    pairs = [word.partition("=") for word in words]
    names = {old: new for old, _, new in pairs}
    if len(names) < len(pairs) or not all(old and new for old, _, new in pairs):
        raise BasisError(f"{' '.join(words)!r}: give OLD=NEW for every attribute to rename, each once.")
    return names


def split_dims(words: list[str]) -> int | dict[str, int] | None:
    """16 from ["16"], {"texture": 8} from ["texture=8"], None from nothing."""
    found: dict[str, int] = {}
    for word in words:
        name, _, size = word.rpartition("=")
        if not size.isdecimal() or name in found:
            raise BasisError(f"--dim {word}: give a number of directions, or NAME=N, each attribute once.")
        found[name] = int(size)
    if "" in found and len(found) > 1:
        raise BasisError("--dim is given for all attributes and for single ones: give one or the other.")
    return found.get("", found or None)


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
