"""examples/vggt/training/settings.py: presets, YAML and command line give the settings of a run, or a sentence."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "examples" / "vggt"
GIVEN = ["--data", "scenes", "--out", "run", "--method", "lora"]


@pytest.fixture(scope="module")
def settings() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("training.settings")
    sys.path.remove(str(FOLDER))


def values(*parts: Any) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for part in parts for f in fields(part)}


def written(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_preset_paper_is_the_recipe_of_the_paper(settings: ModuleType) -> None:
    found = values(*settings.parse([*GIVEN, "--preset", "paper"]))
    expected = {
        "steps": 24_000,
        "lr": 1e-5,
        "lr_start": 1e-8,
        "lr_final": 1e-8,
        "warmup_share": 0.05,
        "weight_decay": 0.05,
        "clip": 0.5,
        "clip_groups": False,
        "images_per_step": 32,
        "accumulate": 1,
        "views_min": 4,
        "views_max": 16,
        "precision": "auto",  # bf16 on the GPUs of the paper
        "rank": 16,
        "image_size": 518,
        "model": "facebook/VGGT-1B",
    }
    assert {name: found[name] for name in expected} == expected


def test_the_preset_release_differs_where_the_release_does(settings: ModuleType) -> None:
    paper = values(*settings.parse([*GIVEN, "--preset", "paper"]))
    release = values(*settings.parse([*GIVEN, "--preset", "release"]))
    changed = {name: value for name, value in release.items() if value != paper[name]}
    assert changed == {"clip": 1.0, "clip_groups": True, "images_per_step": 48, "accumulate": 2, "views_min": 3}


def test_both_have_the_augmentation_and_the_loss_of_vggt(settings: ModuleType) -> None:
    expected = {
        "aspect_min": 0.33,
        "aspect_max": 1.0,
        "crop_min": 0.8,
        "crop_max": 1.2,
        "rescale": 0.3,
        "jitter": 0.9,
        "brightness": 0.5,
        "contrast": 0.5,
        "saturation": 0.5,
        "hue": 0.1,
        "gray": 0.05,
        "blur": 0.0,
        "same_colors": 0.7,
        "camera_weight": 5.0,
        "depth_weight": 1.0,
        "quantile": 0.98,
        "beta1": 0.9,
        "beta2": 0.999,
    }
    for preset in ("paper", "release"):
        found = values(*settings.parse([*GIVEN, "--preset", preset]))
        assert {name: found[name] for name in expected} == expected


def test_without_a_preset_it_is_the_paper_and_so_are_the_defaults(settings: ModuleType) -> None:
    plain = settings.parse(GIVEN)
    assert plain == settings.parse([*GIVEN, "--preset", "paper"])
    own = (settings.ModelSettings(method="lora"), settings.DataSettings(data="scenes"), settings.TrainSettings("run"))
    assert plain == own


def test_every_value_of_a_preset_is_a_setting(settings: ModuleType) -> None:
    known = {
        f.name
        for kind in (settings.ModelSettings, settings.DataSettings, settings.TrainSettings)
        for f in fields(kind)
    }
    assert settings.PRESETS.keys() == {"paper", "release", "smoke"}
    for preset in settings.PRESETS.values():
        assert preset.keys() <= known


def test_smoke_is_small(settings: ModuleType) -> None:
    model, data, train = settings.parse([*GIVEN, "--preset", "smoke"])
    assert (model.model, model.random_weights, model.checkpointed) == ("vggt-mini", 0, ())
    assert data.image_size <= 112 and data.workers == 0
    assert train.steps <= 50 and train.precision == "auto"


def test_the_command_line_goes_over_the_file_and_that_over_the_preset(settings: ModuleType, tmp_path: Path) -> None:
    file = written(tmp_path, "preset: release\nlr: 1e-4\nclip: 2\nsteps: 7\nmethod: psv\n")
    model, data, train = settings.parse([*GIVEN[:4], "--config", file, "--steps", "8"])
    assert (train.steps, train.lr, train.clip, train.accumulate) == (8, 1e-4, 2.0, 2)
    assert (model.method, data.views_min) == ("psv", 3)
    # a preset on the command line as well
    assert settings.parse([*GIVEN[:4], "--config", file, "--preset", "paper"])[1].views_min == 4


def test_a_model_that_is_given_takes_nothing_of_another_one(settings: ModuleType, tmp_path: Path) -> None:
    def weights(*words: str) -> tuple[str, int | None]:
        model = settings.parse([*GIVEN, *words])[0]
        return model.model, model.random_weights

    smoke = ["--preset", "smoke"]
    assert weights(*smoke) == ("vggt-mini", 0)
    assert weights(*smoke, "--model", "vggt-mini") == ("vggt-mini", None)
    assert weights(*smoke, "--model", "vggt-1b", "--random-weights", "3") == ("vggt-1b", 3)
    assert weights(*smoke, "--random-weights", "none") == ("vggt-mini", None)
    file = ["--config", written(tmp_path, "preset: smoke\nmodel: vggt-mini\n")]
    assert weights(*file) == ("vggt-mini", None)
    assert weights(*file, "--random-weights", "4") == ("vggt-mini", 4)
    # The file's seed is of the file's model, unless it names none.
    file = ["--config", written(tmp_path, "model: vggt-1b\nrandom_weights: 3\n")]
    assert weights(*smoke, *file) == ("vggt-1b", 3)
    assert weights(*smoke, *file, "--model", "vggt-mini") == ("vggt-mini", None)
    file = ["--config", written(tmp_path, "random_weights: 3\n")]
    assert weights(*smoke, *file, "--model", "vggt-1b") == ("vggt-1b", 3)
    assert weights(*smoke, "--config", written(tmp_path, "random-weights: none\n")) == ("vggt-mini", None)


LAYERS = st.lists(
    st.dictionaries(st.sampled_from(["model", "random_weights", "steps"]), st.integers(0, 9)), max_size=4
)


@given(LAYERS)
def test_layers_field_by_field(settings: ModuleType, layers: list[dict[str, int]]) -> None:
    """Against the rule in words: the last layer that says it, unless a later one names the model it was said of."""
    expected = {}
    for number, layer in enumerate(layers):
        for key, value in layer.items():
            bound = key == "random_weights" and "model" in layer
            if not (bound and any("model" in later for later in layers[number + 1 :])):
                expected[key] = value
    before = [dict(layer) for layer in layers]
    assert settings.layered(*layers) == expected and layers == before


def test_none_is_a_value_of_every_number_that_may_be_none(settings: ModuleType) -> None:
    kinds = (settings.ModelSettings, settings.DataSettings, settings.TrainSettings)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    numbers = [name for name, hint in hints.items() if hint in (int | None, float | None)]
    assert "random_weights" in numbers and "alpha" in numbers
    words = [word for name in numbers for word in (f"--{name.replace('_', '-')}", "none")]
    found = values(*settings.parse([*GIVEN, "--preset", "smoke", *words]))
    assert [found[name] for name in numbers] == [None] * len(numbers)


def test_a_file_has_every_type(settings: ModuleType, tmp_path: Path) -> None:
    text = (
        "data: scenes\nout: run\nbasis: [one, two]\nattributes: [texture]\nalpha: null\nclip-groups: yes\n"
        "depth_gradient: false\nhue: 0\nrandom_weights: 3\ngradient_checkpointing: none\n"
    )
    model, data, train = settings.parse(["--config", written(tmp_path, text)])
    assert (model.basis, model.attributes, model.alpha, model.random_weights) == (["one", "two"], ["texture"], None, 3)
    assert (train.clip_groups, train.depth_gradient, data.hue, model.checkpointed) == (True, False, 0.0, ())
    assert isinstance(data.hue, float)


def test_spellings_of_a_precision(settings: ModuleType, tmp_path: Path) -> None:
    spellings = {"bf16": ("bf16", "bfloat16"), "fp16": ("fp16", "half"), "fp32": ("fp32", "float32", "no", "none")}
    for name, words in {**spellings, "auto": ("auto",)}.items():
        for word in words:
            assert settings.parse([*GIVEN, "--precision", word])[2].precision == name
            file = written(tmp_path, f"precision: {word}\n")  # YAML reads no as false
            assert settings.parse([*GIVEN, "--config", file])[2].precision == name
    with pytest.raises(ValueError, match=r"--precision is 'int8': expected one of auto, bf16, fp16, fp32\."):
        settings.parse([*GIVEN, "--precision", "int8"])


def test_what_is_written_is_read_back(settings: ModuleType, tmp_path: Path) -> None:
    more = ["--preset", "release", "--basis", "a", "b", "--dim", "texture=4", "light=2", "--heads", "cores"]
    run = settings.parse([*GIVEN[:4], *more, "--seed", "-1", "--gradient-checkpointing", "none"])
    assert settings.parse(["--config", written(tmp_path, settings.to_yaml(*run))]) == run


@pytest.mark.parametrize(
    ("words", "dims"),
    [(None, None), (["16"], 16), (["texture=16", "geometry=8"], {"texture": 16, "geometry": 8}), (["t=1"], {"t": 1})],
)
def test_dim_is_a_number_or_one_by_attribute(settings: ModuleType, words: list[str] | None, dims: Any) -> None:
    assert settings.ModelSettings(basis=["b"], dim=words).dims == dims


def test_dim_by_attribute_in_a_file(settings: ModuleType, tmp_path: Path) -> None:
    file = written(tmp_path, "basis: b\ndim: {texture: 16, geometry: 8}\n")
    assert settings.parse(["--config", file], required=())[0].dims == {"texture": 16, "geometry": 8}
    assert settings.parse(["--config", written(tmp_path, "basis: b\ndim: 16\n")], required=())[0].dims == 16


@pytest.mark.parametrize("words", [["x"], ["8", "9"], ["a=1", "8"], ["a=1", "a=2"], ["0"], ["a="]])
def test_a_dim_that_is_none_is_refused(settings: ModuleType, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"give one number, or one by attribute"):
        settings.ModelSettings(basis=["b"], dim=words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "dora"], r"--method: invalid choice: 'dora' \(choose from .*'attrsub'"),
        (["--weightdecay", "1"], r"there is no option --weightdecay: did you mean --weight_decay\?"),
        (["--zzz"], r"there is no option --zzz; see --help"),
        (["--step", "5"], r"there is no option --step: did you mean --steps\?"),
        (["--steps", "many"], r"--steps: invalid int value: 'many'"),
        (["--random-weights", "many"], r"invalid int value: 'many'"),
        (["--steps", "none"], r"--steps: invalid int value: 'none'"),
        (["--steps", "0"], r"--steps is 0: give 1 or more"),
        (["--method", "attrsub"], r"--basis is missing: method attrsub"),
        (["--method", "psv", "--basis", "b"], r"--basis is for method attrsub"),
        (["--dim", "8"], r"--dim is the size of cores: method lora has none; give --rank"),
        (["--method", "random", "--dim", "a=8"], r"by attribute, which random has not"),
        (["--heads", "cores"], r"--heads cores needs method psv, random, attrsub"),
        (["--method", "full", "--heads", "lora"], r"--heads lora does not go with method full"),
        (["--exclude", "("], r"--exclude '\(' is no regular expression"),
        (["--gradient-checkpointing", "heads"], r"'heads' is unknown: give one of encoder, frame"),
        (["--adalora-init-rank", "16"], r"--adalora-init-rank 16 must be above --rank 16"),
        (["--adalora-warm", "0.7"], r"leave no steps in which ranks fall"),
        (["--image-size", "0"], r"--image-size is 0: give 1 or more"),
        (["--views-min", "9", "--views-max", "8"], r"--views-min 9 and --views-max 8"),
        (["--images-per-step", "8"], r"--images-per-step 8 is less than one scene of --views-max 16"),
        (["--accumulate", "4"], r"cannot hold a scene of --views-max 16 each: 64 images would"),
        (["--lr", "nan"], r"expected lr > 0"),
        (["--ema", "1"], r"--ema 1.0 is outside \[0, 1\)"),
        (["--camera-weight", "0", "--depth-weight", "0"], r"there is nothing to learn"),
        (["--config", "missing.yaml"], r"--config missing.yaml is no file"),
    ],
)
def test_what_does_not_fit_is_a_sentence(settings: ModuleType, words: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        settings.parse([*GIVEN, *words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("leraning_rate: 1\n", r"run.yaml: there is no option --leraning_rate"),
        ("lr: fast\n", r"run.yaml: --lr: invalid float value: 'fast'"),
        ("lr: [1, 2]\n", r"run.yaml: --lr is a list: give one value"),
        ("train: {lr: 1}\n", r"run.yaml: there is no option --train"),
        ("lr: null\n", r"run.yaml: --lr is empty: give a value"),
        ("- lr\n", r"holds a list, expected lines like"),
        ("lr: [\n", r"is no YAML"),
        ("preset: thesis\n", r"--preset: invalid choice: 'thesis'"),
    ],
)
def test_a_file_that_does_not_fit_is_a_sentence(
    settings: ModuleType, text: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        settings.parse([*GIVEN, "--config", written(tmp_path, text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["data", "out"])
def test_a_run_needs_data_and_a_folder(settings: ModuleType, missing: str) -> None:
    words = {"data": ["--out", "run"], "out": ["--data", "scenes"]}[missing]
    with pytest.raises(ValueError, match=f"--{missing} is missing"):
        settings.parse([*words, "--method", "lora"])


def test_help_says_what_there_is(settings: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        settings.parse(["--help"], description="Train a model.")
    text = " ".join(capsys.readouterr().out.split())
    assert "Train a model." in text and "--warmup-share" in text and "(default: 24000)" in text
    assert "(default: None)" not in text


@dataclass
class ClusterSettings:
    jobs: int = 1


def test_another_script_adds_its_own(settings: ModuleType) -> None:
    kinds = (settings.TrainSettings, ClusterSettings)
    train, cluster = settings.parse_types(kinds, ["--jobs", "4", "--preset", "release"])
    assert (train.clip, cluster.jobs) == (1.0, 4)
    with pytest.raises(ValueError, match="there is no option --views-min"):
        settings.parse_types(kinds, ["--views-min", "4"])


def test_yaml_written_is_plain(settings: ModuleType) -> None:
    run = settings.parse(GIVEN)
    assert yaml.safe_load(settings.to_yaml(*run)) == values(*run)
