"""The losses of VGGT in plain numpy, pixel by pixel: slow, obvious, and written from the formulas alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

ARRAY = NDArray[Any]


def four(extrinsic: ARRAY) -> ARRAY:
    return np.concatenate([extrinsic, [[0.0, 0.0, 0.0, 1.0]]])


def normalised(batch: dict[str, ARRAY]) -> dict[str, ARRAY]:
    """One scene after the other, one pixel after the other."""
    out = {key: np.array(value, copy=True) for key, value in batch.items()}
    out["scene_scale"] = np.zeros(len(batch["depths"]))
    for b in range(len(batch["depths"])):
        first = four(batch["extrinsics"][b, 0])
        total, count = 0.0, 0
        for s, v, u in np.ndindex(*batch["depths"].shape[1:]):
            out["world_points"][b, s, v, u] = first[:3, :3] @ batch["world_points"][b, s, v, u] + first[:3, 3]
            if batch["point_masks"][b, s, v, u]:
                total += math.sqrt(sum(x * x for x in out["world_points"][b, s, v, u]))
                count += 1
        scale = min(max(total / (count + 1e-3), 1e-6), 1e6)
        out["scene_scale"][b] = scale
        for s in range(batch["depths"].shape[1]):
            relative = (four(batch["extrinsics"][b, s]) @ np.linalg.inv(first))[:3]
            relative[:, 3] /= scale
            out["extrinsics"][b, s] = relative
        for key in ("depths", "world_points", "cam_points"):
            out[key][b] = np.clip(out[key][b] / scale, -100, 100)
    return out


def encoding(extrinsic: ARRAY, intrinsic: ARRAY, height: int, width: int) -> list[float]:
    quaternion = Rotation.from_matrix(extrinsic[:, :3]).as_quat(canonical=True)
    fov = [2 * math.atan(height / 2 / intrinsic[1, 1]), 2 * math.atan(width / 2 / intrinsic[0, 0])]
    return [*extrinsic[:, 3], *quaternion, *fov]


def camera_terms(pose_encs: list[ARRAY], truth: dict[str, ARRAY]) -> dict[str, float]:
    terms = {"camera_T": 0.0, "camera_R": 0.0, "camera_FoV": 0.0}
    scenes, views, height, width = truth["depths"].shape
    counting = [b for b in range(scenes) if truth["point_masks"][b, 0].sum() > 100]
    for k, pose_enc in enumerate(pose_encs):
        errors: dict[str, list[float]] = {name: [] for name in terms}
        for b in counting:
            for s in range(views):
                target = encoding(truth["extrinsics"][b, s], truth["intrinsics"][b, s], height, width)
                difference = [abs(p - t) for p, t in zip(pose_enc[b, s], target, strict=True)]
                errors["camera_T"] += [min(x, 100.0) for x in difference[:3]]
                errors["camera_R"] += difference[3:7]
                errors["camera_FoV"] += difference[7:]
        for name, values in errors.items():
            weight = 0.6 ** (len(pose_encs) - 1 - k) / len(pose_encs)
            terms[name] += weight * (float(np.mean(values)) if values else 0.0)
    return terms


def trimmed(values: list[float], quantile: float = 0.98) -> float:
    if not values:
        return 0.0
    if len(values) <= 1000:
        return float(np.mean(values))
    values = [min(x, 100.0) for x in values]
    threshold = sorted(values)[round(quantile * (len(values) - 1))]
    kept = [x for x in values if x < threshold]
    return float(np.mean(kept if len(kept) > 1000 else values))


def dense_terms(part: str, prediction: ARRAY, confidence: ARRAY, target: ARRAY, mask: ARRAY) -> dict[str, float]:
    """Depth with "grad", points with "normal"; target (B, S, H, W, C)."""
    if mask.sum() < 100:
        return {f"{part}_conf": 0.0, f"{part}_reg": 0.0, f"{part}_grad": 0.0}
    conf, reg = [], []
    for at in np.ndindex(*mask.shape):
        if mask[at]:
            error = min(math.sqrt(sum((t - p) ** 2 for t, p in zip(target[at], prediction[at], strict=True))), 100.0)
            reg.append(error)
            conf.append(error * confidence[at] - 0.2 * math.log(confidence[at]))
    smooth = differences if part == "depth" else normals
    views = [x.reshape(-1, *x.shape[2:]) for x in (prediction, target, mask)]
    return {f"{part}_conf": trimmed(conf), f"{part}_reg": trimmed(reg), f"{part}_grad": smooth(*views)}


def differences(prediction: ARRAY, target: ARRAY, mask: ARRAY) -> float:
    scales = []
    for stride in (1, 2, 4, 8):
        total, count = 0.0, 0
        for n in range(len(mask)):
            rows, columns = range(0, mask.shape[1], stride), range(0, mask.shape[2], stride)
            for v in rows:
                for u in columns:
                    count += bool(mask[n, v, u])
                    for vv, uu in ((v + stride, u), (v, u + stride)):
                        if vv in rows and uu in columns and mask[n, v, u] and mask[n, vv, uu]:
                            d = (prediction[n, v, u] - target[n, v, u]) - (prediction[n, vv, uu] - target[n, vv, uu])
                            total += sum(min(abs(x), 100.0) for x in d) / len(d)
        scales.append(total / count if count else 0.0)
    return sum(scales) / 4


def normals(prediction: ARRAY, target: ARRAY, mask: ARRAY) -> float:
    scales = []
    for stride in (1, 2, 4):
        values = []
        around = ((-stride, 0), (0, -stride), (stride, 0), (0, stride), (-stride, 0))  # up, left, down, right, up
        for n in range(len(mask)):
            rows, columns = range(0, mask.shape[1], stride), range(0, mask.shape[2], stride)
            for v in rows:
                for u in columns:
                    for (v1, u1), (v2, u2) in pairwise(around):
                        a, b = (v + v1, u + u1), (v + v2, u + u2)
                        if all(r in rows and c in columns and mask[n, r, c] for r, c in ((v, u), a, b)):
                            cross = [
                                np.cross(x[n][a] - x[n, v, u], x[n][b] - x[n, v, u]) for x in (prediction, target)
                            ]
                            length = [math.sqrt(c @ c) for c in cross]
                            if min(length) > 1e-12:
                                values.append(1 - cross[0] @ cross[1] / (length[0] * length[1]))
        scales.append(float(np.mean(values)) if values else 0.0)
    return sum(scales) / 3


def total(terms: dict[str, float]) -> float:
    camera = terms["camera_T"] + terms["camera_R"] + 0.5 * terms["camera_FoV"]
    return 5 * camera + sum(value for name, value in terms.items() if not name.startswith("camera"))
