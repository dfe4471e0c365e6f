"""What a command writes: only where it may, whole or not at all, and nothing of others is lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_attrsub import Basis, build_basis
from tests.basis.helpers import random_factors, save_lora

from .zygote import ROOT

NET = {"0": (10, 12), "2": (8, 10)}
OURS = {"README.md", "basis.safetensors", "basis_records.safetensors", "basis_config.json"}


@pytest.fixture
def basis(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = [save_lora(tmp_path / "sources" / f"tone-{i}", random_factors(NET, 3, generator)) for i in range(2)]
    build_basis({"tone": paths}, dim=2, progress=False).save_pretrained(tmp_path / "basis")
    return tmp_path / "basis"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("seed", range(6))
def test_overwrite_replaces_only_what_we_wrote(cli, basis, tmp_path, seed):
    draw = random.Random(seed)
    target = tmp_path / "target"
    Basis.from_pretrained(basis).save_pretrained(target)
    strange = draw.sample(
        [
            "notes.txt",
            "tokenizer.json",
            "checkpoint-9/optimizer.pt",
            "model.safetensors",
            ".env",
            "src/x.py",
            "basis.bak",
        ],
        draw.randint(0, 2),
    )
    passing = draw.sample([".gitattributes", ".cache/huggingface/x", "figures/spectra.png"], draw.randint(0, 3))
    for name in [*strange, *passing]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine")
    before = tree(target)
    done = cli("select", basis, "--dim", 1, "-o", target, "--overwrite")
    if strange:
        assert done.code == 2 and "is not replaced: move them away" in done.err
        assert any(repr(Path(name).parts[0]) in done.err for name in strange)
        assert tree(target) == before
    else:
        assert done.code == 0, done.err
        assert set(tree(target)) == OURS and Basis.from_pretrained(target).dim("0", "tone") == 1


def test_an_adapter_of_another_kind_is_not_replaced(cli, basis, tmp_path):
    source = tmp_path / "sources" / "tone-0"
    assert cli("project", source, "--basis", basis, "-o", tmp_path / "cores").code == 0
    lora = save_lora(tmp_path / "lora", random_factors(NET, 3, torch.Generator().manual_seed(5)))
    before = tree(Path(lora)), tree(tmp_path / "cores")
    done = cli("project", source, "--basis", basis, "-o", lora, "--overwrite")
    assert done.code == 2 and "holds an adapter of PEFT type LORA, and not ATTRSUB" in done.err
    other = save_lora(tmp_path / "other", random_factors(NET, 3, torch.Generator().manual_seed(6)))
    cli("project", other, "--basis", basis, "-o", tmp_path / "cores-2")
    done = cli("export-lora", tmp_path / "cores-2", "-o", tmp_path / "cores", "--overwrite")
    assert done.code == 2 and "holds an adapter of PEFT type ATTRSUB, and not LORA" in done.err
    onto_itself = (
        ["project", source, "--basis", basis, "-o", source],
        ["export-lora", tmp_path / "cores", "-o", tmp_path / "cores"],
    )
    for words in onto_itself:
        done = cli(*words, "--overwrite")
        assert done.code == 2 and "which is read for it" in done.err
    assert (tree(Path(lora)), tree(tmp_path / "cores")) == before
    # The same kinds are replaced.
    assert cli("project", other, "--basis", basis, "-o", tmp_path / "cores", "--overwrite").code == 0
    assert cli("export-lora", tmp_path / "cores-2", "-o", lora, "--overwrite").code == 0


def test_a_link_as_output_is_followed(cli, basis, tmp_path):
    real = tmp_path / "disk" / "real"
    Basis.from_pretrained(basis).save_pretrained(real)
    (tmp_path / "link").symlink_to(real)
    assert cli("select", basis, "--dim", 1, "-o", tmp_path / "link", "--overwrite").code == 0
    assert (tmp_path / "link").is_symlink() and Basis.from_pretrained(real).dim("0", "tone") == 1
    assert [p.name for p in real.parent.iterdir()] == ["real"]
    (tmp_path / "page").write_text("old")
    (tmp_path / "report.html").symlink_to(tmp_path / "page")
    assert cli("report", basis, "-o", tmp_path / "report.html").code == 0
    assert (tmp_path / "report.html").is_symlink() and "<html" in (tmp_path / "page").read_text()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for words in (["select", basis], ["report", basis]):
        done = cli(*words, "-o", tmp_path / "dangling")
        assert done.code == 2 and "which does not exist: remove the link" in done.err
    assert not (tmp_path / "nowhere").exists()


def test_places_that_cannot_be_written_are_found_before_the_work(cli, basis, tmp_path):
    (tmp_path / "file").write_text("x")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    places = [(tmp_path / "file", "is a file"), (tmp_path / "file" / "x" / "out", "is not a folder")]
    places += [("/proc/none/out", "cannot be written")]
    if os.geteuid():
        places.append((locked / "out", "cannot be written (Permission denied)"))
    for place, words in places:
        # The adapter is absent, which would be said later.
        done = cli("build-basis", f"x={tmp_path / 'gone'}", "-o", place)
        assert done.code == 2 and words in done.err and "gone" not in done.err, done.err
        done = cli("report", basis, "-o", place / "page.html" if isinstance(place, Path) else f"{place}/page.html")
        assert done.code == 2 and "Traceback" not in done.err
    assert list(locked.iterdir()) == [] and (tmp_path / "file").read_text() == "x"


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from peft_attrsub.cli import main
sys.argv = ["peft-attrsub", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("limit", [1000])
def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(basis, tmp_path, limit):
    """A limit on the size of files stands for a full disk, in every command that writes."""
    (tmp_path / "out").mkdir()
    source = tmp_path / "sources" / "tone-0"
    commands = {
        "build-basis": [source, "-o", "basis"],
        "select": [basis, "-o", "part"],
        "project": [source, "--basis", basis, "-o", "cores"],
        "report": [basis, "-o", "page.html", "--json-file", "numbers.json"],
    }
    for command, words in commands.items():
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), command, *map(str, words)],
            cwd=tmp_path / "out",
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, (command, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert "cannot be written (File too large)" in last and "Traceback" not in done.stderr, done.stderr
        assert list((tmp_path / "out").iterdir()) == [], command


def test_a_killed_report_is_cleared_by_the_next(cli, basis, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = 0
    for at in (1, 2, 3, 5, 8, 40):
        run = cli.start("report", basis, "-o", out / "page.html", crash_at=at, crash_in=str(out)).wait()
        left = max(left, len(list(out.iterdir())))
        assert not (out / "page.html").exists() or "</html>" in (out / "page.html").read_text()
        if run.code == 0:
            break
    assert left, "nothing was ever left"
    assert cli("report", basis, "-o", out / "page.html").code == 0
    assert [p.name for p in out.iterdir()] == ["page.html"]


def test_json_is_a_flag_everywhere(cli, basis, tmp_path):
    source = tmp_path / "sources" / "tone-0"
    cli("project", source, "--basis", basis, "-o", tmp_path / "cores")
    for words in (
        ["info", basis],
        ["build-basis", source, "-o", tmp_path / "a"],
        ["select", basis, "-o", tmp_path / "b"],
        ["rename", basis, "tone=sound", "-o", tmp_path / "c"],
        ["combine", basis, "-o", tmp_path / "d"],
        ["project", source, "--basis", basis, "-o", tmp_path / "e"],
        ["export-lora", tmp_path / "cores", "-o", tmp_path / "f"],
        ["report", basis, "-o", tmp_path / "g.html", "--json-file", tmp_path / "g.json"],
    ):
        done = cli(*words, "--json")
        assert done.code == 0 and isinstance(json.loads(done.out), dict), (words, done.out)
    assert "spectra" in (tmp_path / "g.json").read_text() or json.loads((tmp_path / "g.json").read_text())
    same = cli("report", basis, "-o", tmp_path / "h", "--json-file", tmp_path / "h")
    assert same.code == 2 and "must be different files" in same.err


def test_a_combined_basis_keeps_the_base_and_the_dtypes(cli, basis, tmp_path):
    wide = Basis.from_pretrained(basis).rename({"tone": "wide"})
    wide.config.base_model = None
    wide.save_pretrained(tmp_path / "wide")
    Basis.from_pretrained(basis).rename({"tone": "half"}).save_pretrained(tmp_path / "half", dtype="bfloat16")
    done = cli("combine", tmp_path / "wide", tmp_path / "half", "-o", tmp_path / "both", "--json")
    assert done.code == 0, done.err
    assert [(a["name"], a["dtype"]) for a in done.json["attributes"]] == [("wide", "float32"), ("half", "bfloat16")]
    assert done.json["base_model"] == "toy/base"
    stored = load_file(tmp_path / "both" / "basis.safetensors")
    assert stored["wide.0.S"].dtype == torch.float32 and stored["half.0.S"].dtype == torch.bfloat16
    assert "half (bfloat16)" in cli("info", tmp_path / "both").out
