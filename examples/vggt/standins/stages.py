"""Subjects of the benchmarks in rooms of our generator, seen by cameras that the base has not seen.

The stand-ins of examples/vggt have the paper's own set-ups: one person on white in a ring of cameras, one print before
a hand that trembles. A base this small knows nothing of these, and to a scale they all have the same depth and the
same cameras: fine-tuned, by whatever method, it answered the same for every picture (with the pictures of another
sequence it was as good), and all methods were alike. So here several people, or prints, stand at different depths in a
room, and all pixels count. The base can look at it, and loses much by cameras that are held at a slant (`rolled`) or
hang below the ceiling (`above`): that is what there is to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

#: Subjects of a scene; tries to place one, and scenes to find one that shows enough.
SUBJECTS, TRIES, SCENES = 3, 60, 30
#: Distance from the middle camera in shares of the room's longer side; half of the angle they stand in, degrees.
NEAR, FAR, ANGLE = 0.15, 0.55, 22.0
#: Share of the pictures that subjects fill, on average and in each; share that may be nearer than CLOSE metres.
SEEN, LEAST, CLOSE, CLUTTER = 0.03, 0.003, 0.6, 0.1
CLEAR = 0.35  # metres between a subject and cameras, walls or other subjects
ROLL, PITCH, BELOW = (15.0, 45.0), (25.0, 50.0), 0.25  # degrees to either side, degrees down, metres from the ceiling
Move = Callable[[Sequence[Any], np.random.Generator, float], list[Any]]


@dataclass(frozen=True)
class Subject:
    """A mesh that stands at the origin, z up, facing +x, with one material; maps: of that. radius: around the z axis,
    metres. rise: of its lowest point above the floor."""

    mesh: Any
    maps: Any
    radius: float
    rise: float = 0.0


@dataclass(frozen=True)
class Stage:
    """What a renderer needs, and the object ids of the subjects."""

    scene: Any
    mesh: Any
    maps: list[Any]
    ids: tuple[int, ...]


def slant(degrees: float) -> np.ndarray:
    """(4, 4) that turns a camera about where it looks: pose @ slant."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def rolled(cameras: Sequence[Any], rng: np.random.Generator, ceiling: float) -> list[Any]:
    """All cameras turned about where they look, by one angle of ROLL to either side."""
    turn = slant(rng.uniform(*ROLL) * rng.choice([-1, 1]))
    return [replace(camera, pose=(np.array(camera.pose) @ turn).tolist()) for camera in cameras]


def above(cameras: Sequence[Any], rng: np.random.Generator, ceiling: float) -> list[Any]:
    """All cameras raised together until the highest is BELOW the ceiling, and turned down by one angle of PITCH."""
    angle = np.radians(rng.uniform(*PITCH))
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0, 0], [0, c, s, 0], [0, -s, c, 0], [0, 0, 0, 1]])
    poses = np.array([camera.pose for camera in cameras]) @ turn
    poses[:, 2, 3] += ceiling - BELOW - poses[:, 2, 3].max()
    return [replace(camera, pose=pose.tolist()) for camera, pose in zip(cameras, poses, strict=True)]


def stage(
    recipe: Any, index: int, subjects: Sequence[Subject], move: Move, rng: np.random.Generator, texture: int
) -> Stage | None:
    """The scene with this index, its cameras moved, and the subjects in it; None where there is no room for them."""
    from _prints import together

    from peft_attrsub.scenes.description import Material
    from peft_attrsub.scenes.meshes import Mesh, build_mesh
    from peft_attrsub.scenes.sampling import sample_scene
    from peft_attrsub.scenes.textures import render_maps

    scene = sample_scene(recipe, index)
    room = next(shape for shape in scene.shapes if shape.kind == "room")
    pose = np.array(room.pose)
    centre, half = pose[:3, 3], np.abs(pose[:3, :3]).sum(1)
    scene = replace(scene, cameras=move(scene.cameras, rng, float(centre[2] + half[2])))
    eyes = np.array([camera.pose for camera in scene.cameras])[:, :3, 3]
    middle = np.array(scene.cameras[len(scene.cameras) // 2].pose)
    taken = [(eye[:2], 0.0) for eye in eyes]
    parts, maps = [build_mesh(scene)], [render_maps(material, texture) for material in scene.materials]
    ids = []
    first = int(max(parts[0].object_id)) + 1
    for number, subject in enumerate(subjects):
        place = _place(subject, scene, middle, centre, half, taken, rng)
        if place is None:
            return None
        taken.append((place, subject.radius))
        # Facing the cameras, more or less.
        turn = np.arctan2(*(middle[:2, 3] - place)[::-1]) + rng.uniform(-0.9, 0.9)
        c, s = np.cos(turn), np.sin(turn)
        rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)
        shift = np.array([*place, centre[2] - half[2] + subject.rise], np.float32)
        mesh, count = subject.mesh, len(subject.mesh.triangles)
        parts.append(
            Mesh(
                mesh.vertices @ rotation.T + shift,
                mesh.triangles,
                mesh.uv,
                mesh.normals @ rotation.T,
                np.full(count, len(maps), np.int32),
                np.full(count, first + number, np.int32),
            )
        )
        maps.append(subject.maps)
        ids.append(first + number)
    plain = Material("plain", [[0.5, 0.5, 0.5]], scale=1.0, roughness=0.9)
    scene = replace(scene, materials=[*scene.materials, *[plain] * len(subjects)])
    return Stage(scene, together(*parts), maps, tuple(ids))


def _place(
    subject: Subject, scene: Any, middle: Any, centre: Any, half: Any, taken: Sequence[Any], rng: Any
) -> np.ndarray | None:
    """A free place (x, y) that the middle camera looks at, or None."""
    ahead = np.arctan2(middle[1, 2], middle[0, 2])
    longest = 2 * max(half[:2])
    for _ in range(TRIES):
        away = np.exp(rng.uniform(np.log(NEAR), np.log(FAR))) * longest
        angle = ahead + np.radians(rng.uniform(-ANGLE, ANGLE))
        place = middle[:2, 3] + away * np.array([np.cos(angle), np.sin(angle)])
        reach = subject.radius + CLEAR
        if (np.abs(place - centre[:2]) > half[:2] - reach).any():
            continue
        if any(np.linalg.norm(place - other) < reach + radius for other, radius in taken):
            continue
        boxes = np.array(scene.boxes).reshape(-1, 6)
        # What hangs above or on a wall leaves room below; a box on the floor does not.
        low = boxes[boxes[:, 2] < centre[2] - half[2] + 1.5]
        outside = np.maximum(np.maximum(low[:, :2] - place, place - low[:, 3:5]), 0)
        if len(low) and (np.linalg.norm(outside, axis=1) < subject.radius).any():
            continue
        return place
    return None


def find_stage(
    recipe: Any,
    key: Sequence[int],
    choose: Callable[[np.random.Generator], Sequence[Subject]],
    move: Move,
    texture: int,
    shape: tuple[int, int] | None = None,
) -> tuple[Stage, list[Any]]:
    """The first of SCENES scenes of this key that shows enough of its subjects, and its views.

    key: seed and number of the sequence. choose: generator of random numbers -> subjects. shape: height and width of
    the pictures, cut from the middle of the recipe's square ones. ValueError where no scene will do.
    """
    from peft_attrsub.scenes.raycast import RaycastRenderer

    for attempt in range(SCENES):
        rng = np.random.default_rng([*key, attempt])
        made = stage(recipe, key[-1] * SCENES + attempt, choose(rng), move, rng, texture)
        if made is None:
            continue
        if shape is not None:
            height, width = shape
            cameras = [replace(camera, cx=width / 2, cy=height / 2) for camera in made.scene.cameras]
            made = replace(made, scene=replace(made.scene, height=height, width=width, cameras=cameras))
        with RaycastRenderer(made.scene, 2, mesh=made.mesh, maps=made.maps, shadow_samples=1, threads=1) as renderer:
            views = [renderer.render(number) for number in range(len(made.scene.cameras))]
        shares = [float(np.isin(view.ids, made.ids).mean()) for view in views]
        clutter = max(float((view.depth < CLOSE).mean()) for view in views)
        if np.mean(shares) >= SEEN and min(shares) >= LEAST and clutter <= CLUTTER:
            return made, views
    raise ValueError(f"none of {SCENES} scenes of {list(key)} shows enough of its subjects: choose another seed.")


def write_stage(folder: Path, made: Stage, views: Sequence[Any], *, unit: float, digits: int, masks: bool) -> None:
    """One sequence as RenderedWriter lays it out: whole, or to be written again.

    unit: metres of the benchmark's unit of length. masks: write masks too, of all pixels.
    """
    from peft_attrsub.datasets.writing import RenderedWriter
    from peft_attrsub.scenes.storage import extrinsic

    with RenderedWriter(folder, digits=digits, depth="npy", tag="stage") as writer:
        for index, (view, camera) in enumerate(zip(views, made.scene.cameras, strict=True)):
            w2c = np.eye(4)
            w2c[:3] = extrinsic(camera)
            w2c[:3, 3] /= unit
            rgba = np.concatenate([view.rgb, np.full((*view.rgb.shape[:2], 1), 255, np.uint8)], axis=2)
            lens = (camera.fx, camera.fy, camera.cx, camera.cy)
            mask = np.ones(view.depth.shape, bool) if masks else None
            writer.add(index, rgba, (view.depth / unit).astype(np.float32), w2c, *lens, mask=mask)
        writer.finish()
