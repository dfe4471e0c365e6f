"""The package and its scripts on machines unlike the one they were written on.

Each part fakes one thing that other machines lack: a UTF-8 locale, a home, POSIX modules, a network.
"""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig, Basis, build_basis, export_lora, project_lora
from tests.test_machine import environment, run_python

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for room in ("peft_attrsub", "examples", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
SCRIPTS = [path for path in SOURCES if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
SCRIPTS = [path for path in SCRIPTS if path.parts[-2] in ("examples", "vggt", "benchmarks") and path.name[0] != "_"]

#: No UTF-8 anywhere: what ssh, cron and slim containers give.
ASCII = {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": None}


# --------------------------------------------------------------------------------------------------------- encodings


def unnamed_encodings(source: str) -> Iterator[int]:
    """Lines of calls that read or write text in whatever encoding the machine prefers."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = {word.arg: word.value for word in node.keywords}
        if "encoding" in words:
            continue
        place = {"open": int(isinstance(node.func, ast.Name)), "fdopen": 1}.get(name)
        mode = words.get("mode", node.args[place] if place is not None and len(node.args) > place else None)
        text_mode = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwaxt+")
        if (
            (name == "read_text" and not node.args)
            or (name == "write_text" and len(node.args) < 2)
            or (place is not None and text_mode)
            or (isinstance(node.func, ast.Name) and name == "open" and mode is None)
            or (isinstance(words.get("text"), ast.Constant) and getattr(words["text"], "value", None) is True)
        ):
            yield node.lineno


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text(x)", True),
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("path.open('w')", True),
        ("os.fdopen(n, 'w')", True),
        ("subprocess.run(c, text=True)", True),
        ("open(p, 'rb')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("path.read_text('utf-8', 'replace')", False),
        ("Image.open(p)", False),
        ("os.open(p, os.O_RDWR)", False),
    ],
)
def test_an_unnamed_encoding_is_found(line: str, found: bool) -> None:
    assert bool(list(unnamed_encodings(line))) == found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_encoding_is_named(path: Path) -> None:
    assert list(unnamed_encodings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_prints_on_any_console(path: Path) -> None:
    _, _, start = path.read_text(encoding="utf-8").partition('if __name__ == "__main__":\n')
    assert (
        "from _console import run" in start or "print_anything()" in start or 'reconfigure(errors="replace")' in start
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_on_an_ascii_console(path: Path) -> None:
    done = run_python(str(path), "--help", **ASCII)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "usage" in done.stdout.lower() and "UnicodeEncodeError" not in done.stderr


# ------------------------------------------------------------------------------------------------------ small worlds


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def write_adapters(folder: Path, base_model: str | None = None) -> dict[str, list[str]]:
    """Four LoRAs in two attributes, with names that ASCII lacks."""
    groups: dict[str, list[str]] = {"light": [], "texture": []}
    for number in range(4):
        torch.manual_seed(number)
        name = f"übung-δ{number}"
        config = LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False)
        model = get_peft_model(Net(), config)
        model.peft_config["default"].base_model_name_or_path = base_model
        model.save_pretrained(str(folder / name))
        groups["light" if number < 2 else "texture"].append(str(folder / name))
    return groups


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four adapters and the basis that was built from them."""
    folder = tmp_path_factory.mktemp("wörld")
    build_basis(write_adapters(folder), dim=4).save_pretrained(folder / "basis")
    return folder


def cli(*arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "peft_attrsub", *arguments, **changes)


def test_the_commands_in_an_ascii_locale(world: Path, tmp_path: Path) -> None:
    """Names that the console cannot write end no run, and files are UTF-8 all the same."""
    adapters = [word for number in range(4) for word in ("--adapter", str(world / f"übung-δ{number}"))]
    done = cli("build-basis", *build_arguments(world), "--output", str(tmp_path / "out"), "--dim", "4", **ASCII)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Basis.from_pretrained(tmp_path / "out").digest == Basis.from_pretrained(world / "basis").digest
    page = tmp_path / "report.html"
    done = cli("report", str(tmp_path / "out"), "--output", str(page), "--draws", "2", *adapters[:2], **ASCII)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "×" in page.read_text(encoding="utf-8") and "δ0" in page.read_text(encoding="utf-8")
    done = cli("info", str(tmp_path / "out"), **ASCII)
    assert done.returncode == 0 and "texture" in done.stdout, done.stderr[-3000:]


def build_arguments(world: Path) -> list[str]:
    names = {"light": (0, 1), "texture": (2, 3)}
    return [f"{attribute}={world / f'übung-δ{n}'}" for attribute, numbers in names.items() for n in numbers]


# ------------------------------------------------------------------------------------------------------------- homes


@pytest.mark.parametrize("home", ["missing", "a file"])
def test_without_a_home(world: Path, tmp_path: Path, home: str) -> None:
    """No cache can be made below the home: nothing local needs one."""
    place = tmp_path / "home"
    if home == "a file":
        place.write_text("x", encoding="utf-8")
    else:
        place = place / "nowhere"
        (tmp_path / "home").write_text("x", encoding="utf-8")  # so that it cannot be made either
    gone = dict.fromkeys(
        ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    )
    changes = {**gone, "HOME": str(place), "USERPROFILE": str(place)}
    page = tmp_path / "report.html"
    figures = tmp_path / "figures"
    done = cli("info", str(world / "basis"), **changes)
    assert done.returncode == 0 and "texture" in done.stdout, done.stderr[-3000:]
    done = cli("report", str(world / "basis"), "-o", str(page), "--draws", "2", "--png", str(figures), **changes)
    assert done.returncode == 0 and page.is_file() and list(figures.iterdir()), done.stderr[-3000:]
    code = (
        "import torch\nfrom peft_attrsub.vggt import VggtModel\n"
        "print(VggtModel.from_pretrained('vggt-mini').predict(torch.rand(1, 3, 80, 80)).points.isfinite().all())"
    )
    done = run_python("-c", code, **changes)
    assert done.returncode == 0 and "True" in done.stdout, done.stderr[-3000:]


# --------------------------------------------------------------------------------------------------- other systems

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "peft_attrsub").rglob("*.py")
    if path.name != "__main__.py"
)
EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT / "examples/vggt").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "examples/vggt").rglob("*.py")
    if "demonstration" not in path.parts and path.name != "demo.py"
)
WITHOUT_POSIX = """
import importlib, json, os, signal, sys
import numpy, torch, peft, transformers, huggingface_hub, accelerate  # what others do at import is theirs
names = json.loads(sys.argv[1])
for module in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[module] = None
for function in ("sched_getaffinity", "sched_setaffinity", "killpg", "getuid", "sysconf", "getloadavg", "fork"):
    if hasattr(os, function):
        delattr(os, function)
for name in ("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if "bpy" not in str(error) and "halted" in str(error) and "peft_attrsub" not in str(error):
            raise
print("imported")
"""


@pytest.mark.parametrize("names", [MODULES, EXAMPLES], ids=["package", "examples"])
def test_everything_is_imported_without_posix(names: list[str]) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples/vggt")])
    done = run_python("-c", WITHOUT_POSIX, json.dumps(names), PYTHONPATH=path)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr[-3000:]


def test_files_and_locks_without_posix(tmp_path: Path) -> None:
    """Windows' own lock, faked: a second holder is refused, and writers do without permissions and renameat2."""
    code = """
import ctypes, os, sys, types
from pathlib import Path
from peft_attrsub import Basis, _files, _machine  # before: torch asks for Windows' modules itself
sys.modules["fcntl"] = sys.modules["resource"] = None
held = set()
def locking(handle, kind, size):
    if os.fstat(handle).st_ino in held:
        raise OSError(13, "denied")
    held.add(os.fstat(handle).st_ino)
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
def no_library(*_, **__):
    raise TypeError("bad argument type for built-in operation")  # what Windows says of CDLL(None)
ctypes.CDLL = no_library
folder = Path(sys.argv[1])
with _files.locked(folder / "lock", "taken"):
    try:
        with _files.locked(folder / "lock", "taken"):
            print("not locked")
    except BlockingIOError as error:
        print("refused:", error)
_machine.release_memory()
print(_machine.peak_memory(), _machine.available_cores() >= 1)
basis = Basis.from_pretrained(sys.argv[2])
for _ in range(2):
    basis.save_pretrained(folder / "copy", overwrite=True)
print(Basis.from_pretrained(folder / "copy").digest == basis.digest, sorted(p.name for p in folder.iterdir()))
"""
    torch.manual_seed(0)
    build_basis(write_adapters(tmp_path / "adapters"), dim=4).save_pretrained(tmp_path / "basis")
    (tmp_path / "work").mkdir()
    done = run_python("-c", code, str(tmp_path / "work"), str(tmp_path / "basis"))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("refused:") and "taken" in lines[0]
    assert lines[1:] == ["None True", "True ['copy', 'lock']"]


# ----------------------------------------------------------------------------------------------------------- network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A resolver that answers nothing: every question that is asked of it is noted, and an error."""
    asked: list[object] = []

    def getaddrinfo(host: object, *rest: object, **words: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def test_nothing_local_asks_the_network(no_network: list[object], tmp_path: Path) -> None:
    from peft_attrsub.vggt import VggtConfig, VggtImageProcessor, VggtModel

    torch.manual_seed(0)
    base = tmp_path / "base model"
    groups = write_adapters(tmp_path / "adapters", base_model=str(base))
    basis = tmp_path / "basis"
    build_basis(groups, dim=4).save_pretrained(basis)
    Basis.from_pretrained(basis).verify()
    torch.manual_seed(1)
    config = AttrSubspaceConfig(basis=str(basis), target_modules=["first", "second"], init_weights=False)
    model = get_peft_model(Net(), config)
    model.save_pretrained(str(tmp_path / "core"))
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(Net(), str(tmp_path / "core"))
    x = torch.rand(3, 12)
    assert torch.equal(again(x), model(x))
    export_lora(tmp_path / "core", tmp_path / "lora")
    project_lora(tmp_path / "lora", basis, tmp_path / "projected")
    for name in ("vggt-mini", str(ROOT / "examples/vggt/vggt-mini")):
        vggt = VggtModel.from_pretrained(name)
        VggtConfig.from_pretrained(name)
        VggtImageProcessor.from_pretrained(name)
    picture = np.zeros((80, 80, 3), np.uint8)
    assert vggt.predict(picture).points.isfinite().all()
    lora = get_peft_model(vggt, LoraConfig(r=2, target_modules=r".*blocks\.\d+\.attn\.qkv"))
    # Else PEFT itself asks the Hub whether the vocabulary of "vggt-mini" is the base's.
    lora.save_pretrained(str(tmp_path / "vggt-lora"), save_embedding_layers=False)
    PeftModel.from_pretrained(VggtModel.from_pretrained("vggt-mini"), str(tmp_path / "vggt-lora"))
    assert no_network == []


def test_a_resolver_that_refuses_is_a_sentence(no_network: list[object], tmp_path: Path) -> None:
    from peft_attrsub import BasisError

    with pytest.raises(BasisError, match=r"somebody/basis' is not in the local cache, and the Hub .* was not reached"):
        Basis.from_pretrained("somebody/basis", cache_dir=tmp_path)
    assert no_network


def test_the_faked_environment_is_what_it_says() -> None:
    code = "import os, sys; print(sys.stdout.encoding, os.environ.get('LANG'))"
    assert run_python("-c", code, **ASCII).stdout.split()[1] == "None"
    assert "LANG" not in environment(LANG=None)
