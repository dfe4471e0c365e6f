"""How fast, how small and how exact is build_basis? Against reading the files, the dense form, vLoRA and lorashare.

    python benchmarks/build_basis.py [--peers-python PATH] [--work-dir DIR] [--quick]

Adapters: ten LoRA of rank 16 on VGGT-1B's 192 aggregator linears, written by stock PEFT (_adapters.py). Every
contender runs in a process of its own, round by round in turn. What is extrapolated, and how the peers' dimension is
matched, stands in the result itself under "rules".
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
from pathlib import Path

import _contenders
from _adapters import FIXTURES, LINEARS, vggt_shapes, write_adapters
from _common import header, median, print_anything, run_child, summary, table, write_result

RULES = {
    "seconds": "from the adapters' paths to the basis in memory, without imports; median over rounds; files in the "
    "page cache unless the row says cold. cpu_seconds adds up all threads",
    "times_ours": "median over rounds of contender / ours in the same round; the extrapolated against ours' median",
    "peak_rss_mib": "the kernel's high-water mark of resident memory minus its value after the imports; pages of the "
    "adapter files that are mapped count. peak_anon_mib: anonymous memory only, sampled every 5 ms",
    "read_only": "every tensor of every file copied once into memory; cold: the page cache was told to drop the files",
    "dense": "n x m updates, their weighted mean and a full SVD, as many iterations as ours took on that module; one "
    "module of each of the four shapes measured, times 48. Its memory is that of the largest of these modules",
    "lorashare": "num_components = d; one module of each shape measured, times 48, unless run with --whole-peers. Its "
    "memory is that of the largest of these modules; on a whole model it first keeps every full eigenvector matrix",
    "error": "||dW_i - approximation||_F / ||dW_i||_F per adapter and module, then the mean. Ours: U U^T dW_i V V^T. "
    "Peers: their own reconstruct(), with every adapter's true scaling supplied, which vLoRA does not keep",
    "scaling": "two modules of m x n, one a thread, median of two runs; where nothing else is said k = 10 adapters of "
    "rank r = 16 and m = n = 1024; opening and hashing the files counts",
    "large": "one run each. many_adapters: a quarter of the modules, as many of each shape, are measured; "
    "seconds_all_modules is that times four. Their adapters are written for the run and deleted",
    "matching": "as a basis, ours and lorashare hold d (n + m) numbers per module; per adapter ours adds d^2 and "
    "lorashare 2 d r. One vLoRA component holds r (n + m), so it gets ceil(d / r) of them, and its mean, another "
    "r (n + m), for free; with as many components as adapters it stores the adapters themselves",
}


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.quick = args, args.quick
        self.width, self.blocks = (64, 1) if args.quick else (1024, 24)
        self.rank, self.dim, self.count = (4, 4, 3) if args.quick else (16, 16, 10)
        self.folder = Path(args.work_dir)
        self.shapes = vggt_shapes(self.blocks, self.width)
        # One module of each shape stands for all of them in the slow contenders.
        self.one_each = [f"aggregator.frame_blocks.0.{name}" for name in LINEARS]
        self.peers = run_child({"contender": "probe"}, args.peers_python)

    def job(self, contender: str, adapters: list[str], **more) -> dict:
        job = {"contender": contender, "adapters": adapters, "dim": self.dim, **more}
        if self.quick:
            return _contenders.run(job)
        return run_child(job, self.args.peers_python if contender in self.peers else None)

    def has(self, peer: str) -> bool:
        return self.peers[peer] != "not installed"

    def write(
        self,
        name: str,
        shapes: dict,
        count: int | None = None,
        fixture: str = "shared",
        rank: int | None = None,
        shift: int = 0,
    ) -> list[str]:
        """Folders of adapters; `shift` is added to the seed, for updates that share nothing with the others."""
        where = self.folder / f"{'quick-' if self.quick else ''}{name}"
        count, seed = count or self.count, self.args.seed + shift
        return write_adapters(where, shapes, count, fixture=fixture, rank=rank or self.rank, seed=seed)

    def components(self, dim: int) -> int:
        return math.ceil(dim / self.rank)


def main_comparison(bench: Bench) -> dict:
    full = bench.write("whole", bench.shapes)
    single = {m: bench.write(m.replace(".", "-"), {m: bench.shapes[m]}) for m in bench.one_each}
    print(f"{len(full)} adapters on {len(bench.shapes)} modules are written.", flush=True)

    # Not timed: warms the page cache, and gives the errors and the number of iterations.
    mined = bench.job("ours", full, errors=True)
    errors = {"ours": mined["errors"], "vlora": None, "lorashare": {}}
    if bench.has("vlora"):
        errors["vlora"] = bench.job("vlora", full, errors=True, components=bench.components(bench.dim))["errors"]

    seen: dict[str, list[dict]] = {name: [] for name in ("ours", "read_only_warm", "read_only_cold", "vlora")}
    slow: dict[str, dict[str, dict]] = {"dense": {}, "lorashare": {}}

    def slow_part(name: str, round_: int) -> None:
        for module in bench.one_each[round_ :: bench.args.rounds]:
            more = {"modules": [module], "iterations": mined["iterations"][module], "errors": True}
            slow[name][module] = bench.job(name, single[module], **more)
            if name == "lorashare":
                errors[name].update(slow[name][module].pop("errors"))

    def reads(_: int) -> None:
        if hasattr(os, "posix_fadvise"):  # else the system cannot be told to drop a file
            seen["read_only_cold"].append(bench.job("read_only", full, drop_cache=True))
        seen["read_only_warm"].append(bench.job("read_only", full))

    turns = [reads, lambda r: seen["ours"].append(bench.job("ours", full)), lambda r: slow_part("dense", r)]
    if bench.has("vlora"):
        turns.append(lambda r: seen["vlora"].append(bench.job("vlora", full, components=bench.components(bench.dim))))
    if bench.has("lorashare"):
        turns.append(lambda r: slow_part("lorashare", r))
    for round_ in range(bench.args.rounds):
        for turn in turns[round_ % len(turns) :] + turns[: round_ % len(turns)]:
            turn(round_)
        print(
            f"round {round_ + 1} of {bench.args.rounds}: build_basis {seen['ours'][-1]['seconds']:.2f} s",
            flush=True,
        )
    if bench.args.whole_peers and bench.has("lorashare"):
        seen["lorashare"] = [bench.job("lorashare", full)]
        slow["lorashare"] = {}

    rows = {name: measured(runs) for name, runs in seen.items() if runs}
    per_shape = len(bench.shapes) // len(bench.one_each)
    for name, parts in slow.items():
        if parts:
            rows[name] = extrapolated(parts, per_shape)
    for peer in bench.peers:
        rows[peer] = rows.get(peer) or "not installed"
    ours = [run["seconds"] for run in seen["ours"]]
    for name, row in rows.items():
        if isinstance(row, dict):
            # Round by round where the contender ran in every round.
            pairs = zip((run["seconds"] for run in seen.get(name, [])), ours, strict=False)
            ratios = [theirs / own for theirs, own in pairs] or [row["seconds"]["median"] / median(ours)]
            row["times_ours"] = round(median(ratios), 3)
    return {
        "adapters": {
            "count": len(full),
            "rank": bench.rank,
            "modules": len(bench.shapes),
            "fixture": "shared",
            "mib": seen["read_only_warm"][0]["mib"],
        },
        "iterations": {
            "median": median(mined["iterations"].values()),
            "max": max(mined["iterations"].values()),
        },
        "contenders": rows,
        "difference_from_dense": {m: part["difference_from_ours"] for m, part in slow["dense"].items()},
        "errors": {
            name: {m: mean(found[m]) for m in bench.one_each if m in found} for name, found in errors.items() if found
        },
        "errors_all_modules": {
            name: mean([e for row in errors[name].values() for e in row]) for name in ("ours", "vlora") if errors[name]
        },
    }


def mean(values) -> float:
    values = list(values)
    return round(sum(values) / len(values), 5)


def measured(runs: list[dict]) -> dict:
    return {
        "extrapolated": False,
        "seconds": summary(r["seconds"] for r in runs),
        "cpu_seconds": summary(r["cpu_seconds"] for r in runs),
        **{
            key: max(r["memory"][key] for r in runs) if runs[0]["memory"][key] is not None else None
            for key in ("peak_rss_mib", "peak_anon_mib")
        },
    }


def extrapolated(parts: dict[str, dict], times: int) -> dict:
    row = measured(list(parts.values()))
    for key in ("seconds", "cpu_seconds"):
        row[key] = {"median": round(times * sum(p[key] for p in parts.values()), 2)}
    per_module = {m: round(p["seconds"], 3) for m, p in parts.items()}
    return row | {"extrapolated": True, "factor": times, "seconds_per_module": per_module}


def error_study(bench: Bench) -> list[dict]:
    """Mean error of every method on kinder and harsher adapters; two modules, for lorashare's sake."""
    shapes = {m: bench.shapes[m] for m in bench.one_each[:2]}
    rows = []
    for fixture in FIXTURES:
        adapters = bench.write(f"study-{fixture}", shapes, fixture=fixture)
        for dim in (bench.dim // 2, bench.dim, 2 * bench.dim) if fixture == "shared" else (bench.dim,):
            jobs = [("ours", {"dim": dim})]
            if bench.has("vlora"):
                jobs += [("vlora", {"components": bench.components(dim)})]
                jobs += [("vlora", {})] if dim == bench.dim else []
            if bench.has("lorashare"):
                jobs += [("lorashare", {"dim": dim})]
            for contender, choice in jobs:
                found = bench.job(contender, adapters, errors=True, **choice)
                # The outlier is adapter 0; what matters is how well the others are represented.
                keep = slice(1, None) if FIXTURES[fixture]["outlier"] else slice(None)
                kept = [e for row in found["errors"].values() for e in row[keep]]
                own = contender == "vlora" and not choice
                rows.append({
                    "fixture": fixture, "dim": dim, "contender": contender + (" own choice" if own else ""),
                    "error": mean(kept),
                    "worst": round(max(kept), 5),
                    "basis_parameters": found["basis_parameters"],
                    "parameters_per_adapter": found["parameters_per_adapter"],
                })  # fmt: skip
    return rows


def large(bench: Bench) -> dict:
    """Four attributes on all modules, and very many adapters on a quarter of them; once each."""
    names = ("texture", "geometry", "camera", "lighting")
    groups = {name: bench.write("whole" + f"-{i}" * (i > 0), bench.shapes, shift=i) for i, name in enumerate(names)}
    rows = {}
    run = bench.job("ours", [], groups=groups)
    rows["four_attributes"] = measured([run]) | {"modules": len(bench.shapes), "adapters": bench.count * len(names)}
    for i in range(1, len(names)):
        remove(groups[names[i]])
    count = 6 if bench.quick else 200
    quarter = dict(list(bench.shapes.items())[: max(1, len(bench.shapes) // 4)])
    adapters = bench.write("many", quarter, count=count)
    run = bench.job("ours", adapters)
    remove(adapters)
    whole = len(bench.shapes) / len(quarter)
    row = measured([run]) | {"modules": len(quarter), "adapters": count}
    rows["many_adapters"] = row | {"seconds_all_modules": round(row["seconds"]["median"] * whole, 2)}
    return rows


def remove(adapters: list[str]) -> None:
    """Adapters that take gigabytes are not kept for the next run."""
    shutil.rmtree(Path(adapters[0]).parent)


def scaling(bench: Bench) -> dict:
    """Seconds per module of build_basis against adapters k, their rank r, inputs m and outputs n; two modules each."""
    side = 32 if bench.quick else 1024
    axes = {
        "k": (3, 6, 20) if bench.quick else (10, 50, 200),
        "r": (2, 4) if bench.quick else (4, 16, 64),
        "m": (32, 64) if bench.quick else (1024, 2048, 4096),
        "n": (32, 64) if bench.quick else (1024, 2048, 4096),
    }
    usual = {"k": bench.count, "r": bench.rank, "m": side, "n": side}
    cases = {}
    for axis, values in axes.items():
        for value in values:
            at = usual | {axis: value}
            shapes = {f"blocks.{i}.fc": (at["m"], at["n"]) for i in range(2)}
            adapters = bench.write("-".join(f"{a}{v}" for a, v in at.items()), shapes, at["k"], rank=at["r"])
            cases[axis, value] = at, adapters
    seen: dict = {case: [] for case in cases}
    for _ in range(1 if bench.quick else 2):
        for case, (_, adapters) in cases.items():
            seen[case].append(bench.job("ours", adapters))
    result: dict = {axis: [] for axis in axes}
    for (axis, value), runs in seen.items():
        at, line = cases[axis, value][0], measured(runs)
        result[axis].append(
            at | {
                "modules": 2, "stacked_rank": at["k"] * at["r"],
                "seconds_per_module": round(line["seconds"]["median"] / 2, 4),
                "cpu_seconds_per_module": round(line["cpu_seconds"]["median"] / 2, 4),
                "iterations": round(mean(runs[0]["iterations"].values()), 1),
                "peak_rss_mib": line["peak_rss_mib"], "peak_anon_mib": line["peak_anon_mib"],
            }
        )  # fmt: skip
    return result


def targets(result: dict, bench: Bench) -> list[dict]:
    """What was asked of build_basis, what came out, and whether it is reached."""

    def goal(text: str, measured: float, at_most: float = math.inf, at_least: float = -math.inf) -> dict:
        return {"target": text, "measured": round(measured, 4), "reached": at_least <= measured <= at_most}

    rows, errors = result["contenders"], result["errors"]
    found = [
        goal("at least 100 times as fast as the dense form", rows["dense"]["times_ours"], at_least=100),
        goal("at most 5 s for one attribute on two cores", rows["ours"]["seconds"]["median"], at_most=5),
        goal("at most 20 s for four attributes", result["large"]["four_attributes"]["seconds"]["median"], at_most=20),
        goal(
            "at most 120 s for 200 adapters (a quarter of the modules measured, times four)",
            result["large"]["many_adapters"]["seconds_all_modules"],
            at_most=120,
        ),
    ]
    if rows["ours"]["peak_rss_mib"] is not None:
        found.append(goal("at most 1 GB (953 MiB) above the import", rows["ours"]["peak_rss_mib"], at_most=953))
    for peer in bench.peers:
        if not bench.has(peer):
            continue
        ratio = max(errors["ours"][m] / error for m, error in errors[peer].items())
        found.append(goal(f"error at most {peer}'s on all four shapes (ours / theirs, worst)", ratio, at_most=1))
        for fixture in FIXTURES:
            at = {(r["contender"], r["dim"]): r["error"] for r in result["error_study"] if r["fixture"] == fixture}
            ratio = max(at["ours", d] / error for (who, d), error in at.items() if who == peer)
            found.append(goal(f"error at most {peer}'s on adapters of the kind {fixture!r}", ratio, at_most=1))
    return found


def median_of(value: object) -> object:
    return value["median"] if isinstance(value, dict) else value


def show(result: dict) -> None:
    rows = []
    for name, row in result["contenders"].items():
        if isinstance(row, str):
            rows.append([name, row, "", "", "", ""])
            continue
        label = name + (" (extrapolated)" if row["extrapolated"] else "")
        keys = ("seconds", "cpu_seconds", "times_ours", "peak_rss_mib", "peak_anon_mib")
        rows.append([label, *(median_of(row[key]) for key in keys)])
    a = result["adapters"]
    table(
        f"{a['count']} adapters of rank {a['rank']} on {a['modules']} modules, {a['mib']} MiB",
        ["", "seconds", "CPU s", "times ours", "peak RSS MiB", "peak anon MiB"],
        rows,
    )
    errors = result["errors"]
    table(
        "Relative error, matched basis size",
        ["module", *errors],
        [[m.removeprefix("aggregator."), *(errors[c].get(m, "") for c in errors)] for m in errors["ours"]],
    )
    keys = ["fixture", "dim", "contender", "error", "worst", "basis_parameters", "parameters_per_adapter"]
    table("Relative error on other adapters", keys, [[r[key] for key in keys] for r in result["error_study"]])
    for axis, lines in result["scaling"].items():
        keys = ["seconds_per_module", "cpu_seconds_per_module", "iterations", "peak_rss_mib", "peak_anon_mib"]
        table(
            f"build_basis against {axis}",
            [axis, *keys],
            [[line[axis], *(line[k] for k in keys)] for line in lines],
        )
    keys = ["modules", "adapters", "seconds", "peak_rss_mib"]
    rows = [[name, *(median_of(row[key]) for key in keys)] for name, row in result["large"].items()]
    table("Larger jobs", ["", *keys], rows)
    table(
        "Targets",
        ["target", "measured", "reached"],
        [[t["target"], t["measured"], t["reached"]] for t in result["targets"]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", help="an interpreter that has vlora-dev and lorashare; default this one")
    parser.add_argument("--work-dir", help="where adapters are written and kept; default a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole-peers", action="store_true", help="run lorashare on all modules too (half an hour)")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: shows that the script works, measures nothing"
    )
    parser.add_argument("--output", help="JSON file; default results/build_basis.json, and none with --quick")
    args = parser.parse_args()
    args.rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as scratch:
        args.work_dir = args.work_dir or scratch
        bench = Bench(args)
        settings = {"rounds": args.rounds, "dim": bench.dim, "alpha": 1.0, "device": "cpu"}
        result = header("build_basis", args.seed, args.quick, **settings)
        result["versions"] |= {_contenders.PEERS[peer]: version for peer, version in bench.peers.items()}
        result |= main_comparison(bench)
        result["error_study"] = error_study(bench)
        result["scaling"] = scaling(bench)
        result["large"] = large(bench)
        result["targets"] = targets(result, bench)
        result["rules"] = RULES
    show(result)
    write_result(result, "build_basis", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
