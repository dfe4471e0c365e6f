"""A scene as data: shapes, materials, lamps and cameras, JSON-able, without a single vertex or pixel.

Units are metres, the world is right-handed with z up. A pose is a 4 x 4 matrix to the world; cameras look along +z
with x to the right and y down (OpenCV axes). Meshes and textures follow from the numbers and seeds in here, the
same on every machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1
SHAPES = ("ellipsoid", "cube", "cylinder", "room", "floor")
PATTERNS = ("plain", "noise", "voronoi", "wave", "brick", "checker", "stripes", "maps")
LIGHTS = ("sun", "area", "point")
Matrix = list[list[float]]


@dataclass(frozen=True)
class Material:
    """A surface. pattern: how albedo varies; colours: two or more, linear RGB in [0, 1].

    scale: repetitions of the pattern over one unit of the texture coordinates. roughness, metallic: in [0, 1].
    bump: strength of the normal map made from the pattern, 0 for none. emission: W/m^2/sr of light given off.
    maps: folder of PBR maps for the pattern "maps" (albedo or basecolor, roughness, metallic, normal).
    """

    pattern: str
    colours: list[list[float]]
    scale: float = 4.0
    roughness: float = 0.6
    metallic: float = 0.0
    bump: float = 0.0
    emission: float = 0.0
    seed: int = 0
    maps: str | None = None


@dataclass(frozen=True)
class Shape:
    """A primitive with height fields on its surfaces.

    kind: "ellipsoid", "cube", "cylinder" (semi-axes 1, turned and stretched by `pose`); "room": the inside of the
    box [-1, 1]^3 stretched by `pose`; "floor": the square [-1, 1]^2 at z = 0.
    amplitude: of the height field, as a share of the smallest semi-axis (0: flat); seed: of the height field.
    resolution: segments along a side of a surface patch. materials: index per surface patch (cube and room 6:
    -x, +x, -y, +y, -z, +z; cylinder 3: side, bottom, top; ellipsoid and floor 1).
    object_id: 1 or more, in the id masks; parts of one object share it.
    """

    kind: str
    pose: Matrix
    materials: list[int]
    object_id: int
    amplitude: float = 0.0
    seed: int = 0
    resolution: int = 32


@dataclass(frozen=True)
class Light:
    """kind "sun": `direction` it shines in, strength W/m^2; "area": a square of side `size` at `position` shining
    in `direction`, and "point" at `position`: strength in W. colour: linear RGB."""

    kind: str
    colour: list[float]
    strength: float
    direction: list[float] | None = None
    position: list[float] | None = None
    size: float = 0.0


@dataclass(frozen=True)
class Camera:
    """One view. pose: camera to world (OpenCV axes). fx, fy, cx, cy: pixels; the centre of the first pixel is at
    (0.5, 0.5), so cx = width / 2 is the middle."""

    pose: Matrix
    fx: float
    fy: float
    cx: float
    cy: float


@dataclass(frozen=True)
class Scene:
    """Everything a renderer needs. size: of the room (x, y, z), None for an object-centred scene without walls.

    background: linear RGB seen where nothing is, which also lights the scene as an ambient term.
    boxes: axis-aligned boxes (x0, y0, z0, x1, y1, z1) that hold the objects: cameras keep clear of them.
    recipe, dataset_seed, index: where the scene came from.
    motion: per view, in the order of the cameras, the objects that move: object id (decimal, as JSON's keys are
    text) to a rigid 4 x 4 transform of the object's vertices from where `shapes` put them to where they are in the
    view. The same ids in every view; what is not named stands still. Empty, and then not in the JSON, where nothing
    moves. `boxes` hold moving objects where `shapes` put them.
    """

    recipe: str
    dataset_seed: int
    index: int
    width: int
    height: int
    materials: list[Material]
    shapes: list[Shape]
    lights: list[Light]
    cameras: list[Camera]
    background: list[float] = field(default_factory=lambda: [0.05, 0.05, 0.05])
    size: list[float] | None = None
    boxes: list[list[float]] = field(default_factory=list)
    format: int = FORMAT
    motion: list[dict[str, Matrix]] = field(default_factory=list)

    def to_json(self) -> str:
        """One line of JSON; floats in their shortest exact form, so that the same scene gives the same bytes."""
        record = asdict(self)
        if not self.motion:
            del record["motion"]  # still scenes are as they were before anything could move
        return json.dumps(record, separators=(",", ":"), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Read what `to_json` wrote; a ValueError says what is wrong with anything else."""
        try:
            record: dict[str, Any] = json.loads(text)
            version = record["format"]
            if not isinstance(version, int) or not 1 <= version <= FORMAT:
                raise ValueError(f"the scene has format {version!r}, this version reads up to {FORMAT}: upgrade it.")
            kinds = {"materials": Material, "shapes": Shape, "lights": Light, "cameras": Camera}
            parts = {key: [kind(**part) for part in record[key]] for key, kind in kinds.items()}
            return cls(**(record | parts))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no scene description ({error!r}): make the scene again.") from error
