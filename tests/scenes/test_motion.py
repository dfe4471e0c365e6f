"""Things that move: where the recipe lets them go, what is stored, and that both renderers put them there."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from peft_attrsub.scenes.cycles import CyclesRenderer
from peft_attrsub.scenes.description import Light, Scene
from peft_attrsub.scenes.meshes import build_mesh
from peft_attrsub.scenes.posed import moving_ids, object_poses, pose_mesh
from peft_attrsub.scenes.raycast import RaycastRenderer
from peft_attrsub.scenes.recipes import LAYOUTS, TRAJECTORIES, AttributeRecipe
from peft_attrsub.scenes.sampling import MARGIN, sample_scene
from peft_attrsub.scenes.storage import SceneFormat, transforms

from .bench_scene import ball, ball_depth, flat_maps, join, look, quad, scene
from .test_sampling import VARIED, dataset, measures

KEYS = list(product(LAYOUTS, TRAJECTORIES))


@cache
def moving(layout: str, trajectory: str = "spline", seed: int = 11, scenes: int = 4) -> list[Scene]:
    recipe = AttributeRecipe("motion", seed, layout=layout, trajectory=trajectory, views=30)
    return [sample_scene(recipe, index) for index in range(scenes)]


def poses(one: Scene, number: int) -> np.ndarray:
    return np.array([view[str(number)] for view in one.motion])


def places(one: Scene) -> dict[int, tuple[np.ndarray, float]]:
    """Of every moving object the middle in every view (views, 3), and the radius of a ball that holds its box."""
    first = 1 + sum(shape.kind in ("room", "floor") for shape in one.shapes)
    found = {}
    for number in moving_ids(one):
        box = np.array(one.boxes[number - first])
        middle = np.append((box[:3] + box[3:]) / 2, 1.0)
        found[number] = ((poses(one, number) @ middle)[:, :3], float(np.linalg.norm(box[3:] - box[:3])) / 2)
    return found


# What the recipe promises.


@pytest.mark.parametrize(("layout", "trajectory"), KEYS)
def test_things_move_rigidly_through_free_space(layout: str, trajectory: str) -> None:
    for one in moving(layout, trajectory):
        assert Scene.from_json(one.to_json()) == one and len(one.motion) == len(one.cameras) == 30
        every = places(one)
        assert 1 <= len(every) <= 4
        eyes = np.array([camera.pose for camera in one.cameras])[:, :3, 3]
        first = 1 + sum(shape.kind in ("room", "floor") for shape in one.shapes)
        still = [box for number, box in enumerate(one.boxes, first) if number not in every]
        for number, (path, radius) in every.items():
            turn = poses(one, number)[:, :3, :3]
            np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), np.tile(np.eye(3), (30, 1, 1)), atol=1e-8)
            np.testing.assert_allclose(np.linalg.det(turn), 1.0, atol=1e-8)
            np.testing.assert_array_equal(poses(one, number)[0], np.eye(4))
            steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
            assert steps.min() > 0 and steps.sum() > 0.005 * 8.0 and steps.max() < 0.15 * 8.0
            assert np.linalg.norm(np.diff(path, 2, axis=0), axis=1).max() < 0.6 * steps.max()  # smooth
            for at in path:
                for box in still:
                    assert np.linalg.norm(at - np.clip(at, box[:3], box[3:])) > radius
                if one.size is not None:
                    assert np.all(np.abs(at) < np.array(one.size) / 2 - radius)
                assert np.linalg.norm(eyes - at, axis=1).min() > radius + MARGIN / 4 * 8.0
            for other, (away, size) in every.items():
                assert other == number or np.linalg.norm(path - away, axis=1).min() > radius + size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parts_of_a_thing_stay_in_its_ball(layout: str) -> None:
    one = moving(layout)[0]
    mesh, every = build_mesh(one), places(one)
    for view in (0, 7, 29):
        posed = pose_mesh(mesh, object_poses(one, view))
        for number, (path, radius) in every.items():
            mine = np.unique(posed.triangles[posed.object_id == number])
            assert np.linalg.norm(posed.vertices[mine] - path[view], axis=1).max() <= radius + 1e-4
        rest = np.unique(posed.triangles[~np.isin(posed.object_id, list(every))])
        np.testing.assert_array_equal(posed.vertices[rest], mesh.vertices[rest])
        np.testing.assert_allclose(np.linalg.norm(posed.normals, axis=1), 1.0, atol=1e-5)
    assert (pose_mesh(mesh, object_poses(one, 0)).vertices == mesh.vertices).all()


def ways(scenes: list[Scene]) -> np.ndarray:
    """Standard deviation within a dataset of where the first thing is at the end of a scene, from where it began."""
    ends = []
    for one in scenes:
        path = next((path for path, _ in places(one).values()), np.zeros((1, 3)))
        ends.append(path[-1] - path[0])
    return np.std(ends, axis=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_motion_varies_in_its_own_dataset_and_nowhere_else(layout: str) -> None:
    own = dataset("motion", layout, "spline", 11, 8)
    assert ways(own).min() > 0.02 * 8.0
    for name in VARIED:
        assert ways(dataset(name, layout, "spline", 11, 8)).max() == 0
    kept = measures(own)
    for name in VARIED:
        wild = measures(dataset(name, layout, "spline", 11, 8))[name]
        assert np.all(wild >= 5 * kept[name]), name
    one, two = own[:2]
    assert one.motion[9] != two.motion[9]
    far = dataset("motion", layout, "spline", 12, 2)[0]
    assert [shape.seed for shape in one.shapes] == [shape.seed for shape in two.shapes]
    assert [shape.seed for shape in one.shapes] != [shape.seed for shape in far.shapes]


DIGEST = """
import hashlib, sys
from peft_attrsub.scenes.recipes import AttributeRecipe
from peft_attrsub.scenes.sampling import sample_scene
for word in sys.argv[1:]:
    layout, trajectory = word.split("/")
    scene = sample_scene(AttributeRecipe("motion", 11, layout=layout, trajectory=trajectory, views=30), 3)
    print(hashlib.sha256(scene.to_json().encode()).hexdigest())
"""


def test_a_fresh_process_gives_the_same_bytes() -> None:
    words = ["/".join(key) for key in KEYS]
    done = subprocess.run([sys.executable, "-c", DIGEST, *words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [hashlib.sha256(moving(*key)[3].to_json().encode()).hexdigest() for key in KEYS]


def test_a_still_scene_says_nothing_of_motion() -> None:
    one = dataset("texture", "object", "spline", 11, 8)[0]
    assert one.motion == [] and "motion" not in one.to_json()
    assert all("object_poses" not in frame for frame in transforms(one, SceneFormat())["frames"])
    frames = transforms(moving("object")[0], SceneFormat())["frames"]
    assert [frame["object_poses"] for frame in frames] == moving("object")[0].motion


# A ball that moves, and a wall.

WALL = quad([-9, 3, -9], [18, 0, 0], [0, 0, 18], number=7)
AT = [[-0.8, 0.0, 0.1], [0.0, -0.5, 0.0], [0.7, 0.4, -0.3]]
RADIUS = 0.6


def pose(place: list[float], turns: float = 0.0) -> list[list[float]]:
    """From the ball's mesh, at (5, 5, 5), to `place`, turned about z there."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    out = np.eye(4)
    out[:2, :2] = [[cos, -sin], [sin, cos]]
    out[:3, 3] = place - out[:3, :3] @ [5.0, 5.0, 5.0]
    matrix: list[list[float]] = out.tolist()
    return matrix


def flight() -> tuple[Scene, Any]:
    one = scene(look([0, -4, 0], [0, 0, 0]), [Light("sun", [1.0, 1.0, 1.0], 2.0, direction=[0.1, 1.0, -0.6])])
    motion = [{"3": pose(place, 0.17 * view)} for view, place in enumerate(AT)]
    return replace(one, cameras=one.cameras * 3, motion=motion), join(WALL, ball([5, 5, 5], RADIUS, number=3))


def views(kind: Any, one: Scene, mesh: Any, order: list[int], **options: Any) -> list[Any]:
    with kind(one, mesh=mesh, maps=[flat_maps([0.5, 0.5, 0.5])], **options) as renderer:
        return [renderer.render(index) for index in order]


@pytest.mark.parametrize("kind", [RaycastRenderer, CyclesRenderer])
def test_a_moving_ball_has_the_depth_and_the_ids_of_its_place(kind: Any) -> None:
    for package in ("open3d",) if kind is RaycastRenderer else ("bpy", "OpenEXR"):
        pytest.importorskip(package, reason="the renderer needs it")
    options = {} if kind is RaycastRenderer else {"samples": 1, "denoise": False}
    one, mesh = flight()
    for view, place in zip(views(kind, one, mesh, [0, 1, 2], **options), AT, strict=True):
        exact = ball_depth(one, place, RADIUS)
        on_ball = np.isfinite(exact)
        assert on_ball.sum() > 50
        assert (view.ids != np.where(on_ball, 3, 7)).sum() <= 8  # the mesh is a little inside the ball
        both = on_ball & (view.ids == 3)
        assert np.quantile(np.abs(view.depth - exact)[both] / exact[both], 0.95) < 2e-3
        np.testing.assert_allclose(view.depth[view.ids == 7], 7.0, rtol=1e-4)


def test_a_moving_ball_is_lit_and_shades_as_one_that_stands_there() -> None:
    pytest.importorskip("open3d", reason="the ray casting renderer needs open3d")
    one, mesh = flight()
    seen = views(RaycastRenderer, one, mesh, [2, 0, 1, 2], supersample=2)
    for index, view in zip([2, 0, 1, 2], seen, strict=True):
        there = pose_mesh(mesh, object_poses(one, index))
        still = views(RaycastRenderer, replace(one, motion=[]), there, [index], supersample=2)[0]
        np.testing.assert_array_equal(view.ids, still.ids)
        np.testing.assert_allclose(view.depth, still.depth, rtol=1e-6)
        assert (np.abs(view.rgb.astype(int) - still.rgb) > 1).mean() < 0.002
    dark = [(view.ids == 7) & (view.rgb.max(axis=-1) < 20) for view in seen]
    assert all(mask.sum() > 10 for mask in dark)  # the shadow on the wall, which goes along
    assert (dark[0] != dark[1]).any() and (dark[0] == dark[3]).all()


@pytest.mark.parametrize(
    ("motion", "words"),
    [
        ([{"3": pose(AT[0])}] * 2, "2 views for 3 cameras"),
        ([{"3": pose(AT[0])}, {}, {}], "not the same objects"),
        ([{"three": pose(AT[0])}] * 3, "from 1 to 65535"),
        ([{"3": np.diag([1.0, 1.0, 2.0, 1.0]).tolist()}] * 3, "no rotation"),
        ([{"3": np.diag([1.0, 1.0, -1.0, 1.0]).tolist()}] * 3, "no rotation"),
        ([{"3": [[1.0]]}] * 3, "no rotation"),
    ],
)
def test_a_motion_that_is_none_is_refused(motion: Any, words: str) -> None:
    one = replace(flight()[0], motion=motion)
    with pytest.raises(ValueError, match=words):
        moving_ids(one)
    with pytest.raises(ValueError, match=words):
        transforms(one, SceneFormat())


def test_an_object_that_is_not_there_cannot_move() -> None:
    one, mesh = flight()
    with pytest.raises(ValueError, match="object 9 moves"):
        pose_mesh(mesh, {9: np.eye(4)})
    assert pose_mesh(mesh, object_poses(one, 1)).triangles is mesh.triangles
