"""What a dataset is told to vary, and the streams of random numbers that this decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .draws import Draw

ATTRIBUTES = ("texture", "geometry", "camera", "lighting", "mixed", "motion")
LAYOUTS = ("room", "object")
TRAJECTORIES = ("spline", "micro", "orbit")
SAMPLING = 2  # counts up whenever the same recipe gives other scenes


@dataclass(frozen=True)
class AttributeRecipe:
    """One dataset: `attribute` goes to the extreme from scene to scene (the camera: from view to view), the others
    are drawn once per dataset and nearly fixed. "mixed": everything is drawn anew for every scene, mildly.
    "motion": two to four things glide through the scene on paths of its own (`movers`); nothing moves elsewhere.

    seed: of the dataset, 0 to 2^32 - 1; two attributes under one seed are two datasets all the same.
    layout: "room" (walls, boxes on floor, walls and roof) or "object" (boxes in the middle of nothing).
    trajectory: "spline", "micro" (steps <= 0.01 m and <= 1 degree) or "orbit". views: per scene, 0 for the usual 100,
    or 42 of a micro-baseline. size: of the square pictures, pixels. fov: least and largest field of view, degrees.
    extent: longest side of the room, metres; objects stand in a cube a quarter as long, seen from within half of it
    to all of it. floor: for objects to stand on. triangles: about how many a scene may have. sampling: how scenes are
    drawn, 1 as before there was this number, 2 with low-contrast textures and lighting drawn again.
    """

    attribute: str
    seed: int
    layout: str = "room"
    trajectory: str = "spline"
    size: int = 518
    views: int = 0
    fov: tuple[float, float] = (45.0, 70.0)
    extent: float = 8.0
    floor: bool = False
    triangles: int = 400_000
    sampling: int = SAMPLING

    def __post_init__(self) -> None:
        for name, known in (("attribute", ATTRIBUTES), ("layout", LAYOUTS), ("trajectory", TRAJECTORIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"the {name} {getattr(self, name)!r} is unknown: give one of {', '.join(known)}.")
        whole = {"seed": (0, 2**32 - 1), "size": (1, 65535), "views": (0, 10**6), "triangles": (1, 10**9)}
        whole["sampling"] = (1, SAMPLING)
        for name, (low, high) in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} was given: give a whole number from {low} to {high}.")
        if len(self.fov) != 2 or not 1.0 <= self.fov[0] <= self.fov[1] <= 150.0:
            raise ValueError(f"fov={self.fov!r} was given: give the least and the largest, within 1 to 150 degrees.")
        if not (math.isfinite(self.extent) and self.extent > 0.0):
            raise ValueError(f"extent={self.extent!r} was given: give metres above 0.")
        object.__setattr__(self, "fov", (float(self.fov[0]), float(self.fov[1])))
        object.__setattr__(self, "views", self.views or (42 if self.trajectory == "micro" else 100))

    @classmethod
    def from_plan(cls, **fields: Any) -> AttributeRecipe:
        """The recipe of a dataset.json; one without `sampling` is of a version that had 1 alone."""
        return cls(**({"sampling": 1} | fields))

    def varies(self, attribute: str) -> bool:
        """Whether `attribute` goes to the extreme."""
        return self.attribute == attribute

    def base(self, purpose: str, index: int) -> Draw:
        """What the dataset keeps: one stream for all its scenes, except for "mixed", which keeps nothing."""
        return Draw(self.seed, index if self.attribute == "mixed" else 0, f"{self._kind}:base:{purpose}")

    def scene(self, purpose: str, index: int) -> Draw:
        """What belongs to one scene."""
        return Draw(self.seed, index, f"{self._kind}:scene:{purpose}")

    @property
    def _kind(self) -> str:
        return f"{self.attribute}:{self.layout}"
