"""Every bad input of build_basis: one sentence that names the culprit, and nothing computed."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_attrsub import BasisError, build_basis

from .helpers import PREFIX, SHAPES, edit_config, random_factors, save_lora, save_many


def factors(seed=0, shapes=SHAPES, rank=3):
    return random_factors(shapes, rank, torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(tmp_path):
    """Two good adapters; each test spoils the second."""
    return save_many(tmp_path, [factors(0), factors(1)])


def refused(adapters, *mentions, **kwargs):
    """build_basis raises BasisError with one line of text holding every mention."""
    with pytest.raises(BasisError) as caught:
        build_basis(adapters, progress=False, **kwargs)
    text = str(caught.value)
    assert "\n" not in text.strip(), f"more than one line: {text}"
    assert 20 < len(text) < 900 and "Traceback" not in text
    for mention in mentions:
        assert mention in text, f"{mention!r} is missing from: {text}"
    return text


def test_the_pair_is_good_before_it_is_spoilt(pair):
    assert build_basis(pair, dim=2, progress=False).attributes == ["shared"]


# ---- kinds of adapters that are no plain LoRA ----


def test_dora(pair):
    refused([pair[0], edit_config(pair[1], use_dora=True)], "adapter-1", "DoRA")


def test_dora_saved_by_peft(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(9, 7)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model.save_pretrained(str(tmp_path / "dora"))
    refused([tmp_path / "dora"], "dora", "DoRA")


def test_dora_magnitudes_in_a_file_without_the_flag(tmp_path):
    extra = {f"{PREFIX}block.0.fc.lora_magnitude_vector.weight": torch.ones(24)}
    refused([save_lora(tmp_path / "odd", factors(), extra_tensors=extra)], "odd", "magnitude")


def test_lora_bias(tmp_path):
    config = LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    get_peft_model(nn.Sequential(nn.Linear(9, 7)), config).save_pretrained(str(tmp_path / "biased"))
    refused([tmp_path / "biased"], "biased", "lora_bias")


def test_trained_biases(tmp_path):
    """bias="lora_only" changes the model beyond dW; it may not vanish unseen."""
    config = LoraConfig(r=2, target_modules=["0"], bias="lora_only", init_lora_weights=False)
    get_peft_model(nn.Sequential(nn.Linear(9, 7)), config).save_pretrained(str(tmp_path / "biased"))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build_basis([tmp_path / "biased"], progress=False)
        assert any("bias" in str(w.message) for w in caught)
    except BasisError as error:
        assert "bias" in str(error) and "biased" in str(error)


@pytest.mark.parametrize(
    "config",
    [IA3Config(target_modules=["0"], feedforward_modules=[]), LoHaConfig(r=2, target_modules=["0"])],
    ids=["IA3", "LOHA"],
)
def test_other_peft_types(tmp_path, config):
    get_peft_model(nn.Sequential(nn.Linear(9, 7)), config).save_pretrained(str(tmp_path / "other"))
    refused([tmp_path / "other"], "other", config.peft_type.value)


def test_peft_type_unknown_to_peft(pair):
    refused([edit_config(pair[0], peft_type="FANCY_NEW_THING")], "adapter-0", "FANCY_NEW_THING")


class Experts(nn.Module):
    """A fused mixture of experts: one 3-d parameter, which LoRA reaches through target_parameters."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x):
        return x @ self.up[0].T


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()


def test_target_parameters(tmp_path):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"], init_lora_weights=False)
    get_peft_model(MoE(), config).save_pretrained(str(tmp_path / "moe"))
    refused([tmp_path / "moe"], "moe", "target_parameters")


def test_grouped_convolution_is_right_or_refused(tmp_path):
    """With groups, B @ A is not the update: each group has its own block."""
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    get_peft_model(nn.Sequential(nn.Conv2d(8, 6, 3, groups=2)), config).save_pretrained(str(tmp_path / "grouped"))
    model = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2))
    refused([tmp_path / "grouped"], "grouped", "group", base_model=model)


def test_one_grouped_convolution_can_be_left_out(tmp_path):
    """The error above advises modules=; it must work."""
    net = nn.ModuleDict({"conv": nn.Conv2d(8, 6, 3, groups=2), "fc": nn.Linear(9, 7)})
    config = LoraConfig(r=4, target_modules=["conv", "fc"], init_lora_weights=False)
    get_peft_model(net, config).save_pretrained(str(tmp_path / "grouped"))
    assert build_basis([tmp_path / "grouped"], dim=2, modules=["fc"], progress=False).modules == ["fc"]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_weight(tmp_path, start):
    """PiSSA and OLoRA subtract a part of W first: B @ A alone is not the update of the published model."""
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
    get_peft_model(nn.Sequential(nn.Linear(9, 7)), config).save_pretrained(str(tmp_path / "moved"))
    refused([tmp_path / "moved"], "moved", start)


def test_pissa_converted_by_peft_is_mined(tmp_path):
    """PEFT's own way out: saved as the difference from the unchanged base, of rank 2 r."""
    net = nn.Sequential(nn.Linear(9, 7))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights="pissa")
    before = net[0].weight.detach().clone().double()
    model = get_peft_model(net, config)
    model.save_pretrained(str(tmp_path / "init"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, for the initial copy
    model.save_pretrained(str(tmp_path / "init2"))
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(str(tmp_path / "done"), path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    after = model.merge_and_unload()[0].weight.detach().double()
    basis = build_basis([tmp_path / "done"], dim=4, progress=False)
    U, S, V = (t.double() for t in basis.factors("0", "shared"))
    torch.testing.assert_close((U * S) @ V.T, after - before, atol=1e-5, rtol=1e-4)


# ---- adapters that do not fit together ----


def test_different_base_models(tmp_path):
    one = save_lora(tmp_path / "one", factors(), base_model="org/small")
    two = save_lora(tmp_path / "two", factors(1), base_model="org/large")
    refused([one, two], "org/small", "org/large")
    refused({"a": [one], "b": [two]}, "org/small", "org/large")


def test_different_module_sets(tmp_path):
    first, second = factors(0), factors(1)
    second["block.7.extra"] = second.pop("block.1.proj")
    paths = save_many(tmp_path, [first, second])
    refused(paths, "block.1.proj", "block.7.extra")
    refused({"a": paths[:1], "b": paths[1:]}, "block.1.proj", "block.7.extra")
    common = build_basis(paths, dim=2, missing="intersect", progress=False)
    assert common.modules == ["block.0.fc"]


def test_many_missing_modules_make_a_short_sentence(tmp_path):
    shapes = {f"layers.{i}.fc": (6, 5) for i in range(300)}
    paths = save_many(tmp_path, [factors(0, shapes, 1), factors(1, {"layers.0.fc": (6, 5)}, 1)])
    assert len(refused(paths, "layers.1.fc", "296 more")) < 900


def test_no_common_module(tmp_path):
    paths = save_many(tmp_path, [factors(0, {"a": (6, 5)}), factors(1, {"b": (6, 5)})])
    refused(paths, "module", missing="intersect")


def test_different_shapes(tmp_path):
    paths = save_many(tmp_path, [factors(0), factors(1, {**SHAPES, "block.0.fc": (24, 21)})])
    refused(paths, "block.0.fc", "adapter-1", "20", "21")


def test_factors_of_one_adapter_that_do_not_fit(tmp_path):
    broken = factors()
    B, A = broken["block.0.fc"]
    broken["block.0.fc"] = (B, A[:2])
    text = refused([save_lora(tmp_path / "torn", broken, r=3)], "torn", "block.0.fc")
    assert "convolution" not in text, "this is a Linear"


def test_half_a_pair(tmp_path):
    path = Path(save_lora(tmp_path / "half", factors()))
    tensors = {f"{PREFIX}block.0.fc.lora_A.weight": torch.ones(3, 20)}
    save_file(tensors, path / "adapter_model.safetensors")
    refused([path], "half", "block.0.fc", "lora_B")


# ---- numbers that are none ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["B", "A"])
def test_nan_and_inf(tmp_path, value, side):
    bad = factors(1)
    bad["block.1.proj"][side][0, 1] = value
    refused(save_many(tmp_path, [factors(0), bad]), "adapter-1", "block.1.proj")


def test_all_zero_adapter(tmp_path):
    """An untrained LoRA (B = 0): says so, or mines the others; never returns NaN."""
    zero = {name: (torch.zeros_like(B), A) for name, (B, A) in factors(1).items()}
    try:
        basis = build_basis(save_many(tmp_path, [factors(0), zero, factors(2)]), dim=2, progress=False)
    except BasisError as error:
        assert "adapter-1" in str(error)
        return
    for module in basis.modules:
        assert all(torch.isfinite(t).all() for t in basis.factors(module, "shared"))
        assert torch.isfinite(basis.weights(module, "shared")).all()


def test_only_zero_adapters(tmp_path):
    zero = {name: (torch.zeros_like(B), A) for name, (B, A) in factors(1).items()}
    refused(save_many(tmp_path, [zero, zero]), "zero")


def test_one_module_untrained_everywhere(tmp_path):
    """A module whose every update is zero (a branch never reached in training) must not give NaN columns."""
    adapters = [factors(i) for i in range(3)]
    for a in adapters:
        a["block.1.proj"] = (torch.zeros_like(a["block.1.proj"][0]), a["block.1.proj"][1])
    try:
        basis = build_basis(save_many(tmp_path, adapters), dim=2, progress=False)
    except BasisError as error:
        assert "block.1.proj" in str(error)
        return
    for module in basis.modules:
        assert all(torch.isfinite(t).all() for t in basis.factors(module, "shared"))


# ---- files ----


def test_missing_folder(pair, tmp_path):
    refused([pair[0], str(tmp_path / "not-there")], "not-there")


def test_hub_id_that_cannot_be_reached(pair):
    refused([pair[0], "someone/not-there"], "someone/not-there")


def test_empty_folder(pair, tmp_path):
    (tmp_path / "hollow").mkdir()
    refused([pair[0], tmp_path / "hollow"], "hollow", "adapter_config.json")


def test_missing_weights(pair):
    (Path(pair[1]) / "adapter_model.safetensors").unlink()
    refused(pair, "adapter-1", "adapter_model.safetensors")


def test_pickle_only_adapter_is_never_unpickled(pair):
    folder = Path(pair[1])
    (folder / "adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (Path.write_text, (folder / "exploded", "boom"))

    torch.save(Bomb(), folder / "adapter_model.bin")
    refused(pair, "adapter-1", "adapter_model.bin", "safetensors")
    assert not (folder / "exploded").exists()


def test_truncated_adapter(pair):
    file = Path(pair[1]) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    refused(pair, "adapter-1")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_broken_adapter_config(pair, text):
    (Path(pair[1]) / "adapter_config.json").write_text(text)
    refused(pair, "adapter-1", "adapter_config.json")


def test_file_without_lora_tensors(pair):
    save_file({"model.weight": torch.zeros(3)}, Path(pair[1]) / "adapter_model.safetensors")
    refused(pair, "adapter-1")


def test_file_without_config_beside_it(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "lone.safetensors")
    refused([tmp_path / "lone.safetensors"], "lone", "adapter_config.json")


def test_rank_zero_or_scaling_missing(pair):
    refused([edit_config(pair[0], r=0)], "adapter-0")


# ---- arguments ----


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dim": 0},
        {"dim": -3},
        {"dim": 2.5},
        {"alpha": 0},
        {"alpha": -1},
        {"alpha": 2.0001},
        {"alpha": float("nan")},
        {"eps": -1e-6},
        {"eps": float("nan")},
        {"max_iter": 0},
        {"tol": -1.0},
        {"allocation": "generous"},
        {"missing": "shrug"},
        {"dtype": torch.int32},
        {"device": "warp-drive"},
    ],
    ids=lambda kw: next(f"{k}={v}" for k, v in kw.items()),
)
def test_bad_arguments(pair, kwargs):
    name, value = next(iter(kwargs.items()))
    refused(pair, name, str(value).removeprefix("torch."), **kwargs)


def test_unknown_module_asked_for(pair):
    refused(pair, "block.9", modules=["block.9"])


def test_modules_argument_limits_the_work(pair):
    assert build_basis(pair, dim=2, modules=["block.0.fc"], progress=False).modules == ["block.0.fc"]


@pytest.mark.parametrize("adapters", [[], {}, {"texture": []}], ids=str)
def test_no_adapters(adapters):
    refused(adapters, "adapter")


def test_one_string_instead_of_a_list(pair):
    """list("adapter-0") would be nine adapters of one letter."""
    try:
        assert build_basis({"x": pair[0]}, dim=2, progress=False).attributes == ["x"]
    except BasisError as error:
        assert pair[0] in str(error)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\\b", "a\nb", 3], ids=repr)
def test_attribute_names(pair, name):
    refused({name: pair}, repr(name) if name in ("", 3) else "attribute")


def test_dim_above_the_layer_is_cut(pair):
    basis = build_basis(pair, dim=500, progress=False)
    for module, (n, m) in SHAPES.items():
        U, S, V = basis.factors(module, "shared")
        assert U.shape[1] == S.shape[0] == V.shape[1] == basis.dim(module, "shared") <= min(n, m)


def test_modules_to_save_are_left_out(tmp_path):
    """modules_to_save are full weights, not updates."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(9, 7), nn.Linear(7, 3)

    config = LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"], init_lora_weights=False)
    get_peft_model(Two(), config).save_pretrained(str(tmp_path / "a"))
    assert build_basis([tmp_path / "a"], dim=2, progress=False).modules == ["fc"]
