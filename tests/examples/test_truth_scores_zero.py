"""The truth, given as the prediction of a model, scores 0: for every benchmark and reader, through evaluate.py.

The model's forward gives the pose encoding of the true cameras and the true depth; all that comes after it is the
real thing: predict, resizing, decoding, unprojection, alignment, metrics, summary.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from peft_attrsub.basis.identity import BaseIdentity
from peft_attrsub.datasets import RenderedWriter, Sample, open_benchmark
from peft_attrsub.datasets.resizing import resize_intrinsics
from peft_attrsub.scenes.storage import SceneFormat, write_scene
from peft_attrsub.vggt import (
    VggtOutput,
    encode_pose,
    relative_to_first,
    to_image_corner,
    to_pixel_centers,
    unproject,
)
from tests.datasets import world
from tests.scenes import tiny

pytest.importorskip("PIL", reason="pictures need Pillow")

EXAMPLES = Path(__file__).parents[2] / "examples" / "vggt"
#: Rounding errors of float64 in units of the scene.
EXACT = 1e-9


class Oracle(nn.Module):
    """A VGGT that knows the answer: of `sample` at the size it was read, or of `depth(size)` (S, H, W) at any size.

    unit: scenes are given in another unit than the truth's, as a model may choose.
    """

    def __init__(self, patch: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=patch, image_size=56, heads=["camera", "depth"])
        self.device = torch.device("cpu")
        self.sample: Sample | None = None
        self.depth: Any = None
        self.unit = 0.3

    def forward(self, pixel_values: Tensor) -> VggtOutput:
        sample, size = self.sample, tuple(pixel_values.shape[-2:])
        assert sample is not None
        depth = sample.depths.double() if self.depth is None else self.depth(size)
        assert tuple(depth.shape[-2:]) == size
        extrinsics = torch.eye(3, 4, dtype=torch.float64).expand(len(sample), 3, 4)
        if sample.extrinsics is not None:
            extrinsics = relative_to_first(sample.extrinsics)
        extrinsics = torch.cat([extrinsics[..., :3], self.unit * extrinsics[..., 3:]], -1)
        pose = encode_pose(extrinsics, sample.intrinsics, tuple(sample.depths.shape[-2:]))
        confidence = torch.ones_like(depth)
        return VggtOutput(pose_enc=pose[None], depth=self.unit * depth[None, ..., None], depth_conf=confidence[None])


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("evaluate")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def oracle(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """What evaluate.py loads, whatever it is told, and told the truth of each sequence."""
    model, measure = Oracle(), importlib.import_module("_measure")
    loading, run_model = importlib.import_module("_model"), measure.run_model

    def told(model: Oracle, sample: Sample, how: object) -> object:
        model.sample = sample
        return run_model(model, sample, how)

    monkeypatch.setattr(loading, "load_config", lambda *_: model.config)
    monkeypatch.setattr(
        loading, "load_model", lambda *_, **__: loading.Loaded(model, 0, "", BaseIdentity("truth", "0" * 64))
    )
    monkeypatch.setattr(measure, "run_model", told)
    return model


def evaluated(script: ModuleType, benchmark: str, data: Path, out: Path, *more: str) -> dict[str, float]:
    """Metrics of a run at the size of the truth."""
    width = open_benchmark(benchmark, data)[0].depths.shape[-1]
    first = ["--benchmark", benchmark, "--data", str(data), "--out", str(out), "--image-size", str(width)]
    assert script.main([*first, "--pictures", "0", "--dtype", "float32", *more]) == 0
    found = json.loads((out / "summary.json").read_text())
    assert found["n_evaluated"] == found["n_sequences"] > 0
    metrics: dict[str, float] = found["metrics"]
    return metrics


def extent(benchmark: str, data: Path) -> float:
    """Diagonal of the smallest scene."""
    found = []
    for sample in open_benchmark(benchmark, data):
        points = unproject(sample.depths.double(), sample.intrinsics, sample.extrinsics)[sample.point_masks]
        found.append(float((points.amax(0) - points.amin(0)).norm()))
    return min(found)


# The benchmarks as they are on disk ---------------------------------------------------------------------------------


def centered(index: int = 0, width: int = 69, height: int = 64, views: int = 3) -> Any:
    """The small world, seen by cameras that look through the middle of an image that is wider than high."""
    made = world.scene(views, height, index)
    return replace(made, width=width, cameras=[replace(c, cx=width / 2, cy=height / 2) for c in made.cameras])


def human(root: Path) -> None:
    for index in range(2):
        scene = centered(index)
        renderer = tiny.TinyRenderer(scene)
        with RenderedWriter(root / f"{index:04d}", depth="npy") as writer:
            for number, camera in enumerate(scene.cameras):
                view = renderer.render(number)
                rgba = np.dstack([view.rgb, np.full(view.ids.shape, 255, np.uint8)])
                lens = (camera.fx, camera.fy, camera.cx, camera.cy)
                writer.add(number, rgba, view.depth, world.world_to_camera(scene, number), *lens)
            writer.finish()


def scenes(root: Path) -> None:
    from peft_attrsub.scenes.dataset import Dataset, make_plan

    plan = make_plan(tiny.TinyRecipe(size=64), f"{tiny.HERE}:sample", f"{tiny.HERE}:TinyRenderer", depth="npy")
    dataset = Dataset.start(root, plan, 1)
    scene = centered(width=64)
    renderer = tiny.TinyRenderer(scene)
    views = [renderer.render(number) for number in range(len(scene.cameras))]
    write_scene(dataset.scene(0), scene, views, SceneFormat(None, "npy"), dataset.tag)
    dataset.close()


def clearpose(root: Path) -> None:
    from standins.glasses import write_scene as write_glasses

    write_glasses(root / "set8" / "scene1", 0, 3, (48, 64))


def people_in_rooms(root: Path) -> None:
    rooms(root, "people", "--detail", "24")


def prints_in_rooms(root: Path) -> None:
    rooms(root, "prints")


def rooms(root: Path, what: str, *more: str) -> None:
    pytest.importorskip("open3d")
    import prepare_rooms

    few = ["--scenes", "1", "--views", "3", "--size", "40", "--triangles", "500", "--texture-size", "16"]
    assert prepare_rooms.main([what, "--out", str(root), *few, *more]) == 0


@pytest.fixture(scope="module")
def faces(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of both face benchmarks."""
    pytest.importorskip("open3d")
    pytest.importorskip("OpenEXR")
    import prepare_faces

    root: Path = tmp_path_factory.mktemp("faces")
    few = ["--scenes", "1", "--size", "40", "--frames", "3", "--texture-size", "64", "--supersample", "1"]
    assert prepare_faces.main(["standin", "--out", str(root), *few]) == 0
    return root


def check_points(script: ModuleType, benchmark: str, data: Path, out: Path) -> None:
    size = extent(benchmark, data)
    for align in ("sim3+icp", "sim3", "scale", "median"):
        found = evaluated(script, benchmark, data, out / align, "--align", align)
        assert found["acc"] < EXACT * size and found["comp"] < EXACT * size, align
        # Rounding decides which of two equally near points is the thirtieth neighbor; at an edge it turns the normal.
        assert found["nc"] > 1 - 1e-6, align
        assert found["scale"] == pytest.approx(1 / 0.3, rel=1e-9)


@pytest.mark.parametrize(
    ("benchmark", "write"),
    [
        ("human", human),
        ("scenes", scenes),
        ("clearpose", clearpose),
        ("human", people_in_rooms),
        ("face", prints_in_rooms),
    ],
)
def test_the_truth_has_no_error(
    script: ModuleType, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmark: str, write: Any
) -> None:
    from standins import glasses

    # VGGT cannot say that the principal point is elsewhere (see the test below).
    monkeypatch.setattr(glasses, "CENTRE", ((glasses.SIZE[1] - 1) / 2, (glasses.SIZE[0] - 1) / 2))
    write(tmp_path / "data")
    check_points(script, benchmark, tmp_path / "data", tmp_path)


@pytest.mark.parametrize("kind", ["face", "face-relief"])
def test_the_truth_of_prints_has_no_error(
    script: ModuleType, oracle: Oracle, faces: Path, tmp_path: Path, kind: str
) -> None:
    check_points(script, "face", faces / kind, tmp_path)


@pytest.mark.parametrize("align", ["release", "video", "moge", "median", "none"])
def test_the_true_depth_of_a_burst_has_no_error(
    script: ModuleType, oracle: Oracle, faces: Path, tmp_path: Path, align: str
) -> None:
    oracle.unit = 1.0 if align == "none" else 0.3
    found = evaluated(script, "face-real", faces / "face-real", tmp_path / "run", "--depth-align", align)
    assert found["abs_rel"] < EXACT and found["scale_abs_rel"] < EXACT
    assert found["delta"] == found["scale_delta"] == 1
    assert found["depth_inverted"] == 0
    assert found["relief_ratio"] == pytest.approx(found["true_relief_ratio"], rel=1e-9)


def test_a_principal_point_that_vggt_cannot_encode_is_a_bounded_error(
    script: ModuleType, oracle: Oracle, tmp_path: Path
) -> None:
    """ClearPose's is (15, 8.5) pixels of 640 x 480 off the middle: each point is off by |c - middle| z / f."""
    clearpose(tmp_path / "data")
    oracle.unit = 1.0
    found = evaluated(script, "clearpose", tmp_path / "data", tmp_path / "run", "--align", "none")
    (sample,) = open_benchmark("clearpose", tmp_path / "data")
    rows, columns = sample.depths.shape[-2:]
    k = to_image_corner(sample.intrinsics[0])
    off = ((k[:2, 2] - torch.tensor([columns / 2, rows / 2])) / k[(0, 1), (0, 1)]).norm()
    assert 0 < found["acc"] < float(off * sample.depths[sample.point_masks].double().mean())


# Predictions of another size than the truth -------------------------------------------------------------------------


def plane_sample(size: tuple[int, int], rng: np.random.Generator, views: int = 3) -> tuple[Sample, Any]:
    """Views of a slanted plane n . X = d, and its exact depth (S, H, W) at any size."""
    rotation = Rotation.from_rotvec(rng.normal(0, 0.15, (views, 3))).as_matrix()
    extrinsics = torch.from_numpy(np.concatenate([rotation, rng.normal(0, 0.2, (views, 3, 1))], -1))
    height, width = size
    fov = rng.uniform(0.6, 1.1, 2)
    lens = [[width / 2 / np.tan(fov[0] / 2), 0, width / 2], [0, height / 2 / np.tan(fov[1] / 2), height / 2]]
    k = to_pixel_centers(torch.tensor([*lens, [0, 0, 1.0]], dtype=torch.float64).expand(views, 3, 3))
    normal = torch.tensor([*rng.uniform(-0.3, 0.3, 2), 1.0], dtype=torch.float64)
    distance = float(rng.uniform(2, 4))

    def depth(other: tuple[int, int]) -> Tensor:
        ones = torch.ones(views, *other, dtype=torch.float64)
        rays = unproject(ones, resize_intrinsics(k, size, other))  # camera coordinates at z = 1
        turned = torch.einsum("sij,j->si", extrinsics[..., :3], normal)
        offset = distance + (turned * extrinsics[..., 3]).sum(-1)
        return offset[:, None, None] / torch.einsum("si,shwi->shw", turned, rays)

    depths = depth(size).float()
    assert bool((depths > 0.5).all())
    sample = Sample(
        name="plane",
        frames=tuple(map(str, range(views))),
        images=torch.rand(views, 3, *size, generator=torch.Generator().manual_seed(0)),
        depths=depths,
        point_masks=torch.ones(views, *size, dtype=torch.bool),
        intrinsics=k,
        extrinsics=extrinsics,
    )
    return sample, depth


@pytest.mark.parametrize("seed", range(12))
def test_at_another_size_only_the_interpolation_remains(script: ModuleType, seed: int) -> None:
    """Of bilinear interpolation the error is at most (max |z_uu| + max |z_vv|) / 8 in pixels of the model, plus the
    float32 of the true depth: second order, where half a pixel would be first order."""
    measure = importlib.import_module("_measure")
    rng = np.random.default_rng(seed)
    size, patch = (int(rng.integers(30, 90)), int(rng.integers(30, 90))), int(rng.choice([1, 4, 14]))
    sample, depth = plane_sample(size, rng)
    model = Oracle(patch)
    model.sample, model.depth, model.unit = sample, depth, 1.0
    width = patch * int(rng.integers(42 // patch, 126 // patch))
    how = measure.How("points", False, "none", 0.1, "release", "irls", None, None, True, width, "float32", 0, 1)
    found = measure.run_model(model, sample, how)
    seen = (max(1, round(size[0] * width / size[1] / patch)) * patch, width)
    exact = depth(seen)
    curved = exact.diff(n=2, dim=-1).abs().max() + exact.diff(n=2, dim=-2).abs().max()
    # Beyond the centers of the model's outermost pixels nothing is known: resizing repeats them.
    inside = []
    for have, want in zip(seen, size, strict=True):
        at = (torch.arange(want) + 0.5) * have / want - 0.5
        inside.append((at >= 0) & (at <= have - 1))
    mask = (inside[0][:, None] & inside[1]).expand(len(sample), -1, -1)
    truth = unproject(sample.depths.double(), sample.intrinsics, relative_to_first(sample.extrinsics))
    off = torch.from_numpy(found.points()) - truth
    longest = unproject(torch.ones_like(sample.depths), sample.intrinsics).norm(dim=-1).max()
    bound = float(longest * (1.5 * curved / 8 + 1e-6))
    assert float(off.norm(dim=-1)[mask].max()) < bound
    half_a_pixel = float(0.5 * sample.depths.min() / sample.intrinsics[0, 0, 0])
    assert bound < 0.5 * half_a_pixel  # or this test could not see it
    row = measure.measure(replace(sample, point_masks=mask), found, how)
    assert row["acc"] < bound and row["comp"] < bound
