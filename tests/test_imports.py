"""Imports between rooms go one way, and `import peft_attrsub` costs nothing that it need not cost.

A room is a folder of the package. What it may import of ours is the table in `MAY_IMPORT`; the files beside
the rooms (`__init__.py`, `cli.py`) stand on top and may import every room, and no room may import them. Files beside
the rooms whose names begin with an underscore (`PLUMBING`) are below every room and import none.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peft_attrsub"

MAY_IMPORT: dict[str, set[str]] = {
    "tuner": {"basis"},
    "basis": set(),
    "analysis": {"basis"},
    "vggt": set(),
    "scenes": set(),
    "datasets": {"vggt", "scenes"},
    "evaluation": set(),
}
PLUMBING = {"_files", "_machine", "_pictures"}  # nothing about attribute subspaces: files, cores, pictures
OUTSIDE = {"tests", "examples", "benchmarks"}  # the package never reaches into these
HEAVY = ("typer", "matplotlib", "plotly", "scipy", "sklearn", "bpy", "open3d")

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def imported_names(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in `source`, wherever in the file it stands.

    `from a import b` gives `a.b`: b may be a module. Relative imports are resolved against `module`, the
    dotted name of the file; `is_package`: the file is an `__init__.py`. `import_module("a.b")` counts too.
    """
    parts = module.split(".")
    here = parts if is_package else parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            stem = base + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, ".".join([*stem, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One sentence for every import in `source` that the table does not allow."""
    room = module.split(".")[1] if module.count(".") else ""
    found = []
    for line, name in imported_names(source, module, is_package):
        top, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if top in OUTSIDE:
            found.append(f"{module}, line {line}: imports {name}, which is not part of the package.")
        elif top == PACKAGE and room in PLUMBING and other not in PLUMBING:
            found.append(f"{module}, line {line}: imports {name}; plumbing imports nothing of the package.")
        elif top == PACKAGE and room in MAY_IMPORT and other not in MAY_IMPORT[room] | {room} | PLUMBING:
            allowed = ", ".join(sorted(MAY_IMPORT[room])) or "no other room"
            found.append(f"{module}, line {line}: imports {name}; the room {room} may import {allowed}.")
    return found


def dotted(path: Path) -> str:
    """`peft_attrsub/basis/irls.py` -> `peft_attrsub.basis.irls`; an `__init__.py` has its folder's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_one_way(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), dotted(path), path.name == "__init__.py") == []


def test_every_folder_is_a_room_of_the_table() -> None:
    rooms = {path.relative_to(ROOT / PACKAGE).parts[0] for path in FILES if path.parent != ROOT / PACKAGE}
    assert rooms, "no room was found: the package is not where this test looks for it"
    assert rooms <= set(MAY_IMPORT), f"{sorted(rooms - set(MAY_IMPORT))} are missing from the table MAY_IMPORT"


def test_the_plumbing_is_what_the_files_say() -> None:
    assert {path.stem for path in (ROOT / PACKAGE).glob("_*.py") if not path.stem.startswith("__")} == PLUMBING


def test_the_plumbing_imports_nothing_heavy() -> None:
    """The workers of the renderers load it without torch and without the package's own `__init__`."""
    for name in sorted(PLUMBING):
        loaded = run_fresh(
            "import importlib.util\n"
            f"spec = importlib.util.spec_from_file_location({name!r}, {str(ROOT / PACKAGE / name)!r} + '.py')\n"
            "module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module\n"
            "spec.loader.exec_module(module)\n"
            f"print(sorted(sys.modules.keys() & {{'torch', 'PIL', 'peft', 'transformers', *{HEAVY!r}}}))"
        )
        assert loaded == "[]", name


def test_the_table_has_no_circle() -> None:
    for room, below in MAY_IMPORT.items():
        seen, waiting = set(), list(below)
        while waiting:
            seen.add(waiting[-1])
            waiting.extend(MAY_IMPORT[waiting.pop()] - seen)
        assert room not in seen, f"the room {room} may import itself through {sorted(below)}"


@pytest.mark.parametrize(
    ("line", "module", "is_package"),
    [
        ("import peft_attrsub.tuner", "peft_attrsub.basis.irls", False),
        ("from peft_attrsub import tuner", "peft_attrsub.basis.irls", False),
        ("from peft_attrsub import AttrSubspaceConfig", "peft_attrsub.basis.irls", False),
        ("from ..tuner.layer import Linear", "peft_attrsub.basis.irls", False),
        ("from .. import cli", "peft_attrsub.basis.irls", False),
        ("from ..tuner import layer", "peft_attrsub.basis", True),
        ("from ...tuner import layer", "peft_attrsub.basis.deep.irls", False),
        ("def f():\n    from peft_attrsub.evaluation import metrics", "peft_attrsub.tuner.layer", False),
        ("import importlib\nimportlib.import_module('peft_attrsub.cli')", "peft_attrsub.tuner.layer", False),
        ("from tests.reference import slow", "peft_attrsub.tuner.layer", False),
        ("import examples.digits", "peft_attrsub.cli", False),
        ("from .basis import Basis", "peft_attrsub._pictures", False),
    ],
)
def test_a_wrong_import_is_found(line: str, module: str, is_package: bool) -> None:
    assert len(violations(line, module, is_package)) == 1


@pytest.mark.parametrize(
    ("line", "module", "is_package"),
    [
        ("from ..basis.store import Basis", "peft_attrsub.tuner.layer", False),
        ("from .layer import Linear", "peft_attrsub.tuner", True),
        ("from .._pictures import decode_picture", "peft_attrsub.tuner.layer", False),
        ("from peft_attrsub.basis import Basis", "peft_attrsub.analysis.spectrum", False),
        ("import torch\nfrom peft import PeftModel", "peft_attrsub.basis.irls", False),
        ("from .tuner import AttrSubspaceConfig", "peft_attrsub", True),
        ("from peft_attrsub.tuner import AttrSubspaceConfig", "peft_attrsub.cli", False),
        ("import peft_attrsub_extra.tuner", "peft_attrsub.basis.irls", False),
    ],
)
def test_a_right_import_passes(line: str, module: str, is_package: bool) -> None:
    assert violations(line, module, is_package) == []


def run_fresh(code: str) -> str:
    """Standard output of `code` in a new Python process that finds this checkout first."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_adds_nothing_heavy() -> None:
    """Only what PEFT's own import loads already: transformers takes scipy where it is installed."""
    count = f"print(sorted(sys.modules.keys() & set({HEAVY!r})))"
    before, after = run_fresh(f"import peft\n{count}\nimport peft_attrsub\n{count}").splitlines()
    assert after == before


def test_import_needs_nothing_heavy() -> None:
    """`sys.modules[name] = None` makes Python behave as if the package were not installed."""
    hide = f"sys.modules.update(dict.fromkeys({HEAVY!r}))"
    assert run_fresh(f"{hide}\nimport peft_attrsub\nprint(peft_attrsub.__version__)")
