"""What a command loads before it knows what it has to do; and the tuner is registered whenever PEFT is loaded."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig
from tests.basis.helpers import SHAPES, random_factors, save_lora

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "peft", "transformers", "accelerate", "numpy", "scipy", "matplotlib", "plotly", "trimesh", "PIL")
LEARNING = ("torch", "peft", "transformers", "accelerate")

# Runs a command as `python ARGUMENTS` would, then tells on the last line of standard error what it has loaded.
RUNNER = """
import json, os, runpy, sys
target, sys.argv = sys.argv[1], sys.argv[1:]
try:
    if target.endswith(".py"):
        sys.path[0] = os.path.dirname(target)
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    code = 0
except SystemExit as error:
    code = error.code or 0
print("\\n" + json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]), file=sys.stderr)
"""


def run_fresh(code: str, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`code` in a new Python process that finds this checkout first."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def loaded(*command: object) -> tuple[int, set[str], str]:
    """Exit code, names of the packages loaded at the end, and standard output."""
    done = run_fresh(RUNNER, *command)
    try:
        code, names = json.loads(done.stderr.splitlines()[-1])
    except (IndexError, ValueError):
        raise AssertionError(done.stderr) from None
    return code, set(names), done.stdout


# Benchmarks of torch code, which import it at once.
OF_TORCH = ("build_basis", "checkpoint_size", "hotswap", "loading", "mixed", "report", "tuner", "vggt")
# Their options are dataclasses, which transformers parses.
PARSED_BY_TRANSFORMERS = ("finetune.py", "train_lora_cluster.py")
SCRIPTS = [
    path
    for folder in ("examples", "examples/vggt", "benchmarks")
    for path in sorted((ROOT / folder).glob("[!_]*.py"))
    if "__main__" in path.read_text(encoding="utf-8") and (folder != "benchmarks" or path.stem not in OF_TORCH)
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_of_a_script_loads_no_learning(path: Path) -> None:
    code, names, out = loaded(path, "--help")
    assert code == 0 and "usage:" in out
    allowed = {"transformers"} if path.name in PARSED_BY_TRANSFORMERS else set()
    assert not names & set(LEARNING) - allowed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["build-basis", "--help"], 0),
        (["report", "--help"], 0),
        (["export-lora", "--help"], 0),
        (["no-such-command"], 2),
        (["build-basis", "--dim", "many", "-o", "x", "y"], 2),
        (["build-basis", "somewhere", "-o", "x", "--dtype", "int8"], 2),
        (["build-basis", "user/same", "user/same", "-o", "x"], 2),
        (["convert", "file", "-o", "x", "--attributes", "light=4,light=8"], 2),
        (["project", "a", "--basis", "b", "-o", "."], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_help_and_wrong_arguments_load_nothing_heavy(arguments: list[str], expected: int) -> None:
    code, names, _ = loaded("peft_attrsub", *arguments)
    assert code == expected and not names & set(HEAVY)


def test_commands_on_a_basis_load_torch_alone(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        save_lora(tmp_path / "adapters" / f"texture-{i}", random_factors(SHAPES, 3, generator))
    adapters = sorted((tmp_path / "adapters").iterdir())
    basis = tmp_path / "basis"
    for command in (
        ["build-basis", *adapters, "-o", basis, "--dim", "2"],
        ["info", basis, "--verify"],
        ["combine", basis, "-o", tmp_path / "copy"],
        ["report", basis, "-o", tmp_path / "report.html"],
    ):
        code, names, out = loaded("peft_attrsub", *command)
        assert code == 0, out
        assert "torch" in names
        # sympy: brought by torch.distributed.tensor and torch.compile, and as slow to load as torch.
        assert not names & {"peft", "transformers", "accelerate", "matplotlib", "scipy", "sympy"}, command


def test_a_table_of_runs_loads_nothing_heavy(tmp_path: Path) -> None:
    from peft_attrsub.evaluation.tables import finish_run, ok_row, start_run, write_row

    run = tmp_path / "run"
    start_run(run, {"benchmark": "human", "align": "sim3+icp"})
    write_row(run, ok_row("one", {"acc_mean": 0.5, "comp_mean": 0.25, "nc_mean": 0.75}))
    finish_run(run, ["one"], None, label="mine", trainable_parameters=1, unit="height", frames="all", data="d")
    code, names, out = loaded(ROOT / "examples/vggt/evaluate.py", "--table", run)
    assert code == 0 and "mine" in out
    assert not names & set(HEAVY)


def test_import_loads_nothing_heavy() -> None:
    for name in ("peft_attrsub", "peft_attrsub.basis", "peft_attrsub.datasets", "peft_attrsub.evaluation"):
        done = run_fresh(f"import {name}, sys; print(sorted(sys.modules.keys() & {set(HEAVY)!r}))")
        assert done.stdout.strip() == "[]", done.stderr


def test_import_needs_nothing_that_is_optional() -> None:
    """`sys.modules[name] = None` makes Python behave as if the package were not installed."""
    optional = ("typer", "matplotlib", "plotly", "scipy", "sklearn", "bpy", "open3d", "trimesh", "PIL")
    hide = f"import sys; sys.modules.update(dict.fromkeys({optional!r}))"
    done = run_fresh(f"{hide}\nimport peft_attrsub\nprint(peft_attrsub.AttrSubspaceConfig, peft_attrsub.build_basis)")
    assert done.returncode == 0, done.stderr


# ---- the registration ----

# Imports PEFT once and forgets its own modules, so that each fork pays for those alone; torch and the rest stay.
# Each fork runs one case, then loads an adapter; a line of JSON on standard output: [name, what went wrong].
FORKS = """
import json, os, sys, threading, traceback
import torch, peft, peft.tuners.lora, transformers.pytorch_utils
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]

def check(adapter):
    from torch import nn
    from peft import PeftModel, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), adapter)
    assert model.peft_config["default"].peft_type is PeftType.ATTRSUB
    assert list(PeftType).count(PeftType.ATTRSUB) == 1
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "PeftFinder"]
    spec = sys.modules["peft"].__spec__
    assert type(spec).__name__ == "ModuleSpec" and spec.loader is sys.modules["peft"].__loader__
    assert type(spec.loader).__name__ == "SourceFileLoader" and not getattr(spec, "_initializing", False)

for name, code in json.loads(sys.argv[1]):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__", "check": check, "adapter": sys.argv[2]})
            check(sys.argv[2])
            wrong = ""
        except BaseException:
            wrong = traceback.format_exc()
        print(json.dumps([name, wrong]), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
OURS = {
    "the package": "import peft_attrsub",
    "a basis": "from peft_attrsub.basis import Basis",
    "the config": "from peft_attrsub import AttrSubspaceConfig",
    "a module": "import peft_attrsub.tuner.layer",
}
THEIRS = {"PEFT": "import peft", "a part of PEFT": "from peft.tuners.lora import LoraConfig"}
PARTIAL = """
# A plugin that PEFT itself imports, at an early or at a late import of PEFT's `__init__`.
import sys
from importlib.abc import MetaPathFinder
class Plugin(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {at!r} and "peft_attrsub" not in sys.modules:
            assert sys.modules["peft"].__spec__._initializing
            import peft_attrsub
            assert "peft_attrsub.tuner" not in sys.modules
sys.meta_path.insert(0, Plugin())
import peft
assert "peft_attrsub.tuner" in sys.modules
sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, Plugin)]
"""
RACE = """
import sys, threading
sys.setswitchinterval(1e-6)
import {first}
def run(statement):
    try:
        exec(statement)
        check(adapter)
    except BaseException:
        import traceback
        failures.append(traceback.format_exc())
failures, barrier = [], threading.Barrier(4)
threads = [threading.Thread(target=lambda one=one: (barrier.wait(), run(one))) for one in {statements!r}]
[thread.start() for thread in threads]
[thread.join(120) for thread in threads]
assert not any(thread.is_alive() for thread in threads), "the threads wait for each other"
assert not failures, failures[0]
"""
CASES = {
    **{f"{a}, then {b}": f"{OURS[a]}\n{THEIRS[b]}" for a, b in itertools.product(OURS, THEIRS)},
    **{f"{b}, then {a}": f"{THEIRS[b]}\n{OURS[a]}" for a, b in itertools.product(OURS, THEIRS)},
    "early in PEFT": PARTIAL.format(at="peft.config"),
    "late in PEFT": PARTIAL.format(at="peft.mixed_model"),
    "reloaded": """
import importlib, peft_attrsub
importlib.reload(peft_attrsub)
import peft
for module in (peft_attrsub, peft, peft_attrsub):
    importlib.reload(module)
""",
    "a second copy": """
import sys, peft_attrsub
for name in [name for name in sys.modules if name.partition(".")[0] == "peft_attrsub"]:
    del sys.modules[name]
import peft_attrsub, peft
""",
    "found by its spec": """
import copy, importlib.util, pickle, peft_attrsub
spec = importlib.util.find_spec("peft")
assert spec.loader.get_filename("peft") == spec.origin and spec.loader.is_package("peft")
assert "def get_peft_model" in importlib.util.find_spec("peft.mapping_func").loader.get_source("peft.mapping_func")
assert copy.copy(spec.loader).path == pickle.loads(pickle.dumps(spec.loader)).path == spec.origin
""",
    "loaded by its spec": """
import importlib.util, sys, peft_attrsub
spec = importlib.util.find_spec("peft")
sys.modules["peft"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.PeftType.ATTRSUB
""",
    "pickled": """
import pickle, peft_attrsub
kind = pickle.loads(b"cpeft_attrsub.tuner.config\\nAttrSubspaceConfig\\n.")
assert kind is peft_attrsub.AttrSubspaceConfig and pickle.loads(pickle.dumps(kind)) is kind
""",
    "PEFT fails once": """
import sys, peft_attrsub
sys.modules["peft.config"] = None
try:
    import peft
except ImportError:
    pass
else:
    raise AssertionError
assert "peft" not in sys.modules and "peft_attrsub.tuner" not in sys.modules
for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
    del sys.modules[name]
""",
    "the name is taken": """
import sys, peft_attrsub
class Taken:  # stands for a PEFT that has a method of this name
    def find_spec(self, name, path=None, target=None):
        if name == "peft_attrsub.tuner.config" and sys.modules["peft"].PeftType:
            raise RuntimeError("PEFT already has a method called ATTRSUB")
sys.meta_path.insert(0, taken := Taken())
for _ in range(2):
    try:
        import peft
    except RuntimeError as error:
        assert "ATTRSUB" in str(error)
    else:
        raise AssertionError("an error in the registration is lost")
sys.meta_path.remove(taken)
""",
    **{
        f"threads {i}, {first}": RACE.format(first=first, statements=statements)
        for first in ("sys", "peft_attrsub")
        for i, statements in enumerate([
            ["import peft_attrsub, peft", "import peft, peft_attrsub"] * 2,
            ["import peft_attrsub, peft", "from peft_attrsub import AttrSubspaceConfig"] * 2,
            ["import peft_attrsub, peft", "from peft_attrsub.tuner import AttrSubspaceLayer"] * 2,
            ["from peft_attrsub import hotswap_adapter", "from peft_attrsub.basis import build_basis, Basis"] * 2,
        ])
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{case: what went wrong}"""
    path = tmp_path_factory.mktemp("adapter")
    config = AttrSubspaceConfig(basis="random", dim=2, target_modules=["0", "1"])
    get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), config).save_pretrained(str(path))
    done = run_fresh(FORKS, json.dumps(list(CASES.items())), path)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_loads_in_whatever_order(registered: dict[str, str], case: str) -> None:
    assert registered[case] == ""


def test_a_spawned_process_unpickles_ours() -> None:
    code = """
import multiprocessing, peft_attrsub
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        config = peft_attrsub.AttrSubspaceConfig(basis="random", dim=3)
        print(pool.apply(getattr, (config, "dim")))
"""
    done = run_fresh(code)
    assert done.stdout.strip() == "3", done.stderr
