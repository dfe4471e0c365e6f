"""finetune.py and train_lora_cluster.py: runs that are stopped, killed, continued, refused; adapters that load."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_attrsub.evaluation.markdown import parameters_text
from peft_attrsub.scenes.generate import generate
from peft_attrsub.vggt import VggtModel
from tests.examples.training_tools import FOLDER, on_path, tiny_model
from tests.scenes import tiny

on_path()

ROOT = Path(__file__).parents[2]
SMALL = "--image-size 56 --views-max 3 --images-per-step 6 --steps 6 --eval-every 3 --checkpoint-every 2"
FIXED = f"--preset smoke {SMALL} --eval-share 0.25 --panel-every 6 --lr 0.003 --tracker none".split()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("finetune")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of four small scenes, in the layout of generate_scenes.py."""
    root = tmp_path_factory.mktemp("scenes")
    for seed in range(2):
        recipe = tiny.TinyRecipe(seed=seed, size=56, views=5)
        names = {"renderer": f"{tiny.HERE}:TinyRenderer", "sampler": f"{tiny.HERE}:sample"}
        generate(root / f"texture_{seed:02d}", recipe, 4, workers=1, **names)
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


def arguments(scenes: Path, base: Path, out: Path, *more: str) -> list[str]:
    settings = out.parent / "settings.yaml"
    if not settings.exists():
        settings.write_text(f"model: {base}\n")
    return [*FIXED, "--config", str(settings), "--data", str(scenes / "texture_00"), "--out", str(out), *more]


CORES = ("--method", "random", "--dim", "4")


def weights(out: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(out / name / "adapter_model.safetensors")


def digest_of(base: Path) -> str:
    """sha256 of the weights in a folder of the fixture `base`."""
    return importlib.import_module("_model").state_digest(VggtModel.from_pretrained(base).state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(script: ModuleType, scenes: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert script.main(arguments(scenes, base, out, *CORES, "--ema", "0.5")) == 0
    return out


def test_a_run_leaves_an_adapter_numbers_and_pictures(undisturbed: Path, base: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["skipped_steps"] == 0 and summary["images"] >= 24
    lines = log(undisturbed)
    assert [line["step"] for line in lines if "loss/loss" in line] == list(range(6))
    assert {"loss/camera_T", "loss/depth_conf", "gradient/aggregator", "gradient/total", "lr"} <= set(lines[0])
    held = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in held] == [3, 6] and {"eval/abs_rel", "eval/rotation"} <= set(held[0])
    assert summary["best_eval_loss"] == min(line["eval/loss"] for line in held)
    assert (undisturbed / "panels" / "step-00000006.png").stat().st_size > 1000
    assert len(list((undisturbed / "checkpoints").glob("step-*"))) <= 3  # the last two and the best

    model = PeftModel.from_pretrained(
        VggtModel.from_pretrained(base, heads=["camera", "depth"]), undisturbed / "adapter"
    )
    trained = sum(value.numel() for name, value in model.state_dict().items() if "attrsub_M" in name)
    assert 0 < trained < summary["trainable_parameters"]  # the heads have LoRA
    assert any(value.abs().sum() > 0 for name, value in model.state_dict().items() if "attrsub_M" in name)


def test_a_run_that_a_signal_stops_continues_to_the_same_weights(
    script: ModuleType,
    scenes: Path,
    base: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from training import loop

    step = loop.Loop.step

    def interrupted(self: object, number: int, micro: object) -> object:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, micro)  # type: ignore[arg-type]

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", interrupted)
        assert script.main(arguments(scenes, base, out, *CORES, "--ema", "0.5")) == 128 + signal.SIGTERM
    assert not (out / "summary.json").exists() and (out / "checkpoints" / "step-00000004").is_dir()
    assert script.main(arguments(scenes, base, out, *CORES, "--ema", "0.5")) == 0
    assert same(weights(out), weights(undisturbed)) and same(weights(out, "best"), weights(undisturbed, "best"))
    for line, other in zip(log(out), log(undisturbed), strict=True):
        drop = ("images_per_second", "memory_gib")
        assert {k: v for k, v in line.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}
    assert f"{out}: 6 steps" in (said := capsys.readouterr().out) and "peak memory" in said
    # A third time there is nothing to do.
    before = (out / "summary.json").read_bytes()
    assert script.main(arguments(scenes, base, out, *CORES, "--ema", "0.5")) == 0
    assert (out / "summary.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 1.1])
def test_a_killed_run_continues_to_the_same_weights(
    scenes: Path, base: Path, undisturbed: Path, tmp_path: Path, seconds: float
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(FOLDER / "finetune.py"), *arguments(scenes, base, out, *CORES, "--ema", "0.5")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert same(weights(out), weights(undisturbed))


@pytest.mark.parametrize(
    "method",
    [
        ["--method", "full", "--heads", "frozen"],
        ["--method", "lora", "--rank", "2"],
        ["--method", "pissa", "--rank", "2", "--heads", "frozen"],
        ["--method", "adalora", "--rank", "2", "--adalora-every", "1"],
        ["--method", "psv", "--dim", "4", "--heads", "full"],
    ],
    ids=lambda words: words[1],
)
def test_every_method_learns_and_is_saved(
    script: ModuleType, scenes: Path, base: Path, tmp_path: Path, method: list[str]
) -> None:
    out = tmp_path / "run"
    more = [*method, "--steps", "4", "--eval-every", "0", "--eval-share", "0", "--auto-memory"]
    assert script.main(arguments(scenes, base, out, *more)) == 0
    losses = [line["loss/loss"] for line in log(out)]
    assert len(losses) == 4 and losses[-1] != losses[0]
    vggt = VggtModel.from_pretrained(base, heads=["camera", "depth"])
    if method[1] == "full":
        tuned = VggtModel.from_pretrained(out / "model", heads=["camera", "depth"])
    else:
        tuned = PeftModel.from_pretrained(vggt, out / "adapter").get_base_model()
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    untuned = VggtModel.from_pretrained(base, heads=["camera", "depth"])
    with torch.no_grad():
        a, b = (model.eval()(pixel_values=images).depth for model in (tuned, untuned))
    assert not torch.equal(a, b)
    assert "why" in json.loads((out / "memory.json").read_text())


def test_ten_steps_of_nan_in_a_row_end_the_run(
    script: ModuleType,
    scenes: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from training import loop

    step = loop.Loop.step

    def spoiled(self: object, number: int, micro: list) -> object:
        for batch in micro:
            batch["images"][:] = float("nan")
        return step(self, number, micro)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.Loop, "step", spoiled)
    out = tmp_path / "run"
    assert script.main(arguments(scenes, base, out, *CORES, "--max-skipped", "3")) == 2
    error = capsys.readouterr().err
    assert "3 steps in a row up to step 2 were left out" in error and "lower the learning rate" in error
    assert list(out.glob("batch-step-*.safetensors")) and not (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--method", "random", "--image-size", "60"], "no multiple of 14"),
        (["--method", "attrsub"], "--basis is missing"),
        (["--method", "attrsub", "--basis", "no-such-basis-folder"], "no-such-basis-folder"),
        (["--method", "random", "--start", "consensus"], "--start consensus needs method attrsub"),
        (["--method", "attrsub", "--basis", "b", "--calibrate", "1"], "--calibrate needs --start consensus"),
        (["--method", "lorra"], "invalid choice: 'lorra'"),
        (["--method", "lora", "--data", "no-such-folder"], "no-such-folder is no folder"),
        (
            ["--method", "lora", "--views-min", "9", "--views-max", "9", "--images-per-step", "9"],
            "none of the 3 sequences",
        ),
        (["--method", "lora", "--learning-rate", "1"], "there is no option --learning-rate"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(
    script: ModuleType, scenes: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list, words: str
) -> None:
    out = tmp_path / "run"
    assert script.main(arguments(scenes, base, out, *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("finetune: ") and words in error
    assert not (out / "log.jsonl").exists()


def test_other_settings_do_not_continue_a_run(
    script: ModuleType, scenes: Path, base: Path, undisturbed: Path, capsys: pytest.CaptureFixture
) -> None:
    assert script.main(arguments(scenes, base, undisturbed, *CORES, "--ema", "0.25")) == 2
    assert "holds a run with ema = 0.5, and this one has 0.25" in capsys.readouterr().err


def test_check_reads_everything_and_names_what_is_broken(
    script: ModuleType, scenes: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    run = arguments(copy, base, tmp_path / "run", *CORES, "--check")
    assert script.main(run) == 0 and "no problems" in capsys.readouterr().out
    victim = copy / "texture_00" / "scene_00001" / "images" / "00002.png"
    victim.write_bytes(victim.read_bytes()[:40])
    assert script.main(run) == 1
    out = capsys.readouterr().out
    assert str(victim) in out and "1 problem" in out and not (tmp_path / "run").exists()


def test_a_cluster_of_adapters_is_tagged_and_made_once(
    scenes: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import run as module

    cluster = importlib.import_module("train_lora_cluster")
    loads = []
    load = module.load_vggt
    monkeypatch.setattr(module, "load_vggt", lambda settings: (loads.append(1), load(settings))[1])
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: {base}\n")
    out = tmp_path / "adapters"
    command = [*FIXED, "--config", str(settings), "--datasets", str(scenes), "--out", str(out), "--rank", "2"]
    assert cluster.main([*command, "--only", "texture_01"]) == 0
    assert cluster.main(command) == 0
    assert "texture_01: done already" in capsys.readouterr().out and len(loads) == 2
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == ["texture_00", "texture_01"]
    for seed in range(2):
        name = f"texture_{seed:02d}"
        tags = json.loads((out / name / "adapter_config.json").read_text())["auto_mapping"]["training"]
        digest = json.loads((scenes / name / "dataset.json").read_text())["digest"]
        assert tags == {
            "attribute": "texture",
            "dataset": name,
            "dataset_digest": digest,
            "dataset_seed": seed,
            "seed": 42,
            "steps": 6,
            "base": {"name": "tiny", "digest": digest_of(base)},
        }
    # Two adapters on one base in one process are those of two processes.
    alone = tmp_path / "alone"
    assert cluster.main([*command[:-3], str(alone), *command[-2:], "--only", "texture_00"]) == 0
    assert same(load_file(alone / "texture_00" / "adapter_model.safetensors"), weights(out, "texture_00"))

    assert cluster.main([*command, "--launcher", "local", "--dry-run"]) == 0
    assert "2 of 2 adapters are there already" in capsys.readouterr().out
    assert cluster.main([*command, "--only", "wood"]) == 2
    assert "--only wood: there is no such dataset" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_the_consensus_begins_where_calibration_says(
    script: ModuleType, scenes: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from peft_attrsub import build_basis

    sources = []
    for seed in range(2):
        source = tmp_path / f"texture-{seed}"
        assert (
            script.main(arguments(scenes, base, source, "--method", "lora", "--rank", "2", "--seed", str(seed))) == 0
        )
        sources.append(source / "adapter")
    build_basis({"texture": sources}, dim=2, progress=False).save_pretrained(tmp_path / "basis")
    tuned = ("--method", "attrsub", "--basis", str(tmp_path / "basis"), "--missing", "intersect", "--heads", "frozen")
    starts = {"zero": (), "start": ("--start", "consensus", "--start-scale", "0.5")}
    starts["calibrated"] = (*starts["start"], "--calibrate", "1")
    capsys.readouterr()
    for name, more in starts.items():
        assert script.main(arguments(scenes, base, tmp_path / name, *tuned, *more)) == 0
        assert ("calibrate_start: loss " in capsys.readouterr().out) == (name == "calibrated")
    first = {name: log(tmp_path / name)[0]["loss/loss"] for name in starts}
    assert len(set(first.values())) == 3 and first["calibrated"] <= first["zero"] * 1.001
    config = json.loads((tmp_path / "calibrated/adapter/adapter_config.json").read_text())
    assert config["init_weights"] == "consensus" and set(config["init_scale"]) == {"texture"}


def test_from_datasets_to_a_table(tmp_path: Path) -> None:
    """The paper's whole way in its smallest form, by the commands that README gives."""
    pytest.importorskip("open3d", reason="the ray caster needs it")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    make = [str(FOLDER / "generate_scenes.py"), "--scenes", "3", "--views", "5", "--size", "112"]
    for attribute in ("texture", "geometry"):
        run(*make, "--attribute", attribute, "--datasets", "2", "--out", "data")
    run(*make, "--attribute", "mixed", "--datasets", "1", "--out", "new")
    smoke = ["--preset", "smoke", "--steps", "6", "--tracker", "none"]
    cluster = [str(FOLDER / "train_lora_cluster.py"), *smoke, "--datasets", "data", "--out", "adapters"]
    run(*cluster, "--launcher", "local", "--parallel", "2", "--per-job", "2")
    adapters = sorted(str(path) for path in (tmp_path / "adapters").iterdir() if not path.name.startswith("."))
    run("-m", "peft_attrsub", "build-basis", *adapters, "-o", "basis", "--dim", "4")
    tune = [str(FOLDER / "finetune.py"), *smoke, "--method", "attrsub", "--basis", "basis", "--missing", "intersect"]
    run(*tune, "--data", "new/mixed_00", "--out", "runs/ours")
    measure = [str(FOLDER / "evaluate.py"), "--benchmark", "scenes", "--data", "new/mixed_00", "--image-size", "112"]
    measure += ["--model", "vggt-mini", "--random-weights", "0", "--pictures", "0"]
    run(*measure, "--out", "eval/base")
    run(*measure, "--adapter", "runs/ours/adapter", "--label", "ours", "--out", "eval/ours")
    table = run(str(FOLDER / "evaluate.py"), "--table", "eval/base", "eval/ours")
    trained = json.loads((tmp_path / "runs/ours/summary.json").read_text())["trainable_parameters"]
    assert f"| ours | {parameters_text(trained)} |" in table and "3 of 3 sequences evaluated" in table
