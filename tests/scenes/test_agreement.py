"""Poses of random scenes: right ones raise no alarm, wrong ones are named; units do not matter."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from peft_attrsub.scenes.agreement import PosedDepth, inverse, pairs_to_compare, pose_problem
from peft_attrsub.scenes.posed import moving_ids
from peft_attrsub.scenes.raycast import RaycastRenderer
from peft_attrsub.scenes.recipes import LAYOUTS, AttributeRecipe
from peft_attrsub.scenes.sampling import sample_scene
from peft_attrsub.scenes.storage import extrinsic, intrinsic

pytest.importorskip("open3d", reason="the ray caster needs it")
OPENGL, PYTORCH3D = np.diag([1.0, -1.0, -1.0]), np.diag([-1.0, -1.0, 1.0])


def shifted(poses: np.ndarray, translation: np.ndarray) -> np.ndarray:
    return np.concatenate([poses[..., :3], translation], axis=-1)


#: How a file goes wrong, given the right poses, and a word of the sentence that must name it.
FAULTS = {
    "inverted": (inverse, "read as inverted"),
    "opengl": (lambda e: OPENGL @ e, "read as with OpenGL axes (y up, z backward) instead"),
    "opengl inverted": (lambda e: inverse(OPENGL @ e), "read as with OpenGL axes (y up, z backward), and inverted"),
    "pytorch3d": (lambda e: PYTORCH3D @ e, "read as with PyTorch3D axes (x left, y up) instead"),
    "pytorch3d inverted": (lambda e: inverse(PYTORCH3D @ e), "read as with PyTorch3D axes (x left, y up), and"),
    "transposed": (lambda e: np.concatenate([e[..., :3].swapaxes(-1, -2), e[..., 3:]], -1), "transposed rotations"),
    "centers": (lambda e: shifted(e, inverse(e)[..., 3:]), "the camera's position in place of"),
    "millimeters": (lambda e: shifted(e, e[..., 3:] * 1000), "1000 times too large"),
    "meters": (lambda e: shifted(e, e[..., 3:] / 1000), "1000 times too small"),
}


def shoot(recipe: AttributeRecipe, index: int) -> tuple[dict[int, PosedDepth], list[tuple[int, int]]]:
    scene = sample_scene(recipe, index)
    moving, pairs = moving_ids(scene), pairs_to_compare(len(scene.cameras))
    found = {}
    with RaycastRenderer(scene) as renderer:
        for number in sorted({view for pair in pairs for view in pair}):
            view, camera = renderer.render(number), scene.cameras[number]
            mask = ~np.isin(view.ids, moving)
            found[number] = PosedDepth(view.depth, extrinsic(camera), intrinsic(camera), mask)
    return found, pairs


def changed(views: dict[int, PosedDepth], change, unit: float = 1.0) -> dict[int, PosedDepth]:
    """The views with wrong poses; all lengths, those of depth too, in another unit."""
    out = {}
    for number, view in views.items():
        pose = change(shifted(view.extrinsic, view.extrinsic[:, 3:] * unit))
        out[number] = PosedDepth(view.depth * np.float32(unit), pose, view.intrinsic, view.mask)
    return out


@pytest.mark.parametrize(
    ("attribute", "layout", "trajectory"),
    [*product(("camera",), LAYOUTS, ("spline", "orbit")), ("motion", "room", "orbit"), ("mixed", "object", "spline")],
)
def test_wrong_poses_are_named_and_right_ones_pass(attribute: str, layout: str, trajectory: str) -> None:
    recipe = AttributeRecipe(attribute, 31, layout, trajectory, size=64, views=30, triangles=20_000)
    views, pairs = shoot(recipe, 1)
    for unit in (1.0, 1000.0, 0.01):
        assert pose_problem(changed(views, lambda pose: pose, unit), pairs) is None
    for name, (change, words) in FAULTS.items():
        found = pose_problem(changed(views, change), pairs)
        assert found and words in found, (name, found)


@pytest.mark.parametrize(("layout", "attribute"), list(product(LAYOUTS, ("texture", "motion", "camera"))))
def test_right_poses_raise_no_alarm_however_few_the_views(layout: str, attribute: str) -> None:
    for views, trajectory in ((2, "spline"), (3, "orbit"), (5, "micro"), (42, "micro")):
        recipe = AttributeRecipe(attribute, 40 + views, layout, trajectory, size=48, views=views, triangles=20_000)
        shown, pairs = shoot(recipe, 1)
        assert pose_problem(shown, pairs) is None, (views, trajectory)


def test_noise_of_a_sensor_is_no_contradiction() -> None:
    """1.5 % noise, holes, and edges that bleed: a real depth camera with right poses."""
    rng = np.random.default_rng(3)
    views, pairs = shoot(AttributeRecipe("camera", 33, size=64, views=30, triangles=20_000), 0)
    noisy = {}
    for number, view in views.items():
        depth = view.depth * (1 + 0.015 * rng.normal(size=view.depth.shape))
        depth[rng.random(depth.shape) < 0.2] = 0
        noisy[number] = PosedDepth(depth.astype(np.float32), view.extrinsic, view.intrinsic)
    assert pose_problem(noisy, pairs) is None
