"""Meshes of surfaces that are given as the zeros of a function of space, by naive surface nets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = Callable[[np.ndarray], np.ndarray]
BLOCK = 4  # side of the blocks in which the function is first looked at


def surface_nets(field: Field, low: np.ndarray, high: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """The surface field = 0 in the box: one vertex in each cell it passes, the mean of its crossings of the cell's
    edges, and one quad across each edge it crosses. The field is looked at closely only where it is small."""
    blocks = np.ceil((high - low) / (step * BLOCK)).astype(int) + 1
    coarse = np.indices(blocks).reshape(3, -1).T * BLOCK
    middle = low + (coarse + (BLOCK - 1) / 2) * step
    values = field(middle)
    near = np.abs(values) < 1.5 * BLOCK * step
    inner = np.indices((BLOCK,) * 3).reshape(3, -1).T
    grid = np.repeat(np.repeat(np.repeat(values.reshape(blocks), BLOCK, 0), BLOCK, 1), BLOCK, 2)
    nodes = (coarse[near][:, None] + inner).reshape(-1, 3)
    grid[tuple(nodes.T)] = np.concatenate(
        [field(low + part * step) for part in np.array_split(nodes, len(nodes) // 200_000 + 1)]
    )
    shape = np.array(grid.shape)
    total, count = np.zeros((*(shape - 1), 3)), np.zeros(shape - 1)
    edges = []
    for axis in range(3):
        a, b = np.take(grid, range(shape[axis] - 1), axis), np.take(grid, range(1, shape[axis]), axis)
        crossed = np.argwhere((a < 0) != (b < 0))
        # Edges on the border of the box have not all four cells.
        others = [(axis + 1) % 3, (axis + 2) % 3]
        crossed = crossed[((crossed[:, others] > 0) & (crossed[:, others] < shape[others] - 1)).all(axis=1)]
        at = tuple(crossed.T)
        points = crossed.astype(float)
        points[:, axis] += a[at] / (a[at] - b[at])
        cells = np.repeat(crossed[:, None], 4, axis=1)
        cells[:, :, others[0]] -= [1, 0, 0, 1]
        cells[:, :, others[1]] -= [1, 1, 0, 0]
        for corner in range(4):
            np.add.at(total, tuple(cells[:, corner].T), points)
            np.add.at(count, tuple(cells[:, corner].T), 1)
        edges.append(np.where((a[at] < 0)[:, None, None], cells, cells[:, ::-1]))
    used = count > 0
    number = np.full(count.shape, -1)
    number[used] = np.arange(int(used.sum()))
    quads = number[tuple(np.moveaxis(np.concatenate(edges), -1, 0))]
    return low + total[used] / count[used][:, None] * step, quads


def triangles(quads: np.ndarray) -> np.ndarray:
    """Two triangles (2 Q, 3) for each quad, one after the other."""
    return quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
