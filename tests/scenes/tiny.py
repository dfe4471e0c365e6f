"""A sampler and a renderer small enough to be killed hundreds of times: a chequered floor with a block on it.

Files in the folder that TINY_CONTROL names make things go wrong: "fail-3" makes scene 3 raise, "fail-3-once" only
the first time, "kill-3" kills the worker, "full-3" fills its disk, "missing" loses a package, "no-gpu" the graphics
card, "slow" makes each view take as many seconds as it says.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_attrsub.scenes.description import Camera, Light, Material, Scene, Shape
from peft_attrsub.scenes.view import NoDeviceError, View

HERE = "tests.scenes.tiny"
BLOCK = ((-0.5, -0.4, 0.0), (0.5, 0.6, 0.8))  # lower and upper corner; its object id is 2, the floor's 1


@dataclass(frozen=True)
class TinyRecipe:
    attribute: str = "texture"
    seed: int = 7
    size: int = 24
    views: int = 3


def sample(recipe: TinyRecipe, index: int, textures: list[str] | None = None) -> Scene:
    rng = np.random.default_rng([recipe.seed, index])
    start, cameras = rng.uniform(0, 6.28), []
    for view in range(recipe.views):
        angle = start + 0.15 * view
        eye = np.array([3 * np.cos(angle), 3 * np.sin(angle), 2.5])
        forward = -eye / np.linalg.norm(eye)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(forward, right), forward, eye], axis=1)
        half = recipe.size / 2
        cameras.append(Camera(pose.tolist(), recipe.size * 0.9, recipe.size * 0.9, half, half))
    materials = [Material("checker", [rng.uniform(0, 1, 3).tolist(), [0.1, 0.1, 0.1]], maps=(textures or [None])[0])]
    shapes = [Shape("floor", np.diag([9.0, 9.0, 1.0, 1.0]).tolist(), [0], 1)]
    lights = [Light("sun", [1.0, 1.0, 1.0], 2.0, direction=[0.0, 0.0, -1.0])]
    size, motion = recipe.size, []
    if recipe.attribute == "motion":  # the block slides along x
        way = rng.uniform(0.4, 0.9)
        for view in range(recipe.views):
            pose = np.eye(4)
            pose[0, 3] = way * view
            motion.append({"2": pose.tolist()})
    return Scene(recipe.attribute, recipe.seed, index, size, size, materials, shapes, lights, cameras, motion=motion)


class TinyRenderer:
    """Rays against the floor z = 0 up to 6 m from the origin, and the block, which has an inside, too."""

    block, reach = BLOCK, 6.0

    def __init__(self, scene: Scene, bright: float = 1.0) -> None:
        if ("torch" in sys.modules or "peft" in sys.modules) and Path(sys.argv[0]).name == "worker.py":
            raise RuntimeError("a worker imported torch")
        self.scene, self.bright = scene, bright
        self.control = Path(os.environ["TINY_CONTROL"]) if "TINY_CONTROL" in os.environ else None
        if self.control:
            with (self.control / "tried").open("a") as file:
                file.write(f"{scene.index} {os.getpid()}\n")
        if self.asked("missing"):
            raise ImportError('this needs embree: pip install "peft-attrsub[scenes]"')

        if self.asked("no-gpu"):
            raise NoDeviceError("no such device: check the driver")

    def __enter__(self) -> TinyRenderer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        pass

    def asked(self, name: str) -> bool:
        return self.control is not None and (self.control / name).exists()

    def misbehave(self) -> None:
        index = self.scene.index
        if self.asked(f"fail-{index}-once"):
            assert self.control is not None
            (self.control / f"fail-{index}-once").unlink()
            raise RuntimeError("it failed once")
        if self.asked(f"fail-{index}"):
            raise RuntimeError(f"scene {index} never works")
        if self.asked(f"kill-{index}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.asked(f"full-{index}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.asked("slow"):
            assert self.control is not None
            time.sleep(float((self.control / "slow").read_text()))

    def render(self, index: int) -> View:
        if index == 1:
            self.misbehave()
        if self.control:
            with (self.control / "rendered").open("a") as file:
                file.write(f"{self.scene.index} {index}\n")
        camera, width, height = self.scene.cameras[index], self.scene.width, self.scene.height
        v, u = np.mgrid[:height, :width] + 0.5
        rays = np.stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy, np.ones_like(u)], -1)
        pose = np.asarray(camera.pose)
        rays, eye = rays @ pose[:3, :3].T, pose[:3, 3]  # the parameter along a ray is planar z
        floor = np.where(rays[..., 2] < 0, -eye[2] / rays[..., 2], np.inf)
        away = np.hypot(*np.moveaxis(eye[:2] + np.nan_to_num(floor, posinf=0)[..., None] * rays[..., :2], -1, 0))
        floor[away > self.reach] = np.inf
        shift = np.array(self.scene.motion[index]["2"])[:3, 3] if self.scene.motion else np.zeros(3)
        near, far = np.sort([(np.array(corner) + shift - eye) / rays for corner in self.block], axis=0)
        enter, leave = near.max(-1), far.min(-1)
        block = np.where((enter < leave) & (leave > 0), np.where(enter > 0, enter, leave), np.inf)
        depth = np.minimum(floor, block)
        hit = np.isfinite(depth)
        depth = np.where(hit, depth, 0)
        point = eye + depth[..., None] * rays
        checks = np.floor(2 * point).sum(-1) % 2
        albedo = np.asarray(self.scene.materials[0].colours)[checks.astype(int)]
        rgb = np.where(hit[..., None], albedo * 255 * self.bright, 10).astype(np.uint8)
        ids = np.where(hit, np.where(block < floor, 2, 1), 0).astype(np.uint16)
        return View(rgb, depth.astype(np.float32), ids)


class ThreadedRenderer(TinyRenderer):
    """Writes down how many threads each scene was given."""

    def __init__(self, scene: Scene, bright: float = 1.0, threads: int = 0) -> None:
        super().__init__(scene, bright)
        if self.control:
            with (self.control / "threads").open("a") as file:
                file.write(f"{threads}\n")


class HallRenderer(TinyRenderer):
    """No floor, and the block is a hall around every camera that any recipe thinks of."""

    block, reach = ((-20.0, -20.0, -20.0), (20.0, 20.0, 20.0)), 0.0
