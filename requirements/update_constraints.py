"""Renew constraints.txt and constraints-cycles.txt: the newest releases that are known to work together.

    python requirements/update_constraints.py      # TORCH=torch==2.13.0 chooses the build of torch to resolve with

Resolves the project with the extras of `make test`, `make demo` and `make test-slow` in a new virtual environment,
asks tests/pairs.py which third-party pairs are broken, and steps the package it names back, release by release, until
none is. Torch and all that torch requires stay out of the files: the build of torch is the caller's choice. Both files
are replaced at the end, or neither. Run it on the oldest Python that the project supports.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "requirements"
TORCH = os.environ.get("TORCH", "torch")
#: What .venv ever holds: the extras of the targets, what the slow test of Depth Anything 3 adds, and the libraries
#: that the slow tests of tests/conformance and tests/tuner run.
MAIN = [".[demo,dev,eval,report,slurm,train,vggt]", "addict", "einops", "omegaconf"]
MAIN += ["bitsandbytes", "datasets", "deepspeed", "diffusers", "hqq", "optimum-quanto", "sentence-transformers", "trl"]
#: Blender's bpy wants an older numpy, and has an environment of its own (`make test-cycles`).
CYCLES = [".[scenes]", "numpy<2", "hypothesis", "pytest", "pytest-timeout"]
SHARED = ("accelerate", "huggingface-hub", "peft", "safetensors", "transformers")
#: Steps back before the search gives up.
MOST_STEPS = 10

# Prints "name==version" of everything installed but torch and what nothing else requires.
_FREEZE = """
import importlib.metadata, re
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as plain
found = {plain(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
def needs(name):
    # Extras count as wanted: a pin for what is not installed harms nobody.
    for text in found[name].requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield plain(requirement.name)
closure, waiting = set(), ["torch"]
while waiting:
    name = waiting.pop()
    if name in found and name not in closure:
        closure.add(name)
        waiting.extend(needs(name))
for name in sorted(found.keys() - closure - {"peft-attrsub", "pip", "setuptools", "wheel"}):
    print(f"{name}=={found[name].version}")
"""


def run(*command: str | Path, **more: object) -> str:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, **more)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return str(done.stdout)


def environment(folder: Path, requirements: list[str], pins: list[str]) -> Path:
    """Python of a new virtual environment with torch and the requirements."""
    run(sys.executable, "-m", "venv", "--clear", folder)
    python = folder / "bin" / "python"
    constraints = folder / "pins.txt"
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, TORCH, "packaging")
    run(*pip, "--constraint", constraints, "--editable", requirements[0], *requirements[1:])
    return python


def broken(python: Path) -> dict[str, str]:
    """Package that should step back -> why, from tests/pairs.py."""
    done = subprocess.run([python, "tests/pairs.py"], cwd=ROOT, capture_output=True, text=True)
    pairs = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    if bool(done.returncode) != bool(pairs):
        raise SystemExit(f"tests/pairs.py failed:\n{done.stderr[-4000:]}")
    return pairs


def pins_of(python: Path) -> list[str]:
    return run(python, "-c", _FREEZE).split()


def resolve(folder: Path) -> tuple[list[str], list[str]]:
    """Pins of the main environment, and a sentence for each step back."""
    below: dict[str, str] = {}
    said: list[str] = []
    for _ in range(MOST_STEPS):
        python = environment(folder, MAIN, [f"{name}<{version}" for name, version in below.items()])
        pins = pins_of(python)
        pairs = broken(python)
        if not pairs:
            return pins, said
        for package, why in pairs.items():
            said.append(why)
            below[package] = next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{package}=="))
            print(why, flush=True)
    raise SystemExit(f"no working set within {MOST_STEPS} steps: {'; '.join(said)}")


def text(pins: list[str], title: str, said: list[str]) -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    head = [f"# {title}", f"# Made by requirements/update_constraints.py on {date.today()} with Python {python}."]
    head += [f"# Held back: {sentence}" for sentence in said]
    return "\n".join([*head, *pins]) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pins, said = resolve(Path(folder) / "main")
        # The packages that matter are the same in both environments.
        shared = [pin for pin in pins if pin.partition("==")[0] in SHARED]
        cycles = pins_of(environment(Path(folder) / "cycles", CYCLES, shared))
        files = {
            "constraints.txt": text(pins, "Versions for `make demo`, `make test` and `make lint`.", said),
            "constraints-cycles.txt": text(cycles, "Versions for `make test-cycles`.", []),
        }
        for name, content in files.items():
            (HERE / f"{name}.partial").write_text(content, encoding="utf-8")
        for name in files:
            os.replace(HERE / f"{name}.partial", HERE / name)
            print(f"requirements/{name}: {files[name].count('==')} versions")


if __name__ == "__main__":
    main()
