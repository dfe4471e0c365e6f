"""The benchmark of the point metrics runs and reports every field. Toy sizes: no time is looked at."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "metrics.py"), *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_metrics_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="the metrics need scipy")
    output = tmp_path / "new" / "result.json"
    done = run("--quick", "--points", "3200", "--cores", "1", "--seed", "5", "--output", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    header = {"benchmark", "date", "seed", "quick", "machine", "versions", "settings", "rules"}
    assert result.keys() == header | {"contenders", "load_at_end", "targets"}
    assert result["benchmark"] == "metrics" and result["quick"] is True and result["seed"] == 5
    assert result["versions"].keys() >= {"python", "numpy", "scipy", "peft_attrsub"}
    assert result["settings"]["points"] == 3200 and result["settings"]["size"] == 20
    contenders = result["contenders"]
    assert contenders.keys() == {"default", "exact", "longest_icp", "open3d"} <= result["rules"].keys()
    assert contenders.pop("longest_icp")["values"] == {"iterations": 30}
    for one in contenders.values():
        if isinstance(one, str):
            assert "open3d cannot be imported" in one
            continue
        assert one["seconds"]["median"] > 0 and one["values"]["queries"] == 3200
        assert 0.001 < one["values"]["acc"] < 0.1 and 0.5 < one["values"]["nc"] < 1
        # So few points are never thinned out, and Open3D finds the same.
        assert max(one["deviation"].values()) < 1e-5
    assert all({"target", "measured", "reached"} == t.keys() for t in result["targets"])
    assert len(result["targets"]) == (3 if isinstance(contenders["open3d"], str) else 5)
    assert "Targets" in done.stdout
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    text = importlib.import_module("pages.metrics").markdown(json.loads(output.read_text()))
    assert "3,200 points" in text and all(target["target"] in text for target in result["targets"])
    # Quick runs publish nothing unless told where.
    assert [p.name for p in output.parent.iterdir()] == ["result.json"]


def test_metrics_refuses_too_few_points() -> None:
    done = run("--points", "10")
    assert done.returncode == 2
    assert "--points 800 or more" in done.stderr
