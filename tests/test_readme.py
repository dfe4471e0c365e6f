"""What the README shows works: its ```python blocks and its `peft-attrsub` lines, from top to bottom.

Everything runs in one fresh Python process in an empty folder, so that a block may use what an earlier one
made, as a reader's session would. Of a ```bash block only the lines that start with `peft-attrsub` run.
Fences of any other language are shown, not run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "peft-attrsub"
# Fences may be indented (a block in a list); the closing one has at least as many backticks.
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}) *(?P<language>\w*)[^`\n]*$")

RUNNER = """
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for step in json.load(open(sys.argv[1], encoding="utf-8")):
    if step["language"] == "python":
        # Empty lines above the block make a traceback name the README's own line.
        exec(compile("\\n" * (step["line"] - 1) + step["code"], sys.argv[2], "exec"), namespace)
    else:
        print("$", step["code"], flush=True)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", step["code"]], stdin=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(f"{sys.argv[2]}, line {step['line']}: exit code {done.returncode} from: {step['code']}")
"""


@dataclass(frozen=True)
class Step:
    """One block of Python, or one command; `line` is its first line in the file, counted from 1."""

    language: str
    line: int
    code: str


def steps(text: str) -> list[Step]:
    """Everything in the Markdown `text` that is to run, in the order in which it stands there."""
    found: list[Step] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        at += 1
        if not opening:
            continue
        start, indent = at, len(opening["indent"])
        while at < len(lines) and not re.fullmatch(rf" *{opening['ticks']}`* *", lines[at]):
            at += 1
        if at == len(lines):
            raise ValueError(f"The block that opens on line {start} is never closed: add its closing fence.")
        body = [line[min(indent, len(line) - len(line.lstrip(" "))) :] for line in lines[start:at]]
        at += 1
        if opening["language"] == "python":
            found.append(Step("python", start + 1, "\n".join(body)))
        elif opening["language"] == "bash":
            found += commands(body, start + 1)
    return found


def commands(body: list[str], first_line: int) -> list[Step]:
    """The `peft-attrsub` lines of a bash block; a line that ends in a backslash goes on in the next."""
    found: list[Step] = []
    at = 0
    while at < len(body):
        start, code = at, body[at]
        while code.endswith("\\") and at + 1 < len(body):
            at += 1
            code = code[:-1] + body[at].lstrip()
        at += 1
        if code.split(maxsplit=1)[:1] == [COMMAND]:
            found.append(Step("bash", first_line + start, code))
    return found


def test_steps_of_a_small_page() -> None:
    page = """# Title
```python
a = 1

b = 2
```
text with `code`
- in a list:
  ```python
  if a:
      c = 3
  ```
```bash
pip install peft-attrsub
peft-attrsub build-basis one \\
    two -o basis   # comment
# peft-attrsub never
peft-attrsub info basis
```
```text
peft-attrsub not run
```
````markdown
```python
not_run()
```
````
"""
    assert steps(page) == [
        Step("python", 3, "a = 1\n\nb = 2"),
        Step("python", 10, "if a:\n    c = 3"),
        Step("bash", 15, "peft-attrsub build-basis one two -o basis   # comment"),
        Step("bash", 18, "peft-attrsub info basis"),
    ]


def test_an_unclosed_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 2 is never closed"):
        steps("text\n```python\na = 1\n")


def test_the_command_is_the_one_of_pyproject() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts[COMMAND].partition(":")
    assert callable(getattr(import_module(module), function))


def test_readme_runs(tmp_path: Path) -> None:
    todo = steps((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(step.language == "python" for step in todo), "README.md has no ```python block to run"

    bin_folder, folder = tmp_path / "bin", tmp_path / "reader"
    bin_folder.mkdir()
    folder.mkdir()
    runner, plan, command = tmp_path / "runner.py", tmp_path / "plan.json", bin_folder / COMMAND
    runner.write_text(RUNNER, encoding="utf-8")
    plan.write_text(json.dumps([asdict(step) for step in todo]), encoding="utf-8")
    # The command of this checkout, installed or not.
    command.write_text(f"#!{sys.executable}\nfrom peft_attrsub.cli import main\n\nmain()\n", encoding="utf-8")
    command.chmod(0o755)

    search = {"PATH": str(bin_folder), "PYTHONPATH": str(ROOT)}
    merged = {name: os.pathsep.join(filter(None, [first, os.environ.get(name)])) for name, first in search.items()}
    done = subprocess.run(
        [sys.executable, str(runner), str(plan), "README.md"],
        cwd=folder,
        env={**os.environ, **merged},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"README.md does not run as written:\n{done.stdout}"
