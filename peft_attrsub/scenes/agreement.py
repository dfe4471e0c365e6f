"""Do depth maps and poses fit each other? And where they do not: which convention do the poses look like?

A pixel (u, v) of one view with planar depth z is the point X = R^T (z K^-1 (u, v, 1) - t) of the world. In another
view it falls on (u', v') at the depth z' of K' (R' X + t'). There the other view shows the same surface (its depth is
z'), or something nearer that hides the point, or something farther: then it looks through the point, and the two
views contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrices = NDArray[np.float64]

# How far depths of one surface may differ: relative, and for the millimeters of a PNG.
TOLERANCE, SLACK = 0.01, 0.002
FEW = 50  # points: their share says nothing
GRID = 64  # points along a side of a view are enough to judge its pose
# Shares of contradictions among the points that both views show. Right poses of generated scenes give up to 0.3 %, or
# 8 % where objects move; wrong ones from 2 % on (narrow camera paths) to 100 %. SUSPECT: other conventions are tried;
# WRONG: reported even if none of them fits.
SUSPECT, WRONG = 0.02, 0.3
# Share of the points that both views show. NOTHING: too few to speak of; CLEAR: enough to trust another convention.
NOTHING, CLEAR = 0.002, 0.15
# How much a convention must be better, in (agreeing - contradicting) / points, to be named.
BETTER = 0.03
# With fewer pairs, views that share nothing may just look at different things.
ENOUGH_PAIRS = 3


@dataclass(frozen=True)
class PosedDepth:
    """One view. depth (H, W): planar z, 0 where there is none; extrinsic (3, 4): [R | t], world to camera, OpenCV
    axes; intrinsic (3, 3): the center of the first pixel is (0.5, 0.5); mask (H, W) bool: the pixels to use."""

    depth: np.ndarray
    extrinsic: np.ndarray
    intrinsic: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Comparison:
    """Counts of a view's points. inside: those that fall into the other view; agreeing: where that shows the same
    surface; contradicting: where it shows something farther."""

    points: int = 0
    inside: int = 0
    agreeing: int = 0
    contradicting: int = 0

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.points + other.points,
            self.inside + other.inside,
            self.agreeing + other.agreeing,
            self.contradicting + other.contradicting,
        )

    @property
    def shared(self) -> float:
        """Share of the points that the other view shows: (agreeing + contradicting) / points."""
        return (self.agreeing + self.contradicting) / max(1, self.points)

    @property
    def wrong(self) -> float:
        """Share of contradictions among those: contradicting / (agreeing + contradicting)."""
        return self.contradicting / max(1, self.agreeing + self.contradicting)

    @property
    def score(self) -> float:
        """(agreeing - contradicting) / points, in [-1, 1]."""
        return (self.agreeing - self.contradicting) / max(1, self.points)


def compare(
    here: PosedDepth, there: PosedDepth, stride: int = 1, *, empty: float = np.inf, slack: float = SLACK
) -> Comparison:
    """How the points of view `here` fit view `there`.

    A point agrees where one of the 3 x 3 depths around (u', v') differs from z' by no more than 1 % + slack, and
    contradicts where all of them lie beyond that. stride: use every n-th row and column of `here`. empty: what a depth
    of 0 in `there` stands for: inf for nothing to see, nan for not measured, which neither agrees nor contradicts.
    """
    height, width = here.depth.shape
    v, u = np.mgrid[0:height:stride, 0:width:stride]
    z = here.depth[v, u].astype(np.float64)
    use = z > 0
    if here.mask is not None:
        use &= here.mask[v, u]
    u, v, z = u[use], v[use], z[use]
    rays = np.linalg.inv(here.intrinsic) @ np.stack([u + 0.5, v + 0.5, np.ones(len(u))])
    points = here.extrinsic[:, :3].T @ (rays * z - here.extrinsic[:, 3:])
    x, y, far = there.intrinsic @ (there.extrinsic[:, :3] @ points + there.extrinsic[:, 3:])
    ahead = far > 1e-9
    x, y, far = x[ahead] / far[ahead], y[ahead] / far[ahead], far[ahead]
    height, width = there.depth.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column, row, far = x[inside].astype(np.intp), y[inside].astype(np.intp), far[inside]
    leave = far * TOLERANCE + slack
    agreeing, nearest = np.zeros(len(far), bool), np.full(len(far), np.inf)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            shown = there.depth[np.clip(row + down, 0, height - 1), np.clip(column + right, 0, width - 1)]
            shown = np.where(shown > 0, shown, empty)
            agreeing |= np.abs(shown - far) <= leave
            nearest = np.minimum(nearest, shown)  # nan if one of them is
    return Comparison(len(z), len(far), int(agreeing.sum()), int((nearest > far + leave).sum()))


def contradictions(
    depth: np.ndarray,
    extrinsic: np.ndarray,
    intrinsic: np.ndarray,
    mask: np.ndarray | None = None,
    stride: int = 1,
) -> float:
    """Share of view 0's points inside view 1 that cannot be there, because view 1 looks through them.

    depth (2, H, W) meters, 0 where nothing is; extrinsic (2, 3, 4); intrinsic (2, 3, 3); mask (H, W): the pixels of
    view 0 to use; stride: use every n-th row and column. 0.0 where less than 50 points fall into view 1.
    """
    here = PosedDepth(depth[0], extrinsic[0], intrinsic[0], mask)
    found = compare(here, PosedDepth(depth[1], extrinsic[1], intrinsic[1]), stride)
    return found.contradicting / found.inside if found.inside >= FEW else 0.0


def inverse(poses: Matrices) -> Matrices:
    """(..., 3, 4) rigid [R | t] to [R^T | -R^T t]."""
    turned = np.swapaxes(poses[..., :3], -1, -2)
    return np.concatenate([turned, -turned @ poses[..., 3:]], axis=-1)


def _scaled(factor: float) -> Callable[[Matrices], Matrices]:
    return lambda poses: np.concatenate([poses[..., :3], poses[..., 3:] * factor], axis=-1)


_OPENGL, _PYTORCH3D = np.diag([1.0, -1.0, -1.0]), np.diag([-1.0, -1.0, 1.0])
_INVERTED = "inverted (camera to world where world to camera is expected, or the other way round)"
#: What poses may look like, and how they become world to camera with OpenCV axes.
CONVENTIONS: dict[str, Callable[[Matrices], Matrices]] = {
    _INVERTED: inverse,
    "with OpenGL axes (y up, z backward) instead of OpenCV axes": lambda poses: _OPENGL @ poses,
    f"with OpenGL axes (y up, z backward), and {_INVERTED}": lambda poses: _OPENGL @ inverse(poses),
    "with PyTorch3D axes (x left, y up) instead of OpenCV axes": lambda poses: _PYTORCH3D @ poses,
    f"with PyTorch3D axes (x left, y up), and {_INVERTED}": lambda poses: _PYTORCH3D @ inverse(poses),
    "with transposed rotations": lambda poses: np.concatenate(
        [np.swapaxes(poses[..., :3], -1, -2), poses[..., 3:]], axis=-1
    ),
    "with the camera's position in place of the translation t = -R c": lambda poses: np.concatenate(
        [poses[..., :3], -poses[..., :3] @ poses[..., 3:]], axis=-1
    ),
} | {
    f"in another unit than the depth (translations {word})": _scaled(factor)
    for factor, word in (
        (1e-3, "1000 times too large, such as millimeters"),
        (1e-2, "100 times too large, such as centimeters"),
        (1e-1, "10 times too large"),
        (1e1, "10 times too small"),
        (1e2, "100 times too small, such as depth in centimeters"),
        (1e3, "1000 times too small, such as depth in millimeters"),
    )
}


def pairs_to_compare(views: int) -> list[tuple[int, int]]:
    """Up to six pairs of `views` views in their order: three of neighbors, evenly spread, and three far apart, for
    the poses of neighbors in a micro-baseline differ too little to tell conventions apart."""
    last = views - 1
    chosen = [(place * last // 3, place * last // 3 + 1) for place in range(3) if views > 1]
    chosen += [pair for pair in ((0, views // 2), (views // 4, last), (0, last)) if pair[1] > pair[0]]
    return list(dict.fromkeys(chosen))


def pose_problem(views: Mapping[int, PosedDepth], pairs: Sequence[tuple[int, int]]) -> str | None:
    """What is wrong with the poses of a sequence, a sentence without its subject's name; None for nothing.

    views: by number, those of `pairs` (see `pairs_to_compare`); a depth of 0 counts as not measured, and depths and
    translations may be in any unit. Wrong is what makes views contradict each other, or share no surface at all. The
    sentence names the convention that ends this, if one of CONVENTIONS does.
    """
    numbers = list(views)
    given = np.stack([np.asarray(views[number].extrinsic, np.float64) for number in numbers]) if views else np.empty(0)

    def judge(poses: Matrices) -> Comparison:
        total = Comparison()
        for pair in pairs:
            for one, other in (pair, pair[::-1]):
                here, there = (_with_pose(views[n], poses[numbers.index(n)]) for n in (one, other))
                stride = max(1, min(here.depth.shape) // GRID)
                total += compare(here, there, stride, empty=np.nan, slack=0.0)
        return total

    found = judge(given)
    apart = found.shared < NOTHING
    if found.points < FEW or (len(pairs) < ENOUGH_PAIRS if apart else found.wrong <= SUSPECT):
        return None
    fault = (
        "its views share no surface according to their poses"
        if apart
        else f"its views contradict each other in {found.wrong:.0%} of the points that they share"
    )
    others = {name: judge(convert(given)) for name, convert in CONVENTIONS.items()}
    name, best = max(others.items(), key=lambda item: item[1].score)
    fits = best.wrong <= found.wrong / 2 or (apart and best.wrong <= SUSPECT)
    if fits and best.score > found.score + BETTER and (not apart or best.shared > CLEAR):
        left = "they fit" if best.wrong < 0.005 else f"{best.wrong:.0%} are left"
        return f"{fault}, and {left} if the poses are read as {name}: convert the pose file."
    if apart:
        return f"{fault}: check the convention and the unit of the pose file."
    if found.wrong > WRONG:
        return f"{fault}: depth maps and poses do not belong together, or a unit or the intrinsics are wrong."
    return None


def _with_pose(view: PosedDepth, pose: Matrices) -> PosedDepth:
    return PosedDepth(view.depth, pose, view.intrinsic, view.mask)
