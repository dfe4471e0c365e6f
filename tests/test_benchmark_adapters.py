"""The benchmarks of saved adapters (loading, hot swap, size on disk) run at toy size, and their pages read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name: str, output: Path) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--output", str(output)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    def read(name: str, result: dict[str, Any]) -> str:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return getattr(__import__(f"pages.{name}"), name).markdown(result)

    return read


def test_loading_reads_what_it_needs(tmp_path: Path, page: Any) -> None:
    result = run("loading", tmp_path / "result.json")
    assert [case["modules"] for case in result["cases"].values()] == [8, 8, 3]
    for name, case in result["cases"].items():
        assert case["bytes_read"] == case["bytes_needed"] > 0
        assert case["seconds"]["median"] > 0 and case["peak_rss_mib"] >= 0
        assert name in page("loading", result)
    assert all({"target", "measured", "reached"} == t.keys() for t in result["targets"])


def test_hotswap_is_measured_beside_peft_and_loading_anew(tmp_path: Path, page: Any) -> None:
    rows = (result := run("hotswap", tmp_path / "result.json"))["contenders"]
    assert len(rows) == 6 and rows["LoRA, PEFT's hot swap"]["ratio"] == 1
    assert all(row["seconds"]["median"] > 0 and row["file_mb"] > 0 for row in rows.values())
    assert all(name in page("hotswap", result) for name in rows)


def test_sizes_are_those_of_what_is_trained(tmp_path: Path, page: Any) -> None:
    rows = (result := run("checkpoint_size", tmp_path / "result.json"))["adapters"]
    assert [name.split()[0] for name in rows] == ["LoRA", "LoRA", "VeRA", "PSOFT", "cores", "cores"]
    for name, row in rows.items():
        assert row["bytes"] > 4 * row["trained"] > 0
        assert name in page("checkpoint_size", result)
    assert rows["cores D=4"]["bytes"] < rows["LoRA r=2"]["bytes"] < result["basis_bytes"]
