"""predict: images to cameras, depth and points in one call, and VggtPrediction, which saves them for viewers."""

from __future__ import annotations

import colorsys
import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._extras import require
from .._files import write_atomically
from .cameras import at_least_float32, decode_pose, to_image_corner, to_pixel_centers, unproject
from .image_processing_vggt import VggtImageProcessor
from .precision import choose_precision, parse_dtype, parse_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Axes of a viewer (glTF: y up, z towards the eye) from OpenCV's (y down, z forward).
_UPRIGHT = np.diag([1.0, -1.0, -1.0])
_SLACK = 1e-3  # as in VggtImageProcessor


@dataclass(eq=False)
class VggtPrediction:
    """What VGGT sees in S views of one scene, each of H x W processed pixels.

    The world is the frame of the first camera, OpenCV axes (x right, y down, z forward), in the scene's own unit.

    extrinsics (S, 3, 4): [R | t], camera from world: x_cam = R X + t.
    intrinsics (S, 3, 3): in pixels of `images`, integer coordinates at pixel centers as `unproject` and
        `datasets.Sample` have them: the principal point is the middle of the image, ((W - 1) / 2, (H - 1) / 2).
        `to_image_corner` gives the W / 2, H / 2 that VGGT's published code and COLMAP count with.
    pose_enc (S, 9): what the cameras were decoded from (see `decode_pose`).
    depth, depth_conf (S, H, W): planar z, and its confidence, 1 or more; None without a depth head.
    points (S, H, W, 3): world coordinates: the depth unprojected by the cameras, or the point head's.
    points_conf (S, H, W): confidence of the points, 1 or more; of depth or of the point head, as the points.
    images (S, 3, H, W): the processed pixels, RGB in [0, 1].
    mask (S, H, W): False where a pixel is padding and not part of the view.
    boxes (S, 6): where each view lies in its processed pixels, see VggtImageProcessor; None for tensors.
    """

    extrinsics: Tensor
    intrinsics: Tensor
    pose_enc: Tensor
    depth: Tensor | None
    depth_conf: Tensor | None
    points: Tensor
    points_conf: Tensor
    images: Tensor
    mask: Tensor
    boxes: Tensor | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> VggtPrediction:
        """The same on another device; dtype, or its name, is for the floating-point tensors."""
        kind = parse_dtype(dtype)
        moved: dict[str, Any] = {
            name: value.to(device=device, dtype=kind if value.is_floating_point() else None)
            for name, value in self._tensors()
        }
        return VggtPrediction(**({field.name: None for field in fields(self)} | moved))

    def numpy(self) -> dict[str, NDArray[Any]]:
        """Field name to array, without the fields that are None: `np.savez("scene.npz", **prediction.numpy())`."""
        return {
            name: (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
            for name, value in self._tensors()
        }

    def save_ply(self, path: str | os.PathLike[str], min_confidence: float = 0.0, percentile: float = 0.0) -> Path:
        """Write the coloured points as a binary PLY file, in world coordinates (OpenCV axes).

        Args:
            path: the file; one of that name is replaced, in one step.
            min_confidence: points below this confidence are left out.
            percentile: in [0, 100]: so many percent of the pixels, the least confident of all views, are left out.
                Padding and points that are not finite are always left out.

        Returns: the path.
        Raises: ValueError if no point is left or the folder is missing, ImportError without trimesh.
        """
        trimesh = _trimesh()
        points, colors = self._cloud(min_confidence, percentile)
        return _write(path, trimesh.PointCloud(points, colors=colors).export(file_type="ply"))

    def save_glb(
        self,
        path: str | os.PathLike[str],
        min_confidence: float = 0.0,
        percentile: float = 0.0,
        cameras: bool = True,
        camera_size: float | None = None,
    ) -> Path:
        """Write the coloured points and the cameras as a GLB file (binary glTF).

        A viewer shows it upright as seen by the first camera: (x, y, z) of the world is written as (x, -y, -z).
        The geometry "points" is the cloud; "camera_0", "camera_1", ... are pyramids from the centre of the camera to
        the corners of its image, coloured from red (the first view) over green to blue (the last).

        Args:
            path, min_confidence, percentile: as in `save_ply`, which also says what is raised.
            cameras: whether the cameras are written.
            camera_size: height of the pyramids in the scene's unit; by default a twentieth of the extent of the cloud.

        Returns: the path.
        """
        trimesh = _trimesh()
        if camera_size is not None and not camera_size > 0:
            raise ValueError(f"camera_size={camera_size} is not a length: give a positive number, or None.")
        points, colors = self._cloud(min_confidence, percentile)
        scene = trimesh.Scene()
        cloud = trimesh.PointCloud(points @ _UPRIGHT, colors=colors)
        scene.add_geometry(cloud, node_name="points", geom_name="points")
        if cameras:
            size = _extent(points) / 20 if camera_size is None else camera_size
            arrays = self.to(dtype=torch.float64).numpy()
            views, _, height, width = self.images.shape
            for s in range(views):
                vertices, faces = _pyramid(arrays["extrinsics"][s], arrays["intrinsics"][s], (height, width), size)
                mesh = trimesh.Trimesh(vertices @ _UPRIGHT, faces, process=False)
                mesh.visual.vertex_colors = np.tile(_view_color(s, views), (len(vertices), 1))
                scene.add_geometry(mesh, node_name=f"camera_{s}", geom_name=f"camera_{s}")
        return _write(path, scene.export(file_type="glb"))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def _cloud(self, min_confidence: float, percentile: float) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """Points (N, 3) and colours RGBA (N, 4) that pass the thresholds."""
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile={percentile} is not a share of the points: give a number from 0 to 100.")
        arrays = self.numpy()
        points, confidence = arrays["points"].astype(np.float64), arrays["points_conf"]
        real = arrays["mask"] & np.isfinite(points).all(-1) & np.isfinite(confidence)
        if not real.any():
            raise ValueError("the prediction holds no finite point, so there is nothing to save: check the weights.")
        low, high = confidence[real].min(), confidence[real].max()
        threshold = max(min_confidence, float(np.percentile(confidence[real], percentile)))
        keep = real & (confidence >= threshold)
        if not keep.any():
            raise ValueError(
                f"no point has a confidence of {threshold:g} or more: they go from {low:g} to {high:g}; lower "
                f"min_confidence or percentile."
            )
        pixels = np.rint(arrays["images"].astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
        rgb = pixels.transpose(0, 2, 3, 1)[keep]
        return points[keep], np.concatenate([rgb, np.full_like(rgb[:, :1], 255)], 1)


def predict(
    model: PreTrainedModel,
    images: Any,
    *,
    points: str = "depth",
    mode: str | None = None,
    processor: VggtImageProcessor | None = None,
    dtype: torch.dtype | str | None = None,
) -> VggtPrediction:
    """Cameras, depth and points of one scene; `model.predict(images)` is the same.

    Args:
        model: a VggtModel; in eval mode while it runs; afterwards every module has its own mode again.
        images: of one scene: what VggtImageProcessor takes (a folder, files, arrays, PIL images), or what it gave, or
            pixels that are ready: a tensor of floats (S, 3, H, W) or (1, S, 3, H, W) in [0, 1], H and W multiples of
            the patch size.
        points: "depth" unprojects the depth by the cameras; "head" takes the points of the point head.
        mode: of the processor: "crop", "pad" or "square". Pixels that are ready stay as they are.
        processor: by default one of the model's own image and patch size.
        dtype: to run the blocks in it (autocast): torch.bfloat16, "bfloat16" or "bf16", likewise float16, or "auto"
            for what the device computes natively (see `precision`). The heads stay in float32. None: as the caller's
            autocast has it, by default float32.

    Returns: a VggtPrediction of tensors on the model's device without gradients, float32 (float64 where the model's
    outputs are).
    Raises: ValueError for more than one scene, for pixels outside [0, 1], and for a head that the model lacks.
    """
    _check_heads(model, points)
    pixels, boxes = _pixels(model, images, mode, processor)
    guard: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if dtype is not None:
        chosen = choose_precision(model.device, parse_precision(dtype, "dtype"), training=False)
        guard = chosen.autocast(model.device)
    with _evaluating(model), torch.inference_mode(), guard:
        pixels = pixels.to(model.device, torch.float32)
        output = model(pixel_values=pixels)
        size = tuple(pixels.shape[-2:])
        pose_enc = at_least_float32(output.pose_enc[0])
        extrinsics, corner_intrinsics = decode_pose(pose_enc, size)
        intrinsics = to_pixel_centers(corner_intrinsics)
        found = {
            "extrinsics": extrinsics,
            "intrinsics": intrinsics,
            "pose_enc": pose_enc,
            "images": pixels[0],
            "mask": _inside(boxes, pixels),
        }
        if output.depth is not None:
            found |= {"depth": at_least_float32(output.depth[0, ..., 0])}
            found |= {"depth_conf": at_least_float32(output.depth_conf[0])}
        if points == "depth":
            found["points"] = unproject(found["depth"], intrinsics, extrinsics)
            found["points_conf"] = found["depth_conf"]
        else:
            found |= {"points": at_least_float32(output.world_points[0])}
            found |= {"points_conf": at_least_float32(output.world_points_conf[0])}
        if boxes is not None:
            found["boxes"] = boxes.to(model.device)
    # Copied outside inference mode: ordinary tensors, which a caller may optimise over, and of this scene alone.
    copies: dict[str, Any] = {name: tensor.clone() for name, tensor in found.items()}
    return VggtPrediction(**({"depth": None, "depth_conf": None} | copies))


def _check_heads(model: PreTrainedModel, points: str) -> None:
    if points not in ("depth", "head"):
        raise ValueError(f'points={points!r} is not known: choose "depth" or "head".')
    for head in ("camera", "depth" if points == "depth" else "point"):
        if head not in model.config.heads:
            raise ValueError(
                f"predict with points={points!r} needs the {head} head, and this model has {model.config.heads}: load "
                f"it with heads={[*model.config.heads, head]}."
            )


def _pixels(
    model: PreTrainedModel, images: Any, mode: str | None, processor: VggtImageProcessor | None
) -> tuple[Tensor, Tensor | None]:
    """Pixels (1, S, 3, H, W) of one scene, and the boxes (S, 6) of its views where a processor made them."""
    boxes = None
    if isinstance(images, Tensor) and images.is_floating_point() and images.dim() > 3:
        pixels = images.detach()
    else:
        if not (isinstance(images, Mapping) and "pixel_values" in images):
            config = model.config
            processor = processor or VggtImageProcessor(image_size=config.image_size, patch_size=config.patch_size)
            images = processor(images, mode=mode, return_tensors="pt")
        pixels = torch.as_tensor(images["pixel_values"])
        boxes = torch.as_tensor(images["boxes"]).reshape(-1, 6) if "boxes" in images else None
    pixels = pixels[None] if pixels.dim() == 4 else pixels
    if pixels.dim() != 5 or not pixels.numel():
        raise ValueError(
            f"the pixels have shape {tuple(pixels.shape)}, expected (views, 3, H, W), with a view or more."
        )
    if pixels.shape[0] != 1:
        raise ValueError(f"there are {pixels.shape[0]} scenes, and predict takes one: call it for each of them.")
    low, high = (float(x) for x in pixels.aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise ValueError(f"the pixels go from {low:g} to {high:g}, expected [0, 1] without mean and deviation.")
    return pixels, boxes


def _inside(boxes: Tensor | None, pixels: Tensor) -> Tensor:
    """(S, H, W): whether the centre of a pixel lies in the box of its view."""
    views, _, height, width = pixels.shape[1:]
    if boxes is None:
        return torch.ones(views, height, width, dtype=torch.bool, device=pixels.device)
    left, top, right, bottom = (boxes[:, i, None].to(pixels.device) for i in range(4))
    x = torch.arange(width, device=pixels.device) + 0.5
    y = torch.arange(height, device=pixels.device) + 0.5
    across, down = (x > left) & (x < right), (y > top) & (y < bottom)
    return down[:, :, None] & across[:, None, :]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards each module has the mode it had, which a frozen part may have of its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# -------------------------------------------------------------------------------------------------------- files


def _trimesh() -> Any:
    return require("trimesh", "vggt", "saving point clouds")


def _extent(points: NDArray[np.float64]) -> float:
    """Diagonal of the box that holds the points, without the outermost 2 % on every side; 1 for a single place."""
    low, high = np.percentile(points, [2, 98], axis=0)
    return float(np.linalg.norm(high - low)) or 1.0


def _pyramid(
    extrinsic: NDArray[np.float64], intrinsic: NDArray[np.float64], size: tuple[int, int], depth: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices (5, 3) in the world, the camera's center first, and faces that are seen from both sides.

    intrinsic: with integers at pixel centers; the base of the pyramid is the outline of the image, not of the
    centers of its outermost pixels.
    """
    height, width = size
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], np.float64)
    camera = np.concatenate([np.zeros((1, 3)), depth * corners @ np.linalg.inv(to_image_corner(intrinsic)).T])
    world = (camera - extrinsic[:, 3]) @ extrinsic[:, :3]  # R^T (x - t), as rows
    outer = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1]])
    return world, np.concatenate([outer, outer[:, ::-1]])


def _view_color(s: int, views: int) -> NDArray[np.uint8]:
    red, green, blue = colorsys.hsv_to_rgb(2 / 3 * s / max(1, views - 1), 1.0, 1.0)
    return np.array([round(255 * red), round(255 * green), round(255 * blue), 255], np.uint8)


def _write(path: str | os.PathLike[str], data: bytes) -> Path:
    """The file in one step; ValueError for a folder that is missing, or in its place."""
    final = Path(path)
    if final.is_dir():
        raise ValueError(f"{str(final)!r} is a folder: give the name of a file to write.")
    if not final.parent.is_dir():
        raise ValueError(
            f"the folder {str(final.parent)!r} does not exist: make it, or write {final.name!r} elsewhere."
        )
    return write_atomically(final, data)


__all__ = ["VggtPrediction", "predict"]
