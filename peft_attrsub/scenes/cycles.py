"""Path tracing with Blender's Cycles as a Python module (bpy 5.0 or later): the paper's look.

A view is rendered to one temporary multilayer EXR (colour, depth, object index), read back and encoded here: Blender's
own PNG writer adds time stamps and dither. Depth and ids are those of the first sample, which sits at the pixel
centre: planar, without anti-aliasing, the same for every number of samples. The shell of a room casts no shadow, so
that suns reach inside; lamps are invisible to the camera. bpy holds one scene a process: a new renderer ends the old.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self
from zlib import crc32

import numpy as np

from .._extras import require
from .blender import add_camera, add_lamp, add_material, add_object, add_world, aim, use_device
from .deferring import deferred_signals, quiet_stdout
from .description import Scene
from .filtering import Maps
from .posed import moving_ids, object_poses
from .view import View, camera_at, encode_srgb, mesh_and_maps, shell_ids

DEVICES = ("cpu", "optix", "cuda")
# Cycles writes 1e10 where a ray met nothing.
NOTHING = 1e9


class CyclesRenderer:
    """Pictures of one scene by path tracing.

    samples: paths a pixel. denoise: with OpenImageDenoise; 4 samples denoised come close to 64 that are not, in a
    tenth of the time. device: "cpu", "optix" or "cuda"; a NoDeviceError where the machine has none (Blender
    itself would quietly use the processor). bounces: of light, diffuse and glossy. threads: 0 for all cores. mesh,
    maps, texture_size: as in `RaycastRenderer`. On "cpu" the same scene gives the same pixels in every process and
    with any number of threads. Raises ImportError without bpy or OpenEXR.
    """

    _owner: ClassVar[CyclesRenderer | None] = None
    _warm: ClassVar[set[str]] = set()

    def __init__(
        self,
        scene: Scene,
        samples: int = 4,
        denoise: bool = True,
        device: str = "cpu",
        *,
        bounces: int = 2,
        threads: int = 0,
        texture_size: int = 512,
        mesh: Any = None,
        maps: Sequence[Maps] | None = None,
    ) -> None:
        if samples < 1 or bounces < 0 or threads < 0:
            raise ValueError(
                f"samples={samples}, bounces={bounces}, threads={threads} were given: samples must be 1 or more, the "
                "others 0 or more."
            )
        if device not in DEVICES:
            raise ValueError(f"device={device!r} was given: {', '.join(map(repr, DEVICES))} are known.")
        self._bpy = require("bpy", "scenes", "the Cycles renderer")
        self._exr = require("OpenEXR", "scenes", "the Cycles renderer")
        self.scene = scene
        if device not in CyclesRenderer._warm:
            CyclesRenderer._warm.add(device)
            if device != "cpu":
                self._warm_up(device)
        self._folder: Path | None = None
        self._set_up(samples, denoise, device, bounces, threads)
        self._fill(mesh, maps, texture_size)
        self._folder = Path(tempfile.mkdtemp(prefix="cycles-", dir=_fast_folder(scene)))
        CyclesRenderer._owner = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary folder and empty Blender's scene; a second call does nothing."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if CyclesRenderer._owner is self:
            CyclesRenderer._owner = None
            _reset(self._bpy)

    def render(self, index: int) -> View:
        """The view of camera `index`. ValueError for an index the scene does not have, or a renderer that is closed
        or was ended by a newer one; OSError where the temporary picture cannot be written or read.

        SIGINT and SIGTERM that arrive on the way are delivered when the view is finished: Blender would swallow the
        one and die of the other half-way.
        """
        camera = camera_at(self.scene, index)
        if self._folder is None or CyclesRenderer._owner is not self:
            raise ValueError("this renderer is closed, or a newer one took Blender's scene over: make a new one.")
        target = self._bpy.context.scene
        aim(target, self.scene, camera)
        for number, pose in object_poses(self.scene, index).items():
            self._moving[number].matrix_world = pose.T.tolist()  # bpy reads a list of lists as columns
        target.cycles.seed = crc32(f"{self.scene.dataset_seed} {self.scene.index} {index}".encode()) & 0x7FFFFFFF
        path = self._folder / f"{index}.exr"
        target.render.filepath = str(path)
        with deferred_signals(self.close):
            with quiet_stdout():
                self._bpy.ops.render.render(write_still=True)
            return self._read(path)

    def _read(self, path: Path) -> View:
        """The view in a temporary EXR, which is removed."""
        if not path.is_file():
            raise OSError(f"Blender wrote no picture to {path}: is the disk full?")
        try:
            channels = self._exr.File(str(path), separate_channels=True).parts[0].channels
            plane = {name.split(".", 1)[1]: channel.pixels for name, channel in channels.items()}
            light = np.stack([plane[f"Combined.{colour}"] for colour in "RGB"], axis=-1)
            depth = plane["Depth.Z"].astype(np.float32)
            ids = plane["Object Index.X"]
        except (KeyError, IndexError, RuntimeError) as error:
            raise OSError(f"the picture that Blender wrote to {path} cannot be read ({error!r}).") from error
        finally:
            path.unlink(missing_ok=True)
        something = depth < NOTHING
        return View(
            encode_srgb(light),
            np.where(something, depth, np.float32(0)),
            np.where(something, np.rint(ids), 0).astype(np.uint16),
        )

    def _set_up(self, samples: int, denoise: bool, device: str, bounces: int, threads: int) -> None:
        """An empty Blender scene with the settings of the renderer."""
        _reset(self._bpy)
        target = self._bpy.context.scene
        target.render.engine = "CYCLES"
        use_device(self._bpy, target, device)
        target.cycles.samples = samples
        target.cycles.use_adaptive_sampling = False
        target.cycles.use_denoising = denoise
        if denoise:
            target.cycles.denoiser = "OPENIMAGEDENOISE"
        target.cycles.max_bounces = target.cycles.diffuse_bounces = target.cycles.glossy_bounces = bounces
        target.render.use_persistent_data = True
        target.render.use_compositing = target.render.use_sequencer = False
        target.render.resolution_x, target.render.resolution_y = self.scene.width, self.scene.height
        target.render.resolution_percentage = 100
        if threads:
            target.render.threads_mode, target.render.threads = "FIXED", threads
        layer = target.view_layers[0]
        layer.name = "ViewLayer"
        layer.use_pass_z = layer.use_pass_object_index = True
        picture = target.render.image_settings
        picture.media_type = "MULTI_LAYER_IMAGE"  # before the format, which it restricts
        picture.file_format = "OPEN_EXR_MULTILAYER"
        picture.color_depth, picture.exr_codec, picture.use_exr_interleave = "32", "NONE", True

    def _fill(self, mesh: Any, maps: Sequence[Maps] | None, texture_size: int) -> None:
        """Meshes (one object an id), materials, lamps, camera and background."""
        mesh, maps = mesh_and_maps(self.scene, mesh, maps, texture_size)
        bpy = self._bpy
        pairs = zip(self.scene.materials, maps, strict=True)
        materials = [add_material(bpy, number, one, its) for number, (one, its) in enumerate(pairs)]
        scales = np.array([material.scale for material in self.scene.materials], np.float32)
        shells = shell_ids(self.scene)
        numbers = np.unique(mesh.object_id).tolist()
        things = {
            number: add_object(bpy, mesh, number, materials, scales, casts_shadow=number not in shells)
            for number in numbers
        }
        if strangers := set(moving_ids(self.scene)) - set(numbers):
            raise ValueError(f"the object {min(strangers)} moves, but the mesh has no such object: give its own mesh.")
        self._moving = {number: things[number] for number in moving_ids(self.scene)}
        for number, lamp in enumerate(self.scene.lights):
            add_lamp(bpy, number, lamp)
        add_world(bpy, self.scene.background, closed=bool(shells))
        add_camera(bpy)

    def _warm_up(self, device: str) -> None:
        """Render one pixel of nothing: a graphics card compiles its kernels in its first picture, which may last."""
        self._set_up(1, False, device, 0, 0)
        target = self._bpy.context.scene
        add_camera(self._bpy)
        target.render.resolution_x = target.render.resolution_y = 8
        with deferred_signals(), quiet_stdout():
            self._bpy.ops.render.render(write_still=False)


def _reset(bpy: Any) -> None:
    # Not read_factory_settings: it forgets the compute device, and Cycles would go on with the processor.
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)


def _fast_folder(scene: Scene) -> str | None:
    """Shared memory where there is room for a picture, else None, the system's temporary folder."""
    memory = Path("/dev/shm")
    needed = 16 * 4 * scene.width * scene.height
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * needed:
        return str(memory)
    return None
