"""What the words of build-basis mean: runs with checkpoints, globs, links, absent names; modules and base names."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from peft_attrsub import Basis, BasisError, build_basis
from peft_attrsub.basis.base_names import base_name_of
from peft_attrsub.cli_words import group_adapters
from tests.basis.helpers import edit_config, random_factors, save_lora

SHAPES = {"model.layers.0.q": (12, 10), "model.layers.1.q": (12, 10), "model.layers.1.mlp": (14, 10)}


def lora(folder: Path, seed: int, names: dict[str, tuple[int, int]] = SHAPES, **config: object) -> str:
    return save_lora(folder, random_factors(names, 3, torch.Generator().manual_seed(seed)), **config)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.filterwarnings("ignore:.*holds no final adapter")
def test_random_trees_of_runs(tmp_path, monkeypatch, seed):
    """Finals before checkpoints, the last checkpoint where there is no final, nothing of folders without either."""
    draw = random.Random(seed)
    monkeypatch.chdir(tmp_path)
    expected = []
    for i in range(draw.randint(1, 5)):
        run = Path("runs") / draw.choice([f"x-{i}", f"x-{i}-long", f"{i}"])
        run.mkdir(parents=True)
        steps = sorted(draw.sample([2, 10, 100, 999, 1000], draw.randint(0, 3)))
        for step in steps:
            (run / f"checkpoint-{step}").mkdir()
            (run / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
        (run / "checkpoint-7").mkdir()  # a step that was not written whole
        (run / "logs").mkdir()
        final = draw.choice([None, ".", "adapter", "best"])
        if final:
            (run / final).mkdir(exist_ok=True)
            (run / final / "adapter_config.json").write_text("{}")
            expected.append(os.path.normpath(run / final))
        elif steps:
            expected.append(str(run / f"checkpoint-{steps[-1]}"))
    word = draw.choice(["runs", "runs/", "./runs", "a=runs"])
    if not expected:
        with pytest.raises(BasisError, match="holds neither an adapter"):
            group_adapters([word])
        return
    ((attribute, found),) = group_adapters([word]).items()
    assert attribute == ("a" if word.startswith("a=") else "runs")
    assert sorted(found) == sorted(expected)


def test_checkpoints_are_told_and_chosen(cli, tmp_path):
    for run in range(2):
        for step in (5, 10):
            lora(tmp_path / f"texture-{run}" / f"checkpoint-{step}", 10 * run + step)
    last = cli("build-basis", tmp_path / "texture-0", tmp_path / "texture-1", "-o", tmp_path / "last")
    assert last.code == 0 and last.err.count("its last checkpoint, 10, is taken") == 2
    first = cli("build-basis", tmp_path / "texture-*", "-o", tmp_path / "first", "--checkpoint", 5)
    assert first.code == 0, first.err
    basis = Basis.from_pretrained(tmp_path / "first")
    assert basis.attributes == ["texture"]
    expected = build_basis({"texture": [tmp_path / f"texture-{i}/checkpoint-5" for i in range(2)]}, progress=False)
    assert basis.digest == expected.digest != Basis.from_pretrained(tmp_path / "last").digest
    none = cli("build-basis", tmp_path / "texture-0", "-o", tmp_path / "none", "--checkpoint", 6)
    assert none.code == 2 and "has no checkpoint 6: it has 5, 10." in none.err
    assert cli("build-basis", tmp_path / "texture-0", "-o", tmp_path / "x", "--checkpoint", "best").code == 2


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("gone", "there is no file or folder 'gone' here"),
        ("./gone", "there is no file or folder './gone' here"),
        ("here/gone", "there is no file or folder 'here/gone' here"),
        ("gone.safetensors", "there is no file or folder 'gone.safetensors' here"),
        ("~/gone-adapter", "gone-adapter' here"),
        ("gone-*", "'gone-*' matches no file or folder here"),
        ("x=gone-*", "'gone-*' matches no file or folder here"),
        ("notes.txt", "'notes.txt' is a file and not a saved adapter: give a folder or a .safetensors file"),
        ("dangling", "'dangling' is a link to 'nowhere', which does not exist"),
        ("x=dangling", "'dangling' is a link to 'nowhere', which does not exist"),
        ("here", "'here' holds neither an adapter"),
    ],
)
def test_words_that_are_no_adapter(cli, tmp_path, word, sentence):
    (tmp_path / "here").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    done = cli("build-basis", word, "-o", "basis", cwd=tmp_path)
    assert done.code == 2 and sentence in done.err and "Traceback" not in done.err
    assert not (tmp_path / "basis").exists()


def test_modules_are_chosen_by_pattern(cli, tmp_path):
    lora(tmp_path / "x-0", 0)
    for words, names in [
        (["--modules", r"layers\.1\."], ["model.layers.1.mlp", "model.layers.1.q"]),
        (["--modules", "mlp", "--modules", r"0\.q$"], ["model.layers.0.q", "model.layers.1.mlp"]),
        (["--exclude", "mlp"], ["model.layers.0.q", "model.layers.1.q"]),
        (["--modules", "q$", "--exclude", r"\.0\.", "--exclude", "mlp"], ["model.layers.1.q"]),
    ]:
        done = cli("build-basis", tmp_path / "x-0", "-o", tmp_path / "basis", "--overwrite", *words, "--json")
        assert done.code == 0, done.err
        assert done.json["module_names"] == names
    for words, sentence in [
        (["--modules", "k_proj"], "modules='(?:k_proj)' is found in no module"),
        (["--modules", "("], "--modules '(' is not a regular expression"),
        (["--exclude", "("], "exclude= '(' is not a regular expression"),
        (["--exclude", "layers"], "leaves no module"),
        (["--map", "x"], "--map 'x': give OLD=NEW"),
    ]:
        done = cli("build-basis", tmp_path / "x-0", "-o", tmp_path / "other", *words)
        assert done.code == 2 and sentence in done.err, done.err


def test_renamed_prefixes_are_hinted_and_mapped(cli, tmp_path):
    lora(tmp_path / "x-0", 0)
    new = {name.replace("model.layers", "layers"): shape for name, shape in SHAPES.items()}
    lora(tmp_path / "x-1", 1, new)
    done = cli("build-basis", tmp_path / "x-0", tmp_path / "x-1", "-o", tmp_path / "basis")
    assert done.code == 2
    hint = done.err.partition("(--map '")[2].partition("'")[0]
    assert hint in (r"^model\.=", "^=model."), done.err
    done = cli("build-basis", tmp_path / "x-0", tmp_path / "x-1", "-o", tmp_path / "basis", "--map", hint)
    assert done.code == 0, done.err
    assert len(Basis.from_pretrained(tmp_path / "basis").modules) == 3
    both = {"a.fc": (12, 10), "b.fc": (12, 10)}
    lora(tmp_path / "y-0", 2, both)
    done = cli("build-basis", tmp_path / "y-0", "-o", tmp_path / "other", "--map", "^[ab].=")
    assert done.code == 2 and "the modules 'a.fc' and 'b.fc' both become 'fc'" in done.err


@pytest.mark.parametrize(
    ("one", "other", "same", "recorded"),
    [
        ("org/model", "org/model/", True, "org/model"),
        ("org/model", "/cache/hub/models--org--model/snapshots/abc123", True, "org/model"),
        ("org/model", "/cache/hub/models--org--model/snapshots/abc123/", True, "org/model"),
        ("unsloth/model-bnb-4bit", "org/model", True, "org/model"),
        ("unsloth/Model-unsloth-bnb-4bit", "org/model", True, "org/model"),
        ("unsloth/model", "org/Model", True, "org/Model"),
        ("org/model-bnb-4bit", "org/model", True, "org/model"),
        ("org/model-bnb-4bit", "other/model", False, None),
        ("org/model", "org/model-large", False, None),
        ("org/model", "other/model", False, None),
        ("/data/models/model", "/data/models/model/", True, "model"),
        ("/data/models/model", "/other/model", False, None),
        (r"C:\models\model", r"C:\models\model", True, "model"),
    ],
)
def test_names_of_one_base(tmp_path, one, other, same, recorded):
    assert base_name_of(one).same_as(base_name_of(other)) == base_name_of(other).same_as(base_name_of(one)) == same
    adapters = [lora(tmp_path / f"x-{i}", i, base_model=name) for i, name in enumerate((one, other))]
    if not same:
        with pytest.raises(BasisError, match="belong to different base models"):
            build_basis(adapters, progress=False)
        return
    basis = build_basis(adapters, progress=False)
    assert basis.config.base_model == recorded
    revision = "abc123" if "abc123" in other else None
    assert basis.config.base_model_revision == revision


def test_an_explicit_base_model_decides(cli, tmp_path):
    adapters = [lora(tmp_path / f"x-{i}", i, base_model=f"org/model-{i}") for i in range(2)]
    done = cli("build-basis", *adapters, "-o", tmp_path / "basis", "--base-model", "/data/models/mine/")
    assert done.code == 0 and "base_model='mine' is recorded as it was given; the adapters name" in done.err
    assert Basis.from_pretrained(tmp_path / "basis").config.base_model == "mine"


def test_two_revisions_are_told_and_recorded(tmp_path):
    adapters = [lora(tmp_path / f"x-{i}", i) for i in range(3)]
    for adapter, revision in zip(adapters, ("aaa", "bbb", "main"), strict=True):
        edit_config(adapter, revision=revision)
    with pytest.warns(UserWarning, match="several revisions of the base model: aaa .*, bbb"):
        basis = build_basis(adapters, progress=False)
    assert basis.config.base_model_revision == "aaa, bbb"


def test_no_absolute_path_gets_into_a_basis_its_card_or_its_report(cli, tmp_path):
    secret = tmp_path / "secret-place"
    adapters = [lora(secret / f"texture-{i}", i, base_model=str(secret / "model")) for i in range(2)]
    record = {"name": str(secret / "model"), "digest": "0" * 64}
    for adapter in adapters:
        edit_config(adapter, auto_mapping={"training": {"base": record}})
    lora(secret / "untrained-0", 5)
    shutil.copytree(adapters[0], secret / "zero-0")
    done = cli("build-basis", *adapters, "-o", tmp_path / "basis", "--base-model", secret / "model", "--dim", 2)
    assert done.code == 0, done.err
    done = cli("report", tmp_path / "basis", "-o", tmp_path / "report.html", cwd=tmp_path)
    assert done.code == 0, done.err
    for path in [*(tmp_path / "basis").iterdir(), tmp_path / "report.html"]:
        assert b"secret-place" not in path.read_bytes(), path.name
    config = json.loads((tmp_path / "basis" / "basis_config.json").read_text())
    assert config["base_model"] == "model" and config["base"]["name"] == "model"
