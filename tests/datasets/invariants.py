"""What every reader's samples must satisfy, written slowly and plainly."""

from __future__ import annotations

import numpy as np
import torch

from peft_attrsub.datasets.sample import Sample


def reprojection_error(sample: Sample, a: int, b: int) -> float:
    """Median relative error of depth b at the places where points of view a fall; nan where none is seen.

    Points that something hides differ: the median does not mind, as long as more than half of them is seen.
    """
    assert sample.extrinsics is not None
    z = sample.depths.double().numpy()
    k, e = sample.intrinsics.numpy(), sample.extrinsics.numpy()
    height, width = z.shape[1:]
    errors = []
    for v in range(height):
        for u in range(width):
            if not bool(sample.point_masks[a, v, u]):
                continue
            camera = np.linalg.inv(k[a]) @ np.array([u, v, 1.0]) * z[a, v, u]
            world = e[a, :, :3].T @ (camera - e[a, :, 3])
            there = e[b, :, :3] @ world + e[b, :, 3]
            if there[2] <= 0:
                continue
            x, y, _ = k[b] @ (there / there[2])
            column, row = round(x), round(y)
            if 0 <= column < width and 0 <= row < height and bool(sample.point_masks[b, row, column]):
                errors.append(abs(z[b, row, column] - there[2]) / there[2])
    return float(np.median(errors)) if errors else float("nan")


def check_sample(sample: Sample, limit: float = 0.01) -> None:
    """Types, ranges, rotations, masks; and every view agrees with the next one by its depth and cameras."""
    assert sample.images.dtype == torch.float32 and sample.images.min() >= 0 and sample.images.max() <= 1
    assert sample.point_masks.dtype == torch.bool and bool(sample.point_masks.any())
    assert not bool((sample.point_masks & (sample.depths == 0)).any())
    if sample.extrinsics is None:
        return
    for extrinsic in sample.extrinsics.numpy():
        np.testing.assert_allclose(extrinsic[:, :3] @ extrinsic[:, :3].T, np.eye(3), atol=1e-6)
        assert np.linalg.det(extrinsic[:, :3]) > 0
    for a in range(len(sample) - 1):
        assert reprojection_error(sample, a, a + 1) < limit
