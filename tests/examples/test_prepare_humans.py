"""prepare_thuman.py and prepare_2k2k.py: from meshes to pictures, depth and cameras that the reader takes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from peft_attrsub.datasets.meshes import find_2k2k, find_thuman, load_mesh
from peft_attrsub.datasets.rendered import RenderedDataset
from tests.datasets.invariants import check_sample

EXAMPLES = Path(__file__).parents[2] / "examples" / "vggt"
sys.path.insert(0, str(EXAMPLES))

import _humans  # noqa: E402
import prepare_2k2k  # noqa: E402
import prepare_thuman  # noqa: E402
from standins.people import colour, distance, sample_person, surface  # noqa: E402
from standins.surfaces import surface_nets, triangles  # noqa: E402

pytest.importorskip("open3d", reason='the ray caster needs Open3D: pip install "peft-attrsub[scenes]"')
pytest.importorskip("trimesh", reason='meshes are read with trimesh: pip install "peft-attrsub[vggt]"')

FAST = ("--renderer", "raycast", "--supersample", "1", "--size", "64", "--depth", "npy")
# A box 0.4 wide (x), 1 tall (y), 0.2 deep (z); its front, at z = 0.2, shows the whole texture, the others its middle.
CORNERS = [(x, y, z) for z in (0.0, 0.2) for y in (0.0, 1.0) for x in (0.0, 0.4)]
FRONT, OTHERS = (4, 5, 7, 6), ((1, 3, 7, 5), (4, 6, 2, 0), (2, 6, 7, 3), (4, 0, 1, 5), (0, 2, 3, 1))
QUARTERS = {
    "top left": (220, 40, 40),
    "top right": (40, 200, 40),
    "low left": (40, 40, 220),
    "low right": (210, 200, 40),
}


def write_box(root: Path, name: str, factor: float = 1.0) -> None:
    folder = root / "model" / name
    folder.mkdir(parents=True)
    lines = ["mtllib material0.mtl"] + [f"v {factor * x} {factor * y} {factor * z}" for x, y, z in CORNERS]
    lines += ["vt 0 0", "vt 1 0", "vt 1 1", "vt 0 1", "vt 0.5 0.5"]
    for face in (FRONT, *OTHERS):
        a, b, c, d = (f"{1 + corner}/{1 + number if face == FRONT else 5}" for number, corner in enumerate(face))
        lines += [f"f {a} {b} {c}", f"f {a} {c} {d}"]
    (folder / f"{name}.obj").write_text("\n".join(lines) + "\n")
    (folder / "material0.mtl").write_text("newmtl material0\nmap_Kd material0.jpeg\n")
    picture = np.zeros((64, 64, 3), np.uint8)
    for part, paint in zip(((0, 0), (0, 1), (1, 0), (1, 1)), QUARTERS.values(), strict=True):
        picture[32 * part[0] : 32 * part[0] + 32, 32 * part[1] : 32 * part[1] + 32] = paint
    Image.fromarray(picture).save(folder / "material0.jpeg", quality=100, subsampling=0)


def run(script: ModuleType, *arguments: object) -> int:
    return int(script.run([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stand-ins of each kind."""
    root = tmp_path_factory.mktemp("people")
    assert run(prepare_thuman, "standin", "--out", root / "thuman", "--people", 2, "--detail", 48) == 0
    assert run(prepare_2k2k, "standin", "--out", root / "2k2k", "--people", 3, "--detail", 48) == 0
    return root


def test_cameras_stand_on_the_circle_and_see_the_box_where_it_is(tmp_path: Path) -> None:
    write_box(tmp_path, "0000")
    out = tmp_path / "out"
    assert run(prepare_thuman, "render", "--meshes", tmp_path, "--out", out, "--views", 4, *FAST) == 0
    record = json.loads((out / "0000" / "opencv_cameras.json").read_text())["frames"][0]
    assert record["fx"] == record["fy"] == 70 and record["cx"] == record["cy"] == 32  # 1120 and 512 at 1024 pixels
    sample = RenderedDataset(out).read("0000", [0, 1, 2, 3])
    assert sample.extrinsics is not None
    e = sample.extrinsics.numpy()
    centres = -np.einsum("nji,nj->ni", e[:, :, :3], e[:, :, 3])
    expected = 1.1 * np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
    np.testing.assert_allclose(centres, expected, atol=1e-9)
    np.testing.assert_allclose(e[:, 1, :3], [[0, 0, -1]] * 4, atol=1e-12)  # down in the picture is down
    # The first camera sees the front, half the depth nearer than the middle; the second one the side.
    middle = sample.depths[:, 31:33, 31:33].numpy()
    np.testing.assert_allclose(middle[[0, 2]], 1.0, atol=1e-5)
    np.testing.assert_allclose(middle[[1, 3]], 0.9, atol=1e-5)
    wide = sample.point_masks[:, 32].sum(dim=-1).tolist()
    assert wide == [28, 16, 28, 16]  # 70 * 0.4 / 1.0 and 70 * 0.2 / 0.9 = 15.6 pixels


def test_the_texture_is_on_the_front_the_right_way_round(tmp_path: Path) -> None:
    write_box(tmp_path, "0000")
    assert run(prepare_thuman, "render", "--meshes", tmp_path, "--out", tmp_path / "out", "--views", 2, *FAST) == 0
    with Image.open(tmp_path / "out" / "0000" / "renderings" / "000_rgba.png") as file:
        picture = np.asarray(file)
    places = {"top left": (16, 25), "top right": (16, 39), "low left": (48, 25), "low right": (48, 39)}
    for name, place in places.items():
        seen = picture[place][:3] / np.linalg.norm(picture[place][:3])
        alike = {other: float(seen @ np.array(paint) / np.linalg.norm(paint)) for other, paint in QUARTERS.items()}
        assert max(alike, key=lambda other: alike[other]) == name


def test_where_nobody_is_the_picture_is_white_and_clear(tmp_path: Path) -> None:
    write_box(tmp_path, "0000")
    assert run(prepare_thuman, "render", "--meshes", tmp_path, "--out", tmp_path / "out", "--views", 1, *FAST) == 0
    folder = tmp_path / "out" / "0000" / "renderings"
    picture, depth = np.asarray(Image.open(folder / "000_rgba.png")), np.load(folder / "000_depth.npy")
    assert (picture[depth == 0] == [255, 255, 255, 0]).all() and (depth == 0).any()
    assert (picture[depth > 0][:, 3] == 255).all() and (depth > 0).any()


def test_the_unit_of_a_file_does_not_matter_unless_it_is_kept(tmp_path: Path) -> None:
    write_box(tmp_path, "0000")
    write_box(tmp_path, "0001", 175.0)
    write_box(tmp_path, "0002", 0.58)
    assert run(prepare_thuman, "render", "--meshes", tmp_path, "--out", tmp_path / "out", "--views", 2, *FAST) == 0
    data = RenderedDataset(tmp_path / "out")
    for name in ("0001", "0002"):
        difference = (data.read(name, [0, 1]).depths - data.read("0000", [0, 1]).depths).abs()
        assert (difference > 1e-4).sum() < 20  # pixels on the outline
    kept = ["--normalise-height", 0, "--ids", "0002", "--views", 1]
    assert run(prepare_thuman, "render", "--meshes", tmp_path, "--out", tmp_path / "kept", *FAST, *kept) == 0
    depth = RenderedDataset(tmp_path / "kept").read("0002", [0]).depths
    assert float(depth[0, 32, 32]) == pytest.approx(1.1 - 0.058, abs=1e-5)


@pytest.mark.parametrize("kind", ["thuman", "2k2k"])
@pytest.mark.parametrize("crop", [False, True])
def test_standins_go_from_files_to_samples_whose_views_agree(
    people: Path, tmp_path: Path, kind: str, crop: bool
) -> None:
    script = prepare_thuman if kind == "thuman" else prepare_2k2k
    options = ["--views", 24, *FAST, *(["--crop", "--crop-size", 56] if crop else [])]
    assert run(script, "render", "--meshes", people / kind, "--out", tmp_path / "out", *options) == 0
    data = RenderedDataset(tmp_path / "out")
    assert list(data.names) == (["0000", "0001"] if kind == "thuman" else ["07184", "07185", "07186"])
    for name in data.names:
        sample = data.read(name, [5, 6, 7])
        check_sample(sample)
        if crop:
            focal = sample.intrinsics[:, 0, 0]
            assert tuple(sample.depths.shape[1:]) == (56, 56) and bool((focal == focal.round()).all())
            assert bool((sample.intrinsics[:, :2, 2] == 27.5).all())


def test_a_crop_leaves_its_border_around_the_person(people: Path, tmp_path: Path) -> None:
    options = ["--views", 6, *FAST, "--crop", "--crop-size", 220]
    assert run(prepare_2k2k, "render", "--meshes", people / "2k2k", "--out", tmp_path / "out", *options) == 0
    data = RenderedDataset(tmp_path / "out")
    for mask in data.read("07184", list(range(6))).point_masks.numpy():
        rows, columns = np.nonzero(mask)
        reach = max(np.abs(rows + 0.5 - 110).max(), np.abs(columns + 0.5 - 110).max())
        assert 110 / 1.1 - 3 < reach <= 110 / 1.1  # 3 pixels: what a whole focal length and whole pixels leave


def test_standins_have_colour_shape_and_size(people: Path) -> None:
    adults = [load_mesh(path) for path in find_thuman(people / "thuman").values()]
    children = [load_mesh(path) for path in find_2k2k(people / "2k2k").values()]
    assert all(mesh.texture is not None and mesh.texture.shape == (512, 512, 3) for mesh in adults)
    assert all(mesh.colors is not None and len(np.unique(mesh.colors, axis=0)) > 500 for mesh in children)
    assert all(0.8 < np.ptp(mesh.vertices[:, 1]) < 1.15 for mesh in adults)
    tall = [int(np.ptp(mesh.vertices, axis=0).argmax()) for mesh in children]
    assert tall == [1, 1, 2]  # every third has z up
    assert all(80 < np.ptp(mesh.vertices, axis=0).max() < 140 for mesh in children)


def test_the_texture_shows_the_colours_of_the_surface() -> None:
    from standins.scans import paint_quads

    person = sample_person(3)
    vertices, quads = surface(person, 40)
    picture, uv = paint_quads(person, vertices, quads, 4)
    texels = np.floor(uv * len(picture)).astype(int)
    seen = picture[len(picture) - 1 - texels[..., 1], texels[..., 0]]
    np.testing.assert_array_equal(seen, colour(person, vertices)[quads])


@pytest.mark.parametrize("seed", range(4))
def test_a_persons_surface_is_closed_and_lies_where_the_distance_is_zero(seed: int) -> None:
    person = sample_person(seed, child=bool(seed % 2))
    vertices, quads = surface(person, 64)
    edges = Counter(
        (min(a, b), max(a, b)) for quad in quads.tolist() for a, b in zip(quad, quad[1:] + quad[:1], strict=True)
    )
    assert all(count % 2 == 0 for count in edges.values())
    a, b, c = (vertices[triangles(quads)[:, corner]] for corner in range(3))
    volume = float((a * np.cross(b, c)).sum() / 6)
    assert 0.005 < volume < 0.08  # outward, and about as much as a person 1 tall
    assert np.quantile(np.abs(distance(person, vertices)), 0.99) < 2e-3
    again, _ = surface(sample_person(seed, child=bool(seed % 2)), 64)
    np.testing.assert_array_equal(again, vertices)


def test_surface_nets_of_a_ball() -> None:
    step = 1 / 20
    vertices, quads = surface_nets(
        lambda points: np.linalg.norm(points - [0.1, 0.2, 0.3], axis=1) - 0.5, np.full(3, -0.6), np.full(3, 1.0), step
    )
    radius = np.linalg.norm(vertices - [0.1, 0.2, 0.3], axis=1)
    assert np.abs(radius - 0.5).max() < step**2
    a, b, c = (vertices[triangles(quads)[:, corner]] - [0.1, 0.2, 0.3] for corner in range(3))
    assert ((a + b + c) * np.cross(b - a, c - a)).sum(axis=1).min() > 0
    assert (a * np.cross(b, c)).sum() / 6 == pytest.approx(4 / 3 * np.pi * 0.5**3, rel=0.02)
    assert len(vertices) - 2 * len(quads) + len(quads) == 2  # Euler: V - E + F, every quad with half of its four edges


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the views that were rendered; a first entry of -n, put there before a run, stops it after n."""
    views: list[int] = []
    make = _humans.renderer_of

    def counting(*arguments: Any) -> Any:
        renderer = make(*arguments)
        render = renderer.render

        def one(index: int) -> Any:
            if views and views[0] < 0 and len(views) > -views[0]:
                raise KeyboardInterrupt
            views.append(index)
            return render(index)

        renderer.render = one
        return renderer

    monkeypatch.setattr(_humans, "renderer_of", counting)
    return views


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stopped_run_continues_and_a_finished_one_has_nothing_to_do(tmp_path: Path, rendered: list[int]) -> None:
    write_box(tmp_path, "0000")
    write_box(tmp_path, "0001")
    command = ["render", "--meshes", tmp_path, "--views", 5, *FAST, "--out"]
    assert run(prepare_thuman, *command, tmp_path / "whole") == 0
    assert rendered == [0, 1, 2, 3, 4] * 2
    rendered[:] = [-3]
    assert run(prepare_thuman, *command, tmp_path / "out") == 130
    assert not (tmp_path / "out" / "0000").exists()
    rendered.clear()
    assert run(prepare_thuman, *command, tmp_path / "out") == 0
    assert rendered == [3, 4, 0, 1, 2, 3, 4]
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    rendered.clear()
    assert run(prepare_thuman, *command, tmp_path / "out") == 0
    assert rendered == []


def test_two_protocols_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_box(tmp_path, "0000")
    command = ["render", "--meshes", tmp_path, "--out", tmp_path / "out", *FAST]
    assert run(prepare_thuman, *command, "--views", 2) == 0
    before = everything(tmp_path / "out")
    assert run(prepare_thuman, *command, "--views", 3) == 1
    assert "was rendered by another protocol" in capsys.readouterr().err
    assert everything(tmp_path / "out") == before


def test_what_was_done_to_a_mesh_is_kept_with_its_pictures(people: Path, tmp_path: Path) -> None:
    command = ["render", "--meshes", people / "2k2k", "--out", tmp_path / "out", "--views", 1, *FAST]
    assert run(prepare_2k2k, *command) == 0
    tags = [
        json.loads(json.loads(path.read_text())["tag"]) for path in sorted(tmp_path.glob("out/*/opencv_cameras.json"))
    ]
    assert [tag["placement"]["up"] for tag in tags] == ["y", "y", "z"]
    assert all(tag["protocol"]["normalise_height"] == 1.0 and 0.005 < tag["placement"]["scale"] < 0.02 for tag in tags)


def test_a_damaged_mesh_is_named_and_the_others_are_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0000", "0001", "0002"):
        write_box(tmp_path, name)
    (tmp_path / "model" / "0001" / "material0.jpeg").unlink()
    assert run(prepare_thuman, "render", "--meshes", tmp_path, "--out", tmp_path / "out", "--views", 1, *FAST) == 1
    said = capsys.readouterr().err
    assert "0001 is left out" in said and "material0.jpeg" in said and "1 of 3 people could not be rendered" in said
    assert list(RenderedDataset(tmp_path / "out").names) == ["0000", "0002"]


def test_a_person_cut_off_by_the_border_is_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_box(tmp_path, "0000")
    command = ["render", "--meshes", tmp_path, "--views", 2, *FAST, "--out"]
    assert run(prepare_thuman, *command, tmp_path / "near") == 0
    assert "cuts the person off in 2 of 2 views" in capsys.readouterr().err
    assert run(prepare_thuman, *command, tmp_path / "far", "--radius", 1.5) == 0
    assert "cuts the person off" not in capsys.readouterr().err


def test_processes_share_the_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0000", "0001", "0002"):
        write_box(tmp_path, name)
    command = ["render", "--meshes", tmp_path, "--out", tmp_path / "out", "--views", 1, *FAST]
    for rank, expected in ((1, ["0001"]), (0, ["0000", "0001", "0002"])):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(prepare_thuman, *command) == 0
        assert list(RenderedDataset(tmp_path / "out").names) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ids", "0000", "0007"], "has no 0007"),
        (["--views", "0"], "--views 0: give 1 or more"),
        (["--texture-size", "1000"], "give a power of two"),
        (["--radius", "0.4"], "does not fit a circle"),
        (["--radius", "0"], "--radius must be greater than 0"),
        (["--split", "train"], "nobody in the split 'train'"),
        (["--meshes", "nowhere"], "nowhere is no folder"),
    ],
)
def test_wrong_arguments_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    write_box(tmp_path, "0000")
    assert run(prepare_thuman, "render", "--meshes", tmp_path, "--out", tmp_path / "out", *FAST, *extra) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_mesh_with_the_wrong_up_axis_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_box(tmp_path, "0000")
    command = ["render", "--meshes", tmp_path, "--out", tmp_path / "out", "--up", "z", *FAST]
    assert run(prepare_thuman, *command) == 1
    assert "is its up axis right?" in capsys.readouterr().err


def test_a_large_or_oblong_texture_becomes_a_square_within_the_limit() -> None:
    from peft_attrsub.scenes.view import decode_srgb

    picture = np.random.default_rng(0).integers(0, 256, (40, 100, 3)).astype(np.uint8)
    assert _humans.maps_of(picture, 2048).albedo.shape == (128, 128, 3)
    assert _humans.maps_of(picture, 32).albedo.shape == (32, 32, 3)
    square = picture[:32, :32]
    for limit in (32, 64, None):
        np.testing.assert_array_equal(_humans.maps_of(square, limit).albedo, decode_srgb(square[::-1]))
    np.testing.assert_array_equal(_humans.maps_of(square, None).normal[3, 5], [0, 0, 1])


def test_the_script_runs_by_itself_and_keeps_what_is_there(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "prepare_2k2k.py"), "standin", "--out", str(tmp_path), "--detail", "24"]
    done = subprocess.run([*command, "--people", "1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    before = everything(tmp_path)
    assert list(before) == ["test/07184/07184.ply"]
    assert run(prepare_2k2k, "standin", "--out", tmp_path, "--people", 2, "--detail", 24) == 0
    assert list(everything(tmp_path)) == ["test/07184/07184.ply", "test/07185/07185.ply"]
    assert before.items() <= everything(tmp_path).items()
