"""Pictures from files, folders, bytes and open files: the one reader that every room uses.

Pillow is imported where it is used, so that this file costs nothing where no picture is read.
"""

from __future__ import annotations

import importlib
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

_PICTURES = """
.png .jpg .jpeg .jpe .jfif .bmp .gif .tif .tiff .webp .avif .heic .heif .hif .jp2 .j2k .pnm .ppm .pgm .pbm .tga
.qoi .mpo
"""
_VIDEOS = ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .mts .3gp"
#: Endings, in lower case, of what `picture_files` takes for a picture, and of videos.
SUFFIXES, VIDEO_SUFFIXES = frozenset(_PICTURES.split()), frozenset(_VIDEOS.split())

#: Key in `Image.info`: the file has 16 bits a channel, of which Pillow keeps the upper 8.
UPPER_HALF = "peft_attrsub: upper 8 of 16 bits"

#: Numbers of bits that values in 16 bits are known to use. 14 is not among them: a scene of true 16-bit values that
#: all lie below 16384 is merely dark, one below 4096 would be black.
BIT_DEPTHS = (8, 10, 12, 16)

_URL = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters or more before the colon: C:/ is a drive
_FRAMES = "extract its frames first (ffmpeg -i VIDEO frames/%05d.png) and pass the folder"
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_AVIF = {b"avif", b"avis"}
_HEAD = 4096


# ---------------------------------------------------------------------------------------------------------- reading


def decode_picture(source: Any, upright: bool = False) -> Image.Image:
    """The picture in a file, in all of Pillow's modes, with its pixels loaded; of an animation the first frame.

    Args:
        source: a path, the bytes of a file, or an open binary file, which is read from its start and left open.
        upright: turn it as its EXIF orientation says. Leave it as stored where other files (depth, masks, texture
            coordinates) refer to the stored pixels.

    Returns: the image; `info[UPPER_HALF]` is set where the file holds 16 bits a channel and Pillow keeps 8.
    Raises: FileNotFoundError for a path that does not exist; ValueError with the reason for what cannot be read, as
        a clause ("it holds text, not a picture"): the caller knows best how to name the source.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.path.expanduser(os.fspath(source))
        if isinstance(name, str) and _URL.match(name) and not os.path.exists(name):
            raise ValueError("it is a URL, and nothing is downloaded here: fetch it, then pass the file or its bytes")
        if os.path.isdir(name):
            raise ValueError("it is a folder, and one picture was expected")
        try:
            with open(name, "rb") as file:
                return _decode(file, upright)
        except FileNotFoundError:
            raise
        except OSError as error:  # no permission, a name that is too long, an I/O error
            raise ValueError(error.strerror or str(error)) from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), upright)
    if isinstance(source, io.TextIOBase):
        raise ValueError("the file is open in text mode: open it with mode 'rb'")
    if source.seekable() if hasattr(source, "seekable") else hasattr(source, "seek"):
        source.seek(0)
    return _decode(io.BytesIO(source.read()), upright)


def loaded(image: Image.Image, upright: bool = False) -> Image.Image:
    """An image that Pillow has opened, with its pixels, turned upright if asked. Raises ValueError with the reason."""
    from PIL import ImageOps

    narrowed = _has_wide_channels(image)
    try:
        image.load()
        turned = ImageOps.exif_transpose(image) if upright else image
    except MemoryError:
        raise
    except Exception as error:  # decoders raise more than OSError: SyntaxError, struct.error, ValueError, ...
        raise ValueError(f"the file is cut short or damaged ({_first_line(error)}): fetch it again") from error
    if narrowed:
        turned.info[UPPER_HALF] = True
    return turned


def _decode(file: Any, upright: bool) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(_HEAD)
        if not _register(head):
            raise ValueError(_reason(head)) from error
        try:
            image = Image.open(file)
        except Exception as again:
            raise ValueError(f"the file is cut short or damaged ({_first_line(again)}): fetch it again") from again
    except MemoryError:
        raise
    except Exception as error:  # a decompression bomb, or whatever a plugin trips over in a damaged header
        raise ValueError(_first_line(error)) from error
    return loaded(image, upright)


def _has_wide_channels(image: Image.Image) -> bool:
    """Whether Pillow is about to drop the lower byte of every channel; known only before the pixels are loaded."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    return any(";16" in str(tile[-1]) for tile in getattr(image, "tile", ()))


def _brands(head: bytes) -> set[bytes]:
    """The brands of an ISO base media file (HEIF, AVIF, MP4, QuickTime), empty for any other file."""
    if head[4:8] != b"ftyp":
        return set()
    size = min(max(int.from_bytes(head[:4], "big"), 12), len(head))
    return {head[8:12]} | {head[i : i + 4] for i in range(16, size - 3, 4)}


def _register(head: bytes) -> bool:
    """Add the plugin for HEIF or AVIF to Pillow if the file needs one that is installed."""
    brands = _brands(head)
    wanted = []
    if brands & _AVIF:
        wanted = [("pillow_heif", "register_avif_opener"), ("pillow_avif", None)]
    elif brands & _HEIF:
        wanted = [("pillow_heif", "register_heif_opener")]
    for module, function in wanted:
        try:
            plugin = importlib.import_module(module)
            if function is not None:
                getattr(plugin, function)()
        except (ImportError, AttributeError):  # newer versions of pillow-heif leave AVIF to Pillow
            continue
        return True
    return False


def _reason(head: bytes) -> str:
    """Why Pillow does not know a file that begins with `head`, and what to do."""
    brands, start = _brands(head), head.lstrip()[:64].lower()
    if not head:
        return "the file is empty (0 bytes): fetch it again"
    if brands & _AVIF:
        return "it is AVIF, which Pillow reads from 11.3 on: pip install -U pillow, or convert it to PNG"
    if brands & _HEIF:
        return "it is HEIC/HEIF, which Pillow reads by a plugin only: pip install pillow-heif, or convert it to JPEG"
    if brands or head[4:8] in (b"moov", b"mdat") or head[:4] in (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3"):
        return f"it is a video: {_FRAMES}"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return f"it is a video: {_FRAMES}"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the picture: run git lfs pull"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, as a failed download leaves one: fetch the picture again"
    if head[:6] == b"\x93NUMPY":
        return "it is a NumPy file: pass the array that np.load gives"
    if _is_text(head):
        return "it holds text, not a picture: check which file this is"
    return "it is in no format that Pillow reads, or damaged: fetch it again, or convert it to PNG or JPEG"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < _HEAD:  # else a character is cut by the end of the head
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# ---------------------------------------------------------------------------------------------------------- folders


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which img2 comes before img10, whatever the case of the letters."""
    parts = re.split(r"([0-9]+)", name)
    numbers = [(1, int(part), "") if part.isascii() and part.isdigit() else (0, 0, part.casefold()) for part in parts]
    return [*numbers, (2, 0, name)]  # names that differ in case or in zeros have an order of their own


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures of a folder in natural order, by the endings in SUFFIXES; hidden files and subfolders are left out.

    Raises ValueError, a sentence that names the folder, where there are none.
    """
    place = Path(os.path.expanduser(folder))
    try:
        names = sorted(os.listdir(place), key=natural_key)
    except OSError as error:
        raise ValueError(f"the folder {str(place)!r} cannot be read: {error.strerror}.") from error
    visible = [place / name for name in names if not name.startswith(".")]
    found = [path for path in visible if path.suffix.lower() in SUFFIXES and path.is_file()]
    if found:
        return found
    videos = [path.name for path in visible if path.suffix.lower() in VIDEO_SUFFIXES]
    if videos:
        raise ValueError(f"the folder {str(place)!r} holds no pictures, but the video {videos[0]!r}: {_FRAMES}.")
    inside = [path.name for path in visible if path.is_dir()][:3]
    hint = f" It has subfolders, which are not searched: {', '.join(map(repr, inside))}." if inside else ""
    raise ValueError(
        f"the folder {str(place)!r} holds no pictures (.png, .jpg, .tif, .webp, ...): give a folder with the views of "
        f"one scene.{hint}"
    )


# ------------------------------------------------------------------------------------------------------- conversion


def wide_values(image: Image.Image) -> NDArray[np.uint16] | NDArray[np.float32] | None:
    """(H, W) uint16 of an image of mode I or I;16, float32 of mode F, None for modes of 8 bits a channel.

    Pillow's own convert() clips both at 255. Raises ValueError with the reason for integers beyond 16 bits.
    """
    if image.mode == "F":
        return np.asarray(image, np.float32)
    if not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("it holds integers beyond 16 bits, expected values from 0 to 65535")
    return values.astype(np.uint16)


def bit_depth_of(maximum: int) -> int:
    """The fewest of BIT_DEPTHS bits that hold `maximum`."""
    return next(bits for bits in BIT_DEPTHS if maximum < 1 << bits)


def to_8_bits(values: NDArray[np.uint16], bits: int = 16) -> NDArray[np.uint8]:
    """round(255 v / (2^bits - 1)), any shape. Raises ValueError with the reason for larger values."""
    top = (1 << bits) - 1
    if values.size and values.max() > top:
        raise ValueError(
            f"its values reach {values.max()}, and {bits} bits hold {top} at most: give another bit_depth"
        )
    return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)


def to_rgba(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 4) uint8 of a picture in any mode: 16 bits become 8, floats are in [0, 1], alpha is 255 without one."""
    from PIL import Image

    values = wide_values(image)
    if values is not None:
        scaled = values / np.float32(65535) if values.dtype == np.uint16 else values
        image = Image.fromarray(np.rint(scaled.clip(0, 1) * 255).astype(np.uint8))
    try:
        return np.asarray((image.convert("LA") if image.mode == "La" else image).convert("RGBA"))
    except ValueError as error:
        raise ValueError(f"its mode {image.mode} has no way to RGB: save it as RGB") from error


def on_white(image: Image.Image) -> Image.Image:
    """A picture of a mode with 8 bits a channel as RGB: transparency, also of palettes, is laid on white."""
    from PIL import Image

    if "transparency" in image.info or image.mode.endswith(("A", "a")):
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"its mode {image.mode} has no way to RGB: save it as RGB") from error
