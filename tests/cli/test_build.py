"""peft-attrsub build-basis: grouping, what it prints, what it writes."""

import json
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch

from peft_attrsub import Basis, build_basis
from tests.basis.helpers import SHAPES

from .zygote import ROOT


def ok(result):
    assert result.code == 0, result.err
    return result


def test_group_by_name_without_number(cli, adapters, tmp_path):
    result = ok(cli("build-basis", *sorted(adapters.iterdir()), "-o", tmp_path / "basis", "--dim", 2))
    basis = Basis.from_pretrained(tmp_path / "basis")
    assert sorted(basis.attributes) == ["geometry", "texture"]
    assert basis.weights("block.0.fc", "texture").shape == (3,)
    printed = result.out + result.err
    for word in ("texture", "geometry", "texture-0", "geometry-2"):
        assert word in printed, "the grouping must be shown"
    basis.verify()


def test_same_as_the_function(cli, adapters, tmp_path):
    ok(
        cli(
            "build-basis",
            *sorted(adapters.glob("texture-*")),
            "-o",
            tmp_path / "basis",
            "--dim",
            2,
            "--alpha",
            0.7,
        )
    )
    made = Basis.from_pretrained(tmp_path / "basis")
    expected = build_basis({"texture": sorted(adapters.glob("texture-*"))}, dim=2, alpha=0.7, progress=False)
    assert made.digest == expected.digest


def test_folder_of_adapters_is_an_attribute(cli, adapters, tmp_path):
    for name in ("texture", "geometry"):
        (tmp_path / "grouped" / name).mkdir(parents=True)
        for i in range(3):
            shutil.move(adapters / f"{name}-{i}", tmp_path / "grouped" / name / f"run{i}-final")
    grouped = tmp_path / "grouped"
    ok(cli("build-basis", grouped / "texture", str(grouped / "geometry") + "/", "-o", tmp_path / "basis"))
    basis = Basis.from_pretrained(tmp_path / "basis")
    assert basis.attributes == ["texture", "geometry"], "in the order given"
    assert basis.weights("block.0.fc", "geometry").shape == (3,)


def test_explicit_attribute_wins(cli, adapters, tmp_path):
    a, b, c = (adapters / f"texture-{i}" for i in range(3))
    ok(cli("build-basis", f"wood={a}", f"wood={b}", f"stone={c}", "-o", tmp_path / "basis"))
    basis = Basis.from_pretrained(tmp_path / "basis")
    assert basis.attributes == ["wood", "stone"]
    assert basis.weights("block.0.fc", "wood").shape == (2,)


def test_explicit_attribute_takes_a_folder_of_adapters(cli, adapters, tmp_path):
    ok(cli("build-basis", f"everything={adapters}", "-o", tmp_path / "basis"))
    basis = Basis.from_pretrained(tmp_path / "basis")
    assert basis.attributes == ["everything"]
    assert basis.weights("block.0.fc", "everything").shape == (6,)


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("texture-0", "texture"), ("texture_12", "texture"), ("low-light-3", "low-light"), ("plain", "plain")],
)
def test_name_without_trailing_number(cli, adapters, tmp_path, name, attribute):
    (adapters / "texture-0").rename(tmp_path / name)
    ok(cli("build-basis", tmp_path / name, "-o", tmp_path / "basis"))
    assert Basis.from_pretrained(tmp_path / "basis").attributes == [attribute]


def test_relative_paths(cli, adapters, tmp_path):
    ok(cli("build-basis", "adapters/texture-0", "adapters/texture-1/", "-o", "basis", cwd=tmp_path))
    assert Basis.from_pretrained(tmp_path / "basis").attributes == ["texture"]


def test_json_on_stdout_is_all_of_stdout(cli, adapters, tmp_path):
    result = ok(cli("build-basis", *sorted(adapters.iterdir()), "-o", tmp_path / "basis", "--json"))
    text = json.dumps(result.json)
    for word in ("texture", "geometry", Basis.from_pretrained(tmp_path / "basis").digest):
        assert word in text


def test_every_option_reaches_the_basis(cli, adapters, tmp_path):
    ok(
        cli(
            "build-basis", adapters / "texture-0", adapters / "texture-1", "-o", tmp_path / "basis", "--dim", 2,
            "--alpha", 1.5, "--eps", 1e-4, "--max-iter", 7, "--tol", 1e-3, "--allocation", "energy",
            "--dtype", "bfloat16", "--device", "cpu", "--base-model", "toy/base", "--missing", "intersect",
        )
    )  # fmt: skip
    basis = Basis.from_pretrained(tmp_path / "basis")
    (record,) = basis.config.attributes
    assert (record.dim, record.alpha, record.eps, record.max_iter, record.tol) == (2, 1.5, 1e-4, 7, 1e-3)
    assert record.allocation == "energy"
    assert basis.factors("block.0.fc", "texture")[0].dtype == torch.bfloat16
    assert basis.config.base_model == "toy/base"


def test_the_card_holds_the_command(cli, adapters, tmp_path):
    ok(cli("build-basis", adapters / "texture-0", "-o", tmp_path / "basis", "--dim", 2))
    card = (tmp_path / "basis" / "README.md").read_text()
    assert "peft-attrsub build-basis" in card and "--dim 2" in card and "texture-0" in card


def test_overwrite(cli, adapters, tmp_path):
    ok(cli("build-basis", adapters / "texture-0", "-o", tmp_path / "basis", "--dim", 2))
    first = Basis.from_pretrained(tmp_path / "basis").digest
    refused = cli("build-basis", adapters / "texture-1", "-o", tmp_path / "basis", "--dim", 2)
    assert refused.code == 2 and "basis" in refused.err
    assert Basis.from_pretrained(tmp_path / "basis").digest == first
    ok(cli("build-basis", adapters / "texture-1", "-o", tmp_path / "basis", "--dim", 2, "--overwrite"))
    assert Basis.from_pretrained(tmp_path / "basis").digest != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters", "basis"]


def test_existing_output_is_refused_before_the_work(cli, adapters, tmp_path):
    """An hour of mining must not end in "exists already": the check comes before any reading."""
    (tmp_path / "basis").mkdir()
    (tmp_path / "basis" / "notes.txt").write_text("mine")
    result = cli("build-basis", tmp_path / "no-such-adapter", "-o", tmp_path / "basis")
    assert result.code == 2
    assert "no-such-adapter" not in result.err and str(tmp_path / "basis") in result.err


def test_a_new_parent_folder_is_made(cli, adapters, tmp_path):
    ok(cli("build-basis", adapters / "texture-0", "-o", tmp_path / "deep" / "er" / "basis"))
    assert Basis.from_pretrained(tmp_path / "deep" / "er" / "basis").modules == sorted(SHAPES)


def test_without_the_fork_server(adapters, tmp_path):
    """A plain interpreter, calling the function that pyproject.toml names; and python -m peft_attrsub."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["peft-attrsub"].split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    args = ["build-basis", str(adapters / "texture-0"), "-o", str(tmp_path / "basis"), "--json"]

    def run(*command):
        return subprocess.run([sys.executable, *command, *args], capture_output=True, text=True, cwd=ROOT, timeout=120)

    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    done = run("-m", "peft_attrsub")  # the output exists by now
    assert done.returncode == 2 and "exists" in done.stderr and "Traceback" not in done.stderr
