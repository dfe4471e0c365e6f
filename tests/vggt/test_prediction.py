"""predict and VggtPrediction: cameras and points against plain numpy; saved files read again by trimesh."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from peft_attrsub.vggt import VggtConfig, VggtModel, choose_precision
from peft_attrsub.vggt.image_processing_vggt import VggtImageProcessor
from peft_attrsub.vggt.prediction import VggtPrediction, predict


def mini(**changes: object) -> VggtModel:
    torch.manual_seed(0)
    sizes = {"image_size": 112, "patch_size": 14, "depth": 2, "encoder_depth": 1}
    model = VggtModel(VggtConfig.preset("vggt-mini", **sizes, **changes)).eval()
    if "camera" in model.config.heads:  # a fresh head looks nowhere: fields of view near zero
        with torch.no_grad():
            model.camera_head.pose_branch.fc2.bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.1, 0.2, -0.1, 0.2, 0.2, 0.3]))
    return model


@pytest.fixture(scope="module")
def model() -> VggtModel:
    return mini()


def views(count: int = 2, width: int = 100, height: int = 75) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def by_hand(height: int = 3, width: int = 4) -> VggtPrediction:
    """Two views with known numbers: view 1 is turned a quarter around y and stands at (1, 2, 3)."""
    rng = np.random.default_rng(0)
    turned = np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])
    extrinsics = np.stack([np.eye(4)[:3], np.c_[turned, -turned @ [1, 2, 3]]])
    k = np.array([[4.0, 0, (width - 1) / 2], [0, 5.0, (height - 1) / 2], [0, 0, 1]])  # integers at pixel centers
    intrinsics = np.tile(k, (2, 1, 1))
    confidence = np.arange(1.0, 1 + 2 * height * width).reshape(2, height, width)
    mask = np.ones((2, height, width), bool)
    mask[1, :, 0] = False
    arrays = {
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
        "pose_enc": rng.normal(size=(2, 9)),
        "depth": rng.uniform(1, 2, (2, height, width)),
        "depth_conf": confidence,
        "points": rng.normal(size=(2, height, width, 3)),
        "points_conf": confidence,
        "images": rng.integers(0, 256, (2, 3, height, width)) / 255,
    }
    tensors = {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    return VggtPrediction(**tensors, mask=torch.tensor(mask))


def expected_cloud(prediction: VggtPrediction, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and colours, pixel by pixel."""
    points, colors = [], []
    for s, v, u in np.ndindex(*prediction.mask.shape):
        if prediction.mask[s, v, u] and prediction.points_conf[s, v, u] >= threshold:
            points.append(prediction.points[s, v, u].tolist())
            colors.append([*(prediction.images[s, :, v, u] * 255).round().int().tolist(), 255])
    return np.array(points), np.array(colors)


# -------------------------------------------------------------------------------------------------------- predict


def test_shapes_and_what_the_model_said(model: VggtModel) -> None:
    images = views(3)
    prediction = predict(model, images)
    features = VggtImageProcessor(image_size=112)(images)
    with torch.no_grad():
        output = model(features["pixel_values"])
    s, h, w = 3, 84, 112
    shapes = {name: array.shape for name, array in prediction.numpy().items()}
    assert shapes == {
        "extrinsics": (s, 3, 4),
        "intrinsics": (s, 3, 3),
        "pose_enc": (s, 9),
        "depth": (s, h, w),
        "depth_conf": (s, h, w),
        "points": (s, h, w, 3),
        "points_conf": (s, h, w),
        "images": (s, 3, h, w),
        "mask": (s, h, w),
        "boxes": (s, 6),
    }
    assert torch.equal(prediction.images, features["pixel_values"][0])
    assert torch.equal(prediction.boxes, features["boxes"][0])
    assert prediction.mask.all()
    for got, said in (
        (prediction.pose_enc, output.pose_enc[0]),
        (prediction.depth, output.depth[0, ..., 0]),
        (prediction.depth_conf, output.depth_conf[0]),
        (prediction.points_conf, output.depth_conf[0]),
    ):
        torch.testing.assert_close(got, said)


def test_cameras_and_points_follow_the_formulas(model: VggtModel) -> None:
    """The pose encoding decoded by hand; each point, seen by its camera, lies at its pixel and its depth."""
    prediction = predict(model, views(2)).to(dtype=torch.float64)
    h, w = prediction.images.shape[-2:]
    for s in range(2):
        tx, ty, tz, x, y, z, r, fov_h, fov_w = prediction.pose_enc[s].tolist()
        n = x * x + y * y + z * z + r * r
        rotation = np.eye(3) + 2 / n * np.array(
            [
                [-y * y - z * z, x * y - z * r, x * z + y * r],
                [x * y + z * r, -x * x - z * z, y * z - x * r],
                [x * z - y * r, y * z + x * r, -x * x - y * y],
            ]
        )
        np.testing.assert_allclose(prediction.extrinsics[s], np.c_[rotation, [tx, ty, tz]], atol=1e-5)
        fx, fy = w / 2 / np.tan(fov_w / 2), h / 2 / np.tan(fov_h / 2)
        k = [[fx, 0, (w - 1) / 2], [0, fy, (h - 1) / 2], [0, 0, 1]]
        np.testing.assert_allclose(prediction.intrinsics[s], k, rtol=1e-5)
        for v, u in ((0, 0), (10, 100), (h - 1, w - 1)):
            seen = rotation @ prediction.points[s, v, u].numpy() + [tx, ty, tz]
            assert seen[2] == pytest.approx(prediction.depth[s, v, u].item(), abs=1e-4)
            pixel = seen[:2] / seen[2] * [fx, fy] + [(w - 1) / 2, (h - 1) / 2]
            np.testing.assert_allclose(pixel, [u, v], atol=0.02)


def test_every_kind_of_input_gives_the_same(model: VggtModel, tmp_path: Path) -> None:
    images = views(2)
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(paths[-1])
    features = VggtImageProcessor(image_size=112)(images)
    pixels = features["pixel_values"]
    expected = predict(model, images)
    uint8 = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    arrays = VggtImageProcessor(image_size=112)(images, return_tensors="np")
    with_gradient = pixels.clone().requires_grad_()
    for form in (paths, [images], features, arrays, pixels, pixels[0], pixels.double(), with_gradient, uint8):
        got = predict(model, form)
        torch.testing.assert_close(got.points, expected.points)
        ready = isinstance(form, torch.Tensor) and form is not uint8
        assert got.mask.all() and (got.boxes is None) == ready
    assert predict(model, images[0]).depth.shape == (1, 84, 112)
    assert torch.equal(
        predict(model, images, processor=VggtImageProcessor(image_size=56)).mask, torch.ones(2, 42, 56) > 0
    )


def test_the_mask_leaves_out_padding(model: VggtModel) -> None:
    padded = predict(model, views(1), mode="pad")
    expected = np.zeros((1, 112, 112), bool)
    expected[:, 14:98] = True
    assert np.array_equal(padded.mask, expected)
    assert np.array_equal((padded.images == 1).all(1)[:, :14], np.ones((1, 14, 112), bool))
    mixed = predict(model, [views(1)[0], views(1, 80, 160)[0]])  # 84 rows beside a cropped view of 112
    expected = np.ones((2, 112, 112), bool)
    expected[0, :14], expected[0, 98:] = False, False
    assert np.array_equal(mixed.mask, expected)


def test_each_module_has_its_mode_back() -> None:
    model = mini().train()
    model.freeze_encoder()
    model.depth_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    during = []
    hook = model.aggregator.frame_blocks[0].register_forward_hook(
        lambda module, *_: during.append((module.training, torch.is_inference_mode_enabled()))
    )
    predict(model, views(1))
    hook.remove()
    assert during == [(False, True)]
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="cannot be cut into patches"):
        predict(model, torch.zeros(1, 3, 20, 20))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_result_may_be_optimised_over(model: VggtModel) -> None:
    prediction = predict(model, views(1))
    scale = torch.ones((), requires_grad=True)
    (scale * prediction.depth).sum().backward()
    assert scale.grad == prediction.depth.sum()
    assert not any(t.requires_grad or t.is_inference() for t in (prediction.points, prediction.images))


def test_autocast_by_dtype(model: VggtModel) -> None:
    seen = []
    hook = model.aggregator.frame_blocks[0].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    exact, rounded = predict(model, views(2)), predict(model, views(2), dtype=torch.bfloat16)
    hook.remove()
    assert seen == [torch.float32, torch.bfloat16]
    assert rounded.points.dtype == rounded.extrinsics.dtype == torch.float32
    torch.testing.assert_close(rounded.depth, exact.depth, rtol=0.05, atol=0.05)
    assert not torch.equal(rounded.depth, exact.depth)
    for dtype, same in (("bfloat16", rounded), ("bf16", rounded), ("float32", exact), (torch.float32, exact)):
        assert torch.equal(predict(model, views(2), dtype=dtype).depth, same.depth)
    # The caller's autocast holds, unless a dtype is given.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(model, views(2)).depth, rounded.depth)
        assert torch.equal(predict(model, views(2), dtype="fp32").depth, exact.depth)
    native = choose_precision("cpu", training=False).dtype
    assert torch.equal(predict(model, views(2), dtype="auto").depth, (rounded if native else exact).depth)
    with pytest.raises(ValueError, match="dtype is 'int8': expected one of auto"):
        predict(model, views(2), dtype="int8")


def test_a_model_in_bfloat16_gives_float32() -> None:
    prediction = predict(mini(heads=("camera", "depth", "point")).to(torch.bfloat16), views(1))
    assert {value.dtype for name, value in prediction.numpy().items() if name != "mask"} == {np.dtype(np.float32)}
    assert prediction.depth.dtype == prediction.pose_enc.dtype == torch.float32


def test_points_of_the_point_head() -> None:
    model = mini(heads=("camera", "depth", "point"))
    with torch.no_grad():
        output = model(VggtImageProcessor(image_size=112)(views(2))["pixel_values"])
    prediction = predict(model, views(2), points="head")
    torch.testing.assert_close(prediction.points, output.world_points[0])
    torch.testing.assert_close(prediction.points_conf, output.world_points_conf[0])
    assert prediction.depth is not None
    lone = predict(mini(heads=("camera", "point")), views(1), points="head")
    assert lone.depth is None and lone.depth_conf is None and "depth" not in lone.numpy()
    assert lone.to(dtype=torch.float64).depth is None


@pytest.mark.parametrize(
    ("heads", "points", "message"),
    [
        (("camera", "depth"), "head", r"needs the point head.*heads=\['camera', 'depth', 'point'\]"),
        (("camera", "point"), "depth", "needs the depth head"),
        (("depth",), "depth", "needs the camera head"),
        (("camera", "depth"), "both", 'choose "depth" or "head"'),
    ],
)
def test_a_missing_head_is_refused(heads: tuple[str, ...], points: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(mini(heads=heads), views(1), points=points)


def test_wrong_images_are_refused(model: VggtModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 2 scenes, and predict takes one"):
        predict(model, [views(1), views(1)])
    with pytest.raises(ValueError, match="there are 2 scenes"):
        predict(model, torch.zeros(2, 1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"the pixels go from 0 to 255, expected \[0, 1\]"):
        predict(model, torch.tensor([0.0, 255.0]).repeat(1, 3, 28, 14))
    with pytest.raises(ValueError, match="expected"):
        predict(model, torch.full((1, 3, 28, 28), torch.nan))
    for shape in ((0, 3, 28, 28), (1, 1, 1, 3, 28, 28)):
        with pytest.raises(ValueError, match=r"the pixels have shape .*expected \(views, 3, H, W\)"):
            predict(model, torch.zeros(shape))
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        predict(model, [tmp_path / "nowhere.png"])


def test_to_and_numpy() -> None:
    prediction = by_hand()
    half = prediction.to(dtype="bfloat16")
    assert half.points.dtype == torch.bfloat16 and half.mask.dtype == torch.bool and half.boxes is None
    arrays = half.numpy()
    assert arrays["points"].dtype == np.float32 and arrays["mask"].dtype == bool and "boxes" not in arrays
    assert prediction.to("meta").depth.device.type == "meta" and prediction.depth.device.type == "cpu"
    assert np.array_equal(prediction.numpy()["points"], prediction.points.numpy())


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("settings", "threshold"),
    [
        ({}, 0),
        ({"min_confidence": 7.0}, 7),
        # 24 pixels with confidence 1 to 24, three of them (13, 17, 21) are padding: the median of the rest is 11.
        ({"percentile": 50}, 11),
        ({"percentile": 100}, 24),
        ({"percentile": 50, "min_confidence": 20.0}, 20),
    ],
)
def test_a_saved_ply_holds_the_chosen_points(tmp_path: Path, settings: dict[str, float], threshold: float) -> None:
    prediction = by_hand()
    path = prediction.save_ply(tmp_path / "cloud.ply", **settings)
    assert path == tmp_path / "cloud.ply"
    cloud = trimesh.load(path)
    points, colors = expected_cloud(prediction, threshold)
    assert isinstance(cloud, trimesh.PointCloud) and len(points) > 0
    np.testing.assert_allclose(cloud.vertices, points, atol=1e-6)
    assert np.array_equal(cloud.colors, colors)


def test_a_saved_glb_holds_points_and_cameras(tmp_path: Path) -> None:
    prediction = by_hand()
    scene = trimesh.load(prediction.save_glb(tmp_path / "scene.glb", min_confidence=5, camera_size=0.5))
    assert set(scene.geometry) == {"points", "camera_0", "camera_1"}
    points, colors = expected_cloud(prediction, 5)
    flip = np.array([1, -1, -1])
    np.testing.assert_allclose(scene.geometry["points"].vertices, points * flip, atol=1e-6)
    assert np.array_equal(scene.geometry["points"].colors, colors)
    assert all(np.array_equal(scene.graph[name][0], np.eye(4)) for name in scene.geometry)

    for s, place in ((0, (0, 0, 0)), (1, (1, 2, 3))):
        vertices = scene.geometry[f"camera_{s}"].vertices * flip
        np.testing.assert_allclose(vertices[0], place, atol=1e-6)
        rotation, shift = prediction.extrinsics[s, :, :3].numpy(), prediction.extrinsics[s, :, 3].numpy()
        seen = np.array([rotation @ vertex + shift for vertex in vertices[1:]])
        np.testing.assert_allclose(seen[:, 2], 0.5, atol=1e-6)  # planar, in front of the camera
        faces = scene.geometry[f"camera_{s}"].faces
        assert sorted(map(sorted, faces.tolist())) == sorted([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 1, 4]] * 2)
        normals = {tuple(np.round(normal, 5)) for normal in scene.geometry[f"camera_{s}"].face_normals}
        assert len(normals) == 8, "a viewer that draws only front faces would miss a side"
        # The outline of the image, half a pixel outside of the centers of the outermost pixels.
        pixels = seen[:, :2] / seen[:, 2:] * [4, 5] + [1.5, 1]
        np.testing.assert_allclose(pixels, [[-0.5, -0.5], [3.5, -0.5], [3.5, 2.5], [-0.5, 2.5]], atol=1e-5)
        assert set(map(tuple, scene.geometry[f"camera_{s}"].visual.vertex_colors)) == {
            (255, 0, 0, 255) if s == 0 else (0, 0, 255, 255)
        }


def test_glb_without_cameras_and_their_default_size(tmp_path: Path) -> None:
    prediction = by_hand()
    bare = trimesh.load(prediction.save_glb(tmp_path / "bare.glb", cameras=False))
    assert list(bare.geometry) == ["points"]
    small = trimesh.load(prediction.save_glb(tmp_path / "a.glb"))
    prediction.points *= 10
    large = trimesh.load(prediction.save_glb(tmp_path / "b.glb"))
    heights = [abs(scene.geometry["camera_0"].vertices[1:, 2]) for scene in (small, large)]
    np.testing.assert_allclose(heights[1], 10 * heights[0], rtol=1e-4)
    extent = np.ptp(small.geometry["points"].vertices, axis=0)
    assert 0.01 * np.linalg.norm(extent) < heights[0][0] < 0.05 * np.linalg.norm(extent) * 1.01
    prediction.points[:] = 0  # all at one place: no extent to go by
    assert np.ptp(trimesh.load(prediction.save_glb(tmp_path / "c.glb")).geometry["camera_0"].vertices[:, 2]) > 0


def test_a_prediction_of_the_model_is_saved(model: VggtModel, tmp_path: Path) -> None:
    prediction = predict(model, [views(1)[0], views(1, 80, 160)[0]])
    cloud = trimesh.load(prediction.save_ply(tmp_path / "cloud.ply"))
    assert len(cloud.vertices) == 84 * 112 + 112 * 112
    np.testing.assert_allclose(cloud.vertices, prediction.points[prediction.mask].numpy(), atol=1e-5)
    half = trimesh.load(prediction.save_glb(tmp_path / "scene.glb", percentile=50))
    assert len(half.geometry["points"].vertices) == pytest.approx(len(cloud.vertices) / 2, rel=0.02)


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    prediction = by_hand()
    prediction.points[0, 0, 0, 1] = torch.nan
    prediction.points[0, 0, 1, 0] = torch.inf
    prediction.points_conf[0, 0, 2] = torch.nan
    cloud = trimesh.load(prediction.save_ply(tmp_path / "cloud.ply"))
    assert len(cloud.vertices) == 24 - 3 - 3 and np.isfinite(cloud.vertices).all()
    assert len(trimesh.load(prediction.save_ply(tmp_path / "cloud.ply", percentile=50)).vertices) == 9
    prediction.points[:] = torch.nan
    with pytest.raises(ValueError, match="no finite point"):
        prediction.save_ply(tmp_path / "none.ply")


def test_thresholds_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no point has a confidence of 30 or more: they go from 1 to 24"):
        by_hand().save_ply(tmp_path / "cloud.ply", min_confidence=30)
    for wrong in (-1, 100.5, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 100"):
            by_hand().save_glb(tmp_path / "scene.glb", percentile=wrong)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="camera_size"):
            by_hand().save_glb(tmp_path / "scene.glb", camera_size=wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ply", "glb"])
def test_files_are_written_in_one_step(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"scene.{kind}"
    save = getattr(by_hand(), f"save_{kind}")
    path.write_text("old", encoding="utf-8")

    def no_rename(*_: object) -> None:
        assert path.read_text(encoding="utf-8") == "old", "the old file was touched before the new one was whole"
        raise OSError("no rename today")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_rename)
        with pytest.raises(OSError, match="no rename today"):
            save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text(encoding="utf-8") == "old"
    plain = tmp_path / "plain"
    plain.touch()
    save(str(path))
    assert path.stat().st_size > 100
    assert path.stat().st_mode == plain.stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


def test_targets_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        by_hand().save_ply(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere' does not exist: make it, or write 'scene\.glb' elsewhere"):
        by_hand().save_glb(tmp_path / "nowhere" / "scene.glb")


@pytest.mark.parametrize("kind", ["ply", "glb"])
def test_without_trimesh_there_is_a_sentence(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(ImportError, match=r'needs trimesh: pip install "peft-attrsub\[vggt\]"'):
        getattr(by_hand(), f"save_{kind}")(tmp_path / "scene")
