"""Cycles against closed forms and against the ray caster: the same scene must give the same sample."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peft_attrsub.scenes.cycles import CyclesRenderer
from peft_attrsub.scenes.deferring import deferred_signals, quiet_stdout
from peft_attrsub.scenes.description import Light, Scene
from peft_attrsub.scenes.raycast import RaycastRenderer
from peft_attrsub.scenes.view import View, decode_srgb, encode_srgb

from .bench_scene import (
    DOWN,
    FLOOR,
    Maps,
    Mesh,
    arrow_maps,
    ball,
    ball_depth,
    flat_maps,
    in_a_room,
    join,
    look,
    luminance,
    plane_depth,
    quad,
    scene,
)

LAMPS = [
    DOWN,
    Light("point", [1.0, 0.5, 0.2], 500.0, position=[0, 0, 8.0]),
    Light("area", [0.2, 0.5, 1.0], 500.0, direction=[0, 0.2, -1.0], position=[0, -1, 6.0], size=1.0),
]


def need_bpy() -> None:
    pytest.importorskip("bpy", reason="the Cycles renderer needs bpy")
    pytest.importorskip("OpenEXR", reason="the Cycles renderer needs OpenEXR")


def path_trace(one: Scene, mesh: Mesh, maps: list[Maps] | None = None, samples: int = 1, bounces: int = 0) -> View:
    need_bpy()
    maps = maps or [flat_maps([0.5, 0.5, 0.5])]
    with CyclesRenderer(one, samples, denoise=False, mesh=mesh, maps=maps, bounces=bounces) as renderer:
        return renderer.render(0)


def cast(one: Scene, mesh: Mesh, maps: list[Maps] | None = None, **options: int) -> View:
    pytest.importorskip("open3d", reason="the ray casting renderer needs open3d")
    with RaycastRenderer(one, mesh=mesh, maps=maps or [flat_maps([0.5, 0.5, 0.5])], **options) as renderer:
        return renderer.render(0)


# Without bpy.


def test_a_signal_waits_for_the_end_of_the_block() -> None:
    steps: list[str] = []

    def work() -> None:
        with deferred_signals(lambda: steps.append("cleaned up")):
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("finished")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["finished"]  # KeyboardInterrupt is an exception: the caller's `with` cleans up


def test_a_handler_of_the_caller_gets_the_signal_afterwards() -> None:
    steps: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: steps.append("handled"))
    try:
        with deferred_signals(lambda: steps.append("cleaned up")):
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("finished")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert steps == ["finished", "handled"]


def test_standard_output_of_c_code_is_silenced_and_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before ")
    with quiet_stdout():
        os.write(1, b"inside ")
    os.write(1, b"after")
    assert capfd.readouterr().out == "before after"


def test_wrong_options_are_refused() -> None:
    one = scene(look([0, -4, 3], [0, 0, 0]))
    with pytest.raises(ValueError, match="samples=0"):
        CyclesRenderer(one, samples=0)
    with pytest.raises(ValueError, match="device='tpu'"):
        CyclesRenderer(one, device="tpu")


# With bpy.


def test_depth_of_a_plane_and_a_ball_is_planar_and_ids_are_right() -> None:
    """Also with pixels that are not square, and a principal point beside the middle."""
    one = scene(look([0, -4, 3], [0, 0, 0]), focal=(44.0, 37.0), centre=(20.3, 17.1))
    view = path_trace(one, join(FLOOR, ball([0.2, 0.3, 1.0], 0.8, number=3, rings=300)))
    ground, sphere = plane_depth(one, 0.0), ball_depth(one, [0.2, 0.3, 1.0], 0.8)
    on_floor = sphere > ground
    np.testing.assert_allclose(view.depth[on_floor], ground[on_floor], rtol=1e-4)
    error = np.abs(view.depth / sphere - 1)[~on_floor]
    # Blender keeps poses and lenses in 32 bits: a pixel on the ball's edge may fall to the other side.
    assert np.quantile(error, 0.9) < 5e-5 and (error > 1e-3).sum() <= 2
    assert (view.ids != np.where(on_floor, 7, 3)).sum() <= 2
    assert view.rgb.dtype == np.uint8 and view.depth.dtype == np.float32 and view.ids.dtype == np.uint16


def test_nothing_is_zero_in_depth_and_ids_and_the_background_in_the_picture() -> None:
    one = scene(look([0, -4, 1], [0, 0, 1]), background=0.25)
    view = path_trace(one, ball([0, 0, 1], 0.7, number=3))
    beside = np.isinf(ball_depth(one, [0, 0, 1.0], 0.7))
    assert (view.depth[beside] == 0).all() and (view.ids[beside] == 0).all()
    assert (view.rgb[:4] == encode_srgb(np.array(0.25))).all()  # rows without the ball's edge


@pytest.mark.parametrize("lamp", LAMPS, ids=lambda lamp: lamp.kind)
def test_every_lamp_gives_the_same_light_in_both_renderers(lamp: Light) -> None:
    one = scene(look([0, -1, 5], [0, 0, 0]), [lamp])
    maps = [flat_maps([0.5, 0.4, 0.3])]
    traced, seen = path_trace(one, FLOOR, maps, samples=64), cast(one, FLOOR, maps)
    np.testing.assert_allclose(
        decode_srgb(traced.rgb).mean((0, 1)), decode_srgb(seen.rgb).mean((0, 1)), rtol=0.06, atol=0.005
    )


def test_background_light_is_the_same_in_both_renderers_and_enters_rooms() -> None:
    one = scene(look([0, -1, 5], [0, 0, 0]), background=0.6)
    seen = decode_srgb(cast(one, FLOOR).rgb).mean()
    assert decode_srgb(path_trace(one, FLOOR, samples=64).rgb).mean() == pytest.approx(seen, rel=0.05)
    ceiling = quad([-9, -9, 6], [0, 18, 0], [18, 0, 0], number=9)
    inside = path_trace(in_a_room(one, 9), join(FLOOR, ceiling), samples=64)
    assert decode_srgb(inside.rgb).mean() == pytest.approx(seen, rel=0.05)


def test_suns_are_shadowed_by_objects_but_not_by_the_shell_of_a_room() -> None:
    one = scene(look([0, -0.01, 3], [0, 0, 0]), [DOWN])
    roof = quad([-0.5, -0.5, 4], [1, 0, 0], [0, 1, 0], number=9)
    middle, corner = (slice(14, 18), slice(22, 26)), (slice(0, 2), slice(0, 2))
    shadowed, lit = path_trace(one, join(FLOOR, roof)), path_trace(in_a_room(one, 9), join(FLOOR, roof))
    assert shadowed.rgb[middle].max() == 0 and shadowed.rgb[corner].min() > 60
    assert lit.rgb[middle].min() > 60


def test_textures_lie_the_right_way_up_and_are_not_mirrored() -> None:
    wall = quad([-1, 0, -1], [2, 0, 0], [0, 0, 2], number=1)
    one = scene(look([0, -3, 0], [0, 0, 0]), size=(40, 40), focal=(50, 50), background=1.0)
    rgb = path_trace(one, wall, [arrow_maps()], samples=16).rgb.astype(int)
    for at, colour in {(30, 10): (1, 0, 0), (30, 30): (0, 1, 0), (10, 10): (0, 0, 1), (10, 30): (1, 1, 1)}.items():
        assert (rgb[at] > 150).tolist() == [bool(part) for part in colour]


def test_two_renderers_one_sample() -> None:
    """Depth within 1e-4 on 99.9 % of the pixels, the same ids, and luminances that go together."""
    rng = np.random.default_rng(3)
    checks = []
    for _ in range(3):
        maps = flat_maps([0, 0, 0], roughness=0.5, side=64)
        tiles = rng.random((8, 8, 3)) * 0.8
        maps.albedo[:] = np.kron(tiles, np.ones((8, 8, 1)))
        maps.normal[..., 0] = 0.3 * np.sin(np.arange(64) / 64 * 8 * np.pi)
        maps.normal[..., 2] = np.sqrt(1 - maps.normal[..., 0] ** 2)
        checks.append(maps)
    balls = [ball([*rng.uniform(-1.5, 1.5, 2), 0.7], 0.6, 10 + index, index % 3) for index in range(5)]
    one = scene(
        look([1, -5, 3], [0, 0, 0.5]),
        LAMPS[:1] + LAMPS[2:],
        size=(160, 160),
        focal=(170, 170),
        materials=3,
        background=0.2,
    )
    mesh = join(FLOOR, *balls)
    need_bpy()
    with CyclesRenderer(one, mesh=mesh, maps=checks) as renderer:
        traced = renderer.render(0)
    seen = cast(one, mesh, checks, supersample=2)
    both = (traced.depth > 0) & (seen.depth > 0)
    assert both.mean() > 0.7 and (both == (seen.depth > 0)).mean() > 0.999
    error = np.abs(traced.depth - seen.depth)[both] / seen.depth[both]
    assert (error < 1e-4).mean() > 0.999
    assert (traced.ids == seen.ids).mean() > 0.999
    assert np.corrcoef(luminance(traced.rgb).ravel(), luminance(seen.rgb).ravel())[0, 1] > 0.9


def test_views_do_not_depend_on_their_order_and_leave_no_file() -> None:
    need_bpy()
    one = scene(look([0, -4, 3], [0, 0, 0]), [DOWN], background=0.2)
    one = replace(one, cameras=[one.cameras[0], replace(one.cameras[0], pose=look([1, -3, 2], [0, 0, 0]))])
    mesh, maps = join(FLOOR, ball([0, 0, 1], 0.8, 3)), [flat_maps([0.5, 0.5, 0.5])]
    views = []
    for order in ([0, 1], [1, 0]):
        with CyclesRenderer(one, mesh=mesh, maps=maps) as renderer:
            folder = renderer._folder
            assert folder is not None and folder.is_dir()
            got = {index: renderer.render(index) for index in order}
            assert list(folder.iterdir()) == []
        assert not folder.exists()
        views.append(got)
    for index in (0, 1):
        for name in ("rgb", "depth", "ids"):
            np.testing.assert_array_equal(getattr(views[0][index], name), getattr(views[1][index], name))
    assert (views[0][0].rgb != views[0][1].rgb).any()


def test_an_absent_graphics_card_is_an_error() -> None:
    need_bpy()
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a graphics card")
    one = scene(look([0, -4, 3], [0, 0, 0]))
    for _ in range(2):  # the second time, too
        with pytest.raises(ValueError, match='device="optix" was asked for'):
            CyclesRenderer(one, device="optix", mesh=FLOOR, maps=[flat_maps([0.5, 0.5, 0.5])])


def test_wrong_views_and_renderers_that_are_over_are_refused() -> None:
    need_bpy()
    one, maps = scene(look([0, -4, 3], [0, 0, 0])), [flat_maps([0.5, 0.5, 0.5])]
    first = CyclesRenderer(one, mesh=FLOOR, maps=maps)
    with pytest.raises(ValueError, match="cameras 0 to 0, view 1"):
        first.render(1)
    second = CyclesRenderer(one, mesh=FLOOR, maps=maps)
    with pytest.raises(ValueError, match="newer one"):
        first.render(0)
    first.close()
    second.render(0)  # closing the old one does not end the new
    second.close()
    with pytest.raises(ValueError, match="closed"):
        second.render(0)


def test_a_picture_that_was_not_written_or_is_cut_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    need_bpy()
    one = scene(look([0, -4, 3], [0, 0, 0]))
    with CyclesRenderer(one, 1, mesh=FLOOR, maps=[flat_maps([0.5, 0.5, 0.5])]) as renderer:
        bpy, picture = renderer._bpy, b""

        def write(**options: bool) -> None:
            if picture:
                Path(bpy.context.scene.render.filepath).write_bytes(picture)

        ops = SimpleNamespace(render=SimpleNamespace(render=write), wm=bpy.ops.wm)
        monkeypatch.setattr(renderer, "_bpy", SimpleNamespace(ops=ops, context=bpy.context))
        with pytest.raises(OSError, match="wrote no picture"):
            renderer.render(0)
        picture = b"no EXR at all"
        with pytest.raises(OSError, match="cannot be read"):
            renderer.render(0)
