"""The benchmark of the renderers runs and reports every field. Toy sizes: no time is looked at."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STATISTICS = {"median", "min", "max", "rounds"}


def test_render_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open3d", reason="the ray caster needs open3d")
    pytest.importorskip("PIL", reason="pictures are written by Pillow")
    output = tmp_path / "new" / "result.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--quick", "--output", str(output)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    header = {"benchmark", "date", "seed", "quick", "machine", "versions", "settings", "rules"}
    assert result.keys() == header | {"geometry", "raycast", "cycles", "memory", "load_at_end", "targets"}
    assert result["benchmark"] == "render" and result["quick"] is True
    assert result["versions"].keys() >= {"python", "numpy", "open3d", "peft_attrsub"}
    assert [(case["size"], case["processes"]) for case in result["raycast"]] == [(32, 1), (32, 2), (24, 1), (24, 2)]
    for case in result["raycast"]:
        assert case["images_per_second"].keys() == case["with_setup"].keys() == STATISTICS
        assert 0 < case["with_setup"]["median"] < case["images_per_second"]["median"]
        # A colour, a depth and an id picture of at most 32 x 32 pixels.
        assert 0 < case["writing_share"] < 1 and 0.2 < case["kib_per_view"] < 8
    assert result["geometry"]["seconds"].keys() == {"sample_scene", "build_mesh", "render_maps", "trees"}
    assert result["memory"]["rss_mib"].keys() == {"1", "3"}
    # Without bpy in this interpreter the reason stands where the numbers would.
    cycles = result["cycles"]
    if isinstance(cycles, str):
        assert "bpy cannot be imported" in cycles or "OpenEXR cannot be imported" in cycles
    else:
        assert cycles["render_and_write_over_bare"]["median"] > 0
    assert "download" in result["rules"]["blenderproc"]
    assert len(result["targets"]) == (6 if isinstance(cycles, str) else 8)
    assert all({"target", "measured", "reached"} == t.keys() for t in result["targets"])
    assert "Targets" in done.stdout and "BlenderProc" in done.stdout
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    text = importlib.import_module("pages.render").markdown(result)
    assert "24 px, 2 processes" in text and all(target["target"] in text for target in result["targets"])
    # Quick runs publish nothing unless told where.
    assert [p.name for p in output.parent.iterdir()] == ["result.json"]
