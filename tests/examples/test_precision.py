"""finetune.py --precision: what a run chooses, stores and keeps; fp16 with a gradient scaler, stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import DistributedType

from peft_attrsub.vggt import Precision, precision
from tests.examples.test_finetune import CORES, arguments, base, log, same, scenes, script, weights
from tests.examples.training_tools import fake_cpu

from training import loop  # isort: skip  (on the path since test_finetune is imported)
from training import precision as of_a_run  # isort: skip

# The fixtures of test_finetune.
_ = (base, scenes, script)
QUICK = (*CORES, "--steps", "4", "--eval-every", "0", "--eval-share", "0")


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    step = loop.Loop.step

    def interrupted(self: Any, now: int, micro: Any) -> Any:
        if now == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, now, micro)

    monkeypatch.setattr(loop.Loop, "step", interrupted)


@pytest.mark.parametrize(("flags", "name"), [(("avx512_bf16",), "bf16"), ((), "fp32")])
def test_auto_is_said_stored_and_kept_on_another_machine(
    script: ModuleType,
    scenes: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    recwarn: pytest.WarningsRecorder,
    flags: tuple[str, ...],
    name: str,
) -> None:
    out, command = tmp_path / "run", lambda *more: arguments(scenes, base, tmp_path / "run", *QUICK, *more)
    fake_cpu(monkeypatch, *flags, slowdown=7.3)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert script.main(command()) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert said.count("precision ") == 1 and f"precision {name}: this CPU has" in said
    assert yaml.safe_load((out / "settings.yaml").read_text())["precision"] == name
    record = json.loads((out / "precision.json").read_text())
    assert (record["precision"], record["requested"]) == (name, "auto")

    # Another machine; auto keeps what there is, another precision is refused, the stored one is not.
    other = "fp32" if name == "bf16" else "bf16"
    fake_cpu(monkeypatch, *(() if flags else ("avx512_bf16",)), slowdown=7.3)
    assert script.main(command("--precision", other)) == 2
    assert f"holds a run with precision = '{name}', and this one has '{other}'" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert script.main(command("--precision", name)) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert script.main(command()) == 0
    line = f"precision {name} is kept from the start of this run; auto would choose {other}: this CPU has"
    assert line in capsys.readouterr().out
    emulated = [str(one.message) for one in recwarn if "takes 7.3 times as long" in str(one.message)]
    assert bool(emulated) == (name == "bf16")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["precision"] == record and summary["steps"] == 4
    # A finished run is as it was, whatever the machine.
    assert script.main(command()) == 0


def test_a_run_of_an_older_version_is_continued_in_its_precision(
    script: ModuleType, scenes: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cpu(monkeypatch, "avx512_bf16", slowdown=7.3)
    runs = []
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        out = tmp_path / folder / "run"
        with monkeypatch.context() as patch:
            stop_at(patch, 1)
            assert script.main(arguments(scenes, base, out, *QUICK, "--precision", "bf16")) == 128 + signal.SIGTERM
        if folder == "old":
            (out / "precision.json").unlink()
        assert script.main(arguments(scenes, base, out, *QUICK)) == 0
        runs.append(json.loads((out / "summary.json").read_text())["precision"])
    assert same(weights(tmp_path / "old" / "run"), weights(tmp_path / "new" / "run"))
    assert [one["precision"] for one in runs] == ["bf16", "bf16"] and runs[0]["why"] == "stored with the run"


def test_an_fp16_run_that_is_stopped_ends_with_the_same_weights_and_scale(
    script: ModuleType, scenes: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is in motion on both sides of the stop: it begins too large, and grows every second good step."""
    init = torch.amp.GradScaler.__init__

    def restless(self: Any, device: str = "cuda", **more: Any) -> None:
        init(self, device, init_scale=2.0**34, growth_interval=2, growth_factor=2.0**9, backoff_factor=2.0**-6, **more)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", restless)
    monkeypatch.setattr(precision, "slowdown", lambda device, name: 0.5)
    command = (*CORES, "--steps", "12", "--eval-every", "0", "--eval-share", "0", "--precision", "fp16")
    found = []
    for folder, stop in (("whole", None), ("stopped", 7)):
        (tmp_path / folder).mkdir()
        out = tmp_path / folder / "run"
        with monkeypatch.context() as patch:
            if stop is not None:
                stop_at(patch, stop)
                assert script.main(arguments(scenes, base, out, *command)) == 128 + signal.SIGTERM
        assert script.main(arguments(scenes, base, out, *command)) == 0
        summary = json.loads((out / "summary.json").read_text())
        scales = [line["loss_scale"] for line in log(out) if "loss_scale" in line]
        found.append((summary["overflows"], scales, summary["skipped_steps"]))
    assert same(weights(tmp_path / "whole" / "run"), weights(tmp_path / "stopped" / "run"))
    assert found[0] == found[1] and found[0][2] == 0 and found[0][0] > 0
    changes = [b / a for a, b in zip(found[0][1], found[0][1][1:], strict=False)]
    assert set(changes) == {2.0**-6, 1.0, 2.0**9}, "the scale fell, stayed and grew"


@pytest.mark.parametrize("kind", list(of_a_run.SHARDED))
def test_fp16_does_not_go_with_sharded_parameters(monkeypatch: pytest.MonkeyPatch, kind: DistributedType) -> None:
    found = Precision("fp16", "an old GPU")
    monkeypatch.setattr(of_a_run, "choose_precision", lambda device, requested="auto": found)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), distributed_type=kind)
    assert of_a_run._chosen("auto", accelerator).name == "fp32"
    with pytest.raises(ValueError, match=r"precision fp16 needs a gradient scaler, which .* use bf16 or fp32"):
        of_a_run._chosen("fp16", accelerator)
    accelerator.distributed_type = DistributedType.MULTI_GPU
    assert of_a_run._chosen("auto", accelerator) == found
