"""How long do the project's own commands take, set-up excluded? Wall and CPU time of each as a whole process tree.

    python benchmarks/commands.py                            # all of them, an hour and a half on two cores
    python benchmarks/commands.py --only demo test --avx2    # with vector instructions capped at AVX2

--avx2 tells torch, oneDNN and MKL to use nothing beyond AVX2, and so gives the times of a CPU without AVX-512 and
without native bfloat16, but for its clock. Each command runs once, alone. A run replaces its own entries in
results/commands.json and keeps the others, each with its machine, versions and date.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import RESULTS, header, print_anything, table, write_result

ROOT = Path(__file__).resolve().parents[1]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
#: Name -> what is installed before the clock starts, and the command; OUT is a new folder.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "demo": (
        [".venv/.stamp-demo", ".venv/.stamp-system"],
        [".venv/bin/python", "examples/vggt/demo.py", "--out", "OUT"],
    ),
    "demo-digits": ([".venv/.stamp-demo"], [".venv/bin/python", "examples/digits.py", "--out", "OUT"]),
    "test": ([".venv/.stamp-dev", ".venv/.stamp-system"], ["make", "test"]),
    "test-slow": (
        [".venv/.stamp-dev", ".venv/.stamp-slurm", ".venv/.stamp-third-party", ".venv-cycles/.stamp"],
        ["make", "test-slow"],
    ),
    "bench": ([".venv/.stamp-dev"], ["make", "bench"]),
    "mini_study --quick": (
        [".venv/.stamp-dev"],
        [".venv/bin/python", "benchmarks/mini_study.py", "--quick", "--out", "OUT"],
    ),
}
RULES = {
    "seconds": "wall time of one run of the command alone, its set-up done before",
    "cpu_seconds": "user and system time of all its processes that were waited for",
    "setting": "native: as the machine is; avx2: the environment variables of machine.cpu_caps were set",
    "status": "exit status of the command; one that failed is not recorded",
}


def run(name: str) -> dict:
    """Seconds and exit status of one command."""
    stamps, command = COMMANDS[name]
    subprocess.run(["make", *stamps], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as scratch:
        words = [str(Path(scratch) / "out") if word == "OUT" else word for word in command]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        status = subprocess.run(words, cwd=ROOT).returncode
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    shown = ["python" if word.endswith("/python") else word for word in command if word not in ("--out", "OUT")]
    return {"command": " ".join(shown), "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "status": status}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS), metavar="NAME")
    parser.add_argument("--avx2", action="store_true", help="cap vector instructions at AVX2")
    parser.add_argument("--output", help="result file (default: benchmarks/results/commands.json)")
    args = parser.parse_args()
    if args.avx2:
        os.environ.update(AVX2)
    setting = "avx2" if args.avx2 else "native"
    path = Path(args.output) if args.output else RESULTS / "commands.json"
    for name in args.only:
        head = header("commands", 0, False)
        found = run(name) | {"setting": setting}
        if found["status"]:
            print(f"commands: {name} ended with status {found['status']}, and is not recorded", file=sys.stderr)
            return 1
        found |= {key: head[key] for key in ("date", "machine", "versions")}
        # Read again each time: another run may have added its own since.
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else {}
        runs[f"{name}, {setting}"] = found
        write_result(head | {"rules": RULES, "runs": runs}, "commands", args.output, quick=False)
        rows = [[key, one["seconds"], one["cpu_seconds"], one["status"]] for key, one in runs.items()]
        table("whole commands", ["", "seconds", "CPU s", "status"], rows)
    return 0


if __name__ == "__main__":
    print_anything()
    raise SystemExit(main())
