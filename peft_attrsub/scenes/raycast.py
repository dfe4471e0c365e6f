"""Ray casting on Open3D's Embree scene: direct light, shadows and textures, tens of times faster than Cycles.

Rays leave the camera through pixel centres with directions of length 1 along the optical axis, so their parameter at
the hit is planar depth. No light bounces: an ambient term stands for it (`shading.ambient_light`). As in the Cycles
renderer, the shell of a room casts no shadow, so that suns reach inside. What moves has a tree of its own, built anew
for every view; a ray's hit is the nearer of the two trees'.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .._extras import require
from .._machine import available_cores
from .description import Camera, Light, Scene
from .filtering import Maps, TextureTable
from .posed import moving_ids, object_poses, part_of, pose_mesh
from .shading import Surface, ambient_light, cross, dot, lamp_light, reflect, shadow_rays, unit
from .view import View, camera_at, encode_srgb, mesh_and_maps, shell_ids

# Most rays a thread traces and shades at once: they fit the processor's cache, and memory stays flat.
CHUNK = 1 << 14
# A shadow ray starts this share of the depth in front of the surface.
LIFT = np.float32(2e-5)


@dataclass(frozen=True)
class _Layer:
    """Trees for camera rays and for shadow rays; numbers: of the first one's triangles in the tables, None: as is."""

    caster: Any
    shadows: Any
    numbers: np.ndarray | None


class RaycastRenderer:
    """Pictures of one scene by ray casting; the same bytes for the same scene on the same machine.

    supersample: s x s colour rays a pixel (1: one, through the centre); depth and ids always come from the centre.
    shadow_samples: shadow rays to an area lamp per colour ray. threads: of the ray caster, 0 for all cores.
    texture_size: pixels along a side of the material maps. mesh, maps: in place of `build_mesh(scene)` and
    `render_maps(material)` for each material, where the caller has them. Raises ImportError without Open3D.
    """

    def __init__(
        self,
        scene: Scene,
        supersample: int = 1,
        *,
        shadow_samples: int = 2,
        threads: int = 0,
        texture_size: int = 512,
        mesh: Any = None,
        maps: Sequence[Maps] | None = None,
    ) -> None:
        if supersample < 1 or shadow_samples < 1 or threads < 0:
            raise ValueError(
                f"supersample={supersample}, shadow_samples={shadow_samples}, threads={threads} were given: the first "
                "two must be 1 or more, threads 0 (all cores) or more."
            )
        self._o3d = require("open3d", "demo", "the ray casting renderer")
        self.scene = scene
        self._supersample, self._shadow_samples, self._threads = supersample, shadow_samples, threads
        mesh, maps = mesh_and_maps(scene, mesh, maps, texture_size)
        self._layers: list[_Layer] = []
        self._textures = TextureTable(maps)
        self._take_mesh(mesh)
        self._emission = np.array([material.emission for material in scene.materials], np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the ray caster's trees; a second call does nothing."""
        self._layers = []

    def render(self, index: int) -> View:
        """The view of camera `index`. ValueError for an index the scene does not have, or a closed renderer."""
        camera = camera_at(self.scene, index)
        if not self._layers:
            raise ValueError("this renderer is closed: make a new one.")
        if self._moving is not None:
            self._move(self._moving, index)
        height, width = self.scene.height, self.scene.width
        # Parts of one size, a multiple of four for the cores, and the same for any number of threads.
        count = 4 * -(-height * width // (4 * CHUNK))
        bounds = [height * width * number // count for number in range(count + 1)]
        # While one part is in numpy, which lets go of the interpreter, another one casts its rays.
        with ThreadPoolExecutor(self._threads or available_cores()) as pool:
            parts = list(pool.map(lambda first, last: self._part(camera, first, last), bounds, bounds[1:]))
        rgb, depth, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        return View(rgb.reshape(height, width, 3), depth.reshape(height, width), ids.reshape(height, width))

    def _part(self, camera: Camera, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colour (n, 3), depth (n,) and ids (n,) of the pixels first to last - 1, counted row by row."""
        pixels = np.arange(first, last)
        rays = self._rays(camera, pixels, 0.5, 0.5)
        hits = self._cast(rays)
        depth, ids = self._depth_and_ids(hits)
        steps = self._supersample
        if steps == 1:
            return encode_srgb(self._shade(camera, rays, hits, pixels, 0)), depth, ids
        light = np.zeros((len(pixels), 3), np.float32)
        for step in range(steps * steps):
            row, column = divmod(step, steps)
            rays = self._rays(camera, pixels, (column + 0.5) / steps, (row + 0.5) / steps)
            light += self._shade(camera, rays, self._cast(rays), pixels, step)
        return encode_srgb(light / np.float32(steps * steps)), depth, ids

    def _take_mesh(self, mesh: Any) -> None:
        """Build the trees and the tables that shading reads, one row a triangle."""
        self._object_id = np.asarray(mesh.object_id).astype(np.uint16)
        self._material = np.asarray(mesh.material, np.int32)
        self._corners, self._frame, twice_area = self._tables(mesh)
        share = np.bincount(self._material, weights=twice_area, minlength=len(self.scene.materials))
        mean = float(share @ self._textures.mean_albedo().mean(axis=1)) / max(float(share.sum()), 1e-20)
        self._ambient = ambient_light(self.scene, mean)
        moves = np.isin(self._object_id, moving_ids(self.scene))
        self._moving = part_of(mesh, moves) if self.scene.motion else None
        self._numbers = np.flatnonzero(moves)
        if self._moving is None:
            self._layers = [self._layer(mesh, None)]
            return
        self._layers = [self._layer(part_of(mesh, ~moves), np.flatnonzero(~moves))]
        self._move(self._moving, 0)

    def _move(self, moving: Any, index: int) -> None:
        """Put the meshes of what moves where they are in view `index`: their tree and their rows of the tables."""
        posed = pose_mesh(moving, object_poses(self.scene, index))
        self._corners[self._numbers], self._frame[self._numbers], _ = self._tables(posed)
        self._layers = [self._layers[0], self._layer(posed, self._numbers)]

    def _tables(self, mesh: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of triangles: corners (T, 15), frame (T, 8), and twice the area (T,)."""
        triangles = np.asarray(mesh.triangles)
        vertices = np.asarray(mesh.vertices, np.float32)
        material = np.asarray(mesh.material, np.int32)
        # (T, 15): normal and texture coordinates of three corners, so that a hit reads one stretch of memory.
        corners = np.concatenate([mesh.normals, mesh.uv], axis=1).astype(np.float32)
        rows = corners[triangles]
        scale = np.array([material.scale for material in self.scene.materials], np.float32)
        rows[:, :, 3:] *= scale[material][:, None, None]
        at = vertices[triangles].transpose(1, 2, 0)  # (3 corners, 3, T)
        edge1, edge2 = at[1] - at[0], at[2] - at[0]
        uv = rows[:, :, 3:].transpose(1, 2, 0)
        (u1, v1), (u2, v2) = uv[1] - uv[0], uv[2] - uv[0]
        outward = cross(edge1, edge2)
        twice_area = np.maximum(np.sqrt(dot(outward, outward)), np.float32(1e-20))
        turn = u1 * v2 - v1 * u2
        side = np.sign(turn)
        # Direction in which u grows; v grows to its left or right depending on the sign of the turn.
        tangent = unit((edge1 * v2 - edge2 * v1) * side)
        texels_wide = self._textures.sizes[material]
        density = np.sqrt(np.abs(turn) / twice_area) * texels_wide  # texels per metre
        # (T, 8): face normal, tangent, handedness, density
        frame = np.concatenate([outward / twice_area, tangent, side[None], density[None]]).T.astype(np.float32)
        return rows.reshape(-1, 15), np.ascontiguousarray(frame), twice_area

    def _layer(self, mesh: Any, numbers: np.ndarray | None) -> _Layer:
        triangles, vertices = np.asarray(mesh.triangles), np.asarray(mesh.vertices, np.float32)
        casts = ~np.isin(np.asarray(mesh.object_id), sorted(shell_ids(self.scene)))
        caster = self._tree(vertices, triangles)
        return _Layer(caster, caster if casts.all() else self._tree(vertices, triangles[casts]), numbers)

    def _tree(self, vertices: np.ndarray, triangles: np.ndarray) -> Any:
        core = self._o3d.core
        tree = self._o3d.t.geometry.RaycastingScene(nthreads=self._threads)
        if len(triangles):
            tree.add_triangles(
                core.Tensor(np.ascontiguousarray(vertices, np.float32)),
                core.Tensor(np.ascontiguousarray(triangles, np.uint32)),
            )
        return tree

    def _rays(self, camera: Camera, pixels: np.ndarray, x: float, y: float) -> np.ndarray:
        """(n, 6) float32 origin and direction through the point (x, y) of each pixel."""
        pose = np.asarray(camera.pose, np.float64)
        rows, columns = np.divmod(pixels, self.scene.width)
        across = ((columns + (x - camera.cx)) / camera.fx).astype(np.float32)
        down = ((rows + (y - camera.cy)) / camera.fy).astype(np.float32)
        right, below, ahead = pose[:3, :3].T.astype(np.float32)
        rays = np.empty((len(pixels), 6), np.float32)
        rays[:, :3] = pose[:3, 3]
        rays[:, 3:] = across[:, None] * right + down[:, None] * below + ahead
        return rays

    def _cast(self, rays: np.ndarray) -> dict[str, np.ndarray]:
        """Nearest hits: t_hit (n,), infinite without one, primitive_ids (n,) and primitive_uvs (n, 2)."""
        best: dict[str, np.ndarray] = {}
        for layer in self._layers:
            answer = layer.caster.cast_rays(self._o3d.core.Tensor(rays), nthreads=self._threads)
            hits = {key: answer[key].numpy() for key in ("t_hit", "primitive_ids", "primitive_uvs")}
            if layer.numbers is not None:
                hit = np.isfinite(hits["t_hit"])
                ids = hits["primitive_ids"].astype(np.int64)
                ids[hit] = layer.numbers[ids[hit]]
                hits["primitive_ids"] = ids
            if not best:
                best = hits
                continue
            nearer = hits["t_hit"] < best["t_hit"]
            best = {
                key: np.where(nearer if old.ndim == 1 else nearer[:, None], hits[key], old)
                for key, old in best.items()
            }
        return best

    def _depth_and_ids(self, hits: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        hit = np.isfinite(hits["t_hit"])
        ids = np.zeros(len(hit), np.uint16)
        ids[hit] = self._object_id[hits["primitive_ids"][hit]]
        return np.where(hit, hits["t_hit"], np.float32(0)), ids

    def _shade(
        self, camera: Camera, rays: np.ndarray, hits: dict[str, np.ndarray], pixels: np.ndarray, step: int
    ) -> np.ndarray:
        """Linear radiance (n, 3) along n rays."""
        light = np.empty((len(rays), 3), np.float32)
        light[:] = self.scene.background
        hit = np.flatnonzero(np.isfinite(hits["t_hit"]))
        if len(hit) == 0:
            return light
        triangle = hits["primitive_ids"][hit].astype(np.int64)
        surface = self._surface(camera, rays[hit], hits["t_hit"][hit], triangle, hits["primitive_uvs"][hit])
        dither = _dither(pixels[hit], self.scene.width, step)
        emission = self._emission[self._material[triangle]]
        seen = surface.texels.albedo * (self._ambient[:, None] + emission)
        start = surface.points + surface.face * (hits["t_hit"][hit] * LIFT + np.float32(1e-6))
        for lamp in self.scene.lights:
            lit = lamp_light(lamp, surface.points)
            facing = (dot(surface.normal, lit.toward) > 0) & (dot(surface.face, lit.toward) > 0)
            chosen = np.flatnonzero(facing & (lit.irradiance > 0))
            share = self._open_share(lamp, start.take(chosen, 1), dither.take(chosen, 1))
            chosen, share = chosen[share > 0], share[share > 0]
            light_there = lit.irradiance[chosen] * share * np.asarray(lamp.colour, np.float32)[:, None]
            seen[:, chosen] += reflect(surface, lit.toward.take(chosen, 1), chosen) * light_there
        light[hit] = seen.T
        return light

    def _open_share(self, lamp: Light, start: np.ndarray, dither: np.ndarray) -> np.ndarray:
        """Share (n,) of the shadow rays from the points (3, n) to a lamp that nothing blocks."""
        samples = self._shadow_samples if lamp.kind == "area" else 1
        share = np.ones(start.shape[1], np.float32)
        rays = np.empty((start.shape[1], 6), np.float32)
        rays[:, :3] = start.T
        far = float("inf") if lamp.kind == "sun" else 0.999
        for vectors in shadow_rays(lamp, start, dither, samples) if start.shape[1] else ():
            rays[:, 3:] = vectors.T
            tensor = self._o3d.core.Tensor(rays)
            blocked = [
                layer.shadows.test_occlusions(tensor, tfar=far, nthreads=self._threads).numpy()
                for layer in self._layers
            ]
            share -= np.logical_or.reduce(blocked) * np.float32(1 / samples)
        return share

    def _surface(
        self, camera: Camera, rays: np.ndarray, depth: np.ndarray, triangle: np.ndarray, inside: np.ndarray
    ) -> Surface:
        """What the rays (n, 6) met at `depth` on the triangles (n,); inside (n, 2): weights of corners 1 and 2."""
        toward = np.ascontiguousarray(rays[:, 3:].T)
        points = rays[0, :3, None] + depth * toward
        eye = -unit(toward)
        corners = self._corners.take(triangle, axis=0).T
        weight1, weight2 = inside[:, 0], inside[:, 1]
        mixed = corners[:5] * (1 - weight1 - weight2) + corners[5:10] * weight1 + corners[10:] * weight2
        frame = self._frame.take(triangle, axis=0).T
        face, tangent = frame[:3], frame[3:6]
        slant = dot(face, eye)
        # A pixel is depth / f wide across the axis, and longer by 1 / |cos| along the slope: their geometric mean.
        wide = depth * np.float32(1 / (self._supersample * np.sqrt(camera.fx * camera.fy)))
        footprint = frame[7] * wide / np.sqrt(np.maximum(np.abs(slant), np.float32(0.05)))
        texels = self._textures.look_up(self._material[triangle], mixed[3:], footprint)
        normal = unit(mixed[:3])
        tilt = texels.normal
        along = unit(tangent - normal * dot(tangent, normal))
        normal = unit(along * tilt[0] + cross(normal, along) * (tilt[1] * frame[6]) + normal * tilt[2])
        side = np.where(slant < 0, np.float32(-1), np.float32(1))
        return Surface(points, normal * side, face * side, eye, texels)


def _dither(pixels: np.ndarray, width: int, step: int) -> np.ndarray:
    """Interleaved gradient noise (Jimenez 2014): two numbers in [0, 1) a pixel, (2, n), unlike its neighbours'."""
    rows, columns = np.divmod(pixels, width)
    wave = 0.06711056 * columns + 0.00583715 * rows + 0.61803399 * step
    turned = 0.00583715 * columns - 0.06711056 * rows + 0.32471796 * step
    return ((52.9829189 * (np.stack([wave, turned]) % 1)) % 1).astype(np.float32)
