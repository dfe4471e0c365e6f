"""The benchmarks run and report every field. Toy sizes: no time is looked at."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
HEADER = {"benchmark", "date", "seed", "quick", "machine", "versions", "settings", "rules"}
MACHINE = {"cpu", "cpu_flags", "cpu_caps", "cores", "ram_gib", "system", "torch_threads", "load_at_start"}
STATISTICS = {"median", "min", "max", "rounds"}
FIELDS = {
    "build_basis": {
        "adapters",
        "iterations",
        "contenders",
        "difference_from_dense",
        "errors",
        "errors_all_modules",
        "error_study",
        "scaling",
        "targets",
    },
    "render": {"targets"},
    "report": {"cases", "targets"},
    "startup": {"cases", "targets", "load_at_end"},
    "tuner": {"cases"},
    "vggt": {"cases", "model"},
}


def run(name: str, *arguments: str) -> str:
    """Standard output of one benchmark in toy size, with this checkout in front of anything installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_header(result: dict[str, Any], name: str) -> None:
    assert result.keys() >= HEADER | FIELDS[name]
    assert result["benchmark"] == name
    # Results of before 2026-12 do not record the CPU's instructions.
    assert MACHINE - {"cpu_flags", "cpu_caps"} <= result["machine"].keys() <= MACHINE
    assert result["versions"].keys() >= {"python", "torch", "peft", "safetensors", "peft_attrsub"}


def texts(value: Any) -> list[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, dict):
        return [t for key, inner in value.items() for t in (key, *texts(inner))]
    if isinstance(value, list):
        return [t for inner in value for t in texts(inner)]
    return [value] if isinstance(value, str) else []


def check_page(find: Any, name: str, output: Path, result: dict[str, Any]) -> None:
    """The page of the benchmark reads what it has just written, and says what was asked and what came out."""
    readme = find("write_readme")
    page = readme.found_pages()[name]
    if page is None:  # tests/test_benchmark_readme.py asks for it
        return
    text = readme.body(name, page, output)
    assert "older form" not in text and "Not measured" not in text
    assert "\n| --- |" in text
    assert all(target["target"] in text for target in result.get("targets", []))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the folder as the scripts do."""

    def find(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return __import__(name)

    return find


def test_build_basis_runs(tmp_path: Path, module: Any) -> None:
    output = tmp_path / "new" / "result.json"
    printed = run("build_basis", "--output", str(output), "--work-dir", str(tmp_path / "adapters"))
    result = json.loads(output.read_text())
    check_header(result, "build_basis")
    assert result["quick"] is True
    for name in ("ours", "read_only_warm", "read_only_cold", "dense"):
        row = result["contenders"][name]
        assert row["seconds"]["median"] > 0
        assert row.keys() >= {"cpu_seconds", "peak_rss_mib", "peak_anon_mib", "times_ours"}
        assert row["extrapolated"] is (name == "dense")
    assert result["contenders"]["ours"]["seconds"].keys() == STATISTICS
    # The dense form is the same algorithm written down twice: the two must agree, at any size.
    assert all(gap < 1e-4 for gap in result["difference_from_dense"].values())
    assert len(result["difference_from_dense"]) == 4
    for peer in ("vlora", "lorashare"):
        assert result["contenders"][peer] == "not installed" or result["contenders"][peer]["seconds"]["median"] > 0
    assert all(0 < row["error"] <= row["worst"] <= 1 for row in result["error_study"] if row["contender"] == "ours")
    assert {axis: len(lines) for axis, lines in result["scaling"].items()} == {"k": 3, "r": 2, "m": 2, "n": 2}
    assert result["large"].keys() == {"four_attributes", "many_adapters"}
    assert all({"target", "measured", "reached"} == t.keys() for t in result["targets"])
    assert "Targets" in printed
    check_page(module, "build_basis", output, result)


def test_tuner_runs(tmp_path: Path, module: Any) -> None:
    output = tmp_path / "result.json"
    run("tuner", "--output", str(output))
    result = json.loads(output.read_text())
    check_header(result, "tuner")
    (case,) = result["cases"]
    rows = case["contenders"]
    assert [name.split()[0] for name in rows] == ["frozen", *["LoRA"] * 3, "VeRA", "PSOFT", *["attrsub"] * 6]
    for name, row in rows.items():
        for key in ("forward_seconds", "backward_seconds", "seconds"):
            assert row[key].keys() == STATISTICS
        assert row["ratio"] > 0
        assert (row["trainable_parameters"] > 0) is (name != "frozen base")
    # A core keeps tokens x D for its gradient, per linear; LoRA keeps its input of tokens x m as well.
    assert rows["frozen base"]["saved_over_base_mib"] == 0
    for mode in ("factored", "folded", "auto"):
        assert 0 < rows[f"attrsub D=16 {mode}"]["saved_over_base_mib"] < rows["LoRA r=16"]["saved_over_base_mib"]
    # Two shapes, two numbers of tokens, three passes.
    assert len(result["crossover"]) == 12 and {row["pass"] for row in result["crossover"]} == {
        "forward",
        "backward",
        "inference",
    }
    assert 0 <= result["choice"]["fitted_lost"] <= result["choice"]["lost"]
    for row in result["bfloat16"]:
        assert 0 < row["factored"] < 0.02 and row["factored"] < row["folded"]
    assert all({"target", "measured", "reached"} == t.keys() for t in result["targets"])
    check_page(module, "tuner", output, result)


def test_vggt_runs(tmp_path: Path, module: Any) -> None:
    output = tmp_path / "result.json"
    printed = run("vggt", "--device", "cpu", "--frames", "2", "--output", str(output))
    result = json.loads(output.read_text())
    check_header(result, "vggt")
    cases = {case["kind"]: case for case in result["cases"]}
    assert len(cases) == 6 and all(case["seconds"].keys() == STATISTICS for case in cases.values())
    assert all(case["frames"] == 2 and case["seconds"]["median"] > 0 for case in cases.values())
    # Four frame and global blocks, of which the heads read all.
    assert cases["forward"]["kept_mib"] == cases["forward, all layers kept"]["kept_mib"] > 0
    assert "training step" in printed
    check_page(module, "vggt", output, result)


def test_vggt_of_several_sizes_in_bf16(tmp_path: Path, module: Any) -> None:
    output = tmp_path / "result.json"
    sizes = ("--lora", "2", "4", "--dims", "2", "4", "--precision", "bfloat16")
    run("vggt", "--device", "cpu", "--frames", "1", *sizes, "--output", str(output))
    result = json.loads(output.read_text())
    cases = {case["kind"]: case for case in result["cases"]}
    trained = ["LoRA r=2", "LoRA r=4", "cores D=2", "cores D=4", "cores D=2, encoder frozen"]
    trained += ["cores D=2, checkpointed", "cores D=4, checkpointed"]
    assert list(cases) == ["forward", "forward, all layers kept", *trained]
    # 4 + 4 blocks of four linears: a core each.
    assert [cases[f"cores D={d}"]["trainable_parameters"] for d in (2, 4)] == [32 * 4, 32 * 16]
    assert cases["LoRA r=4"]["trainable_parameters"] == 2 * cases["LoRA r=2"]["trainable_parameters"]
    check_page(module, "vggt", output, result)


def test_vggt_on_a_gpu_measures_every_size_with_and_without_checkpointing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vggt = module("vggt")
    monkeypatch.setattr(sys, "argv", ["vggt.py", "--device", "cuda"])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    for capability, name in (((6, 1), "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        args = vggt.arguments()
        assert (args.precision, args.chosen.name) == ("float32" if name == "fp32" else "autocast", name)
    assert (args.preset, args.precision, args.frames) == ("vggt-1b", "autocast", [1, 4, 8, 16])
    plain = ["LoRA r=16", "LoRA r=64", "LoRA r=256", "cores D=64", "cores D=256"]
    assert vggt.training_kinds(args, gpu=True) == [*plain, *(f"{name}, checkpointed" for name in plain)]
    assert vggt.VggtConfig(**vggt.SIZES[args.preset]).image_size == 518


@pytest.mark.parametrize("figures", [True, False])
def test_report_runs(tmp_path: Path, figures: bool, module: Any) -> None:
    output = tmp_path / "result.json"
    flag = "--figures" if figures else "--no-figures"
    printed = run("report", flag, "--output", str(output), "--work-dir", str(tmp_path / "work"))
    result = json.loads(output.read_text())
    check_header(result, "report")
    assert result["quick"] is True and result["settings"]["figures"] is figures
    assert [case["dim"] for case in result["cases"]] == [2, 4]
    stages = {"analyse", "write_report", "explain"} | ({"save_figures"} if figures else set())
    for case in result["cases"]:
        assert case["stages"].keys() == stages
        for stage in case["stages"].values():
            assert stage["seconds"].keys() == stage["cpu_seconds"].keys() == STATISTICS
            assert stage["seconds"]["median"] > 0
        assert case["report_seconds"].keys() == STATISTICS
        assert case.keys() >= {"peak_rss_mib", "peak_anon_mib"}
        assert case["html_mb"] > case["json_mb"] > 0
        assert bool(case["figures"]) is figures
        # Eight modules, two attributes: one pair on two sides in each.
        assert (case["modules"], case["spectra"], case["overlaps"], case["adapters"]) == (8, 16, 16, 6)
    assert all({"target", "measured", "reached"} == t.keys() for t in result["targets"])
    assert "Targets" in printed
    check_page(module, "report", output, result)
    # The bases are kept for the next run, the adapters they were mined from are not.
    (kept,) = (tmp_path / "work").iterdir()
    assert {p.name for p in kept.iterdir()} == {"basis-2", "basis-4", "task"}


@pytest.mark.slow
def test_startup_runs(tmp_path: Path, module: Any) -> None:
    output = tmp_path / "result.json"
    printed = run("startup", "--output", str(output))
    result = json.loads(output.read_text())
    check_header(result, "startup")
    for case in result["cases"]:
        assert case["cpu_seconds"].keys() == case["seconds"].keys() == STATISTICS
    names = [case["name"] for case in result["cases"]]
    assert len(set(names)) == len(names) and {"import torch", "peft-attrsub --help", "evaluate.py --table"} <= set(
        names
    )
    assert {case["group"] for case in result["cases"]} == {"import", "help", "job"}
    assert all({"target", "measured", "reached"} == goal.keys() for goal in result["targets"])
    assert "Targets" in printed
    check_page(module, "startup", output, result)


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_published_results_are_whole_and_name_no_machine(name: str) -> None:
    text = (BENCHMARKS / "results" / f"{name}.json").read_text()
    result = json.loads(text)
    check_header(result, name)
    assert result["quick"] is False
    assert socket.gethostname() not in text
    assert not [t for t in texts(result) if t.startswith(("/", "~")) or "://" in t]


def test_shapes_are_those_of_vggt(module: Any) -> None:
    shapes = list(module("_adapters").vggt_shapes().values())
    assert {shape: shapes.count(shape) for shape in shapes} == {
        (1024, 3072): 48,
        (1024, 1024): 48,
        (1024, 4096): 48,
        (4096, 1024): 48,
    }


def test_error_from_factors_equals_the_dense_one(module: Any) -> None:
    b, a, p, q = torch.randn(9, 3), torch.randn(3, 7), torch.randn(9, 2), torch.randn(2, 7)
    dense = torch.linalg.matrix_norm(b @ a - p @ q) / torch.linalg.matrix_norm(b @ a)
    assert module("_contenders").relative_error(b, a, p, q) == pytest.approx(float(dense), rel=1e-5)


def test_adapters_have_the_same_updates_in_any_gauge(module: Any) -> None:
    adapters = module("_adapters")
    products = {}
    for fixture in ("shared", "aligned-factors"):
        a, b = adapters.factors("blocks.0.fc", (12, 10), 1, fixture, 4, 0)
        products[fixture] = b @ a
    torch.testing.assert_close(*products.values())
