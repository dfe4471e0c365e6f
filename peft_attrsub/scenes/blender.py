"""The parts of a Blender scene, made from numpy arrays through bpy's data interface (5.0 and later).

Every function takes the module bpy, which is imported only where it is used (it is GPL and 800 MB).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .description import Camera, Light, Material, Scene
from .filtering import Maps
from .view import FLIP, NoDeviceError, encode_srgb, lamp_axes

# Millimetres; only its ratio to the focal length counts.
SENSOR = 36.0


def use_device(bpy: Any, target: Any, device: str) -> None:
    """Render on the processor, or on every OptiX or CUDA device; a NoDeviceError where there is none."""
    if device == "cpu":
        target.cycles.device = "CPU"
        return
    preferences = bpy.context.preferences.addons["cycles"].preferences
    kind = device.upper()
    try:
        preferences.compute_device_type = kind
        preferences.get_devices()
        found = [one for one in preferences.devices if one.type == kind]
    except TypeError:  # this build of Blender does not know the kind
        found = []
    if not found:
        seen = sorted({one.type for one in preferences.devices}) or ["none"]
        raise NoDeviceError(
            f'device="{device}" was asked for, but Cycles finds no such device (it finds: {", ".join(seen)}): check '
            'the driver with nvidia-smi, or use device="cpu".'
        )
    for one in preferences.devices:
        one.use = one.type == kind
    target.cycles.device = "GPU"
    target.cycles.denoising_use_gpu = True


def add_object(bpy: Any, mesh: Any, number: int, materials: list[Any], scales: np.ndarray, casts_shadow: bool) -> Any:
    """The triangles with the object id `number` as one Blender object, returned, whose pass index is the id.

    scales: per material, repetitions of its maps over one unit of the mesh's texture coordinates.
    """
    if not 0 < number < 1 << 15:
        raise ValueError(f"an object has the id {number}: Blender takes 1 to 32767.")
    mine = np.flatnonzero(mesh.object_id == number)
    used, corners = np.unique(mesh.triangles[mine], return_inverse=True)
    corners = np.ascontiguousarray(corners.reshape(-1), np.int32)
    slots, slot = np.unique(mesh.material[mine], return_inverse=True)
    data = bpy.data.meshes.new(f"object {number}")
    data.vertices.add(len(used))
    data.vertices.foreach_set("co", np.ascontiguousarray(mesh.vertices[used], np.float32).ravel())
    data.loops.add(len(corners))
    data.loops.foreach_set("vertex_index", corners)
    data.polygons.add(len(mine))
    data.polygons.foreach_set("loop_start", np.arange(0, len(corners), 3, dtype=np.int32))
    for index in slots:
        data.materials.append(materials[index])
    data.polygons.foreach_set("material_index", np.ascontiguousarray(slot.reshape(-1), np.int32))
    layer = data.uv_layers.new(name="uv", do_init=False)
    uv = mesh.uv[used][corners] * np.repeat(scales[mesh.material[mine]], 3)[:, None]
    layer.uv.foreach_set("vector", np.ascontiguousarray(uv, np.float32).ravel())
    data.update(calc_edges=True)
    # Normals as they are: Blender's own would show seams where vertices are split.
    normals = data.attributes.new("custom_normal", "FLOAT_VECTOR", "POINT")
    normals.data.foreach_set("vector", np.ascontiguousarray(mesh.normals[used], np.float32).ravel())
    thing = bpy.data.objects.new(data.name, data)
    thing.pass_index = number
    thing.visible_shadow = casts_shadow
    bpy.context.scene.collection.objects.link(thing)
    return thing


def add_material(bpy: Any, number: int, material: Material, maps: Maps) -> Any:
    """A principled surface with the maps as image textures; maps that are constant become plain values."""
    made = bpy.data.materials.new(f"material {number}")
    tree = made.node_tree
    surface = next(node for node in tree.nodes if node.bl_idname == "ShaderNodeBsdfPrincipled")
    # Only channels that are free of light may be stored as they are; albedo goes through the sRGB curve, as in a PNG.
    albedo = _image(bpy, tree, f"albedo {number}", encode_srgb(maps.albedo), "sRGB")
    tree.links.new(albedo.outputs["Color"], surface.inputs["Base Color"])
    if np.ptp(maps.roughness) == 0 and np.ptp(maps.metallic) == 0:
        surface.inputs["Roughness"].default_value = float(maps.roughness.flat[0])
        surface.inputs["Metallic"].default_value = float(maps.metallic.flat[0])
    else:
        both = np.stack([maps.roughness, maps.metallic, np.zeros_like(maps.metallic)], axis=-1)
        image = _image(bpy, tree, f"roughness and metallic {number}", _bytes(both), "Non-Color")
        split = tree.nodes.new("ShaderNodeSeparateColor")
        tree.links.new(image.outputs["Color"], split.inputs["Color"])
        tree.links.new(split.outputs["Red"], surface.inputs["Roughness"])
        tree.links.new(split.outputs["Green"], surface.inputs["Metallic"])
    if np.abs(maps.normal[..., :2]).max() > 0:
        image = _image(bpy, tree, f"normal {number}", _bytes(maps.normal * 0.5 + 0.5), "Non-Color")
        bend = tree.nodes.new("ShaderNodeNormalMap")
        bend.uv_map = "uv"
        tree.links.new(image.outputs["Color"], bend.inputs["Color"])
        tree.links.new(bend.outputs["Normal"], surface.inputs["Normal"])
    if material.emission > 0:
        tree.links.new(albedo.outputs["Color"], surface.inputs["Emission Color"])
        surface.inputs["Emission Strength"].default_value = material.emission
    return made


def add_lamp(bpy: Any, number: int, light: Light) -> None:
    """A lamp in Blender's units, which are ours; not seen by the camera itself."""
    if light.kind not in ("sun", "area", "point"):
        raise ValueError(f"the scene has a lamp of kind {light.kind!r}: 'sun', 'area' or 'point' is expected.")
    data = bpy.data.lights.new(f"lamp {number}", light.kind.upper())
    data.energy = light.strength
    data.color = light.colour
    pose = np.eye(4)
    if light.kind == "area":
        data.shape, data.size = "SQUARE", light.size
    elif light.kind == "sun":
        data.angle = 0.0
    else:
        data.shadow_soft_size = 0.0
    if light.kind != "point":
        pose[:3, :3] = lamp_axes(light.direction or [0, 0, 0])
    if light.kind != "sun":
        if light.position is None:
            raise ValueError(f"a lamp of kind {light.kind!r} has no position: it needs one.")
        pose[:3, 3] = light.position
    thing = bpy.data.objects.new(data.name, data)
    thing.matrix_world = pose.T.tolist()  # bpy reads a list of lists as columns
    thing.visible_camera = False
    bpy.context.scene.collection.objects.link(thing)


def add_world(bpy: Any, background: list[float], closed: bool) -> None:
    """Even light from all around in the background's colour, linear RGB.

    closed: a room, whose walls the world's light cannot pass, but the shadow rays of lamps can: two suns as wide as
    half the sky, without the paths that would look for them behind the walls, stand for it there.
    """
    world = bpy.data.worlds.new("background")
    tree = world.node_tree
    node = next((node for node in tree.nodes if node.bl_idname == "ShaderNodeBackground"), None)
    if node is None:
        raise RuntimeError("Blender's new world has no background node: is this bpy 5.0 or later?")
    node.inputs["Color"].default_value = (*background, 1.0)
    node.inputs["Strength"].default_value = 1.0
    bpy.context.scene.world = world
    if closed:  # not twice where a shell has an opening
        world.cycles_visibility.diffuse = world.cycles_visibility.glossy = False
    for side in (-1.0, 1.0) if closed and any(background) else ():
        data = bpy.data.lights.new(f"sky {side:+.0f}", "SUN")
        data.angle, data.color, data.energy = np.pi, background, np.pi
        data.cycles.use_multiple_importance_sampling = False
        thing = bpy.data.objects.new(data.name, data)
        pose = np.eye(4)
        pose[:3, :3] = lamp_axes([0.0, 0.0, side])
        thing.matrix_world = pose.T.tolist()
        thing.visible_camera = False
        bpy.context.scene.collection.objects.link(thing)


def add_camera(bpy: Any) -> None:
    """The scene's camera, to be aimed by `aim`."""
    data = bpy.data.cameras.new("camera")
    data.sensor_fit, data.sensor_width = "HORIZONTAL", SENSOR
    data.clip_start, data.clip_end = 1e-3, 1e5
    thing = bpy.data.objects.new("camera", data)
    bpy.context.scene.collection.objects.link(thing)
    bpy.context.scene.camera = thing


def aim(target: Any, scene: Scene, camera: Camera) -> None:
    """Give the Blender scene's camera the pose and the intrinsics of a view."""
    thing = target.camera
    thing.matrix_world = (np.asarray(camera.pose, np.float64) @ FLIP).T.tolist()
    thing.data.lens = camera.fx * SENSOR / scene.width
    # Shifts are shares of the sensor's width; pixels that are not square are wider or taller, never below 1.
    thing.data.shift_x = (scene.width / 2 - camera.cx) / scene.width
    ratio = camera.fy / camera.fx
    target.render.pixel_aspect_x, target.render.pixel_aspect_y = max(ratio, 1.0), max(1 / ratio, 1.0)
    thing.data.shift_y = (camera.cy - scene.height / 2) / scene.width / ratio


def _image(bpy: Any, tree: Any, name: str, pixels: np.ndarray, space: str) -> Any:
    """A texture node with uint8 pixels (S, S, 3); row 0 is at v = 0 here and in Blender."""
    height, width, _ = pixels.shape
    image = bpy.data.images.new(name, width, height, alpha=False, float_buffer=False)
    image.colorspace_settings.name = space
    values = np.ones((height, width, 4), np.float32)
    values[..., :3] = pixels * np.float32(1 / 255)
    image.pixels.foreach_set(values.ravel())
    node = tree.nodes.new("ShaderNodeTexImage")
    node.image = image
    return node


def _bytes(values: np.ndarray) -> np.ndarray:
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
