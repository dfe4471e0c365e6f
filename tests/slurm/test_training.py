"""train_lora_cluster.py at a real Slurm: signalled in mid-training, it ends with the weights of an undisturbed run."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_attrsub.scenes.generate import generate
from tests.examples.training_tools import on_path, tiny_model
from tests.scenes import tiny
from tests.slurm import cluster

pytest.importorskip("submitit", reason="jobs go to Slurm through submitit")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cluster.reason_to_skip()), reason=cluster.reason_to_skip() or "there is a Slurm"),
]
STEPS = 60


@pytest.fixture(scope="module")
def slurm() -> Iterator[cluster.Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own paths are too long for munge's socket
    try:
        with cluster.cluster(folder) as it, pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(it.config))
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
            yield it
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_training_that_is_signalled_is_requeued_and_ends_with_the_same_weights(
    slurm: cluster.Cluster, tmp_path: Path
) -> None:
    on_path()
    script = importlib.import_module("train_lora_cluster")
    tiny_model().save_pretrained(tmp_path / "base")
    for seed in range(2):
        recipe = tiny.TinyRecipe(seed=seed, size=56, views=5)
        names = {"renderer": f"{tiny.HERE}:TinyRenderer", "sampler": f"{tiny.HERE}:sample"}
        generate(tmp_path / "data" / f"texture_{seed:02d}", recipe, 3, workers=1, **names)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: {tmp_path / 'base'}\n")
    words = f"--preset smoke --steps {STEPS} --image-size 56 --views-max 3 --images-per-step 6 --eval-every 0"
    words += " --eval-share 0 --tracker none --rank 2 --lr 0.003 --checkpoint-every 1000"
    command = [*words.split(), "--config", str(settings), "--datasets", str(tmp_path / "data")]
    alone, out = tmp_path / "alone", tmp_path / "adapters"
    assert script.main([*command, "--out", str(alone)]) == 0

    at_slurm = [*command, "--out", str(out), "--launcher", "slurm", "--time", "10"]
    assert script.main([*at_slurm, "--no-wait"]) == 0
    log = out / ".runs" / "texture_00" / "log.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= 3)
    submitted = json.loads((out / ".runs" / "jobs" / "texture_00" / "submitted.json").read_text())["id"]
    slurm.run("scancel", "--signal=USR2", submitted)
    stopped = out / ".runs" / "texture_00" / "checkpoints"
    wait_until(lambda: stopped.is_dir() and any(stopped.glob("step-*")))
    taken = int(next(stopped.glob("step-*")).name.removeprefix("step-"))
    assert taken < STEPS, "it was to be disturbed in mid-training"
    assert script.main(at_slurm) == 0

    assert json.loads((out / ".runs" / "jobs" / "texture_00" / "state.json").read_text())["attempts"] == 2
    for name in ("texture_00", "texture_01"):
        found, expected = (load_file(root / name / "adapter_model.safetensors") for root in (out, alone))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
