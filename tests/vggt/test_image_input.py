"""Whatever form a picture is given in, the same pixels come out; what is no picture is refused in one sentence."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from peft_attrsub._pictures import BIT_DEPTHS, decode_picture, natural_key, picture_files
from peft_attrsub.vggt import VggtConfig, VggtImageProcessor, VggtModel

SIDE = 56
SMALL = VggtImageProcessor(image_size=SIDE)

#: Mode -> file formats that keep it without loss.
FORMATS = {
    "1": ("png", "tiff", "bmp"),
    "L": ("png", "tiff", "bmp", "webp", "pgm", "jp2"),
    "LA": ("png", "tiff", "tga"),
    "P": ("png", "gif", "tiff", "bmp"),
    "RGB": ("png", "tiff", "bmp", "webp", "ppm", "tga", "qoi"),
    "RGBA": ("png", "tiff", "webp", "tga", "qoi"),
    "CMYK": ("tiff",),
    "YCbCr": ("tiff",),
    "I;16": ("png", "tiff"),
    "F": ("tiff",),
}
#: Orientation -> from the upright picture to what a file of that tag stores.
STORED: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda i: i,
    2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
    4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
    6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
    7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
    8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
}


def picture(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """Noise of any mode; values of 16 bits reach the top, so that their number of bits is not in doubt."""
    rng = np.random.default_rng(seed)
    bands = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3}.get(mode, 1)
    values = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    if mode == "I;16":
        wide = rng.integers(0, 65536, (height, width), dtype=np.uint16)
        wide[0, 0] = 65535
        return Image.fromarray(wide)
    if mode == "F":
        return Image.fromarray((values[..., 0] / 255).astype(np.float32))
    if mode == "P":
        image = Image.fromarray(values[..., 0] % 7).convert("P")
        image.putpalette(rng.integers(0, 256, 21, dtype=np.uint8).tobytes())
        return image
    if mode in ("YCbCr", "1"):
        return Image.fromarray(values[..., 0] if bands == 1 else values).convert(mode)
    image = Image.fromarray(values[..., 0] if bands == 1 else values[..., :4] if bands != 4 else values)
    return image if image.mode == mode else Image.frombytes(mode, image.size, values.tobytes())


def by_hand(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an upright picture: 16 bits and floats to 8, then alpha over white."""
    if image.mode == "F":
        return np.repeat(np.rint(np.asarray(image) * 255).astype(np.uint8)[..., None], 3, -1)
    if image.mode.startswith("I"):
        return np.repeat(np.rint(np.asarray(image) / 257.0).astype(np.uint8)[..., None], 3, -1)
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


class Pipe(io.RawIOBase):
    """A stream that cannot be rewound, as a network connection."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(size)


def at_end(data: bytes) -> io.BytesIO:
    """As it is after something was written into it."""
    buffer = io.BytesIO()
    buffer.write(data)
    return buffer


def ways_of_files(path: Path) -> Iterator[tuple[str, object]]:
    data = path.read_bytes()
    yield "Path", path
    yield "str", str(path)
    yield "folder", path.parent
    yield "list of folders", [str(path.parent)]
    yield "bytes", data
    yield "bytearray", bytearray(data)
    yield "BytesIO", io.BytesIO(data)
    yield "BytesIO at its end", at_end(data)
    yield "pipe", Pipe(data)
    yield "PIL of a file", Image.open(path)
    yield "iterator", iter([path])
    yield "tuple", (data,)


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(sorted(FORMATS)),
    number=st.integers(0, 99),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    orientation=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_way_to_give_a_picture(
    mode: str, number: int, width: int, height: int, orientation: int, seed: int
) -> None:
    image = picture(mode, width, height, seed)
    assert image.mode == mode
    expected = by_hand(image)
    reference = SMALL(expected)["pixel_values"]
    suffix = FORMATS[mode][number % len(FORMATS[mode])]
    options: dict[str, object] = {"lossless": True, "exact": True} if suffix == "webp" else {}
    if orientation > 1 and suffix in ("png", "webp") and mode not in ("F",):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    else:
        orientation = 1
    tolerance = 1.01 / 255 if "A" in mode else 1e-6  # Pillow blends in integers
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"view.{suffix}"
        STORED[orientation](image).save(path, **options)
        for name, form in ways_of_files(path):
            pixels = SMALL(form)["pixel_values"]
            assert pixels.shape == reference.shape, (name, mode, suffix, orientation)
            assert float((pixels - reference).abs().max()) <= tolerance, (name, mode, suffix, orientation)
        with path.open("rb") as file:
            assert float((SMALL(file)["pixel_values"] - reference).abs().max()) <= tolerance
            assert not file.closed
    memory = {
        "PIL": image,
        "uint8": expected,
        "float16": expected.astype(np.float16) / np.float16(255),
        "float32": expected / np.float32(255),
        "float64": expected / 255,
        "uint16": np.maximum(expected.astype(np.uint16) * 257, 0),
        "tensor": torch.from_numpy(expected).permute(2, 0, 1),
        "float tensor": torch.from_numpy(expected).permute(2, 0, 1).double() / 255,
    }
    for name, form in memory.items():
        if name == "uint16" and expected.max() < 16:
            continue  # too dark for its number of bits to be told
        pixels = SMALL(form)["pixel_values"]
        assert float((pixels - reference).abs().max()) <= tolerance, (name, mode)


# ------------------------------------------------------------------------------------------------------- bit depth


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BIT_DEPTHS),
    views=st.integers(1, 4),
    form=st.sampled_from(["array", "grey array", "tensor", "PIL", "file"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_16_bit_values_of_fewer_bits(bits: int, views: int, form: str, seed: int) -> None:
    """The whole scene decides, though every view but one is dark; a batch's scenes do not touch each other."""
    rng = np.random.default_rng(seed)
    top = 2**bits - 1
    grey = form in ("grey array", "PIL", "file")
    scene = [rng.integers(0, 40, (SIDE, SIDE) if grey else (SIDE, SIDE, 3), dtype=np.uint16) for _ in range(views)]
    scene[int(rng.integers(views))][3, 5] = top
    with tempfile.TemporaryDirectory() as folder:
        given_as: list[object] = []
        for number, values in enumerate(scene):
            if form == "tensor":
                given_as.append(torch.from_numpy(values.astype(np.int32)).to(torch.uint16).permute(2, 0, 1))
            elif form in ("PIL", "file"):
                path = Path(folder) / f"{number}.png"
                Image.fromarray(values).save(path)
                given_as.append(path if form == "file" else Image.fromarray(values))
            else:
                given_as.append(values)
        pixels = SMALL(given_as)["pixel_values"][0].numpy()
        forced = SMALL(given_as, bit_depth=16)["pixel_values"][0].numpy()
        both = SMALL([given_as, [np.full((SIDE, SIDE), 65535, np.uint16)] * views])["pixel_values"].numpy()
    for values, found, low in zip(scene, pixels, forced, strict=True):
        whole = np.stack([values] * 3, -1) if grey else values
        np.testing.assert_allclose(found, np.rint(whole / top * 255).transpose(2, 0, 1) / 255, atol=1e-6)
        np.testing.assert_allclose(low, np.rint(whole / 65535 * 255).transpose(2, 0, 1) / 255, atol=1e-6)
    assert np.array_equal(both[0], pixels) and (both[1] == 1).all()


def test_alpha_of_16_bits_does_not_hide_that_the_colors_have_12() -> None:
    values = np.full((SIDE, SIDE, 4), 65535, np.uint16)
    values[..., :3] = 1000
    values[0, 0, :3] = 4095
    pixels = SMALL(values)["pixel_values"][0, 0].numpy()
    assert pixels[:, 9, 9] == pytest.approx(round(1000 * 255 / 4095) / 255)


def test_bit_depth_is_kept_and_checked(tmp_path: Path) -> None:
    VggtImageProcessor(bit_depth=12).save_pretrained(tmp_path)
    loaded = VggtImageProcessor.from_pretrained(tmp_path)
    assert loaded.bit_depth == 12
    with pytest.raises(ValueError, match=r"view 0 of scene 0 .*its values reach 5000, and 12 bits hold 4095"):
        loaded(np.full((8, 8), 5000, np.uint16))
    with pytest.raises(ValueError, match="bit_depth=17"):
        VggtImageProcessor(bit_depth=17)


def sixteen_bit_png(values: np.ndarray) -> bytes:
    """An RGB PNG with 16 bits a channel, which Pillow reads and cannot write."""
    import struct
    import zlib

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    whole = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole) + b"\0\0\0\0IEND\xaeB`\x82"


def test_16_bit_rgb_files(tmp_path: Path) -> None:
    """Pillow keeps their upper half: fine for 16 bits, next to nothing for 12."""
    values = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 3)).astype(np.uint16)
    pixels = SMALL(sixteen_bit_png(values))["pixel_values"][0, 0].numpy()
    assert np.abs(pixels - values.transpose(2, 0, 1) / 65535).max() < 1.01 / 255
    (tmp_path / "twelve.png").write_bytes(sixteen_bit_png(values >> 4))
    for form in (tmp_path / "twelve.png", Image.open(tmp_path / "twelve.png")):
        with pytest.raises(ValueError, match=r"view 0 of scene 0, the file .*twelve\.png.* 12 bits or fewer.*uint16"):
            SMALL(form)
    # One bright view shows that the values are real.
    assert SMALL([tmp_path / "twelve.png", sixteen_bit_png(values)])["pixel_values"].shape[1] == 2
    with pytest.raises(ValueError, match="uint16 array"):
        SMALL(sixteen_bit_png(values), bit_depth=12)


# --------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_a_scene_in_natural_order(tmp_path: Path) -> None:
    names = ["img10.PNG", "img2.png", "img1.png", "IMG3.png", "img02.png", "b.webp"]
    shades = {name: 30 * (number + 1) for number, name in enumerate(names)}
    for name, shade in shades.items():
        Image.new("RGB", (SIDE, SIDE), (shade,) * 3).save(tmp_path / name, lossless=True)
    for other in (".hidden.png", "._img1.png", "Thumbs.db", "notes.txt", "poses.json"):
        (tmp_path / other).write_text("x", encoding="utf-8")
    (tmp_path / "masks.png").mkdir()
    order = ["b.webp", "img1.png", "img02.png", "img2.png", "IMG3.png", "img10.PNG"]
    assert [path.name for path in picture_files(tmp_path)] == order
    pixels = SMALL(tmp_path)["pixel_values"]
    assert (pixels[0, :, 0, 0, 0] * 255).round().int().tolist() == [shades[name] for name in order]
    assert torch.equal(SMALL([str(tmp_path), tmp_path])["pixel_values"], pixels.expand(2, -1, -1, -1, -1))
    with pytest.raises(ValueError, match="mixes single images with scenes"):
        SMALL([tmp_path, tmp_path / "img1.png"])
    model = VggtModel(VggtConfig.preset("vggt-mini", image_size=SIDE)).eval()
    assert torch.equal(model.predict(tmp_path).images, pixels[0])


@given(st.lists(st.text("aB.0129 ²٣é", max_size=8), max_size=6))
def test_natural_order_is_an_order(names: list[str]) -> None:
    """Any names have one order, whatever order they come in, and it follows the numbers in them."""
    ordered = sorted(names, key=natural_key)
    names.reverse()
    assert sorted(names, key=natural_key) == ordered
    assert sorted((f"v{i}.png" for i in range(120)), key=natural_key) == [f"v{i}.png" for i in range(120)]


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert torch.equal(SMALL("~")["pixel_values"], SMALL(tmp_path / "red.png")["pixel_values"])
    assert torch.equal(SMALL("~/red.png")["pixel_values"], SMALL(tmp_path / "red.png")["pixel_values"])


# -------------------------------------------------------------------------------------------------------- refusals

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
AVIF = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(40)
FILES = {
    "empty.jpg": (b"", r"is empty \(0 bytes\)"),
    "notes.jpg": ("Zeilen mit Umlauten: äöü\n".encode() * 400, "holds text, not a picture"),
    "page.png": (b"\n<!DOCTYPE html><html>404</html>", "an HTML page, as a failed download"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "clip.jpg": (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64), "it is a video: extract its frames"),
    "clip.mkv": (b"\x1aE\xdf\xa3" + bytes(64), "it is a video"),
    "clip.avi": (b"RIFF\x24\0\0\0AVI LIST" + bytes(64), "it is a video"),
    "array.npy": (b"\x93NUMPY\1\0" + bytes(64), "np.load"),
    "phone.heic": (HEIC, "pip install pillow-heif"),
    "noise.png": (bytes(range(128, 256)) * 4, "no format that Pillow reads"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_picture_gets_a_sentence(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, reason = FILES[name]
    for plugin in ("pillow_heif", "pillow_avif"):
        monkeypatch.setitem(sys.modules, plugin, None)
    path = tmp_path / name
    path.write_bytes(data)
    good = Image.new("RGB", (9, 9))
    for form, named in ((path, True), (str(path), True), (path.open("rb"), True), (data, False)):
        with pytest.raises(ValueError, match=reason) as caught:
            SMALL([good, form])
        text = str(caught.value)
        assert text.startswith("view 1 of scene 0") and text.endswith(".") and "\n" not in text
        assert (repr(str(path)) in text) == named


@settings(max_examples=80, deadline=None)
@given(mode=st.sampled_from(sorted(FORMATS)), seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["cut", "dirt"]))
def test_damage_is_a_sentence_or_a_picture(mode: str, seed: int, kind: str) -> None:
    """Cut files and files with random bytes in them: nothing but ValueError, in one line, ever comes out."""
    rng = np.random.default_rng(seed)
    image, suffix = picture(mode, 24, 18, seed), str(rng.choice(FORMATS[mode]))
    buffer = io.BytesIO()
    image.save(buffer, {"jp2": "JPEG2000", "pgm": "PPM"}.get(suffix, suffix.upper()))
    data = bytearray(buffer.getvalue())
    if kind == "cut":
        data = data[: int(rng.integers(len(data)))]
    else:
        for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
            data[place] = int(rng.integers(256))
    try:
        assert SMALL(bytes(data))["pixel_values"].isfinite().all()
    except ValueError as error:
        assert str(error).startswith("view 0 of scene 0 cannot be read as an image: ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "name",
    ["https://example.org/a/b.jpg", "http://example.org/x.png", "s3://bucket/x.png", "data:image/png;base64,iVBORw0K"],
)
def test_nothing_is_downloaded(name: str) -> None:
    with pytest.raises(ValueError, match=r"the file .* is a URL, and nothing is downloaded"):
        SMALL([name])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no pictures \(\.png, "),
        ([".hidden.jpg", "notes.txt"], "holds no pictures"),
        (["clip.MP4"], r"no pictures, but the video 'clip\.MP4': extract its frames"),
        (["images/0.png"], r"no pictures .*subfolders, which are not searched: 'images'"),
    ],
)
def test_a_folder_without_pictures(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=message) as caught:
        SMALL(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x", encoding="utf-8")
    with text.open(encoding="utf-8") as file, pytest.raises(ValueError, match=r"a\.txt.*open it with mode 'rb'"):
        SMALL(file)
    with pytest.raises(ValueError, match=r"view 0 of scene 0, the file .*cannot be read as an image: "):
        SMALL(tmp_path / ("x" * 300 + ".png"))
    with pytest.raises(ValueError, match=r"view 0 of scene 0, the file .*cannot be read as an image: "):
        SMALL(f"{text}{os.sep}inside.png")
    closed = io.BytesIO(b"")
    closed.close()
    with pytest.raises(ValueError, match=r"view 0 of scene 0 cannot be read as an image: .*closed file"):
        SMALL(closed)


class ToyHeif(ImageFile.ImageFile):
    """Reads one pixel from behind the header of the files above, as pillow-heif reads a whole picture."""

    format, format_description = "TOYHEIF", "toy"

    def _open(self) -> None:
        self._size, self._mode = (1, 1), "RGB"
        self.tile = [ImageFile._Tile("raw", (0, 0, 1, 1), 24, ("RGB", 0, 1))]


@pytest.mark.parametrize(("module", "data"), [("pillow_heif", HEIC), ("pillow_avif", AVIF)])
def test_an_installed_plugin_is_used_on_demand(monkeypatch: pytest.MonkeyPatch, module: str, data: bytes) -> None:
    brand = b"heic" if module == "pillow_heif" else b"avif"

    def register() -> None:
        Image.register_open("TOYHEIF", ToyHeif, lambda head: head[4:8] == b"ftyp")

    if module == "pillow_heif":
        plugin = types.SimpleNamespace(register_heif_opener=register)
    else:  # registers itself when it is imported, here by looking at it
        plugin = types.SimpleNamespace()
        monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace())
        monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    monkeypatch.setattr(Image, "ID", [one for one in Image.ID if one != "AVIF"])
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setitem(sys.modules, module, plugin)
    if module == "pillow_avif":
        monkeypatch.setattr(
            "peft_attrsub._pictures.importlib.import_module", lambda name: (register(), sys.modules[name])[1]
        )
    assert brand in data
    colored = data[:24] + b"\x11\x22\x33" + data[27:]
    assert decode_picture(colored).getpixel((0, 0)) == (0x11, 0x22, 0x33)
