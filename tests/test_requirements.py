"""The versions that `make` installs: pins within our bounds, lower bounds, and the build of torch."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = ("constraints.txt", "constraints-cycles.txt")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "requirements" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name):
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return {(one := Requirement(line)).name: next(iter(one.specifier)).version for line in lines if line[:1] != "#"}


def declared():
    """Every requirement of ours, with those of all extras."""
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        yield Requirement(line)


@pytest.mark.parametrize("name", FILES)
def test_pins_lie_within_the_bounds_and_leave_torch_to_the_caller(name):
    found = pins(name)
    assert not [pin for pin in found if re.match(r"torch$|nvidia|triton|cuda", pin)]
    wanted = [one for one in declared() if canonicalize_name(one.name) in found]
    assert len(wanted) > 10
    for one in wanted:
        assert found[canonicalize_name(one.name)] in one.specifier, one


def test_all_that_the_two_commands_install_is_pinned():
    project, found = PROJECT["optional-dependencies"], pins("constraints.txt")
    lines = [*PROJECT["dependencies"], *project["dev"], *project["demo"]]
    here = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    assert {canonicalize_name(one.name) for one in here} - found.keys() == {"torch"}


def test_every_requirement_of_the_package_has_a_lower_bound():
    done = subprocess.run(
        [sys.executable, "requirements/bounds.py", "oldest"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    oldest = {one.name: one for one in map(Requirement, done.stdout.split())}
    assert oldest.keys() == {Requirement(line).name for line in PROJECT["dependencies"]}
    for one in map(Requirement, PROJECT["dependencies"]):
        assert next(iter(oldest[one.name].specifier)).version in one.specifier


LISTING = "torch ({0})\nAvailable versions: {1}\n"


@pytest.mark.parametrize(
    ("listing", "chosen"),
    [
        ("2.15.0, 2.14.1, 2.13.0+cpu, 2.13.0, 2.12.0+cpu", "torch==2.13.0+cpu"),
        ("2.15.0+cpu, 2.15.0", "torch==2.15.0+cpu"),
        ("2.15.0, 2.14.1+cu130, 2.14.1", "torch"),
        ("", "torch"),
    ],
)
def test_a_cpu_build_is_taken_where_an_index_offers_one(monkeypatch, capsys, listing, chosen):
    module = script("choose_torch")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(module, "pip", lambda *words: LISTING.format("x", listing) if words[0] == "index" else "")
    assert module.choose("torch") == chosen
    assert ("installing the CPU build" in capsys.readouterr().err) == ("+cpu" in chosen)


@pytest.mark.parametrize(
    ("platform", "gpu", "asked"),
    [("linux", True, "torch"), ("darwin", False, "torch"), ("linux", False, "torch>=2.9")],
)
def test_nothing_is_asked_where_the_choice_is_the_callers_or_plain(monkeypatch, platform, gpu, asked):
    module = script("choose_torch")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(module, "pip", lambda *words: pytest.fail("pip was asked"))
    assert module.choose(asked) == asked


def test_a_cuda_build_is_announced_with_its_size(tmp_path):
    names = ("torch-2.15.0-cp311-linux_x86_64.whl", "nvidia_cudnn-9-py3-none-any.whl", "triton-3-cp311.whl")
    for name in names:
        with (tmp_path / name).open("wb") as file:
            file.truncate(400_000_000)
    urls = [(tmp_path / name).as_uri() for name in names]

    def report(*chosen):
        return json.dumps({"install": [{"download_info": {"url": url}} for url in chosen]})

    module = script("choose_torch")
    sentence = module.warning(report(*urls))
    assert "1.2 GB to download in 3 files, 2 of them for CUDA only" in sentence and "TORCH=" in sentence
    assert "several GB" in module.warning(report(*urls, (tmp_path / "missing.whl").as_uri()))
    assert module.warning(report(urls[0])) is None and module.warning("no JSON") is None
