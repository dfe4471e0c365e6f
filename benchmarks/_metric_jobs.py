"""One contender of `metrics.py` in a process of its own: `python _metric_jobs.py JOB.json RESULT.json`.

Runs without torch, so that the memory is that of the metrics. The clock starts after the imports, with both clouds
in memory.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

VALUES = ("acc", "acc_median", "comp", "comp_median", "nc", "nc_pred", "nc_truth")


def write_scene(folder: Path, views: int, size: int, seed: int) -> None:
    """A box room with three balls, seen by `views` cameras of size x size pixels; pred.npy and truth.npy, float32.

    The prediction has what a network gets wrong: depth off by 1 % in broad waves and by 0.2 % from pixel to pixel,
    edges smeared over, poses off by 0.2 degrees and 0.004; all of it in a frame and at a scale of its own.
    """
    import numpy as np
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    across = (np.arange(size) - (size - 1) / 2) / (0.9 * size)
    rays = np.stack([*np.meshgrid(across, across), np.ones((size, size))], axis=-1).reshape(-1, 3)
    truth, pred = [], []
    for view in range(views):
        angle = 0.6 * np.pi * view / views - 0.4
        place = np.array([np.sin(angle), 0, -np.cos(angle)]) / 2
        z = -place + 0.03 * rng.normal(size=3)
        x = np.cross([0, 1, 0], z)
        x, z = x / np.linalg.norm(x), z / np.linalg.norm(z)
        pose = np.stack([x, np.cross(z, x), z], axis=1)
        depth = _depth(rays @ pose.T, place).reshape(size, size)
        waves = gaussian_filter(rng.normal(size=depth.shape), size / 12)
        wrong = 1 + 0.01 * waves / waves.std() + 0.002 * rng.normal(size=depth.shape)
        a, b, c = 0.004 * rng.normal(size=3)
        turn = np.linalg.qr(np.eye(3) + np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]]))[0]
        turn *= np.sign(np.diag(turn))
        seen = gaussian_filter(depth, 1.0) * wrong
        truth.append(place + depth.reshape(-1, 1) * rays @ pose.T)
        pred.append(place + 0.004 * rng.normal(size=3) + seen.reshape(-1, 1) * rays @ (pose @ turn).T)
    frame = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    frame *= np.sign(np.linalg.det(frame))
    np.save(folder / "truth.npy", np.concatenate(truth).astype(np.float32))
    np.save(folder / "pred.npy", (0.7 * np.concatenate(pred) @ frame.T + [0.3, -0.2, 0.5]).astype(np.float32))


def _depth(rays, place):
    """Planar z along rays of z = 1 from a place within [-1, 1]^3, to its walls or the balls in it."""
    import numpy as np

    with np.errstate(divide="ignore"):
        depth = np.where(rays > 0, (1 - place) / rays, (-1 - place) / rays).min(axis=1)
    for *centre, radius in ((0, 0, 0.1, 0.2), (0.4, 0.5, 0.5, 0.3), (-0.5, -0.2, 0.4, 0.25)):
        off = place - np.array(centre)
        a, b, c = (rays * rays).sum(axis=1), rays @ off, off @ off - radius**2
        root = b * b - a * c
        near = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
        depth = np.minimum(depth, np.where(near > 0, near, np.inf))
    return depth


def ours(pred, truth, job: dict):
    from peft_attrsub.evaluation.points import point_metrics

    def run() -> dict:
        found = point_metrics(pred, truth, exact=job["exact"], seed=job["seed"], workers=job["cores"])
        return {name: getattr(found, name) for name in VALUES} | {"queries": found.queries}

    return run


def longest_icp(pred, truth, job: dict):
    """ICP of the default settings that never converges: 30 updates."""
    from peft_attrsub.evaluation.alignment import icp, umeyama
    from peft_attrsub.evaluation.neighbours import build_tree

    aligned, tree = umeyama(pred, truth).apply(pred), build_tree(truth)
    return lambda: {"iterations": icp(aligned, truth, relative=0, tree=tree, workers=job["cores"]).iterations}


def open3d(pred, truth, job: dict):
    import numpy as np
    import open3d as o3d

    registration = o3d.pipelines.registration

    def nearest(query, target):
        search = o3d.core.nns.NearestNeighborSearch(o3d.core.Tensor(np.asarray(target.points)))
        search.knn_index()
        rows, squared = search.knn_search(o3d.core.Tensor(np.asarray(query.points)), 1)
        return rows.numpy()[:, 0], np.sqrt(squared.numpy()[:, 0])

    def run() -> dict:
        p, g = (o3d.geometry.PointCloud(o3d.utility.Vector3dVector(c.astype(np.float64))) for c in (pred, truth))
        same = o3d.utility.Vector2iVector(np.repeat(np.arange(len(pred), dtype=np.int32)[:, None], 2, axis=1))
        similar = registration.TransformationEstimationPointToPoint(with_scaling=True)
        p.transform(similar.compute_transformation(p, g, same))
        rigid = registration.TransformationEstimationPointToPoint()
        p.transform(registration.registration_icp(p, g, 0.1, np.eye(4), rigid).transformation)
        p.estimate_normals()
        g.estimate_normals()
        found = {"queries": len(pred)}
        for key, normal, query, target in (("acc", "nc_pred", p, g), ("comp", "nc_truth", g, p)):
            rows, distances = nearest(query, target)
            agree = np.abs((np.asarray(query.normals) * np.asarray(target.normals)[rows]).sum(axis=1))
            found[key], found[f"{key}_median"] = float(distances.mean()), float(np.median(distances))
            found[normal] = float(agree.mean())
        return found | {"nc": (found["nc_pred"] + found["nc_truth"]) / 2}

    return run


CONTENDERS = {"default": ours, "exact": ours, "longest_icp": longest_icp, "open3d": open3d}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_bytes())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["cores"]])
    folder = Path(job["folder"])
    if job["contender"] == "scene":
        write_scene(folder, job["views"], job["size"], job["seed"])
        Path(sys.argv[2]).write_text("{}", encoding="utf-8")
        return
    import numpy as np
    from _common import PeakMemory, Timer, load
    from _render_jobs import stand_in

    stand_in()
    contender = CONTENDERS[job["contender"]]
    package = "open3d" if contender is open3d else "scipy.spatial"
    try:
        importlib.import_module(package)
    except ImportError as error:
        found = {"missing": f"{package} cannot be imported ({error})"}
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
        return
    before = load()
    run = contender(*(np.load(folder / f"{name}.npy") for name in ("pred", "truth")), job)
    with PeakMemory() as memory, Timer() as timer:
        values = run()
    name = package.partition(".")[0]
    found = {"values": values, "load": before, "versions": {name: str(sys.modules[name].__version__)}}
    Path(sys.argv[2]).write_text(json.dumps(found | timer.report() | memory.report()), encoding="utf-8")


if __name__ == "__main__":
    main()
