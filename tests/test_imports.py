"""Imports between rooms go one way, whether they are made at once or on the first use of a name.

A room is a folder of the package. What it may import of ours is the table in `MAY_IMPORT`; the files next to
the rooms (`__init__.py`, `cli.py`) stand on top and may import every room, and no room may import them. The files of
`PLUMBING` are below every room and import none.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
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
PLUMBING = {
    "_extras",
    "_files",
    "_lazy",
    "_machine",
    "_pictures",
}  # nothing about attribute subspaces: files, cores, pictures
OUTSIDE = {"tests", "examples", "benchmarks"}  # the package never reaches into these

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))


def imported_names(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in `source`, wherever in the file it stands.

    `from a import b` gives `a.b`: b may be a module. Relative imports are resolved against `module`, the
    dotted name of the file; `is_package`: the file is an `__init__.py`. Modules named in strings count too: those
    given to `import_module`, `__import__` and `lazy_names`, and every "peft_attrsub.room.module:name".
    """
    parts = module.split(".")
    here = parts if is_package else parts[:-1]

    def resolved(name: str) -> str:
        level = len(name) - len(name.lstrip("."))
        return ".".join([*here[: len(here) - level + 1], name[level:]]) if level else name

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
                yield node.lineno, resolved(str(target.value))
            elif name == "lazy_names":
                keys = [key for argument in node.args if isinstance(argument, ast.Dict) for key in argument.keys]
                yield from ((key.lineno, resolved(key.value)) for key in keys if isinstance(key, ast.Constant))
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?", str(node.value)):
            yield node.lineno, str(node.value).partition(":")[0]


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
    return list(dict.fromkeys(found))  # a module named in a call is a string as well


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
        code = (
            "import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location({name!r}, {str(ROOT / PACKAGE / name)!r} + '.py')\n"
            "module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module\n"
            "spec.loader.exec_module(module)\n"
            "print(sorted(sys.modules.keys() & {'torch', 'PIL', 'peft', 'transformers', 'scipy', 'open3d'}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        assert done.stdout.strip() == "[]", f"{name}: {done.stdout}{done.stderr}"


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
        ("import importlib\nimportlib.import_module('..tuner.layer', __name__)", "peft_attrsub.basis", True),
        ("__getattr__, __dir__ = lazy_names(__name__, {'..tuner': ['Linear']})", "peft_attrsub.basis", True),
        ("provide('sections', 'peft_attrsub.analysis.card:card_section')", "peft_attrsub.basis.card", False),
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
        ("from .._lazy import lazy_names", "peft_attrsub.basis", True),
        ("__getattr__, __dir__ = lazy_names(__name__, {'.irls': ['irls']})", "peft_attrsub.basis", True),
        ("say('peft_attrsub.analysis reads it')", "peft_attrsub.basis.card", False),
    ],
)
def test_a_right_import_passes(line: str, module: str, is_package: bool) -> None:
    assert violations(line, module, is_package) == []


LAZY = [path for path in FILES if path.name == "__init__.py" and "lazy_names(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", LAZY, ids=dotted)
def test_lazy_names_are_those_that_a_type_checker_sees(path: Path) -> None:
    """The imports under TYPE_CHECKING, the names given to `lazy_names`, and `__all__` say the same."""
    seen, lazy = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            for line in (child for child in node.body if isinstance(child, ast.ImportFrom) and child.module):
                seen |= {(f".{line.module}", alias.name) for alias in line.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "lazy_names":
            lazy = {(module, name) for module, names in ast.literal_eval(node.args[1]).items() for name in names}
    package = importlib.import_module(dotted(path))
    assert seen == lazy and {name for _, name in lazy} == set(package.__all__)
    assert not {name for _, name in lazy} & {file.stem for file in path.parent.glob("*.py")}, "a module takes the name"
    for module, name in lazy:
        assert getattr(package, name) is getattr(importlib.import_module(module, dotted(path)), name)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


@pytest.mark.slow
def test_mypy_knows_the_lazy_names_and_no_others(tmp_path: Path) -> None:
    lines = [
        "from peft_attrsub import AttrSubspaceConfig, Basis, build_basis, hotswap_adapter",
        "from peft_attrsub.datasets import open_benchmark",
        "import peft_attrsub.evaluation",
        "reveal_type(Basis.combine([]))",
        "reveal_type(build_basis)",
        "reveal_type(open_benchmark('human', '.').names)",
        "reveal_type(peft_attrsub.evaluation.umeyama)",
        "Basis.no_such_name",
        "peft_attrsub.evaluation.no_such_name",
        "from peft_attrsub import no_such_name",
    ]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(tmp_path / "cache"), str(tmp_path / "user.py")]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment)
    said = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if line.count(":") > 2}
    assert sorted(said) == [4, 5, 6, 7, 8, 9, 10], done.stdout + done.stderr
    assert "peft_attrsub.basis.basis.Basis" in said[4] and "-> peft_attrsub.basis.basis.Basis" in said[5]
    assert "tuple[" in said[6] and "Similarity" in said[7]
    assert all("no_such" in said[line] and "error" in said[line] for line in (8, 9, 10))
