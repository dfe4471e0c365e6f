"""examples/digits.py through its command line: a tiny run, and the real one among the slow tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_attrsub._machine import available_cores

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "digits.py"
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install peft-attrsub[demo]")
pytest.importorskip("plotly", reason="the report is drawn with plotly: pip install peft-attrsub[demo]")


def run(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_quick_run_goes_through_all_parts(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run("--quick", "--workers", "1", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]

    summary = json.loads((out / "summary.json").read_text())
    assert summary["quick"] is True
    assert {"versions", "machine", "settings", "base", "source_adapters", "methods", "export"} < set(summary)
    assert {"peft_attrsub", "python", "peft", "transformers", "torch", "scikit-learn"} == set(summary["versions"])
    assert summary["machine"]["cores"] == available_cores()
    assert summary["settings"]["seed"] == 0

    adapters = sorted(path.name for path in (out / "adapters").iterdir())
    assert adapters == sorted(source["name"] for source in summary["source_adapters"]) and len(adapters) == 8
    assert (out / "basis" / "basis_config.json").is_file()
    assert "Digits: the mined basis" in (out / "report.html").read_text() and "report.html" in done.stdout

    rows = {row["label"]: row for row in summary["methods"] if row["labels"] == 40}
    few = {row["label"] for row in summary["methods"] if row["labels"] == 20}
    assert few < set(rows) and any("consensus" in label for label in few)
    kinds = ["base", "full", "lora", "psv", "random", "gradient", "attrsub", "dials"]
    assert {row["kind"] for row in rows.values()} == set(kinds)
    # Every rival from both starts; the consensus alone trains one number per attribute.
    assert {row["kind"] for row in rows.values() if row["start"]} == {*kinds} - {"psv", "random"}
    assert rows["consensus alone"]["trainable"] == 4 and rows["dials, from the consensus"]["trainable"] == 24 * 4
    assert all(len(row["scales"]) == (1 if row["start"] else 0) for row in rows.values())
    assert rows["base model, untuned"]["trainable"] == 0
    assert rows["full fine-tuning"]["trainable"] == summary["base"]["parameters"]
    # 24 linear layers with one core each; the three kinds of directions differ in nothing else.
    for name in ("random", "PSV", "attributes"):
        assert rows[f"cores 16 x 16, {name}"]["trainable"] == 24 * 16 * 16
    for row in rows.values():
        assert len(row["accuracies"]) == summary["settings"]["seeds"]
        assert all(0 <= score <= 100 for score in row["accuracies"])
        assert row["label"] in done.stdout
    assert_exported_exactly(summary)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    keep = tmp_path / "thesis.txt"
    keep.write_text("keep me")
    done = run("--quick", "--out", tmp_path)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_full_run_bears_out_what_is_said_about_it(tmp_path: Path) -> None:
    """Only what holds beyond the spread of the runs: no lead over PSV or random directions is claimed."""
    done = run("--out", tmp_path / "demo", timeout=1600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_claims(json.loads((tmp_path / "demo" / "summary.json").read_text()))


def assert_claims(summary: dict) -> None:
    assert summary["quick"] is False
    assert summary["base"]["plain_accuracy"] > 97
    assert all(source["after"] > source["before"] + 3 for source in summary["source_adapters"])
    tables = {
        labels: {row["label"]: row for row in summary["methods"] if row["labels"] == labels}
        for labels in (20, 50, 200)
    }
    # With few labels the start decides: the consensus of the sources, with four numbers found on the labels, is ahead
    # of everything from zero, and so are cores from there.
    for labels, rows in tables.items():
        zero = [row["accuracy"] for row in rows.values() if not row["start"]]
        lead = 4 if labels < 200 else 0
        assert rows["consensus alone"]["accuracy"] > max(zero) + lead
        assert rows["cores 32 x 32, from the consensus"]["accuracy"] > max(zero) + lead
    rows = tables[200]
    untuned, cores = rows["base model, untuned"], rows["cores 32 x 32, attributes"]
    # The base's own accuracy moves by two points with the CPU's instructions (their rounding), and with it what is
    # left to learn: a LoRA of rank 1 gains 3.6 points with AVX-512 and 0.5 with AVX2 alone.
    assert cores["accuracy"] > untuned["accuracy"] + 2
    assert all(row["accuracy"] > untuned["accuracy"] - 0.5 for row in rows.values())
    # From zero, on a level with a LoRA of about the same size.
    assert cores["accuracy"] > rows["LoRA, rank 4"]["accuracy"] - 1.5
    assert_exported_exactly(summary)


def assert_exported_exactly(summary: dict) -> None:
    """Reloaded cores = the run that saved them; their LoRA export = the same logits, without this package."""
    export = summary["export"]
    assert export["without_peft_attrsub"]
    assert export["max_abs_difference"] < 1e-4 * max(1.0, export["largest_logit"])
    assert export["reloaded_accuracy"] == pytest.approx(summary["methods"][-1]["accuracies"][0], abs=0.1)
