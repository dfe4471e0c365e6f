"""One sequence of views with its truth: the contract that every reader of a dataset on disk keeps.

Conventions are those of `peft_attrsub.vggt`: extrinsics [R | t] are camera from world with OpenCV axes (x right,
y down, z forward), intrinsics are in pixels with integer coordinates at pixel centers (the middle of an image of
W columns is cx = (W - 1) / 2), depth is planar z in the unit of t. A reader converts once, at the border
(`vggt.cameras.to_pixel_centers` for files that count from the image's corner).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: How far R R^T may be from I, and det R from 1.
RIGID = 1e-4


@dataclass(frozen=True)
class Sample:
    """S views of one sequence.

    name: of the sequence, unique in its dataset. frames: id of each view, as the dataset names it.
    images (S, 3, H, W) float32 in [0, 1]. depths (S, h, w) float32, exactly 0 where there is none. point_masks
    (S, h, w) bool: the pixels that count, never where depths are 0. intrinsics (S, 3, 3) float64 of the depth maps;
    extrinsics (S, 3, 4) float64, or None where a dataset has no poses. (h, w) is (H, W) unless a sensor measures
    depth at a size of its own. labels (S, h, w) int64: object ids, 0 for none, where the dataset has them.
    unit: what depths and translations are in, for people: "m", "scene".
    """

    name: str
    frames: tuple[str, ...]
    images: Tensor
    depths: Tensor
    point_masks: Tensor
    intrinsics: Tensor
    extrinsics: Tensor | None = None
    labels: Tensor | None = None
    unit: str = "m"

    def __post_init__(self) -> None:
        import torch  # not at the top: scripts that write datasets take constants from here

        views, maps = len(self.frames), tuple(self.depths.shape)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "images": ((views, 3, *self.images.shape[-2:]), torch.float32),
            "depths": ((views, *self.depths.shape[-2:]), torch.float32),
            "point_masks": (maps, torch.bool),
            "intrinsics": ((views, 3, 3), torch.float64),
            "extrinsics": ((views, 3, 4), torch.float64),
            "labels": (maps, torch.int64),
        }
        for key, (shape, dtype) in expected.items():
            value = getattr(self, key)
            if value is not None and (tuple(value.shape) != shape or value.dtype != dtype):
                raise ValueError(
                    f"{self.name}: {key} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}: this is a "
                    "fault of its reader."
                )
        self._check_values()

    def _check_values(self) -> None:
        import torch

        if not views_are_finite(self.depths) or bool((self.depths < 0).any()):
            raise ValueError(f"{self.name}: a depth is negative or not finite; readers put 0 where there is none.")
        if bool((self.point_masks & (self.depths <= 0)).any()):
            raise ValueError(f"{self.name}: point_masks is true where there is no depth: a fault of its reader.")
        if self.extrinsics is not None:
            rotation = self.extrinsics[..., :3]
            off = (rotation @ rotation.transpose(-1, -2) - torch.eye(3, dtype=rotation.dtype)).abs().amax()
            if not bool(off < RIGID) or bool((torch.linalg.det(rotation) < 0).any()):
                raise ValueError(
                    f"{self.name}: an extrinsic is no rotation and translation (off by {float(off):.2g}): the pose "
                    "file is damaged, or of another convention than its reader expects."
                )

    def __len__(self) -> int:
        return len(self.frames)

    def views(self, chosen: list[int]) -> Sample:
        """The same sequence with these views alone, in this order."""
        parts: dict[str, Any] = {
            key: None if getattr(self, key) is None else getattr(self, key)[chosen]
            for key in ("images", "depths", "point_masks", "intrinsics", "extrinsics", "labels")
        }
        return replace(self, frames=tuple(self.frames[index] for index in chosen), **parts)

    def training(self) -> dict[str, Any]:
        """The keys that `peft_attrsub.vggt.VggtLosses` reads, without the dimension of scenes, float32.

        torch's default collation of several makes the batch. ValueError for a sequence without poses, or one whose
        depth maps are not of the size of its images (see `resizing.resize`).
        """
        if self.extrinsics is None:
            raise ValueError(f"{self.name} has no poses: it can be evaluated on its depth, but not trained on.")
        if self.images.shape[-2:] != self.depths.shape[-2:]:
            raise ValueError(
                f"{self.name}: images are {tuple(self.images.shape[-2:])} and depth maps "
                f"{tuple(self.depths.shape[-2:])} pixels: resize the sample first."
            )
        return {
            "images": self.images,
            "depths": self.depths,
            "point_masks": self.point_masks,
            "extrinsics": self.extrinsics.float(),
            "intrinsics": self.intrinsics.float(),
            "seq_name": self.name,
        }


def views_are_finite(values: Tensor) -> bool:
    """Whether all of the numbers are finite."""
    return bool(values.isfinite().all())


__all__ = ["Sample"]
