"""Which weights a training began with: said, recorded, and refused where an adapter, a basis or a run has others."""

# ruff: noqa: F811 (fixtures of test_finetune)
from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from peft_attrsub import Basis
from peft_attrsub.basis.identity import BaseIdentity, adapter_base
from peft_attrsub.cli import app
from peft_attrsub.vggt import VggtModel
from tests.examples.training_tools import on_path, tiny_model

from .test_finetune import FIXED, arguments, base, scenes, script  # noqa: F401

on_path()

ONE = ["--steps", "1", "--eval-every", "0", "--panel-every", "0", "--heads", "frozen", "--rank", "2"]
TRAINED, UNTRAINED = ["--model", "vggt-mini"], []


def finetune(script: ModuleType, scenes: Path, out: Path, *more: str) -> int:
    return script.main([*FIXED, *ONE, "--data", str(scenes / "texture_00"), "--out", str(out), *more])


@pytest.fixture(scope="module")
def adapters(script: ModuleType, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA on the untrained vggt-mini that the preset smoke begins with, and one on the trained one."""
    place = tmp_path_factory.mktemp("adapters")
    for name, which in (("untrained", UNTRAINED), ("trained", TRAINED)):
        assert finetune(script, scenes, place / name, "--method", "lora", *which) == 0
    return {name: place / name / "adapter" for name in ("untrained", "trained")}


def recorded(adapter: Path) -> BaseIdentity:
    found = adapter_base(json.loads((adapter / "adapter_config.json").read_text()))
    assert found is not None
    return found


def test_an_adapter_tells_its_base_and_so_does_the_first_line(
    script: ModuleType,
    scenes: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    found = {name: recorded(folder) for name, folder in adapters.items()}
    assert {one.name for one in found.values()} == {"vggt-mini"}
    assert (found["untrained"].seed, found["trained"].seed) == (0, None)
    assert found["untrained"].digest != found["trained"].digest
    model = importlib.import_module("_model")
    trained = VggtModel.from_pretrained("vggt-mini", heads=["camera", "depth"])
    assert found["trained"] == model.identify(trained, "vggt-mini")
    for name, which in (("untrained", UNTRAINED), ("trained", TRAINED)):
        assert finetune(script, scenes, tmp_path / name, "--method", "random", "--dim", "2", *which) == 0
        printed = capsys.readouterr()
        said = f"base: {found[name]}"
        assert said in printed.out + printed.err
        assert ("untrained weights, seed 0" in said) == (name == "untrained")


def test_the_digest_is_of_the_numbers_not_of_their_files(tmp_path: Path) -> None:
    model = importlib.import_module("_model")
    tiny_model().save_pretrained(tmp_path / "one")
    VggtModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    found = [model.identify(model.load_base(str(tmp_path / name)), str(tmp_path / name)) for name in ("one", "shards")]
    assert [one.name for one in found] == ["one", "shards"], "a path of this machine tells only its last part"
    assert found[0].digest == found[1].digest
    changed = VggtModel.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0].add_(1e-3)
    assert model.identify(changed, "one").digest != found[0].digest


def test_a_basis_is_mined_from_one_base_and_tuned_on_it(
    script: ModuleType,
    scenes: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    names = {name: str(recorded(folder)) for name, folder in adapters.items()}
    both = [f"a={folder}" for folder in adapters.values()]
    done = CliRunner().invoke(app, ["build-basis", *both, "-o", str(tmp_path / "mixed")])
    assert done.exit_code == 2 and not (tmp_path / "mixed").exists()
    for words in (*names.values(), *map(str, adapters.values())):
        assert words in done.stderr
    basis = str(tmp_path / "basis")
    done = CliRunner().invoke(app, ["build-basis", str(adapters["untrained"]), "-o", basis, "--dim", "2"])
    assert done.exit_code == 0
    mined = Basis.from_pretrained(basis)
    # Called by the run, not by the folder that every run has.
    assert mined.attributes == ["untrained"] and mined.config.attributes[0].sources[0].id == "untrained/adapter"
    assert names["untrained"] in CliRunner().invoke(app, ["info", basis]).stdout

    tune = ["--method", "attrsub", "--basis", basis]
    assert finetune(script, scenes, tmp_path / "run", *tune, *TRAINED) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in names.values()) and not (tmp_path / "run").exists()
    assert finetune(script, scenes, tmp_path / "run", *tune, *UNTRAINED) == 0


def test_an_adapter_is_measured_on_its_own_base(
    scenes: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    evaluate = importlib.import_module("evaluate")
    words = ["--benchmark", "scenes", "--data", str(scenes / "texture_00"), "--limit", "1", "--pictures", "0"]
    words += ["--image-size", "56", "--model", "vggt-mini", "--adapter", str(adapters["untrained"])]
    assert evaluate.main([*words, "--out", str(tmp_path / "no"), "--random-weights", "none"]) == 2
    error = capsys.readouterr().err
    assert "the base weights differ" in error and "untrained weights, seed 0" in error
    assert not (tmp_path / "no").exists()
    for seed in ("none", "0"):
        label = [*words[:-2], "--out", str(tmp_path / seed), "--random-weights", seed]
        more = ["--adapter", str(adapters["untrained" if seed == "0" else "trained"])]
        assert evaluate.main([*label, *more]) == 0
    found = json.loads((tmp_path / "0" / "summary.json").read_text())
    assert BaseIdentity.of(found["base"]) == recorded(adapters["untrained"])
    assert found["label"] == "untrained", "the run's folder, not the adapter in it"
    capsys.readouterr()
    assert evaluate.main(["--table", str(tmp_path / "0"), str(tmp_path / "none"), str(tmp_path / "0")]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:5]]
    assert rows == ["untrained (0)", "trained", "untrained (0)"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--model", "vggt-huge", "--random-weights", "0"],
            "none of the presets vggt-1b, vggt-mini: give one of them",
        ),
        (["--model", "me/vggt", "--random-weights", "0"], "none of the presets vggt-1b, vggt-mini: give one of them"),
        (["--model", "vggt-1b"], "one of the presets vggt-1b, vggt-mini with --random-weights SEED"),
        (
            ["--model", "vggt-huge", "--random-weights", "none"],
            "is neither a folder nor a Hub id (user/name) nor vggt-mini",
        ),
    ],
)
def test_a_model_that_is_none_is_a_sentence(
    script: ModuleType,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    words: list[str],
    sentence: str,
) -> None:
    evaluate = importlib.import_module("evaluate")
    assert finetune(script, scenes, tmp_path / "run", "--method", "lora", *words) == 2
    measure = ["--benchmark", "scenes", "--data", str(scenes / "texture_00"), "--out", str(tmp_path / "run")]
    assert evaluate.main([*measure, *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if sentence in line]
    assert [line.partition(":")[0] for line in told] == ["finetune", "evaluate"]
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_weights_of_that_name(
    script: ModuleType,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folder, out = tmp_path / "tiny", tmp_path / "run"
    tiny_model(0).save_pretrained(folder)
    words = [*arguments(scenes, folder, out, "--method", "lora"), *ONE]
    assert script.main(words) == 0
    (out / "summary.json").unlink()  # as if it had been stopped before its end
    tiny_model(1).save_pretrained(folder)
    assert script.main(words) == 2
    assert "the base weights differ: the run in" in capsys.readouterr().err and not (out / "summary.json").exists()
    tiny_model(0).save_pretrained(folder)
    assert script.main(words) == 0


def test_a_cluster_is_not_made_of_two_bases(
    adapters: dict[str, Path],
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    import shutil

    cluster = importlib.import_module("train_lora_cluster")
    shutil.copytree(adapters["untrained"], tmp_path / "texture_00")
    words = [*FIXED, *ONE, "--datasets", str(scenes), "--only", "texture_00", "--out", str(tmp_path)]
    for more in ([], ["--launcher", "local", "--dry-run"]):
        assert cluster.main([*words, *TRAINED, *more]) == 2
        assert "untrained weights, seed 0" in (error := capsys.readouterr().err) and "trained weights" in error
    assert cluster.main([*words, *UNTRAINED]) == 0 and "done already" in capsys.readouterr().out
