"""How much CPU does a command take before it does any work? --help, wrong arguments, small jobs, imports.

    python benchmarks/startup.py [--rounds 5] [--quick]

Every measurement is a process of its own. The small jobs are so small (adapters of rank 4 on eight linears of width
64) that what they take is what starting takes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import HERE, header, load, print_anything, summary, table, write_result

ROOT = HERE.parent
TARGET = 1.0  # CPU seconds
RULES = {
    "cpu_seconds": "user and system time of the process and of those it starts, by getrusage(RUSAGE_CHILDREN); the "
    "files are in the page cache, since one run of every command comes before those that count",
    "seconds": "from starting the process to its end",
    "status": "the exit status, which is 2 for wrong arguments",
    "job": "the command does its work, on eight linears of width 64; such a command needs torch, so that the row of "
    "`import torch` is its floor",
}


def commands(folder: Path) -> list[dict]:
    """group, name as it is shown, words after `python`, exit status."""

    def row(group: str, name: str, *words: str, status: int = 0) -> dict:
        return {"group": group, "name": name, "words": list(words), "status": status}

    def ours(group: str, *words: str, name: str = "", status: int = 0) -> dict:
        return row(group, f"peft-attrsub {name or ' '.join(words)}", "-m", "peft_attrsub", *words, status=status)

    def script(group: str, path: str, *words: str, name: str = "--help") -> dict:
        return row(group, f"{Path(path).name} {name}", str(ROOT / path), *(words or ("--help",)))

    adapters = [str(folder / "adapters" / f"texture-{i}") for i in range(3)]
    basis, made = str(folder / "basis"), str(folder / "made")
    vggt = ["demo", "evaluate", "finetune", "generate_scenes", "prepare_2k2k", "prepare_clearpose", "prepare_faces"]
    vggt += ["prepare_rooms", "prepare_thuman", "pretrain_mini", "train_lora_cluster"]
    return [
        row("import", "no import", "-c", "pass"),
        row("import", "import peft_attrsub", "-c", "import peft_attrsub"),
        row("import", "import torch", "-c", "import torch"),
        row("import", "import peft", "-c", "import peft"),
        row("import", "import peft_attrsub, peft", "-c", "import peft_attrsub, peft"),
        ours("help", "--help"),
        ours("help", "build-basis", "--help"),
        ours("help", "build-basis", "x", "-o", "y", "--dtype", "int8", status=2),
        script("help", "examples/digits.py"),
        *(script("help", f"examples/vggt/{name}.py") for name in vggt),
        script("help", "benchmarks/mini_study.py"),
        script("help", "examples/vggt/evaluate.py", "--table", str(folder / "run"), name="--table"),
        ours("job", "build-basis", *adapters, "-o", made, "--dim", "2", "--overwrite", name="build-basis"),
        ours("job", "info", basis, name="info"),
        ours("job", "combine", basis, "-o", made, "--overwrite", name="combine"),
        ours("job", "report", basis, "-o", str(folder / "report.html"), name="report"),
    ]


def prepare(folder: Path, seed: int) -> None:
    """Adapters, a basis and a finished run of evaluate.py, for the commands that need one."""
    from _adapters import vggt_shapes, write_adapters

    from peft_attrsub import build_basis
    from peft_attrsub.evaluation.tables import finish_run, ok_row, start_run, write_row

    made = write_adapters(folder / "made-adapters", vggt_shapes(1, 64), 3, rank=4, seed=seed)
    (folder / "adapters").mkdir()
    for i, adapter in enumerate(made):
        Path(adapter).rename(folder / "adapters" / f"texture-{i}")
    adapters = sorted(str(path) for path in (folder / "adapters").iterdir())
    build_basis({"texture": adapters}, dim=2, progress=False).save_pretrained(folder / "basis")
    run = folder / "run"
    start_run(run, {"benchmark": "human", "align": "sim3+icp"})
    write_row(run, ok_row("one", {"acc_mean": 0.5, "comp_mean": 0.25, "nc_mean": 0.75}))
    finish_run(run, ["one"], None, label="run", trainable_parameters=1, unit="height", frames="all", data="data")


def measure(one: dict) -> dict:
    """One start: seconds and CPU seconds."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *one["words"]], capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": path}
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != one["status"]:
        raise RuntimeError(f"{one['name']} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {"seconds": wall, "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def targets(cases: list[dict]) -> list[dict]:
    def goal(text: str, names: list[str]) -> dict:
        worst = max((case for case in cases if case["name"] in names), key=lambda case: case["cpu_seconds"]["median"])
        measured = worst["cpu_seconds"]["median"]
        return {"target": text, "measured": f"{measured:.2f} s ({worst['name']})", "reached": measured < TARGET}

    helps = [case["name"] for case in cases if case["group"] == "help" and "--table" not in case["name"]]
    return [
        goal("peft-attrsub --help: CPU below 1 s", ["peft-attrsub --help"]),
        goal("evaluate.py --table: CPU below 1 s", ["evaluate.py --table"]),
        goal("every other --help and wrong arguments: CPU below 1 s (the slowest)", helps),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the adapters")
    parser.add_argument("--quick", action="store_true", help="one round without a run before it: measures nothing")
    parser.add_argument("--output", help="JSON file; default results/startup.json, and none with --quick")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more.")
    rounds = 1 if args.quick else args.rounds
    result = header("startup", args.seed, args.quick, rounds=rounds)
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), args.seed)
        rows = commands(Path(scratch))
        seen: list[list[dict]] = [[] for _ in rows]
        for number in range(0 if args.quick else -1, rounds):
            for runs, one in zip(seen, rows, strict=True):
                found = measure(one)
                runs.extend([found] if number >= 0 else [])
            print(f"round {number + 1} of {rounds}" if number >= 0 else "one run of each before", flush=True)
    result["cases"] = [
        {key: one[key] for key in ("group", "name", "status")}
        | {key: summary(run[key] for run in runs) for key in ("cpu_seconds", "seconds")}
        for one, runs in zip(rows, seen, strict=True)
    ]
    result |= {"load_at_end": load(), "targets": targets(result["cases"]), "rules": RULES}
    columns = ["", "CPU s", "least", "most", "seconds"]
    shown = []
    for case in result["cases"]:
        cpu = case["cpu_seconds"]
        shown.append([case["name"], cpu["median"], cpu["min"], cpu["max"], case["seconds"]["median"]])
    table("CPU seconds of a start", columns, shown)
    table("Targets", ["target", "measured", "reached"], [list(goal.values()) for goal in result["targets"]])
    write_result(result, "startup", args.output, args.quick)


if __name__ == "__main__":
    print_anything()
    main()
