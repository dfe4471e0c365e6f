"""VggtImageProcessor: sizes by the published rules, pixels against plain PIL, every kind of input, every refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from peft_attrsub.vggt import VggtConfig
from peft_attrsub.vggt.image_processing_vggt import VggtImageProcessor

SMALL = VggtImageProcessor(image_size=112)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(width, height, seed=seed))


def reference(image: Image.Image, mode: str, side: int, patch: int) -> np.ndarray:
    """One image (3, H, W) in float64, step by step as the rules are written."""
    w, h = image.size
    if mode == "square":
        longest = max(w, h)
        square = np.zeros((longest, longest, 3), np.uint8)
        left, top = (longest - w) // 2, (longest - h) // 2
        square[top : top + h, left : left + w] = np.asarray(image)
        return np.asarray(Image.fromarray(square).resize((side, side), Image.BICUBIC)).transpose(2, 0, 1) / 255
    if mode == "crop" or w >= h:
        new_w, new_h = side, max(1, round(h * side / w / patch)) * patch
    else:
        new_w, new_h = max(1, round(w * side / h / patch)) * patch, side
    pixels = np.asarray(image.resize((new_w, new_h), Image.BICUBIC)).transpose(2, 0, 1) / 255
    if mode == "crop":
        if new_h > side:
            start = (new_h - side) // 2
            pixels = pixels[:, start : start + side]
        return pixels
    out = np.ones((3, side, side))
    left, top = (side - new_w) // 2, (side - new_h) // 2
    out[:, top : top + new_h, left : left + new_w] = pixels
    return out


# --------------------------------------------------------------------------------------------- sizes and pixels


def test_the_defaults_are_those_of_vggt_1b() -> None:
    processor = VggtImageProcessor()
    assert (processor.mode, processor.image_size, processor.patch_size) == ("crop", 518, 14)
    assert (processor.image_size, processor.patch_size) == (VggtConfig().image_size, VggtConfig().patch_size)


@pytest.mark.parametrize(
    ("width", "height", "mode", "shape", "box"),
    [
        (640, 480, "crop", (392, 518), (0, 0, 518, 392)),  # 480 * 518 / 640 / 14 = 27.75 -> 28 patches
        (1920, 1080, "crop", (294, 518), (0, 0, 518, 294)),  # 20.81 -> 21
        (518, 518, "crop", (518, 518), (0, 0, 518, 518)),
        (480, 640, "crop", (518, 518), (0, -84, 518, 602)),  # 49.33 -> 49 patches, 686 rows, (686 - 518) // 2 = 84
        (100, 101, "crop", (518, 518), (0, 0, 518, 518)),  # 37.37 -> 37: nothing to crop
        (640, 480, "pad", (518, 518), (0, 63, 518, 455)),
        (480, 640, "pad", (518, 518), (63, 0, 455, 518)),
        (640, 480, "square", (518, 518), (0, 64.75, 518, 453.25)),  # 80 rows of black of 640, above and below
        (2000, 10, "crop", (14, 518), (0, 0, 518, 14)),  # never less than a patch
        (10, 2000, "pad", (518, 518), (252, 0, 266, 518)),
    ],
)
def test_known_sizes(width: int, height: int, mode: str, shape: tuple[int, int], box: tuple[float, ...]) -> None:
    features = VggtImageProcessor(mode=mode)(picture(width, height))
    assert features["pixel_values"].shape == (1, 1, 3, *shape)
    assert features["pixel_values"].dtype == torch.float32
    assert features["boxes"].tolist() == [[[*box, width, height]]]
    assert features["original_sizes"].tolist() == [[[height, width]]]


@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    mode=st.sampled_from(["crop", "pad", "square"]),
    patch=st.sampled_from([4, 14]),
    patches=st.integers(1, 5),
)
def test_pixels_equal_the_reference(width: int, height: int, mode: str, patch: int, patches: int) -> None:
    image = picture(width, height, seed=width * height)
    processor = VggtImageProcessor(mode=mode, image_size=patch * patches, patch_size=patch)
    pixels = processor(image)["pixel_values"][0, 0].numpy()
    np.testing.assert_allclose(pixels, reference(image, mode, patch * patches, patch), atol=1e-7)
    assert pixels.shape[1] % patch == 0 and pixels.shape[2] % patch == 0


@pytest.mark.parametrize("mode", ["crop", "pad", "square"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (90, 90)])
def test_boxes_lead_back_to_the_image(mode: str, size: tuple[int, int]) -> None:
    """Red tells the column of the image and green its row: each output pixel knows where it came from."""
    w, h = size
    ramp = np.zeros((h, w, 3))
    ramp[..., 0], ramp[..., 1] = np.arange(w) / (w - 1), np.arange(h)[:, None] / (h - 1)
    other = picture(300, 150)  # makes the crop mode pad
    features = VggtImageProcessor(mode=mode, image_size=112)([other, ramp])
    pixels, (x1, y1, x2, y2, bw, bh) = features["pixel_values"][0, 1].numpy(), features["boxes"][0, 1].tolist()
    assert (bw, bh) == (w, h)
    checked = 0
    for v in range(pixels.shape[1]):
        for u in range(pixels.shape[2]):
            x, y = (u + 0.5 - x1) * w / (x2 - x1), (v + 0.5 - y1) * h / (y2 - y1)
            if 6 < x < w - 6 and 6 < y < h - 6:  # bicubic bends a ramp at its ends
                assert pixels[0, v, u] == pytest.approx((x - 0.5) / (w - 1), abs=0.01)
                assert pixels[1, v, u] == pytest.approx((y - 0.5) / (h - 1), abs=0.01)
                checked += 1
    assert checked > 4000


def test_an_image_of_the_right_size_is_not_touched() -> None:
    values = noise(112, 98)
    assert np.array_equal(SMALL(values)["pixel_values"][0, 0].numpy(), (values / np.float32(255)).transpose(2, 0, 1))


# ----------------------------------------------------------------------------------------------- kinds of input


def test_one_picture_in_any_form_gives_the_same_pixels(tmp_path: Path) -> None:
    values = noise(90, 70)
    path = tmp_path / "view.png"
    Image.fromarray(values).save(path)
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    forms = {
        "pil": Image.fromarray(values),
        "path": path,
        "name": str(path),
        "uint8": values,
        "float32": (values / 255).astype(np.float32),
        "float64": values / 255,
        "uint16": values.astype(np.uint16) * 257,
        "big-endian": (values.astype(np.uint16) * 257).astype(">u2"),
        "tensor": tensor,
        "float tensor": tensor / 255,
        "not contiguous": values[::-1][::-1],
        "with gradient": (tensor / 255).requires_grad_(),
    }
    expected = SMALL(values)["pixel_values"]
    for name, form in forms.items():
        assert torch.equal(SMALL(form)["pixel_values"], expected), name


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "RGB", "F", "I;16", "I"])
def test_modes_without_transparency(mode: str) -> None:
    grey = noise(112, 112, 1)[..., 0]
    if mode == "F":
        image, expected = Image.fromarray((grey / 255).astype(np.float32)), grey
    elif mode in ("I;16", "I"):
        wide = np.minimum(grey.astype(np.int64) * 257 + 3, 65535).astype(
            np.uint16
        )  # rounds to grey; what convert() makes of it is white
        image, expected = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32)), grey
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert image.mode == mode
    pixels = SMALL(image)["pixel_values"][0, 0].numpy() * 255
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=1e-4)


def test_grey_arrays_and_tensors_are_repeated() -> None:
    grey = noise(112, 98, 1)
    expected = np.broadcast_to(grey.transpose(2, 0, 1) / np.float32(255), (3, 98, 112))
    for form in (grey, grey[..., 0], torch.from_numpy(grey).permute(2, 0, 1)):
        assert np.array_equal(SMALL(form)["pixel_values"][0, 0].numpy(), expected)


def test_16_bit_files(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 65536, (112, 112)).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "depthlike.png")
    pixels = SMALL(tmp_path / "depthlike.png")["pixel_values"][0, 0].numpy()
    assert np.abs(pixels - wide / 65535).max() <= 0.5 / 255 + 1e-6


def on_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:].astype(float) / 255
    return ((colour * alpha + 255 * (1 - alpha)) / 255).transpose(2, 0, 1)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = noise(112, 112, 4)
    for form in (Image.fromarray(rgba), rgba, rgba / 255, torch.from_numpy(rgba).permute(2, 0, 1)):
        pixels = SMALL(form)["pixel_values"][0, 0].numpy()
        np.testing.assert_allclose(pixels, on_white(rgba), atol=1.01 / 255)

    grey_alpha = Image.fromarray(rgba).convert("LA")
    np.testing.assert_allclose(
        SMALL(grey_alpha)["pixel_values"][0, 0].numpy(),
        on_white(np.asarray(grey_alpha.convert("RGBA"))),
        atol=1.01 / 255,
    )

    palette = Image.new("P", (112, 112), 0)
    palette.putpalette([200, 0, 0, 0, 100, 0])
    palette.paste(1, (0, 0, 56, 112))
    palette.save(tmp_path / "palette.png", transparency=0)
    pixels = SMALL(tmp_path / "palette.png")["pixel_values"][0, 0].numpy()
    assert np.allclose(pixels[:, :, 56:], 1)
    assert np.allclose(pixels[:, :, :56], np.array([0, 100 / 255, 0])[:, None, None], atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int) -> None:
    """The file holds the pixels turned; what is seen upright must come out whatever the tag."""
    upright = noise(90, 60)
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    features = SMALL(tmp_path / "turned.png")
    assert torch.equal(features["pixel_values"], SMALL(upright)["pixel_values"])
    assert features["original_sizes"].tolist() == [[[60, 90]]]
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(SMALL(opened)["pixel_values"], features["pixel_values"])


# --------------------------------------------------------------------------------------------- scenes and batches


def test_unequal_sizes_are_padded_with_white_in_the_middle() -> None:
    wide, high = picture(160, 80), picture(80, 80, seed=1)
    features = SMALL([wide, high])
    pixels = features["pixel_values"].numpy()
    assert pixels.shape == (1, 2, 3, 112, 112)
    expected = np.ones((3, 112, 112))
    expected[:, 28:84] = reference(wide, "crop", 112, 14)
    np.testing.assert_allclose(pixels[0, 0], expected, atol=1e-7)
    np.testing.assert_allclose(pixels[0, 1], reference(high, "crop", 112, 14), atol=1e-7)
    assert features["boxes"][0, 0].tolist() == [0, 28, 112, 84, 160, 80]
    # An odd difference in patches: 14 rows of white over 2 gives 7 and 7.
    features = SMALL([picture(112, 98), picture(112, 84)])
    assert features["boxes"][0, 1].tolist() == [0, 7, 112, 91, 112, 84]


def test_a_batch_is_its_scenes_padded_alike() -> None:
    scenes = [[picture(112, 70, s) for s in range(3)], [picture(112, 98, 3 + s) for s in range(3)]]
    features = SMALL(scenes)
    assert features["pixel_values"].shape == (2, 3, 3, 98, 112)
    assert torch.equal(features["pixel_values"][0, :, :, 14:84], SMALL(scenes[0])["pixel_values"][0])
    assert torch.equal(features["pixel_values"][1], SMALL(scenes[1])["pixel_values"][0])
    assert features["original_sizes"][:, 0].tolist() == [[70, 112], [98, 112]]
    assert "view_mask" not in features


def test_stacks_tuples_and_iterators() -> None:
    views = np.stack([noise(112, 98, seed=s) for s in range(4)])
    expected = SMALL(list(views))["pixel_values"]
    tensor = torch.from_numpy(views).permute(0, 3, 1, 2)
    for form in (views, tensor, tuple(views), iter(views), [views], tensor[None], views[None]):
        assert torch.equal(SMALL(form)["pixel_values"], expected)
    two = SMALL(torch.stack([tensor[:2], tensor[2:]]))["pixel_values"]
    assert torch.equal(two.flatten(0, 1), expected[0])


def test_different_numbers_of_views() -> None:
    scenes = [[picture(112, 98, 0)], [picture(112, 98, s) for s in (1, 2, 3)]]
    with pytest.raises(ValueError, match=r"the scenes have 1, 3 views.*pad_views=True"):
        SMALL(scenes)
    for features in (SMALL(scenes, pad_views=True), VggtImageProcessor(image_size=112, pad_views=True)(scenes)):
        assert features["view_mask"].tolist() == [[True, False, False], [True, True, True]]
        pixels = features["pixel_values"]
        assert torch.equal(pixels[0], SMALL(scenes[0])["pixel_values"][0].expand(3, -1, -1, -1))
        assert torch.equal(pixels[1], SMALL(scenes[1])["pixel_values"][0])
        assert torch.equal(features["boxes"][0], features["boxes"][0, :1].expand(3, -1))
    assert SMALL([scenes[1]], pad_views=True)["view_mask"].all()
    long = [picture(112, 98, s) for s in range(4)]
    features = SMALL([long[:2], long], pad_views=True)  # the last view is repeated, not the first
    assert torch.equal(features["pixel_values"][0], features["pixel_values"][1][[0, 1, 1, 1]])


def test_the_settings_of_a_call_win_and_do_not_stay() -> None:
    image = picture(100, 80)
    features = SMALL(image, mode="pad", image_size=56, patch_size=8)
    assert torch.equal(
        features["pixel_values"], VggtImageProcessor(mode="pad", image_size=56, patch_size=8)(image)["pixel_values"]
    )
    assert SMALL(image)["pixel_values"].shape[-2:] == (84, 112)


def test_numpy_output_and_the_input_is_left_alone() -> None:
    values = noise(90, 70)
    before = values.copy()
    features = SMALL(values, return_tensors="np")
    assert all(isinstance(features[key], np.ndarray) for key in ("pixel_values", "boxes", "original_sizes"))
    assert np.array_equal(features["pixel_values"], SMALL(values)["pixel_values"].numpy())
    assert np.array_equal(values, before)


# ------------------------------------------------------------------------------------------------ saving, loading


def test_save_and_load(tmp_path: Path) -> None:
    VggtConfig.preset("vggt-mini").save_pretrained(tmp_path)
    VggtImageProcessor(mode="pad", image_size=224, patch_size=16, pad_views=True).save_pretrained(tmp_path)
    image = picture(100, 80)
    for loaded in (VggtImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is VggtImageProcessor
        assert (loaded.mode, loaded.image_size, loaded.patch_size, loaded.pad_views) == ("pad", 224, 16, True)
        assert loaded(image)["pixel_values"].shape == (1, 1, 3, 224, 224)
    assert VggtImageProcessor.from_pretrained(tmp_path, mode="crop", image_size=112).image_size == 112
    assert AutoImageProcessor.from_pretrained(tmp_path, mode="square").mode == "square"
    with pytest.raises(ValueError, match="mode='stretch'"):
        VggtImageProcessor.from_pretrained(tmp_path, mode="stretch")


def test_auto_finds_it_by_the_model_alone(tmp_path: Path) -> None:
    """A preprocessor_config.json without a type, beside a config.json of model_type vggt."""
    VggtConfig.preset("vggt-mini").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_size": 112}', encoding="utf-8")
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VggtImageProcessor and loaded.image_size == 112 and loaded.mode == "crop"


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("damage", ["text", "empty", "truncated.jpg", "truncated.png"])
def test_a_broken_file_is_named(tmp_path: Path, damage: str) -> None:
    good, bad = tmp_path / "good.png", tmp_path / f"broken-{damage}"
    picture(60, 60).save(good)
    if damage == "text":
        bad.write_text("not an image", encoding="utf-8")
    elif damage == "empty":
        bad.write_bytes(b"")
    else:
        picture(60, 60).save(bad)
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=rf"view 1 of scene 0, the file .*broken-{damage}.*cannot be read"):
        SMALL([good, bad])
    with pytest.raises(ValueError, match=rf"view 0 of scene 1, the file .*broken-{damage}"):
        SMALL([[good], [str(bad)]])
    if damage.startswith("truncated"):  # Pillow opens it, and only its pixels are missing
        with Image.open(bad) as opened, pytest.raises(ValueError, match=rf"broken-{damage}"):
            SMALL(opened)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.png.*does not exist"):
        SMALL([tmp_path / "nowhere.png"])
    with pytest.raises(ValueError, match=r"the folder .* holds no pictures"):
        SMALL(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "scene 0 has no images"),
        ([[], []], "scene 0 has no images"),
        ([noise(8, 8), [noise(8, 8)]], "mixes single images with scenes"),
        ([[[noise(8, 8)]]], "nested too deeply"),
        (3, "view 0 of scene 0 cannot be read as an image: it is of type int"),
        ([None], "of type NoneType"),
        (noise(8, 8).transpose(2, 0, 1), r"its shape is \(3, 8, 8\)"),
        (torch.zeros(8, 9, 3), r"its shape is \(8, 9, 3\), expected a tensor"),
        (torch.zeros(8, 9), "expected a tensor"),
        (np.zeros(5, np.uint8), r"its shape is \(5,\)"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (Image.new("RGB", (0, 4)), "expected at least one"),
        (noise(8, 8).astype(np.float32), r"expected \[0, 1\]: divide by 255"),
        (np.full((8, 8, 3), -0.5), r"go from -0.5 to -0.5"),
        (np.full((8, 8, 3), np.nan), "expected"),
        (noise(8, 8).astype(np.int64), "its numbers are int64"),
        (np.zeros((8, 8, 3), bool), "its numbers are bool"),
        (Image.fromarray(np.full((8, 8), 70000, np.int32)), "beyond 16 bits"),
        ([noise(8, 8), noise(8, 8).astype(np.int8)], "view 1 of scene 0"),
    ],
)
def test_what_is_no_image_is_refused(images: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL(images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "stretch"}, "mode='stretch' is not known: choose from crop, pad, square"),
        ({"image_size": 500}, "image_size=500 cannot be cut into patches of 14"),
        ({"image_size": 0}, "image_size=0"),
        ({"patch_size": 0}, "patches of 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VggtImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        VggtImageProcessor()(picture(8, 8), **settings)


def test_without_pillow_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'VggtImageProcessor needs Pillow.*pip install "peft-attrsub\[vggt\]"'):
        SMALL(noise(8, 8))
