"""npz files whose arrays may hold pickled Python objects: none is unpickled unless the caller trusts the file."""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# What a damaged file, or a pickle of another version, raises.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    ImportError,
    AttributeError,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


class Archive:
    """The arrays of an npz file, by name and one at a time.

    ValueError, with the file and the key, for what is missing or damaged, and for a pickled one without trust_pickle.
    """

    def __init__(self, path: Path, trust_pickle: bool) -> None:
        self.path, self._trust = path, trust_pickle
        try:
            with zipfile.ZipFile(self.path) as file:
                self.keys = {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is no npz file ({error}): was it downloaded whole?") from error

    def numbered(self, stem: str) -> list[str]:
        """Keys stem_0, stem_1, ... in the order of their numbers, of which some may be missing."""
        found = [key for key in self.keys if re.fullmatch(rf"{stem}_\d+", key)]
        if not found:
            raise ValueError(f"{self.path} has no key {stem}_0: it is no bundle of images with depth.")
        return sorted(found, key=lambda key: int(key.partition("_")[2]))

    def array(self, key: str) -> np.ndarray:
        if key not in self.keys:
            raise ValueError(f"{self.path} has no key {key}: the bundle is damaged, or of another kind.")
        try:
            with zipfile.ZipFile(self.path) as file, file.open(f"{key}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format
                header = read.read_array_header_1_0 if version == (1, 0) else read.read_array_header_2_0
                pickled = header(stream)[2].hasobject
                if not pickled or self._trust:
                    stream.seek(0)
                    return np.lib.format.read_array(stream, allow_pickle=pickled)
        except DAMAGED as error:
            raise ValueError(f"{self.path}: {key} cannot be read ({error}): was it downloaded whole?") from error
        raise ValueError(
            f"{self.path}: {key} is a pickled dictionary, and unpickling can run any code that its author put there: "
            "if you trust where it comes from, give trust_pickle=True (prepare_faces.py unpack --trust-pickle)."
        )

    def record(self, key: str, *fields: str) -> dict[str, Any]:
        """The dictionary under a key, which must have these fields."""
        value = self.array(key)
        record = value.item() if value.size == 1 else value
        if not isinstance(record, dict):
            raise ValueError(f"{self.path}: {key} is an array of shape {value.shape}, expected a dictionary.")
        if missing := [field for field in fields if field not in record]:
            raise ValueError(f"{self.path}: {key} has no {missing[0]!r}: it has {', '.join(map(str, record))}.")
        return record


__all__ = ["Archive"]
