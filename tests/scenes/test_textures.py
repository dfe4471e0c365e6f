"""Textures: in range, without a seam, the same in every process, and read from folders by name."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peft_attrsub.scenes import patterns
from peft_attrsub.scenes.description import PATTERNS, Material
from peft_attrsub.scenes.maps import find_maps, read_maps
from peft_attrsub.scenes.textures import Maps, normals_from_height, render_maps

Image = pytest.importorskip("PIL.Image", reason="the maps folders of these tests are written with Pillow")

COLOURS = [[0.8, 0.7, 0.6], [0.5, 0.1, 0.05], [0.1, 0.3, 0.5]]
PROCEDURAL = tuple(pattern for pattern in PATTERNS if pattern != "maps")
UNEVEN = tuple(pattern for pattern in PROCEDURAL if pattern != "plain")


def material_of(pattern: str, **more: object) -> Material:
    return replace(Material(pattern, COLOURS, roughness=0.5, metallic=0.25, bump=0.5, seed=3), **more)


def check_maps(maps: Maps, size: int) -> None:
    for values, shape in zip(maps, [(size, size, 3), (size, size), (size, size), (size, size, 3)], strict=True):
        assert values.shape == shape and values.dtype == np.float32 and np.isfinite(values).all()
    for values in maps[:3]:
        assert values.min() >= 0 and values.max() <= 1
    assert np.linalg.norm(maps.normal, axis=-1) == pytest.approx(1, abs=1e-5)
    assert maps.normal[..., 2].min() > 0


@pytest.mark.parametrize("pattern", PROCEDURAL)
@pytest.mark.parametrize("size", [4, 37, 128])
def test_procedural_maps(pattern: str, size: int) -> None:
    for seed in range(5):
        maps = render_maps(material_of(pattern, seed=seed), size)
        check_maps(maps, size)
        assert (maps.metallic == 0.25).all()
        assert 0.37 < maps.roughness.min() <= maps.roughness.max() < 0.63
        low, high = np.min(COLOURS, axis=0) * 0.5, np.max(COLOURS, axis=0)
        assert (maps.albedo >= low - 1e-6).all() and (maps.albedo <= high + 1e-6).all()


@pytest.mark.parametrize("pattern", UNEVEN)
def test_a_pattern_varies_uses_its_colours_and_its_seed(pattern: str) -> None:
    size = 128
    shown = [render_maps(material_of(pattern, seed=seed), size).albedo for seed in range(8)]
    assert all(np.std(albedo, axis=(0, 1)).max() > 0.03 for albedo in shown)
    assert pattern == "checker" or all((shown[0] != other).any() for other in shown[1:])
    for colour in COLOURS:
        nearest = min(np.abs(albedo - np.array(colour, np.float32)).max(axis=-1).min() for albedo in shown)
        assert nearest < 0.08, f"the colour {colour} is nowhere"


@pytest.mark.parametrize("pattern", UNEVEN)
def test_tiles_repeat_without_a_seam(pattern: str) -> None:
    """The step over the border is like the steps inside, in all maps, for many seeds."""
    for seed in range(6):
        maps = render_maps(material_of(pattern, seed=seed), 128)
        for values in (maps.albedo, maps.roughness, maps.normal):
            for axis in (0, 1):
                steps = np.abs(np.diff(np.concatenate([values, np.take(values, [0], axis)], axis), axis=axis))
                steps = np.moveaxis(steps, axis, 0).reshape(128, -1).mean(axis=1)
                assert steps[-1] <= steps[:-1].max() * 1.05 + 1e-6


def test_stripes_next_to_each_other_differ_for_every_number_of_colours() -> None:
    for count in (2, 3, 4, 5):
        colours = [[step / count, 0.0, 0.0] for step in range(count)]
        for seed in range(10):
            line = render_maps(material_of("stripes", colours=colours, seed=seed), 256).albedo[..., 0]
            line = line[0] if np.ptp(line[0]) else line[:, 0]
            bands = np.rint(line * count).astype(int)
            changes = (np.roll(bands, -1) - bands) % count
            assert set(changes.tolist()) in ({0, 1}, {0, count - 1}), "a colour is left out or repeated"


def test_checker_has_the_colours_in_turn() -> None:
    albedo = render_maps(material_of("checker", colours=COLOURS[:2]), 8).albedo
    for row in range(8):
        for col in range(8):
            assert albedo[row, col] == pytest.approx(COLOURS[(row // 4 + col // 4) % 2], abs=1e-6)


def test_voronoi_against_every_point_of_nine_tiles() -> None:
    """`_cells` looks at 3 x 3 squares; here every pixel is compared with every point and its copies."""
    for seed in range(3):
        size, cells = 24, 4 + seed
        label, groove = patterns._cells(np.random.Generator(np.random.PCG64(seed)), size, cells)
        jitter = 0.2 + 0.6 * np.random.Generator(np.random.PCG64(seed)).random((2, cells, cells))
        for row in range(size):
            for col in range(size):
                x, y = (col + 0.5) / size * cells, (row + 0.5) / size * cells
                found = sorted(
                    (((c + jitter[0, r, c] + i * cells - x) ** 2 + (r + jitter[1, r, c] + j * cells - y) ** 2), r, c)
                    for r in range(cells)
                    for c in range(cells)
                    for i in (-1, 0, 1)
                    for j in (-1, 0, 1)
                )
                gap = found[1][0] ** 0.5 - found[0][0] ** 0.5
                if gap > 1e-5:
                    assert label[row, col] == found[0][1] * cells + found[0][2]
                if gap < 0.12:  # beyond, the groove has ended
                    assert groove[row, col] == pytest.approx(gap, abs=1e-5)


def test_normals_from_height_with_loops() -> None:
    rng = np.random.default_rng(0)
    size, bump = 9, 0.7
    height = rng.random((size, size)).astype(np.float32)
    normals = normals_from_height(height, bump)
    for row in range(size):
        for col in range(size):
            du = (height[row, (col + 1) % size] - height[row, col - 1]) * size / 2
            dv = (height[(row + 1) % size, col] - height[row - 1, col]) * size / 2
            n = np.array([-bump / 8 * du, -bump / 8 * dv, 1.0])
            np.testing.assert_allclose(normals[row, col], n / np.linalg.norm(n), atol=1e-6)


def test_no_bump_is_flat_and_more_bump_is_steeper() -> None:
    flat, low, high = (render_maps(material_of("noise", bump=bump), 64).normal for bump in (0.0, 0.2, 1.0))
    assert (flat == np.array([0, 0, 1], np.float32)).all()
    assert flat[..., 2].mean() > low[..., 2].mean() > high[..., 2].mean()


def test_the_roughest_spots_lie_lowest() -> None:
    maps = render_maps(material_of("brick", roughness=1.0), 64)
    assert maps.roughness.max() == 1.0, "clipped, not beyond 1"


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"pattern": "marble"}, 8, "unknown pattern"),
        ({"colours": [[0.1, 0.2, 0.3]]}, 8, "needs 2"),
        ({"colours": []}, 8, "needs 2"),
        ({"colours": [[0.1, 0.2], [0.1, 0.2]]}, 8, "three numbers"),
        ({"colours": [[0.1, 0.2, 1.5], [0, 0, 0]]}, 8, "three numbers"),
        ({"colours": [[0.1, 0.2, float("nan")], [0, 0, 0]]}, 8, "three numbers"),
        ({"roughness": -0.1}, 8, "roughness"),
        ({"metallic": 1.1}, 8, "metallic"),
        ({"bump": -1.0}, 8, "bump"),
        ({"bump": float("nan")}, 8, "bump"),
        ({"seed": -1}, 8, "seed"),
        ({}, 3, "4 or more"),
        ({"pattern": "maps"}, 8, "no folder"),
    ],
)
def test_a_wrong_material_is_named(change: dict[str, object], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_maps(material_of(**({"pattern": "noise"} | change)), size)


def digest() -> str:
    made = [render_maps(material_of(pattern, seed=seed), 64) for pattern in PROCEDURAL for seed in (0, 9)]
    return hashlib.sha256(b"".join(values.tobytes() for maps in made for values in maps)).hexdigest()


def test_a_fresh_process_makes_the_same_bytes() -> None:
    root = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {root!r})\nfrom tests.scenes.test_textures import digest\nprint(digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == digest(), done.stderr


def save(path: Path, values: np.ndarray) -> None:
    """`values` top row first, as pictures are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def flat(value: int | tuple[int, int, int], size: int = 16) -> np.ndarray:
    return np.full((size, size, *np.shape(value)), value, np.uint8)


def test_a_folder_of_maps_is_read_as_it_lies(tmp_path: Path) -> None:
    """Known pixels: sRGB to linear, top row last, OpenGL normals as stored, rough and metal in 1 / 255."""
    colour, bumps = flat((188, 0, 255), 8), flat((128, 128, 255), 8)
    colour[0] = (0, 255, 10)  # the top row, v near 1
    bumps[0] = (255, 128, 128)
    save(tmp_path / "stone" / "basecolor.png", colour)
    save(tmp_path / "stone" / "roughness.png", flat(51, 8))
    save(tmp_path / "stone" / "metallic.png", flat(255, 8))
    save(tmp_path / "stone" / "normal.png", bumps)
    maps = render_maps(material_of("maps", maps=str(tmp_path / "stone"), bump=1.0, colours=[]), 8)
    check_maps(maps, 8)
    assert maps.albedo[0, 0] == pytest.approx([((188 / 255 + 0.055) / 1.055) ** 2.4, 0, 1], abs=1e-6)
    assert maps.albedo[7, 3] == pytest.approx([0, 1, 10 / 255 / 12.92], abs=1e-6)
    assert (maps.roughness == np.float32(0.2)).all() and (maps.metallic == 1).all()
    assert maps.normal[0, 0] == pytest.approx([0, 0, 1], abs=0.01)
    assert maps.normal[7, 0] == pytest.approx([1, 0, 0], abs=0.01)
    halved = render_maps(material_of("maps", maps=str(tmp_path / "stone"), bump=0.0), 8)
    assert (halved.normal == np.array([0, 0, 1], np.float32)).all()
    half, whole = (render_maps(material_of("maps", maps=str(tmp_path / "stone"), bump=b), 4).normal for b in (0.5, 1))
    np.testing.assert_allclose(half[..., 0] / half[..., 2], 0.5 * whole[..., 0] / whole[..., 2], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("basecolor.png", "albedo"),
        ("Base_Color.JPG", "albedo"),
        ("Bricks047_1K-JPG_Color.jpg", "albedo"),
        ("rough_wood_diff_1k.jpg", "albedo"),
        ("metal_plate_albedo.png", "albedo"),
        ("Metal032_1K_Roughness.png", "roughness"),
        ("wood_rough_2k.png", "roughness"),
        ("Metal032_Metalness.jpeg", "metallic"),
        ("metallic.png", "metallic"),
        ("Bricks047_NormalGL.png", "normal"),
        ("rock_nor_gl_1k.png", "normal"),
        ("normal.png", "normal"),
    ],
)
def test_a_map_is_known_by_a_word_of_its_name(tmp_path: Path, name: str, kind: str) -> None:
    save(tmp_path / "plain_color.png", flat((10, 10, 10)))
    save(tmp_path / name, flat((200, 60, 200)))
    found = read_maps(str(tmp_path), 4)
    given = [key for key in ("roughness", "metallic", "normal", "height") if getattr(found, key) is not None]
    assert given == [] if kind == "albedo" else given == [kind]
    if kind == "albedo" and "Color" not in name.split("_")[-1]:
        assert found.albedo.max() > 0.3, "a better name was there"


def test_missing_maps_fall_back_by_name(tmp_path: Path) -> None:
    save(tmp_path / "diffuse.png", flat((255, 255, 255)))
    alone = render_maps(material_of("maps", maps=str(tmp_path), roughness=0.3, metallic=0.7), 8)
    assert (alone.roughness == np.float32(0.3)).all() and (alone.metallic == np.float32(0.7)).all()
    assert (alone.normal == np.array([0, 0, 1], np.float32)).all() and (alone.albedo == 1).all()
    save(tmp_path / "glossiness.png", flat(51))
    save(tmp_path / "height.png", np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1)))
    more = render_maps(material_of("maps", maps=str(tmp_path)), 16)
    assert more.roughness == pytest.approx(0.8) and more.normal[8, 8, 0] < -0.05
    save(tmp_path / "normal_dx.png", flat((128, 255, 200)))
    assert render_maps(material_of("maps", maps=str(tmp_path)), 8).normal[..., 1].max() < -0.1, "green turned round"
    save(tmp_path / "normal_gl.png", flat((128, 255, 200)))
    assert render_maps(material_of("maps", maps=str(tmp_path)), 8).normal[..., 1].min() > 0.1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_kind_of_picture_is_read(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    else:
        grey = Image.fromarray(flat((128, 128, 128), 8))
        picture = grey.quantize(4) if mode == "P" else grey.convert(mode)
    ending = "jpg" if mode == "CMYK" else "png"
    for name in ("albedo", "roughness", "normal"):
        picture.save(tmp_path / f"{name}.{ending}")
    maps = render_maps(material_of("maps", maps=str(tmp_path), bump=1.0), 8)
    check_maps(maps, 8)
    if mode != "1":
        assert maps.roughness == pytest.approx(0.5, abs=0.02)
        assert maps.albedo == pytest.approx(0.2159, abs=0.02)


def test_maps_of_any_size_become_the_asked_size(tmp_path: Path) -> None:
    picture = np.zeros((64, 32, 3), np.uint8)
    picture[:32] = 255
    save(tmp_path / "albedo.png", picture)
    for size in (4, 100):
        albedo = render_maps(material_of("maps", maps=str(tmp_path)), size).albedo
        check_maps(render_maps(material_of("maps", maps=str(tmp_path)), size), size)
        assert albedo[-1].min() == 1 and albedo[0].max() == 0


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_find_maps_lists_folders_and_unreadable_files(tmp_path: Path) -> None:
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("b/oak", "a", "c"):
        save(tmp_path / name / "basecolor.jpg", noisy)
        save(tmp_path / name / "roughness.png", noisy)
    save(tmp_path / "d" / "roughness.png", noisy)
    (tmp_path / "e").mkdir()
    (tmp_path / "a" / "normal.png").write_text("not a picture")
    (tmp_path / "a" / "metallic.png").write_bytes(b"")
    (tmp_path / "a" / "preview.png").write_text("not a map, so nobody's business")
    (tmp_path / "a" / "notes.txt").write_text("albedo")
    cut(tmp_path / "c" / "basecolor.jpg")
    cut(tmp_path / "b/oak" / "roughness.png")
    found = find_maps(tmp_path)
    assert found.folders == [str(tmp_path / "a"), str(tmp_path / "b" / "oak")]
    broken = ["a/metallic.png", "a/normal.png", "b/oak/roughness.png", "c/basecolor.jpg"]
    assert found.unreadable == [str(tmp_path / name) for name in broken]
    assert find_maps(tmp_path / "a").folders == [str(tmp_path / "a")]


def test_an_unreadable_map_is_named_and_left_out(tmp_path: Path) -> None:
    save(tmp_path / "albedo.png", flat((255, 255, 255)))
    (tmp_path / "basecolor.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "roughness.png").write_bytes(b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maps = render_maps(material_of("maps", maps=str(tmp_path), roughness=0.4), 8)
    assert (maps.albedo == 1).all() and (maps.roughness == np.float32(0.4)).all()
    said = "\n".join(str(warning.message) for warning in caught)
    assert "basecolor.png" in said and "roughness.png" in said and "albedo.png" not in said


def test_a_folder_without_albedo_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no folder"):
        find_maps(tmp_path / "nowhere")
    with pytest.raises(OSError, match="cannot be opened"):
        render_maps(material_of("maps", maps=str(tmp_path / "nowhere")), 8)
    with pytest.raises(ValueError, match="no readable map named basecolor"):
        find_maps(tmp_path)
    with pytest.raises(OSError, match="no albedo that can be read"):
        render_maps(material_of("maps", maps=str(tmp_path)), 8)
    (tmp_path / "albedo.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"1 of its files cannot be read, the first is .*albedo\.png"):
        find_maps(tmp_path)
    with pytest.warns(UserWarning, match=r"albedo\.png"), pytest.raises(OSError, match=r"looked for albedo\.png"):
        render_maps(material_of("maps", maps=str(tmp_path)), 8)


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "albedo.png", flat((1, 2, 3)))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'reading maps needs Pillow.*pip install "peft-attrsub\[vggt\]"'):
        find_maps(tmp_path)
    assert render_maps(material_of("noise"), 8).albedo.shape == (8, 8, 3)
