"""How long from a saved basis to its report? analyse, write_report, save_figures at VGGT's size, and peak memory.

    python benchmarks/report.py [--dims 16] [--work-dir DIR] [--full] [--quick]

Four attributes of ten LoRA adapters of rank 16 each (_adapters.py) on VGGT-1B's 192 aggregator linears are mined and
saved before any clock starts. Every round is a process of its own, so that no null is remembered from the last one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import multiprocessing
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _adapters import vggt_shapes, write_adapters
from _common import PeakMemory, Timer, header, print_anything, summary, table, write_result

from peft_attrsub import Basis, build_basis
from peft_attrsub.analysis import analyse, captured_energy, save_figures, write_report

ATTRIBUTES = ("texture", "geometry", "camera", "lighting")
RULES = {
    "seconds": "median over rounds, each a process of its own; the clock starts after `import peft_attrsub.analysis`. "
    "cpu_seconds adds up all threads",
    "analyse": "from the folder of the basis, which is in the page cache, to the Analysis: opening, spectra, overlaps "
    "of all pairs on both sides, both nulls",
    "write_report": "from the Analysis to the HTML file, plotly.js included; html_mb: its size in 10^6 bytes",
    "explain": "captured_energy of one adapter of rank 16 on all modules: what each of --adapters adds to analyse",
    "save_figures": "from the Analysis to all PNG files, with the import of matplotlib; in the first round, "
    "and with --full in every one",
    "peak_rss_mib": "the kernel's high-water mark of resident memory during analyse and write_report minus its value "
    "after the imports; mapped pages of the basis count. peak_anon_mib: anonymous memory only, sampled every 5 ms",
    "report_seconds": "analyse and write_report in the same round",
}


def measure(job: dict) -> dict:
    """One round: seconds and CPU seconds of every stage, memory of the report, sizes of what was written."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, stages = Path(scratch), {}
        with PeakMemory() as memory:
            with Timer() as timer:
                analysis = analyse(job["basis"], draws=job["draws"], mismatches=job["mismatches"], seed=job["seed"])
            stages["analyse"] = timer.report()
            with Timer() as timer:
                html = write_report(analysis, folder / "report.html")
            stages["write_report"] = timer.report()
        with Timer() as timer:
            captured_energy(job["task"], job["basis"])
        stages["explain"] = timer.report()
        figures = []
        if job["figures"]:
            with Timer() as timer:
                figures = save_figures(analysis, folder / "figures")
            stages["save_figures"] = timer.report()
        record = analysis.to_dict()
        return {
            "stages": stages,
            "memory": memory.report(),
            "html_mb": html.stat().st_size / 1e6,
            "json_mb": analysis.save_json(folder / "analysis.json").stat().st_size / 1e6,
            "figures": [path.name for path in figures],
            "records": {name: len(record[name]) for name in ("modules", "spectra", "overlaps", "nulls", "adapters")},
        }


def alone(job: dict) -> dict:
    """`measure` in a fresh interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, job).result()


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.quick = args, args.quick
        self.shapes = vggt_shapes(1, 64) if args.quick else vggt_shapes()
        self.rank, self.count = (4, 3) if args.quick else (16, 10)
        self.attributes = ATTRIBUTES[:2] if args.quick else ATTRIBUTES
        self.folder = Path(args.work_dir) / f"{'quick-' if args.quick else ''}report-{args.seed}"

    def adapters(self, name: str, count: int) -> list[str]:
        """Adapters with a planted subspace of their own for every name."""
        seed = self.args.seed * 100 + ([*ATTRIBUTES, "task"].index(name))
        return write_adapters(self.folder / name, self.shapes, count, rank=self.rank, seed=seed)

    def task(self) -> str:
        return self.adapters("task", 1)[0]

    def bases(self) -> dict[int, str]:
        """{dim: folder of the saved basis}; the adapters of an attribute are on disk only while it is mined."""
        missing = {d: self.folder / f"basis-{d}" for d in self.args.dims if not (self.folder / f"basis-{d}").exists()}
        mined: dict[int, list[Basis]] = {d: [] for d in missing}
        for name in self.attributes if missing else ():
            paths = self.adapters(name, self.count)
            for d, parts in mined.items():
                part = self.folder / f"part-{d}-{name}"
                build_basis({name: paths}, dim=d, progress=False).save_pretrained(part, overwrite=True)
                parts.append(Basis.from_pretrained(part))
            shutil.rmtree(self.folder / name)
            print(f"{name}: {len(paths)} adapters on {len(self.shapes)} modules are mined.", flush=True)
        for d, parts in mined.items():
            Basis.combine(parts).save_pretrained(missing[d])
            for name in self.attributes:
                shutil.rmtree(self.folder / f"part-{d}-{name}")
        return {d: str(self.folder / f"basis-{d}") for d in self.args.dims}


def case(bench: Bench, dim: int, basis: str, task: str) -> dict:
    """All rounds at one dim."""
    args = bench.args
    job = {"basis": basis, "task": task}
    job |= {"draws": args.draws, "mismatches": args.mismatches, "seed": args.seed}
    rounds = []
    for round_ in range(args.rounds):
        # The figures take longer than the rest together: once is enough, unless everything is to be repeated.
        job["figures"] = args.figures and (round_ == 0 or args.full)
        rounds.append(measure(job) if bench.quick else alone(job))
        seconds = sum(rounds[-1]["stages"][name]["seconds"] for name in ("analyse", "write_report"))
        print(f"dim {dim}: round {round_ + 1} of {args.rounds}: {seconds:.1f} s", flush=True)
    first = rounds[0]
    both = [r["stages"]["analyse"]["seconds"] + r["stages"]["write_report"]["seconds"] for r in rounds]
    memory = [r["memory"] for r in rounds]
    return {
        "dim": dim,
        "attributes": len(bench.attributes),
        "adapters_each": bench.count,
        "rank": bench.rank,
        **first["records"],
        "stages": {
            name: {
                key: summary(r["stages"][name][key] for r in rounds if name in r["stages"])
                for key in ("seconds", "cpu_seconds")
            }
            for name in first["stages"]
        },
        "report_seconds": summary(both),
        **{
            key: max(m[key] for m in memory) if memory[0][key] is not None else None
            for key in ("peak_rss_mib", "peak_anon_mib")
        },
        "html_mb": round(first["html_mb"], 3),
        "json_mb": round(first["json_mb"], 3),
        "figures": first["figures"],
    }


def targets(cases: list[dict]) -> list[dict]:
    """What was asked of the report at the smallest dim, what came out, and whether it is reached."""
    first = min(cases, key=lambda c: c["dim"])

    def goal(text: str, measured: float, at_most: float = math.inf) -> dict:
        return {"target": text, "measured": round(measured, 3), "reached": measured <= at_most}

    where = f"at dim {first['dim']}"
    return [
        goal(f"analyse and write_report in at most 30 s on two cores {where}", first["report_seconds"]["median"], 30),
        goal(f"an HTML file of at most 10 MB {where}", first["html_mb"], 10),
    ]


def show(result: dict) -> None:
    for one in result["cases"]:
        rows = [
            [name, stage["seconds"]["median"], stage["seconds"]["min"], stage["cpu_seconds"]["median"]]
            for name, stage in one["stages"].items()
        ]
        table(
            f"{one['modules']} modules x {one['attributes']} attributes, {one['adapters_each']} adapters of rank "
            f"{one['rank']} each, d = {one['dim']}",
            ["", "seconds", "fastest", "CPU s"],
            rows,
        )
    table(
        "The report",
        ["d", "seconds", "peak RSS MiB", "peak anon MiB", "HTML MB", "JSON MB", "overlaps"],
        [
            [c["dim"], c["report_seconds"]["median"]]
            + [c[key] for key in ("peak_rss_mib", "peak_anon_mib", "html_mb", "json_mb", "overlaps")]
            for c in result["cases"]
        ],
    )
    rows = [[t["target"], t["measured"], t["reached"]] for t in result["targets"]]
    table("Targets", ["target", "measured", "reached"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", help="default 16, and 16 64 with --full")
    parser.add_argument("--draws", type=int, default=200, help="of random subspaces for a null")
    parser.add_argument("--mismatches", type=int, default=5, help="layers of the permutation null")
    parser.add_argument("--work-dir", help="where bases are written and kept; default a temporary folder")
    parser.add_argument("--rounds", type=int, help="default 2, and 3 with --full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", action=argparse.BooleanOptionalAction, default=True, help="time save_figures too")
    parser.add_argument("--full", action="store_true", help="two dims, three rounds, the figures in each of them")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: shows that the script works, measures nothing"
    )
    parser.add_argument("--output", help="JSON file; default results/report.json, and none with --quick")
    args = parser.parse_args()
    dims, rounds = ([16, 64], 3) if args.full else ([16], 2)
    args.dims, args.rounds = args.dims or dims, args.rounds or rounds
    if args.quick:
        args.dims, args.rounds, args.draws = [2, 4], 1, 10
    with tempfile.TemporaryDirectory() as scratch:
        args.work_dir = args.work_dir or scratch
        bench = Bench(args)
        settings = {k: getattr(args, k) for k in ("rounds", "dims", "draws", "mismatches", "figures")}
        result = header("report", args.seed, args.quick, **settings, device="cpu")
        extras = ("plotly", "matplotlib") if args.figures else ("plotly",)
        result["versions"] |= {name: importlib.metadata.version(name) for name in extras}
        bases, task = bench.bases(), bench.task()
        result["cases"] = [case(bench, dim, basis, task) for dim, basis in bases.items()]
        result["targets"] = targets(result["cases"])
        result["rules"] = RULES
    show(result)
    write_result(result, "report", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
