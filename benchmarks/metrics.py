"""How long do Acc, Comp and NC with ICP take on eight views of 518 x 518 pixels, and what do thinned-out queries cost?

    python benchmarks/metrics.py [--points 2146592] [--rounds 2] [--cores 2] [--full] [--quick]

`point_metrics` as it is by default, the same with exact=True, and the straightforward way with Open3D, on the same two
clouds. Every measurement is a process of its own, without torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import HERE, header, load, median, print_anything, summary, table, write_result
from _metric_jobs import VALUES

VIEWS = 8
POINTS = VIEWS * 518 * 518
CONTENDERS = ("default", "exact", "longest_icp", "open3d")
ONCE = ("exact", "longest_icp", "open3d")  # what takes longest, or repeats itself; with --full Open3D runs every round
RULES = {
    "scene": "a box room with three balls, eight cameras, every pixel valid. The prediction is the truth with depth "
    "off by 1 % in broad waves and by 0.2 % from pixel to pixel, edges smeared by a Gaussian of one pixel, poses off "
    "by 0.2 degrees and 0.004 a coordinate (the room is 2 across), in a frame and at a scale of its own. float32",
    "default": "point_metrics(pred, truth): Umeyama on all pairs, ICP of 200,000 points of the prediction against all "
    "of the truth, 500,000 points of each side asking for their nearest neighbour among all of the other, normals "
    "from all points. Every round with another seed for the choice of points",
    "exact": "point_metrics(pred, truth, exact=True): every point takes part everywhere",
    "longest_icp": "the ICP of the default settings alone, from Umeyama's alignment, with all updates it may make "
    "(30): clouds that slide along each other, such as flat prints, do not converge sooner",
    "open3d": "the straightforward pipeline on all points: compute_transformation with scaling on all pairs, "
    "registration_icp, estimate_normals of both clouds, core.nns.NearestNeighborSearch both ways for distances and "
    "indices (compute_point_cloud_distance gives no indices, and NC needs them)",
    "seconds": "from two float32 arrays in memory to the numbers; imports are over. cpu_seconds: of all threads. "
    "exact and longest_icp run once, and so does open3d without --full",
    "cores": "each process may use so many cores; both libraries are told",
    "memory": "high-water mark of the process above its value before the call, the two clouds not counted",
    "deviation": "largest relative difference from exact over the rounds, for each number",
}


def child(job: dict) -> dict:
    """The job in a process of its own. PYTHONPATH stays: the metrics need nothing but this interpreter's packages."""
    with tempfile.TemporaryDirectory() as scratch:
        order, result = Path(scratch) / "job.json", Path(scratch) / "result.json"
        order.write_text(json.dumps(job), encoding="utf-8")
        threads = {"OMP_NUM_THREADS": str(job.get("cores", 1))}
        command = [sys.executable, str(HERE / "_metric_jobs.py"), str(order), str(result)]
        environment = {**os.environ, **threads}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
        if done.returncode or not result.exists():
            raise RuntimeError(f"the job {job} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return json.loads(result.read_bytes())


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """Contenders take turns, so that a busy machine slows all of them; some are only needed once."""
    runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for number in range(args.rounds):
        for name in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
            once = name in ONCE and not (args.full and name == "open3d")
            if (once and number) or any("missing" in found for found in runs[name]):
                continue
            job = {"contender": name, "exact": name == "exact", "folder": str(folder), "cores": args.cores}
            found = child(job | {"seed": args.seed + number})
            runs[name].append(found)
            if "seconds" in found:
                print(f"{name}: round {number + 1}: {found['seconds']:.1f} s", flush=True)
    return runs


def deviation(runs: list[dict], exact: dict) -> dict[str, float]:
    return {name: max(abs(run["values"][name] / exact[name] - 1) for run in runs) for name in VALUES}


def report(runs: dict[str, list[dict]]) -> dict:
    exact = runs["exact"][0]["values"]
    found: dict = {}
    for name, mine in runs.items():
        if "missing" in mine[0]:
            found[name] = f"not measured: {mine[0]['missing']}"
            continue
        peaks = [run["peak_rss_mib"] for run in mine]
        found[name] = {
            "seconds": summary(run["seconds"] for run in mine),
            "cpu_seconds": summary(run["cpu_seconds"] for run in mine),
            "peak_rss_mib": None if None in peaks else median(peaks),
            "load": [run["load"] for run in mine],
            "values": mine[0]["values"],
        }
        if name != "longest_icp":
            found[name]["deviation"] = {key: float(f"{value:.3g}") for key, value in deviation(mine, exact).items()}
    return found


def targets(contenders: dict) -> list[dict]:
    def goal(text: str, measured: float, at_most: float) -> dict:
        return {"target": text, "measured": float(f"{measured:.4g}"), "reached": measured <= at_most}

    ours = contenders["default"]
    seconds = ours["seconds"]["median"]
    longest = seconds + contenders["longest_icp"]["seconds"]["median"]
    found = [
        goal("Acc + Comp + NC + ICP of eight views of 518 px in at most 40 s", seconds, 40),
        goal("the same with 30 more updates of ICP, which is more than it ever makes", longest, 40),
        goal("every number within 0.5 % of exact (largest deviation)", max(ours["deviation"].values()), 0.005),
    ]
    if isinstance(contenders["open3d"], dict):
        theirs = contenders["open3d"]
        found.append(goal("exact agrees with Open3D to 0.01 %", max(theirs["deviation"].values()), 1e-4))
        ratio = seconds / theirs["seconds"]["median"]
        found.append(goal("faster than the straightforward way (times its seconds)", ratio, 1))
    return found


def show(result: dict) -> None:
    rows = []
    for name in CONTENDERS:
        one = result["contenders"][name]
        if isinstance(one, str):
            print(f"\n{name}: {one}")
            continue
        seconds = [one["seconds"][key] for key in ("median", "min", "max")]
        peak = one["peak_rss_mib"]
        rows.append([name, *seconds, one["cpu_seconds"]["median"], "-" if peak is None else round(peak)])
    title = f"{result['settings']['points']} points, {result['settings']['cores']} cores"
    table(title, ["", "seconds", "least", "most", "CPU s", "peak MiB"], rows)
    rows = [
        [name, *(one["values"][key] for key in VALUES), f"{100 * max(one['deviation'].values()):.3g} %"]
        for name, one in result["contenders"].items()
        if isinstance(one, dict) and "deviation" in one
    ]
    table("What came out", ["", *VALUES, "largest deviation"], rows)
    rows = [[t["target"], t["measured"], t["reached"]] for t in result["targets"]]
    table("Targets", ["target", "measured", "reached"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=POINTS, help=f"of each cloud, about; default {POINTS}")
    parser.add_argument("--rounds", type=int, help="of the default form; default 2, and 3 with --full")
    parser.add_argument("--cores", type=int, default=2, help="that each contender may use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="three rounds, and of Open3D too: five minutes")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: shows that the script works, measures nothing"
    )
    parser.add_argument("--output", help="JSON file; default results/metrics.json, and none with --quick")
    args = parser.parse_args()
    args.rounds = (3 if args.full else 2) if args.rounds is None else args.rounds
    if args.quick:
        args.rounds, args.points = 1, min(args.points, 8000)
    if min(args.rounds, args.cores) < 1 or args.points < 100 * VIEWS:
        parser.error(f"--rounds and --cores must be 1 or more, --points {100 * VIEWS} or more.")
    if importlib.util.find_spec("scipy") is None:
        sys.exit('the metrics need scipy: pip install "peft-attrsub[eval]"')
    size = round(math.sqrt(args.points / VIEWS))
    settings = {"points": VIEWS * size * size, "views": VIEWS, "size": size, "rounds": args.rounds}
    result = header("metrics", args.seed, args.quick, **settings, cores=args.cores, device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        child({"contender": "scene", "folder": scratch, "cores": 1, **settings, "seed": args.seed})
        runs = measure(args, Path(scratch))
    for mine in runs.values():
        result["versions"] |= mine[0].get("versions", {})
    result["contenders"] = report(runs)
    result["load_at_end"] = load()
    result["targets"] = targets(result["contenders"])
    result["rules"] = RULES
    show(result)
    write_result(result, "metrics", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
