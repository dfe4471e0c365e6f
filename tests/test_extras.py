"""A package of an extra that is not there: one sentence, which names an extra that has it."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from peft_attrsub._extras import require

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def calls():
    """File, line, module and extra of every call of `require` in the package and the examples."""
    for folder in ("peft_attrsub", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                    module = node.args[0]
                    name = module.values[0].value if isinstance(module, ast.JoinedStr) else module.value
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", name.partition(".")[0], node.args[1].value


def packages(extra):
    """Names of the packages of an extra, in lower case."""
    return {re.match(r"[\w-]+", line)[0].lower() for line in EXTRAS[extra]}


def test_every_extra_that_is_named_brings_the_package():
    found = list(calls())
    assert len(found) > 15
    installed = importlib.metadata.packages_distributions()
    for where, module, extra in found:
        names = {name.lower() for name in installed.get(module, [module])} | {module.lower()}
        assert names & packages(extra), f"{where} says that the extra {extra!r} brings {module!r}"


@pytest.mark.parametrize(("module", "package"), [("PIL.Image", "Pillow"), ("scipy.io", "scipy")])
def test_a_package_that_is_missing(monkeypatch, module, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == module.partition(".")[0]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "ditable" not in repr(f)])
    with pytest.raises(ImportError) as caught:
        require(module, "eval", "drawing")
    assert str(caught.value) == f'drawing needs {package}: pip install "peft-attrsub[eval]".'


def test_a_package_that_is_broken_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_one.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"needs broken_one \(No module named 'no_such_module_at_all'\): pip"):
        require("broken_one", "eval", "drawing")
