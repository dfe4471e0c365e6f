"""Folders of PBR maps, as MatSynth, ambientCG and Poly Haven lay them out: one picture per property, told by name.

albedo     basecolor, else albedo, diffuse, color (sRGB)
roughness  roughness, else 1 - glossiness
metallic   metallic (metalness, metal)
normal     OpenGL's convention, else DirectX's with green turned round, else made from a height map

A name counts as a word of the file's stem: Bricks047_1K-JPG_NormalGL.jpg is a normal map. jpg, jpeg and png are
read. Pictures are turned over, so that row 0 is the bottom (v = 0).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._extras import require
from .._pictures import decode_picture

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.float32]
ENDINGS = (".jpg", ".jpeg", ".png")
#: The environment variable with the folder in which relative folders of maps lie.
TEXTURES = "PEFT_ATTRSUB_TEXTURES"
# Property -> words that name it, the first the best.
WORDS = {
    "albedo": ("basecolor", "albedo", "diffuse", "diff", "color", "col"),
    "roughness": ("roughness", "rough"),
    "glossiness": ("glossiness", "gloss", "smoothness"),
    "metallic": ("metallic", "metalness", "metal"),
    "normal": ("normal", "normalgl", "nor", "nrm"),
    "normaldx": ("normaldx",),
    "height": ("height", "displacement", "disp", "bump"),
}


class FoundMaps(NamedTuple):
    """folders: those with a readable albedo, sorted. unreadable: the map files that are empty, cut short or no
    pictures, sorted."""

    folders: list[str]
    unreadable: list[str]


class ReadMaps(NamedTuple):
    """What a folder held: albedo (S, S, 3) linear; roughness, metallic, height (S, S) in [0, 1]; normal (S, S, 3)
    unit, z >= 0. None where there is no such file."""

    albedo: Pixels
    roughness: Pixels | None
    metallic: Pixels | None
    normal: Pixels | None
    height: Pixels | None


def find_maps(folder: str | os.PathLike[str]) -> FoundMaps:
    """All material folders in `folder` at any depth, itself included, and the files that cannot be read.

    A file is judged by its header and its last bytes, not decoded: thousands of 4K maps take seconds. Raises OSError
    where `folder` is no folder, ValueError where it holds no material, and ImportError without Pillow.
    """
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"{os.fspath(folder)} is no folder: name one that holds folders of PBR maps.")
    folders, unreadable = [], []
    for path, below, names in os.walk(folder):
        below.sort()
        files = _by_property(path, names)
        broken = [file for candidates in files.values() for file in candidates if not _looks_whole(file)]
        unreadable += broken
        if any(file not in broken for file in files["albedo"]):
            folders.append(path)
    if not folders:
        wanted = ", ".join(WORDS["albedo"])
        bad = f"; {len(unreadable)} of its files cannot be read, the first is {unreadable[0]}" if unreadable else ""
        raise ValueError(f"{os.fspath(folder)} holds no readable map named {wanted} (jpg or png){bad}.")
    return FoundMaps(sorted(folders), sorted(unreadable))


def read_maps(folder: str, size: int) -> ReadMaps:
    """Decode one folder's maps at size x size. Raises OSError where no albedo can be read, naming the files tried.

    A relative folder lies in the one that the environment variable PEFT_ATTRSUB_TEXTURES names, if it is set: so that
    scenes hold no machine's paths. A file that cannot be decoded is named in a warning, and the next name on the list
    is tried.
    """
    folder = os.path.join(os.environ.get(TEXTURES, ""), folder)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise OSError(f"the folder of maps {folder} cannot be opened ({error.strerror}): check its path.") from error
    files = _by_property(folder, names)
    colour = _first(files["albedo"], size, colour=True)
    if colour is None:
        tried = ", ".join(map(os.path.basename, files["albedo"])) or f"a file named {', '.join(WORDS['albedo'])}"
        raise OSError(f"{folder} has no albedo that can be read; looked for {tried}.")
    roughness = _first(files["roughness"], size)
    if roughness is None:
        glossiness = _first(files["glossiness"], size)
        roughness = None if glossiness is None else np.float32(1) - glossiness
    normal, turn = _first(files["normal"], size, colour=True), 1.0
    if normal is None:
        normal, turn = _first(files["normaldx"], size, colour=True), -1.0
    return ReadMaps(
        _linear(colour),
        roughness,
        _first(files["metallic"], size),
        None if normal is None else _unit(normal, turn),
        _first(files["height"], size) if normal is None else None,
    )


def _by_property(folder: str, names: list[str]) -> dict[str, list[str]]:
    """Property -> paths, the best name first, then by the alphabet."""
    found: dict[str, list[tuple[int, str]]] = {key: [] for key in WORDS}
    for name in sorted(names):
        stem, ending = os.path.splitext(name)
        if ending.lower() not in ENDINGS or name.startswith("."):
            continue
        # The last word that says anything: Metal032_Roughness is a roughness map.
        for key, rank in [match for word in _words(stem) for match in _meaning(word)][-1:]:
            found[key].append((rank, os.path.join(folder, name)))
    return {key: [path for _, path in sorted(matches)] for key, matches in found.items()}


def _words(stem: str) -> list[str]:
    """base_color and BaseColor become one word, as do normal_gl, NormalGL, nor_dx."""
    text = re.sub(r"(?i)base[ _-]*colou?r", " basecolor ", stem)
    text = re.sub(r"(?i)(?<![a-z])(?:normal|nor|nrm)[ _-]*gl(?![a-z])", " normalgl ", text)
    text = re.sub(r"(?i)(?<![a-z])(?:normal|nor|nrm)[ _-]*(?:dx|directx)(?![a-z])", " normaldx ", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word for word in re.split(r"[^a-z]+", text.lower()) if word]


def _meaning(word: str) -> Iterator[tuple[str, int]]:
    word = "color" if word == "colour" else word
    for key, words in WORDS.items():
        if word in words:
            yield key, words.index(word)


def _pillow() -> ModuleType:
    image: ModuleType = require("PIL.Image", "vggt", "reading maps")
    return image


def _looks_whole(path: str) -> bool:
    """The header opens, and the end is a PNG's or JPEG's end."""
    image = _pillow()
    try:
        with open(path, "rb") as file, image.open(file) as picture:
            kind = picture.format
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            tail = file.read()
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError):
        return False
    return {"PNG": b"IEND", "JPEG": b"\xff\xd9"}.get(kind, b"") in tail


def _first(paths: list[str], size: int, colour: bool = False) -> Pixels | None:
    """The first file that decodes, (S, S) or (S, S, 3) in [0, 1], bottom row first."""
    image = _pillow()
    for path in paths:
        try:
            return _values(decode_picture(path), size, colour, image)
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} cannot be read and is left out: {error}", stacklevel=3)
    return None


def _values(picture: Image, size: int, colour: bool, image: ModuleType) -> Pixels:
    if picture.mode.startswith("I") and not colour:  # 16 bits: Pillow's conversion to 8 would cut them off
        values = np.asarray(picture).astype(np.float32) / np.float32(65535)
        picture = image.fromarray(np.clip(values, 0, 1))
    elif picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.int64) >> 8
        picture = image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
    else:
        picture = picture.convert("RGB" if colour else "L")
    smaller = size <= min(picture.size)
    picture = picture.resize((size, size), image.Resampling.BOX if smaller else image.Resampling.BICUBIC)
    values = np.asarray(picture)
    values = values if values.dtype == np.float32 else values.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(np.clip(values, 0, 1)[::-1])


def _linear(srgb: Pixels) -> Pixels:
    """Linear light of sRGB values (IEC 61966-2-1), through a table of the 256 values there are."""
    steps = np.arange(256) / 255.0
    table = np.where(steps <= 0.04045, steps / 12.92, ((steps + 0.055) / 1.055) ** 2.4).round(9).astype(np.float32)
    return table[(srgb * np.float32(255) + np.float32(0.5)).astype(np.int64)]


def _unit(colour: Pixels, turn: float) -> Pixels:
    """Normals stored as (n + 1) / 2; `turn` -1 turns y round."""
    n = colour * np.float32(2) - np.float32(1)
    n *= np.array([1, turn, 1], dtype=np.float32)
    n[..., 2] = np.maximum(n[..., 2], np.float32(1e-3))
    return n / np.sqrt(n[..., :1] ** 2 + n[..., 1:2] ** 2 + n[..., 2:] ** 2)
