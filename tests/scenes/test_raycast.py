"""The ray caster against closed forms: depth, ids, light, shadows, and which way textures lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from peft_attrsub.scenes.description import Light, Scene
from peft_attrsub.scenes.filtering import TextureTable
from peft_attrsub.scenes.raycast import RaycastRenderer
from peft_attrsub.scenes.shading import lamp_light
from peft_attrsub.scenes.view import View, decode_srgb, encode_srgb, lamp_axes

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
    plane_depth,
    quad,
    scene,
)


def shoot(one: Scene, mesh: Mesh, maps: list[Maps] | None = None, **options: int) -> View:
    pytest.importorskip("open3d", reason="the ray casting renderer needs open3d")
    with RaycastRenderer(one, mesh=mesh, maps=maps or [flat_maps([0.5, 0.5, 0.5])], **options) as renderer:
        return renderer.render(0)


# Without Open3D: colour, lamps, lookups.


def test_srgb_is_the_standard_curve_and_comes_back() -> None:
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(encode_srgb(decode_srgb(every)), every)
    np.testing.assert_array_equal(
        encode_srgb(np.array([-1.0, 0.0, 0.0031308, 0.18, 0.5, 1.0, 7.0])), [0, 0, 10, 118, 188, 255, 255]
    )


@pytest.mark.parametrize("direction", [[0, 0, -1], [0, 0, 1], [0.3, -0.5, 0.2], [1, 0, 0]])
def test_lamp_axes_are_a_rotation_that_shines_along_the_direction(direction: list[float]) -> None:
    axes = lamp_axes(direction)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)
    np.testing.assert_allclose(-axes[:, 2], np.asarray(direction) / np.linalg.norm(direction), atol=1e-12)


def test_a_lamp_without_a_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="three numbers that are not all 0"):
        lamp_axes([0.0, 0.0, 0.0])


def test_area_lamp_matches_the_sum_over_many_small_lamps() -> None:
    lamp = Light("area", [1, 1, 1], 30.0, direction=[0.2, 0.1, -1.0], position=[0.3, -0.2, 1.5], size=1.2)
    points = np.array([[0, 0, 0], [1, 0.5, 0.2], [-0.4, 0.3, -1.0], [0.2, 0.1, 3.0]], np.float32).T
    normals = np.array([[0, 0, 1], [-0.6, 0, 0.8], [0, 0, 1], [0, 0, -1]])
    light = lamp_light(lamp, points)
    got = light.irradiance * np.maximum((light.toward.T * normals).sum(1), 0)
    axes, side = lamp_axes(lamp.direction or []), 400
    spots = (np.arange(side) + 0.5) / side - 0.5
    for index in range(points.shape[1]):
        x, y = np.meshgrid(spots * lamp.size, spots * lamp.size)
        to = np.asarray(lamp.position) + x[..., None] * axes[:, 0] + y[..., None] * axes[:, 1] - points[:, index]
        distance = np.linalg.norm(to, axis=-1)
        cosines = np.maximum(to @ axes[:, 2] / distance, 0) * np.maximum(to @ normals[index] / distance, 0)
        assert got[index] == pytest.approx((lamp.strength / np.pi / side**2 * cosines / distance**2).sum(), rel=2e-4)
    assert got[0] > 0 and got[3] == 0  # nothing behind the lamp


def test_point_lamp_spreads_its_power_over_the_sphere() -> None:
    lamp = Light("point", [1, 1, 1], 100.0, position=[0, 0, 2.0])
    light = lamp_light(lamp, np.zeros((3, 1), np.float32))
    assert light.irradiance[0] == pytest.approx(100 / (4 * np.pi * 4), rel=1e-6)
    np.testing.assert_allclose(light.toward[:, 0], [0, 0, 1], atol=1e-6)


def test_bilinear_lookup_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    side = 16
    maps = flat_maps([0, 0, 0], side=side)
    maps.albedo[:] = rng.random((side, side, 3))
    uv = rng.uniform(-2, 2, (2, 50)).astype(np.float32)
    got = TextureTable([maps]).look_up(np.zeros(50, np.int32), uv, np.full(50, 0.5, np.float32))
    for index in range(50):
        x, y = uv[:, index].astype(np.float64) * side - 0.5
        left, low = int(np.floor(x)), int(np.floor(y))
        expected = np.zeros(3)
        for row, column in ((low, left), (low, left + 1), (low + 1, left), (low + 1, left + 1)):
            weight = (1 - abs(x - column)) * (1 - abs(y - row))
            expected += weight * maps.albedo[row % side, column % side]
        np.testing.assert_allclose(got.albedo[:, index], expected, atol=1e-4)


def test_lookup_with_a_large_footprint_is_the_mean_and_maps_may_differ_in_size() -> None:
    rng = np.random.default_rng(1)
    small, large = flat_maps([0, 0, 0], side=8), flat_maps([0, 0, 0], side=32)
    small.albedo[:] = rng.random((8, 8, 3))
    large.albedo[:] = rng.random((32, 32, 3))
    table = TextureTable([small, large])
    got = table.look_up(np.array([0, 1]), np.array([[0.3, 0.9], [0.1, 0.6]], np.float32), np.full(2, 1e4, np.float32))
    expected = np.stack([small.albedo.mean((0, 1)), large.albedo.mean((0, 1))], axis=1)
    np.testing.assert_allclose(got.albedo, expected, atol=1e-4)
    np.testing.assert_allclose(table.mean_albedo().T, expected, atol=1e-4)


def test_maps_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        TextureTable([flat_maps([0, 0, 0], side=12)])


# With Open3D.


def test_depth_of_a_plane_and_a_ball_is_planar() -> None:
    one = scene(look([0, -4, 3], [0, 0, 0]), focal=(44.0, 37.0), centre=(20.3, 17.1), background=0.2)
    view = shoot(one, join(FLOOR, ball([0.2, 0.3, 1.0], 0.8, number=3, rings=300)))
    ground, sphere = plane_depth(one, 0.0), ball_depth(one, [0.2, 0.3, 1.0], 0.8)
    on_floor = sphere > ground
    assert 0.1 < on_floor.mean() < 0.95
    np.testing.assert_allclose(view.depth[on_floor], ground[on_floor], rtol=1e-5)
    # The ball's facets are 4e-5 inside it, and more along a ray that grazes it.
    error = np.abs(view.depth / sphere - 1)[~on_floor]
    assert np.quantile(error, 0.9) < 5e-5 and error.max() < 1e-3
    np.testing.assert_array_equal(view.ids, np.where(sphere < ground, 3, 7))
    assert view.rgb.dtype == np.uint8 and view.depth.dtype == np.float32 and view.ids.dtype == np.uint16


def test_nothing_is_zero_in_depth_and_ids_and_the_background_in_the_picture() -> None:
    one = scene(look([0, -4, 1], [0, 0, 1]), background=0.25)
    view = shoot(one, ball([0, 0, 1], 0.7, number=3))
    beside = np.isinf(ball_depth(one, [0, 0, 1.0], 0.7))
    assert 0 < beside.mean() < 1
    assert (view.depth[beside] == 0).all() and (view.ids[beside] == 0).all()
    assert (view.rgb[beside] == encode_srgb(np.array(0.25))).all()


def test_a_matt_floor_under_a_sun_has_lamberts_radiance() -> None:
    maps = [flat_maps([0.5, 0.2, 0.8])]
    view = shoot(scene(look([0, -1, 5], [0, 0, 0]), [DOWN]), FLOOR, maps)
    expected = np.array([0.5, 0.2, 0.8]) * 2.0 / np.pi
    # The dielectric's gloss adds a little, its Fresnel reflection takes 4 % away.
    np.testing.assert_allclose(decode_srgb(view.rgb).mean((0, 1)), expected, rtol=0.1)


def test_ambient_light_is_albedo_times_background() -> None:
    view = shoot(scene(look([0, -1, 5], [0, 0, 0]), background=0.6), FLOOR, [flat_maps([0.5, 0.5, 0.5])])
    assert (view.rgb == encode_srgb(np.array(0.3))).all()


def test_emission_shows_without_any_lamp() -> None:
    one = scene(look([0, -1, 5], [0, 0, 0]))
    one = replace(one, materials=[replace(one.materials[0], emission=0.8)])
    assert (shoot(one, FLOOR, [flat_maps([0.5, 0.5, 0.5])]).rgb == encode_srgb(np.array(0.4))).all()


@pytest.mark.parametrize(
    "lamp",
    [
        DOWN,
        Light("point", [1, 1, 1], 500.0, position=[0, 0, 8.0]),
        Light("area", [1, 1, 1], 500.0, direction=[0, 0, -1.0], position=[0, 0, 8.0], size=0.2),
    ],
    ids=["sun", "point", "area"],
)
def test_an_occluder_darkens_what_lies_under_it(lamp: Light) -> None:
    one = scene(look([0, -0.01, 3], [0, 0, 0]), [lamp])
    roof = quad([-0.5, -0.5, 4], [1, 0, 0], [0, 1, 0], number=9)  # above the camera: not in the picture
    bright, dark = shoot(one, FLOOR), shoot(one, join(FLOOR, roof))
    np.testing.assert_array_equal(bright.depth, dark.depth)
    middle, corner = (slice(14, 18), slice(22, 26)), (slice(0, 2), slice(0, 2))
    assert bright.rgb[middle].min() > 60
    assert dark.rgb[middle].max() == 0
    np.testing.assert_array_equal(dark.rgb[corner], bright.rgb[corner])


def test_a_lamp_in_front_of_the_occluder_casts_no_shadow_through_it() -> None:
    lamp = Light("point", [1, 1, 1], 200.0, position=[0, 0, 3.5])
    one = scene(look([0, -0.01, 3], [0, 0, 0]), [lamp])
    roof = quad([-0.5, -0.5, 4], [1, 0, 0], [0, 1, 0], number=9)
    np.testing.assert_array_equal(shoot(one, FLOOR).rgb, shoot(one, join(FLOOR, roof)).rgb)


def test_the_shell_of_a_room_casts_no_shadow() -> None:
    one = scene(look([0, -0.01, 3], [0, 0, 0]), [DOWN])
    ceiling = quad([-9, -9, 4], [0, 18, 0], [18, 0, 0], number=9)
    assert shoot(one, join(FLOOR, ceiling)).rgb.max() == 0
    np.testing.assert_array_equal(shoot(in_a_room(one, 9), join(FLOOR, ceiling)).rgb, shoot(one, FLOOR).rgb)


def test_textures_lie_the_right_way_up_and_are_not_mirrored() -> None:
    """Seen from its front with v up, a quad shows low u on the left and low v at the bottom."""
    wall = quad([-1, 0, -1], [2, 0, 0], [0, 0, 2], number=1)  # front: -y
    view = shoot(
        scene(look([0, -3, 0], [0, 0, 0]), size=(40, 40), focal=(50, 50), background=1.0), wall, [arrow_maps()]
    )
    colours = {"low left": (30, 10), "low right": (30, 30), "up left": (10, 10), "up right": (10, 30)}
    got = {name: view.rgb[at].tolist() for name, at in colours.items()}
    assert got == {
        "low left": [255, 0, 0],
        "low right": [0, 255, 0],
        "up left": [0, 0, 255],
        "up right": [255, 255, 255],
    }


def test_scale_repeats_the_texture() -> None:
    wall = quad([-1, 0, -1], [2, 0, 0], [0, 0, 2], number=1)
    one = scene(look([0, -3, 0], [0, 0, 0]), size=(40, 40), focal=(60, 60), background=1.0)
    one = replace(one, materials=[replace(one.materials[0], scale=2.0)])
    rgb = shoot(one, wall, [arrow_maps()]).rgb
    assert rgb[38, 2].tolist() == rgb[38, 22].tolist() == rgb[18, 2].tolist() == [255, 0, 0]
    assert rgb[38, 12].tolist() == [0, 255, 0] and rgb[28, 2].tolist() == [0, 0, 255]


def test_normal_maps_tilt_along_u_and_v() -> None:
    """A wall whose normals lean to +u is brighter under a sun from +u than from -u; likewise for v."""
    wall = quad([-1, 0, -1], [2, 0, 0], [0, 0, 2], number=1)
    for axis, way in ((0, [1.0, 0.0, 0.0]), (1, [0.0, 0.0, 1.0])):
        maps = flat_maps([0.5, 0.5, 0.5])
        maps.normal[..., axis], maps.normal[..., 2] = 0.5, np.sqrt(0.75)
        means = []
        for sign in (1, -1):
            sun = Light("sun", [1, 1, 1], 2.0, direction=(-sign * np.array(way) + [0, 1.0, 0]).tolist())
            means.append(shoot(scene(look([0, -3, 0], [0, 0, 0]), [sun], focal=(90, 90)), wall, [maps]).rgb.mean())
        assert means[0] > means[1] + 20


def test_smooth_metal_shines_where_rough_does_not() -> None:
    sun = Light("sun", [1, 1, 1], 1.0, direction=[0, 1, -0.6])
    one = scene(look([0, -4, 1], [0, 0, 1]), [sun])
    shiny = shoot(one, ball([0, 0, 1], 1, 3), [flat_maps([0.4, 0.4, 0.4], roughness=0.2, metallic=1.0)])
    rough = shoot(one, ball([0, 0, 1], 1, 3), [flat_maps([0.4, 0.4, 0.4], roughness=1.0)])
    assert shiny.rgb.max() == 255 and rough.rgb.max() < 150


def test_supersampling_smooths_edges_and_leaves_depth_and_ids() -> None:
    one = scene(look([0, -4, 1], [0, 0, 1]), background=1.0)
    mesh, maps = ball([0, 0, 1], 0.8, 3), [flat_maps([0.0, 0.0, 0.0])]
    plain, smooth = shoot(one, mesh, maps), shoot(one, mesh, maps, supersample=2)
    np.testing.assert_array_equal(plain.depth, smooth.depth)
    np.testing.assert_array_equal(plain.ids, smooth.ids)
    assert set(np.unique(plain.rgb)) == {0, 255}
    quarters = {int(encode_srgb(np.array(share / 4))) for share in range(5)}
    assert {0, 255} < set(np.unique(smooth.rgb)) <= quarters


def test_the_same_scene_gives_the_same_bytes() -> None:
    lamp = Light("area", [1, 0.9, 0.8], 100.0, direction=[0, 0, -1.0], position=[0, 0, 3.0], size=1.0)
    one = scene(look([0, -4, 3], [0, 0, 0]), [lamp, DOWN], size=(200, 200), focal=(200, 200))
    mesh = join(FLOOR, ball([0, 0, 1], 0.5, 3))
    first, second = shoot(one, mesh), shoot(one, mesh, threads=1)
    for name in ("rgb", "depth", "ids"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_wrong_views_and_closed_renderers_are_refused() -> None:
    pytest.importorskip("open3d", reason="the ray casting renderer needs open3d")
    one = scene(look([0, -4, 3], [0, 0, 0]))
    renderer = RaycastRenderer(one, mesh=FLOOR, maps=[flat_maps([0.5, 0.5, 0.5])])
    with pytest.raises(ValueError, match="cameras 0 to 0, view 1"):
        renderer.render(1)
    renderer.close()
    renderer.close()
    with pytest.raises(ValueError, match="closed"):
        renderer.render(0)
    with pytest.raises(ValueError, match="supersample=0"):
        RaycastRenderer(one, supersample=0)
    strange = replace(one, lights=[Light("neon", [1, 1, 1], 1.0)])
    with pytest.raises(ValueError, match="'neon'"):
        shoot(strange, FLOOR)
