"""Checkpoints of a run: written whole or not at all, the last few kept, and always one that can be loaded.

    OUT/checkpoints/step-00000100/model.safetensors   each entry of the state that is a flat dict of tensors
                                  state.pt            the rest: optimiser, counters, random numbers
                                  checkpoint.json     step, metric, settings, size of each file

A checkpoint grows in a hidden folder beside its name and is renamed when it is on the disk; one to be dropped is
renamed before it is deleted. So a process that is killed anywhere leaves the last checkpoint as it was. One process
writes to a folder at a time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_attrsub._files import sync_path
from peft_attrsub.basis.files import atomic_folder

MANIFEST, REST = "checkpoint.json", "state.pt"
_NAME = re.compile(r"step-(\d{8,})")
#: What a killed run may leave: unfinished checkpoints, and those that were being dropped.
_LEFTOVERS = ".step-*"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk. metric: of the held-out split at this step, lower is better, or None.
    settings: what the run was started with."""

    path: Path
    step: int
    metric: float | None
    settings: dict[str, Any]


def save(
    folder: str | os.PathLike[str],
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    metric: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Write the state after `step` steps into folder/step-XXXXXXXX; then drop all but the last `keep` and the best.

    state: by name, dicts and lists of tensors, numbers, strings, None; tensors are stored as if on the CPU.
    settings: JSON values, compared by `check_settings` when the run goes on.

    Raises:
        ValueError: a value that could not be read again, by its key; keep < 1.
        OSError: no room on the disk; what was there before is as it was.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep is {keep} and step {step}: expected to keep 1 or more, and a step of 0 or more.")
    root, chosen = Path(folder), _json(settings or {})
    groups, rest = _split(state)
    root.mkdir(parents=True, exist_ok=True)
    # Before the room is measured: what a killed run left takes some.
    _clear(root)
    final = root / f"step-{step:08d}"
    _check_room(root, step, sum(_size(value) for value in (*groups.values(), rest)))
    try:
        with atomic_folder(final, MANIFEST, overwrite=True) as beside:
            for name, tensors in groups.items():
                save_file(tensors, beside / f"{name}.safetensors", metadata={"format": "pt"})
            with open(beside / REST, "wb") as file:
                torch.save(rest, file)
            sizes = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
            manifest = {"step": step, "metric": metric, "settings": chosen, "files": sizes}
            (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            sync_path(beside)
    except Exception as error:
        if _is_full(error):
            raise _no_room(root, step) from error
        raise
    sync_path(root)
    _drop(root, keep)
    return Checkpoint(final, step, metric, chosen)


def find(folder: str | os.PathLike[str]) -> list[Checkpoint]:
    """The whole checkpoints of a folder by their step; one that lacks a file, or part of one, is left out."""
    root = Path(folder)
    if not root.is_dir():
        return []
    found = [_read(path) for path in root.iterdir() if _NAME.fullmatch(path.name)]
    return sorted((one for one in found if one is not None), key=lambda one: one.step)


def latest(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The whole checkpoint of the last step, or None."""
    return next(reversed(find(folder)), None)


def best(folder: str | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint with the lowest metric, the earliest of equals; None where none has a finite one."""
    measured = [one for one in find(folder) if one.metric is not None and isfinite(one.metric)]
    return min(measured, key=lambda one: (one.metric, one.step), default=None)


def load(checkpoint: Checkpoint | str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that was saved, tensors on `device`, under the names it was given."""
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    if _read(path) is None:
        raise ValueError(f"{path} is no whole checkpoint: give a folder step-... that has all of its files.")
    state = {file.stem: load_file(file, device=str(device)) for file in path.glob("*.safetensors")}
    rest: dict[str, Any] = torch.load(path / REST, map_location=device, weights_only=True)
    return state | rest


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """ValueError that names the settings in which a run differs from the one that it is to continue."""
    now = _json(settings)
    keys = sorted({*checkpoint.settings, *now})
    changed = [key for key in keys if checkpoint.settings.get(key) != now.get(key)]
    if changed:
        listed = ", ".join(f"{key} {checkpoint.settings.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{checkpoint.path} was made with other settings ({listed}): use those, or write to another folder."
        )


def rng_state() -> dict[str, Any]:
    """The state of the random numbers of torch, CUDA's current device, numpy and Python, of this process."""
    version, numbers, gauss = random.getstate()
    drawn = np.random.get_state(legacy=False)
    key = torch.from_numpy(drawn["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [key, int(drawn["state"]["pos"]), int(drawn["has_gauss"]), float(drawn["gauss"])],
        "python": [version, list(numbers), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers of `rng_state`; CUDA's where there is a device and its state was stored."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    key, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", key.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def _split(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Flat dicts of tensors, each for a file of its own, and the rest; all on the CPU and checked."""
    groups: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Any] = {}
    for name, value in state.items():
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name == Path(REST).stem:
            raise ValueError(f"the state has an entry {name!r}: expected a word that can name a file, not 'state'.")
        plain = _plain(value, name)
        tensors = isinstance(plain, dict) and plain and all(isinstance(part, Tensor) for part in plain.values())
        if tensors and all(isinstance(key, str) and not part.is_complex() for key, part in plain.items()):
            # Two may share one storage (tied weights): safetensors wants each on its own.
            groups[name] = {key: part.contiguous().clone() for key, part in plain.items()}
        else:
            rest[name] = plain
    return groups, rest


def _plain(value: Any, where: str) -> Any:
    """The value with its tensors detached and on the CPU; ValueError for what could not be loaded safely."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _plain(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part, f"{where}[{i}]") for i, part in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    advice = "gather its shards first" if isinstance(value, Tensor) else "store numbers, strings or plain tensors"
    raise ValueError(f"{where} of the state is a {type(value).__name__}, which cannot be read again: {advice}.")


def _size(value: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_size(part) for part in value.values())
    return sum(_size(part) for part in value) if isinstance(value, (list, tuple)) else 0


def _json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are when they come from a file: tuples have become lists."""
    found: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return found


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where a file is missing or shorter than it was."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in manifest["files"].items())
        return Checkpoint(path, manifest["step"], manifest["metric"], manifest["settings"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _drop(root: Path, keep: int) -> None:
    whole, first = find(root), best(root)
    for one in whole[:-keep]:
        if first is None or one.step != first.step:
            gone = one.path.with_name(f".{one.path.name}.dropped")
            os.rename(one.path, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _clear(root: Path) -> None:
    for path in root.glob(_LEFTOVERS):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _check_room(root: Path, step: int, needed: int) -> None:
    """Refuse before the first byte what the disk has no room for."""
    if shutil.disk_usage(root).free < needed:
        raise _no_room(root, step, needed)


def _no_room(root: Path, step: int, needed: int | None = None) -> OSError:
    last = latest(root)
    kept = f"the checkpoint of step {last.step} is whole" if last else "there is no earlier one"
    size = "" if needed is None else f" (it takes {needed / 2**20:.1f} MiB)"
    return OSError(
        errno.ENOSPC,
        f"no room on the disk of {root} for the checkpoint of step {step}{size}; {kept}: make room and start the "
        "same command again",
    )


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error. Writers in C++ and Rust say so in their own ways."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(f"os error {number})" in str(error) or os.strerror(number) in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


__all__ = ["Checkpoint", "best", "check_settings", "find", "latest", "load", "rng_state", "save", "set_rng_state"]
