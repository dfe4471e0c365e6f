"""examples/vggt/evaluate.py: a benchmark on disk to the paper's columns, stopped, continued, joined, in parallel."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

import peft_attrsub
from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.datasets import RenderedDataset, RenderedWriter, Sample
from peft_attrsub.evaluation.skipping import SkippedError
from peft_attrsub.vggt import VggtConfig, VggtModel, relative_to_first, vggt_targets
from tests.datasets import world
from tests.datasets.clearpose_files import write_root
from tests.examples.training_tools import fake_cpu

pytest.importorskip("scipy", reason="nearest neighbours need scipy")
pytest.importorskip("PIL", reason="pictures need Pillow")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "vggt" / "evaluate.py"
NAMES = ["0000", "0001", "0002"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("evaluate")
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sequences in the layout of rendered people: a block on a floor stands for each."""
    root = tmp_path_factory.mktemp("people")
    for number, name in enumerate(NAMES):
        scene, views = world.scene(index=number), world.views(index=number)
        with RenderedWriter(root / name, depth="npy") as writer:
            for index, (view, camera) in enumerate(zip(views, scene.cameras, strict=True)):
                rgba = np.dstack([view.rgb, np.where(view.ids > 0, 255, 0).astype(np.uint8)])
                lens = (camera.fx, camera.fy, camera.cx, camera.cy)
                writer.add(index, rgba, view.depth, world.world_to_camera(scene, index), *lens)
            writer.finish()
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "vggt-mini"
    torch.manual_seed(0)
    VggtModel(VggtConfig.preset("vggt-mini")).save_pretrained(folder)
    return folder


def adapter(model: Path, folder: Path, config: object) -> Path:
    tuned = get_peft_model(VggtModel.from_pretrained(model, heads=["camera", "depth"]), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = vggt_targets("aggregator", VggtConfig.preset("vggt-mini"))
    return adapter(model, tmp_path_factory.mktemp("adapters") / "lora", LoraConfig(r=2, target_modules=targets))


def arguments(people: Path, model: Path, out: Path, *more: str) -> list[str]:
    first = ["--benchmark", "human", "--data", str(people), "--model", str(model), "--out", str(out)]
    return [*first, "--image-size", "56", "--pictures", "0", *more]


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "sequences.csv").open(newline="") as file:
        return {row["sequence"]: row for row in csv.DictReader(file)}


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def truth(sample: Sample, module: ModuleType, scale: float = 0.3) -> object:
    """A faultless prediction: the truth in VGGT's frame and in another unit."""
    assert sample.extrinsics is not None
    extrinsics = relative_to_first(sample.extrinsics).clone()
    extrinsics[..., 3] *= scale
    return module.Prediction(scale * sample.depths.double().numpy(), sample.intrinsics.numpy(), extrinsics.numpy())


def test_an_untrained_model_gets_numbers_tables_and_pictures(
    script: ModuleType, people: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert script.main([*arguments(people, model, out), "--pictures", "1"]) == 0
    printed = capsys.readouterr().out
    found = summary(out)
    assert list(rows(out)) == NAMES
    assert found["n_evaluated"] == 3 and found["n_skipped"] == 0 and found["trainable_parameters"] == 0
    acc = [float(row["acc"]) for row in rows(out).values()]
    assert found["metrics"]["acc"] == pytest.approx(np.mean(acc)) and all(np.isfinite(acc))
    assert printed == (out / "table.md").read_text() and f"{1000 * np.mean(acc):.3f}" in printed
    for words in ("Acc (×1e-3)", "align = sim3+icp", "icp_threshold = 0.1", "3 of 3 sequences evaluated"):
        assert words in printed
    assert found["settings"]["seed"] == 0 and found["provenance"]["torch"] == torch.__version__
    assert found["provenance"]["peft_attrsub"] == peft_attrsub.__version__
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [
        "0000-prediction.ply",
        "0000-truth.ply",
        "0000.png",
    ]


def test_a_faultless_prediction_has_no_error(
    script: ModuleType, people: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = importlib.import_module("_measure")
    monkeypatch.setattr(measure, "run_model", lambda model, sample, how: truth(sample, measure))
    for align in ("sim3+icp", "sim3", "scale", "median"):
        out = tmp_path / align
        assert script.main(arguments(people, model, out, "--align", align)) == 0
        metrics = summary(out)["metrics"]
        assert metrics["acc"] < 1e-5 and metrics["comp"] < 1e-5 and metrics["nc"] > 0.999
        assert metrics["scale"] == pytest.approx(1 / 0.3, rel=1e-4)
    assert script.main(arguments(people, model, tmp_path / "none", "--align", "none")) == 0
    assert summary(tmp_path / "none")["metrics"]["acc"] > 0.1


def test_adapters_change_the_numbers_and_merging_them_does_not(
    script: ModuleType, people: Path, model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    targets = vggt_targets("aggregator", VggtConfig.preset("vggt-mini"))
    subspace = AttrSubspaceConfig(basis="random", dim=4, target_modules=targets)
    cores = adapter(model, tmp_path / "cores", subspace)
    ada = AdaLoraConfig(target_modules=targets, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1)
    others = {"adalora": ada, "pissa": LoraConfig(r=2, target_modules=targets, init_lora_weights="pissa")}
    runs = {"base": [], "lora": ["--adapter", str(lora)], "cores": ["--adapter", str(cores)]}
    for name, config in others.items():
        runs[name] = ["--adapter", str(adapter(model, tmp_path / f"adapter-{name}", config))]
    runs["merged"] = [*runs["lora"], "--merge", "--label", "LoRA, merged"]
    for name, more in runs.items():
        assert script.main(arguments(people, model, tmp_path / name, "--limit", "1", *more)) == 0
    found = {name: summary(tmp_path / name) for name in runs}
    scores = {name: one["metrics"]["comp"] for name, one in found.items()}
    assert len({round(scores[name], 9) for name in ("base", "lora", "cores", *others)}) == 5
    assert scores["merged"] == pytest.approx(scores["lora"], rel=1e-3)
    # Six frame and six global blocks of four linears each, with rank 2 or a core of 4 x 4.
    width, blocks = 128, 12
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    assert found["lora"]["trainable_parameters"] == blocks * sum(2 * (n + m) for n, m in sizes)
    assert found["cores"]["trainable_parameters"] == blocks * 4 * 16
    digests = [found[name]["settings"]["adapter_digest"] for name in ("base", "lora", "cores", "merged")]
    assert digests[0] == "" and digests[1] == digests[3] != digests[2]

    capsys.readouterr()
    assert script.main(["--table", *(str(tmp_path / name) for name in runs)]) == 0
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:8]] == [
        "vggt-mini",
        "lora",
        "cores",
        "adapter-adalora",
        "adapter-pissa",
        "LoRA, merged",
    ]


def test_a_run_continues_where_it_stopped(
    script: ModuleType, people: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert script.main(arguments(people, model, whole)) == 0
    measure = importlib.import_module("_measure")
    run_model, seen = measure.run_model, []

    def stopping(model: object, sample: Sample, how: object) -> object:
        if sample.name == "0001":
            raise KeyboardInterrupt
        return run_model(model, sample, how)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "run_model", stopping)
        assert script.main(arguments(people, model, out)) == 130
    assert [path.name for path in (out / "sequences").iterdir()] == ["0000.json"]
    monkeypatch.setattr(measure, "run_model", lambda m, s, h: (seen.append(s.name), run_model(m, s, h))[1])
    assert script.main(arguments(people, model, out)) == 0
    assert seen == ["0001", "0002"]
    assert files(out) == files(whole)
    assert script.main(arguments(people, model, out)) == 0 and seen == ["0001", "0002"]


def test_a_precision_is_chosen_once_and_kept(
    script: ModuleType,
    people: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    machines = {"bf16": ["avx512_bf16"], "fp32": []}
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    read, numbers = RenderedDataset.read, {}

    def interrupted(self: object, name: str, frames: object = None) -> Sample:
        if name == NAMES[1]:
            raise KeyboardInterrupt
        return read(self, name, frames)  # type: ignore[arg-type]

    for auto, other in (("bf16", "fp32"), ("fp32", "bf16")):
        for option, name in (("auto", auto), ("fp32", "fp32"), ("bfloat16", "bf16")):
            out = tmp_path / f"{auto}-{option}"
            run = arguments(people, model, out)
            fake_cpu(monkeypatch, *machines[auto])
            flag = "--dtype" if option == "bfloat16" else "--precision"  # its older name
            with monkeypatch.context() as patch:
                patch.setattr(RenderedDataset, "read", interrupted)
                assert script.main([*run, flag, option]) == 130
            assert f"precision {name}: " in capsys.readouterr().err
            # Another machine goes on in the same precision, and says so where it would choose another.
            fake_cpu(monkeypatch, *machines[other])
            if option == "fp32":
                (out / "precision.json").unlink()  # as in an older version
            assert script.main([*run, "--precision", names[other if name == auto else auto]]) == 2
            assert f"holds a run with dtype = '{names[name]}'" in capsys.readouterr().err
            assert script.main(run) == 0
            said = capsys.readouterr()
            kept = f"precision {name} is kept from the start of this run; auto would choose {other}"
            assert (kept in said.err) == (name == auto and option != "bfloat16")
            found = summary(out)
            assert found["settings"]["dtype"] == names[name] and found["precision"]["precision"] == name
            assert f"dtype = {names[name]}" in said.out
            numbers.setdefault(name, set()).add(found["metrics"]["acc"])
    assert len(numbers["bf16"]) == len(numbers["fp32"]) == 1 and numbers["bf16"] != numbers["fp32"]


def test_another_protocol_does_not_continue_a_run(
    script: ModuleType, people: Path, model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert script.main(arguments(people, model, out, "--limit", "1")) == 0
    before = files(out)
    for more in (["--align", "sim3"], ["--adapter", str(lora)], ["--image-size", "112"], ["--icp-threshold", "0.2"]):
        assert script.main(arguments(people, model, out, "--limit", "1", *more)) == 2
        assert "holds a run with" in capsys.readouterr().err
    assert files(out) == before


def test_what_cannot_be_measured_is_named(
    script: ModuleType,
    people: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    measure = importlib.import_module("_measure")
    run_model = measure.run_model

    def spoiled(model: object, sample: Sample, how: object) -> object:
        found = run_model(model, sample, how)
        if sample.name == "0001":
            found.depth[0, :, :] = np.nan
        return found

    monkeypatch.setattr(measure, "run_model", spoiled)
    out = tmp_path / "run"
    assert script.main(arguments(people, model, out)) == 0
    found = summary(out)
    assert (found["n_evaluated"], found["skipped"]) == (2, {"0001": "prediction is not finite"})
    assert rows(out)["0001"]["status"] == "skipped" and rows(out)["0001"]["acc"] == ""
    printed = capsys.readouterr().out
    assert "2 of 3 sequences evaluated, 1 skipped (1 prediction is not finite)" in printed
    assert "skipped: 0001: prediction is not finite" in printed


def test_a_damaged_file_is_named_and_read_again_once_it_is_mended(
    script: ModuleType, people: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(people, data)
    victim = next((data / "0001" / "renderings").glob("*_depth.npy"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:50])
    assert script.main(arguments(data, model, out)) == 1
    captured = capsys.readouterr()
    assert "0001 cannot be read" in captured.err and victim.name in captured.err
    assert summary(out)["n_missing"] == 1 and not (out / "table.md").exists()
    victim.write_bytes(whole)
    assert script.main(arguments(data, model, out)) == 0
    assert summary(out)["n_evaluated"] == 3


def test_transparent_pixels_have_columns_of_their_own(
    script: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path / "clearpose")
    measure = importlib.import_module("_measure")
    monkeypatch.setattr(measure, "run_model", lambda model, sample, how: truth(sample, measure))
    out = tmp_path / "run"
    first = ["--benchmark", "clearpose", "--data", str(root), "--model", str(model), "--out", str(out)]
    assert script.main([*first, "--image-size", "56", "--pictures", "0"]) == 0
    found = summary(out)
    assert found["metrics"]["transparent_acc"] < 1e-5 and found["metrics"]["transparent_nc"] > 0.99
    assert 0 < found["metrics"]["transparent_points"] < found["metrics"]["points"]
    assert "Acc transparent (×1e-2)" in capsys.readouterr().out


def test_a_sequence_without_a_valid_pixel_is_skipped(people: Path, script: ModuleType) -> None:
    from dataclasses import replace

    measure = importlib.import_module("_measure")
    sample = RenderedDataset(people)[0]
    empty = replace(sample, point_masks=torch.zeros_like(sample.point_masks))
    for metrics in ("points", "depth"):
        how = measure.How(metrics, False, "sim3", 0.1, "release", "irls", None, None, False, 56, "float32", 0, 1)
        with pytest.raises(SkippedError, match="no valid pixels"):
            measure.measure(empty, truth(sample, measure), how)


def test_an_adapter_of_another_base_is_refused(
    script: ModuleType, people: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = VggtConfig.preset("vggt-mini", embed_dim=64, num_heads=2, encoder_num_heads=2)
    targets = vggt_targets("aggregator", config)
    other = get_peft_model(VggtModel(config), LoraConfig(r=2, target_modules=targets))
    other.save_pretrained(tmp_path / "other")
    assert script.main(arguments(people, model, tmp_path / "run", "--adapter", str(tmp_path / "other"))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "other") in error and "another base" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image-size", "60"], "not a multiple of"),
        (["--merge"], "--merge folds an adapter"),
        (["--limit", "0"], "--limit is 0"),
        (["--adapter", "no-such-adapter-folder"], "no-such-adapter-folder"),
        (["--split", "validation"], "validation"),
    ],
)
def test_arguments_that_do_not_fit(
    script: ModuleType,
    people: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    more: list,
    words: str,
) -> None:
    assert script.main(arguments(people, model, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("evaluate: ")
    assert not (tmp_path / "run").exists()


def test_missing_arguments_and_tables_of_two_benchmarks(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert script.main(["--benchmark", "human"]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert script.main(["--table", str(tmp_path)]) == 2
    assert "summary.json is missing" in capsys.readouterr().err
    for name in ("human", "face"):
        (tmp_path / name).mkdir()
        record = {"metrics": {"acc": 1.0}, "n_evaluated": 1, "settings": {"benchmark": name, "align": "sim3"}}
        (tmp_path / name / "summary.json").write_text(json.dumps(record))
    assert script.main(["--table", str(tmp_path / "human"), str(tmp_path / "face")]) == 2
    assert "several benchmarks (face, human)" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_continued_by_two_processes_it_is_the_run_of_one(people: Path, model: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, str(SCRIPT), *arguments(people, model, whole)]
    subprocess.run(alone, env=environment, check=True, capture_output=True, timeout=300)
    # Not accelerate launch, which starts one process on a CPU whatever it is told.
    environment |= {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(SCRIPT), *arguments(people, model, out)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not any((out / "sequences").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    here, there = files(out), files(whole)
    two, one = (json.loads(tree.pop("summary.json")) for tree in (here, there))
    assert (two["provenance"].pop("processes"), one["provenance"].pop("processes")) == (2, 1)
    assert two == one and here == there
