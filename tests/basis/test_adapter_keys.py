"""Every tensor and every value of an adapter is accounted for: read right, told, or refused by name."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_attrsub import BasisError, build_basis, project_lora
from peft_attrsub.basis import LoraAdapter

from .helpers import PREFIX, edit_config, random_factors, save_lora

SHAPES = {"layers.0.attn.to_q": (12, 10), "layers.0.attn.to_out.0": (10, 12), "layers.1.fc": (14, 10)}
WRAPPERS = ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."]
LAYOUTS = ["PEFT", "PEFT named", "torchtune", "kohya", "diffusers", "diffusers processors"]
Factors = dict[str, tuple[Tensor, Tensor]]


def drawn(seed: int, rank: int = 3) -> Factors:
    return random_factors(SHAPES, rank, torch.Generator().manual_seed(seed))


def keys_of(layout: str, module: str) -> tuple[str, str]:
    """Names of lora_B and lora_A of a module in a layout."""
    if layout == "PEFT named":
        return f"{PREFIX}{module}.lora_B.mine.weight", f"{PREFIX}{module}.lora_A.mine.weight"
    if layout == "torchtune":
        return f"{module}.lora_b.weight", f"{module}.lora_a.weight"
    if layout == "kohya":
        stem = "lora_unet_" + module.replace(".", "_")
        return f"{stem}.lora_up.weight", f"{stem}.lora_down.weight"
    if layout == "diffusers processors" and "attn" in module:
        stem, _, name = module.removesuffix(".0").rpartition(".")
        return f"{stem}.processor.{name}_lora.up.weight", f"{stem}.processor.{name}_lora.down.weight"
    if layout.startswith("diffusers"):
        return f"{module}.lora.up.weight", f"{module}.lora.down.weight"
    return f"{PREFIX}{module}.lora_B.weight", f"{PREFIX}{module}.lora_A.weight"


def name_in(layout: str, module: str) -> str:
    return "lora_unet_" + module.replace(".", "_") if layout == "kohya" else module


def written(folder: Path, layout: str, factors: Factors, **more: Any) -> tuple[Path, dict[str, Tensor]]:
    """An adapter in a layout: what to open, and its tensors."""
    save_lora(folder, factors, **more)
    tensors = {}
    for module, (b, a) in factors.items():
        for key, value in zip(keys_of(layout, module), (b, a), strict=True):
            tensors[key] = value.float().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    own = layout == "kohya" or layout.startswith("diffusers")
    if own:  # such files come alone
        (folder / "adapter_config.json").unlink()
    return (folder / "adapter_model.safetensors" if own else folder), tensors


def quiet(source: Any) -> LoraAdapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraAdapter(source)


def check(adapter: LoraAdapter, layout: str, factors: Factors, scaling: float) -> None:
    assert set(adapter.modules) == {name_in(layout, module) for module in factors}
    for module, (b, a) in factors.items():
        left, right = adapter.read(name_in(layout, module))
        torch.testing.assert_close(left.double() @ right.double().T, scaling * (b @ a), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_every_layout_is_read_with_its_scaling(tmp_path, layout, seed):
    draw, factors = random.Random(seed), drawn(seed)
    source, tensors = written(tmp_path / "one", layout, factors, lora_alpha=6)
    scaling = 2.0
    if source.suffix:
        scaling = 1.0
        if draw.random() < 0.7:
            scaling = 0.5
            for module in factors:
                down = keys_of(layout, module)[1]
                stem = re.sub(r"\.(lora_down|lora\.down|processor\.\w+_lora\.down)\.weight$", "", down)
                if "processor" in down:
                    stem = module
                tensors[f"{stem}.alpha"] = torch.tensor(1.5, dtype=draw.choice([torch.float32, torch.float16]))
    elif layout.startswith("PEFT"):
        tensors = {wrapped(key, draw): value for key, value in tensors.items()}
    dtype = draw.choice([torch.float32, torch.float64])
    tensors = {key: value if key.endswith("alpha") else value.to(dtype) for key, value in tensors.items()}
    tensors["some.counter"] = torch.zeros(2, dtype=draw.choice([torch.uint8, torch.bool, torch.int16]))
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors")
    adapter = quiet(source)
    check(adapter, layout, factors, scaling)
    with pytest.warns(UserWarning, match="holds tensors that are not part of a LoRA and are not read: 'some.counter'"):
        LoraAdapter(source)


def wrapped(key: str, draw: random.Random) -> str:
    """The key as a wrapped model has it: the same wrapper of a block for both factors."""
    parts = key.split(".")
    place = random.Random(key.partition(".lora_")[0]).randrange(3, parts.index("layers") + 3)
    parts.insert(place, draw.choice(["_orig_mod"]))
    return ".".join(parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_a_pair_is_refused_whichever_half_is_lost(tmp_path, layout):
    source, tensors = written(tmp_path / "one", layout, drawn(0))
    for lost in [key for key in tensors if not key.endswith("alpha")]:
        rest = {key: value for key, value in tensors.items() if key != lost}
        save_file(rest, tmp_path / "one" / "adapter_model.safetensors")
        with pytest.raises(BasisError, match=re.escape(f"but lacks {lost!r}")):
            LoraAdapter(source)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("layers.0.attn.to_q.lora_magnitude_vector", "DoRA rescales"),
        ("layers.0.attn.to_q.dora_scale", "DoRA rescales"),
        ("layers.0.attn.to_q.lora_B.bias", "lora_bias adds a bias"),
        ("layers.0.attn.to_q.lora_B.default.bias", "lora_bias adds a bias"),
        ("layers.0.attn.to_q.lora_mid.weight", "not a pair of LoRA factors"),
        ("layers.0.attn.to_q.lora_E", "not a pair of LoRA factors"),
        ("layers.0.attn.to_q.hada_w1_a", "not a pair of LoRA factors"),
        ("layers.0.attn.to_q.lokr_w1", "not a pair of LoRA factors"),
        ("layers.0.attn.to_q.lora_A", "not a pair of LoRA factors"),
    ],
)
def test_what_changes_the_update_otherwise_is_refused(tmp_path, key, words):
    folder = Path(save_lora(tmp_path / "one", drawn(0), extra_tensors={PREFIX + key: torch.ones(3)}))
    with pytest.raises(BasisError, match=words) as caught:
        LoraAdapter(folder)
    assert repr(PREFIX + key) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "config", "words"),
    [
        ("model.embed_tokens.weight", {}, "also trained saved embeddings, which"),
        ("classifier.weight", {"modules_to_save": ["classifier"]}, "also trained modules_to_save, which"),
        ("layers.1.fc.bias", {"bias": "all"}, "also trained bias, which"),
        ("embed.token_adapter.trainable_tokens_delta", {}, "also trained trainable_token_indices, which"),
    ],
)
def test_extras_are_told_once(tmp_path, key, config, words):
    folder = save_lora(tmp_path / "one", drawn(0), extra_tensors={PREFIX + key: torch.ones(3)}, **config)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check(LoraAdapter(folder), "PEFT", drawn(0), 1.0)
    assert [words in str(one.message) for one in seen] == [True]


def test_files_that_hold_several_things_are_refused(tmp_path):
    factors = drawn(0)
    b, a = factors["layers.1.fc"]
    more = {f"{PREFIX}layers.1.fc.lora_B.other.weight": b, f"{PREFIX}layers.1.fc.lora_A.other.weight": a}
    with pytest.raises(BasisError, match="has two factors of one module"):
        LoraAdapter(save_lora(tmp_path / "two", factors, extra_tensors=more))
    more = {f"{PREFIX}x.lora_B.other.weight": b.clone(), f"{PREFIX}x.lora_A.other.weight": a.clone()}
    with pytest.raises(BasisError, match="holds several adapters"):
        LoraAdapter(save_lora(tmp_path / "names", factors, extra_tensors=more))
    more = {"x.lora_up.weight": b.clone(), "x.lora_down.weight": a.clone()}
    with pytest.raises(BasisError, match="mixes the layouts PEFT and kohya"):
        LoraAdapter(save_lora(tmp_path / "mixed", factors, extra_tensors=more))


def test_a_factor_in_codes_is_refused_only_when_it_is_read(tmp_path):
    folder = Path(save_lora(tmp_path / "one", drawn(0)))
    tensors = written(tmp_path / "two", "PEFT", drawn(0))[1]
    key = f"{PREFIX}layers.1.fc.lora_A.weight"
    save_file({**tensors, key: torch.zeros(3, 10, dtype=torch.int8)}, folder / "adapter_model.safetensors")
    adapter = LoraAdapter(folder)
    adapter.read("layers.0.attn.to_q")
    with pytest.raises(BasisError, match=re.escape(key)):
        adapter.read("layers.1.fc")


def test_a_missing_alpha_is_peft_s_default(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Identity(), nn.Module()])
            self.layers[1].fc = nn.Linear(10, 14, bias=False)

    shape = {"layers.1.fc": SHAPES["layers.1.fc"]}
    factors = random_factors(shape, 3, torch.Generator().manual_seed(0))
    folder = Path(save_lora(tmp_path / "one", factors))
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stock = PeftModel.from_pretrained(Model(), folder)
    delta = stock.base_model.model.layers[1].fc.get_delta_weight("default")
    left, right = LoraAdapter(folder).read("layers.1.fc")
    torch.testing.assert_close(left @ right.T, delta)


def test_a_sharded_adapter_is_one_adapter(tmp_path):
    folder = Path(save_lora(tmp_path / "one", drawn(0)))
    digest = LoraAdapter(folder).sha256()
    tensors = written(tmp_path / "two", "PEFT", drawn(0))[1]
    names = {key: f"adapter_model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "adapter_model.safetensors").unlink()
    check(LoraAdapter(folder), "PEFT", drawn(0), 1.0)
    assert len(LoraAdapter(folder).sha256()) == 64 and LoraAdapter(folder).sha256() != digest
    build_basis({"x": [folder]}, dim=2, progress=False)
    for broken, words in [
        ({"weight_map": {"a": "../x.safetensors"}}, "must name files of its own folder"),
        ({"weight_map": {"a": 3}}, "must name files of its own folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lacks 'gone.safetensors'"),
        ({}, "must name files of its own folder"),
    ]:
        index.write_text(json.dumps(broken))
        with pytest.raises(BasisError, match=words):
            LoraAdapter(folder)


def test_a_file_of_another_tool_without_config_needs_its_own_scaling(tmp_path):
    source, tensors = written(tmp_path / "one", "torchtune", drawn(0))
    check(quiet(source), "torchtune", drawn(0), 1.0)
    (tmp_path / "one" / "adapter_config.json").unlink()
    with pytest.raises(BasisError, match=r"has no adapter_config\.json: without it the scaling"):
        LoraAdapter(tmp_path / "one" / "adapter_model.safetensors")
    source, tensors = written(tmp_path / "two", "kohya", drawn(0))
    tensors[keys_of("kohya", "layers.1.fc")[1].replace("lora_down.weight", "alpha")] = torch.tensor([1.0, 2.0])
    save_file(tensors, source)
    with pytest.raises(BasisError, match="must be one finite number"):
        LoraAdapter(source)


def test_a_module_that_cannot_be_projected_is_named(tmp_path):
    """A grouped convolution does not vanish from a projection with exit status 0."""
    from peft import LoraConfig, get_peft_model

    net = nn.ModuleDict({"fc": nn.Linear(20, 24), "conv": nn.Conv2d(8, 6, 3, groups=2)})
    config = LoraConfig(r=4, target_modules=["fc", "conv"], init_lora_weights=False)
    get_peft_model(net, config).save_pretrained(tmp_path / "grouped")
    generator = torch.Generator().manual_seed(0)
    sources = [save_lora(tmp_path / f"s{i}", random_factors({"fc": (24, 20)}, 3, generator)) for i in range(2)]
    basis = build_basis({"x": sources}, dim=4, progress=False)
    with pytest.raises(BasisError, match=r"module 'conv'.*grouped convolution.*--missing"):
        project_lora(tmp_path / "grouped", basis)
    with pytest.warns(UserWarning, match="that the cores do not hold: 'conv'"):
        assert list(project_lora(tmp_path / "grouped", basis, missing="intersect").cores) == ["fc"]


# ------------------------------------------------------------------------------------------------ values of the config

ODD: list[Any] = [
    None, True, False, 0, -1, 3, 8, 10**30, 1.5, -0.0, float("nan"), float("inf"), "", "16", "x" * 300, "\ud800", [],
    [3],
    ["fc"], {}, {"fc": 3}, {"*.m": 4}, {"(": 1}, {"layers.1.fc": 3}, {"a": {"b": [1]}}, [[[]]], "LORA", "\x1b[31m",
]  # fmt: skip
KEYS = [
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "base_model_name_or_path",
    "revision",
    "task_type", "init_lora_weights", "bias", "modules_to_save", "use_dora", "lora_bias", "target_parameters",
    "layer_replication", "trainable_token_indices", "target_modules", "auto_mapping", "unheard_of",
]  # fmt: skip


def reference(config: dict[str, Any], module: str, rank: int) -> float | None:
    """The scaling by PEFT's rules, or None where a value cannot mean any."""
    alpha, r, rslora = (config.get(key) for key in ("lora_alpha", "r", "use_rslora"))
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    r = ranks.get(module, r)
    alpha = alphas.get(module, 8 if alpha is None else alpha)
    if r not in (None, rank) or isinstance(r, bool) or not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return None
    return float(alpha) / (rank**0.5 if rslora else rank)


def test_500_mutations_of_a_config_are_right_or_a_sentence(tmp_path):
    factors, draw = drawn(0), random.Random(0)
    folder = Path(save_lora(tmp_path / "one", factors))
    path = folder / "adapter_config.json"
    original = json.loads(path.read_text())
    refused = 0
    for _ in range(500):
        config = dict(original)
        for key in draw.sample(KEYS, draw.choice([1, 1, 2])):
            config[key] = draw.choice(ODD)
            if draw.random() < 0.1:
                del config[key]
        path.write_text(json.dumps(config))
        try:
            adapter = quiet(folder)
        except BasisError as error:
            assert "\n" not in str(error) and len(str(error)) < 700, str(error)
            refused += 1
            continue
        for module, (b, a) in factors.items():
            scaling = reference(config, module, 3)
            assert scaling is not None, config
            left, right = adapter.read(module)
            torch.testing.assert_close(left.double() @ right.double().T, scaling * (b @ a), rtol=1e-5, atol=1e-6)
    assert 100 < refused < 450
    for text in (
        '{"peft_type": "LORA", "x": ' + "[" * 99999 + "]" * 99999 + "}",
        '{"r": 3, "r": 4}',
        "[]",
        "{",
        "\xff",
    ):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(BasisError, match=r"adapter_config\.json'"):
            LoraAdapter(folder)


def test_an_odd_config_is_one_line_in_the_shell(tmp_path):
    folder = save_lora(tmp_path / "one", drawn(0))
    edit_config(folder, lora_alpha="16")
    command = [sys.executable, "-m", "peft_attrsub", "build-basis", f"x={folder}", "-o", str(tmp_path / "basis")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not (tmp_path / "basis").exists()
    assert done.stderr.splitlines()[-1].endswith("lora_alpha is '16', expected a number from -1e+06 to 1e+06.")
