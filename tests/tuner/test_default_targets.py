"""The modules that get a core by default, compared with those of stock LoRA's "all-linear"."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from peft_attrsub import AttrSubspaceConfig, psv_basis

from .checks import layers
from .models import mined

BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS: dict[str, Any] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3,
              num_attention_heads=2, intermediate_size=24)), "CAUSAL_LM"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)), "CAUSAL_LM"),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2,
           num_heads=2)), "SEQ_2_SEQ_LM"),
    "bert": (lambda: BertModel(BertConfig(**BERT)), "FEATURE_EXTRACTION"),
    "bert sequences": (lambda: BertForSequenceClassification(BertConfig(**BERT)), "SEQ_CLS"),
    "bert tokens": (lambda: BertForTokenClassification(BertConfig(**BERT)), "TOKEN_CLS"),
    "bert answers": (lambda: BertForQuestionAnswering(BertConfig(**BERT)), "QUESTION_ANS"),
    "vit": (lambda: ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, image_size=8, patch_size=4)), None),
    "plain": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))), None),
    "one layer": (lambda: nn.Sequential(nn.Linear(4, 6)), None),
}  # fmt: skip


def make(name: str, **options: Any) -> PeftModel:
    base, task = MODELS[name]
    return get_peft_model(base(), AttrSubspaceConfig(basis="random", dim=2, task_type=task, **options))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_as_stock_lora_takes_all_linear_layers_but_heads_and_poolers(name, targets):
    base, task = MODELS[name]
    stock = LoraConfig(target_modules="all-linear", task_type=None if task in ("TOKEN_CLS", "QUESTION_ANS") else task)
    theirs = set(get_peft_model(base(), stock).targeted_module_names)
    left_out = {n for n in theirs if n.partition(".")[0] in ("classifier", "qa_outputs") and task}
    if task != "SEQ_CLS":
        left_out |= {n for n in theirs if "pooler" in n}
    assert set(layers(make(name, target_modules=targets).base_model.model)) == theirs - left_out


@pytest.mark.parametrize("name", MODELS)
def test_they_are_the_same_after_a_reload(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[name][0](), tmp_path)
    assert layers(again.base_model.model).keys() == layers(model.base_model.model).keys()


ROBERTAS = [
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("trained", ROBERTAS)
def test_they_are_the_same_in_a_model_with_another_head(trained, listed, tmp_path):
    # Some heads have a layer called "dense" like those of the blocks, and PEFT shortens lists of 20 names and more.
    shape = RobertaConfig(**{**BERT, "num_hidden_layers": 5})
    blocks = {n for n, m in trained(shape).named_modules() if isinstance(m, nn.Linear) and ".layer." in n}
    options = {"target_modules": blocks} if listed else {"exclude_modules": r"(lm_head|classifier|qa_outputs).*"}
    model = get_peft_model(trained(shape), AttrSubspaceConfig(basis="random", dim=2, **options))
    assert set(layers(model.base_model.model)) == blocks
    model.save_pretrained(tmp_path)
    config = AttrSubspaceConfig.from_pretrained(tmp_path)
    config.exclude_modules = None  # which would hide what the targets alone mean
    for other in ROBERTAS:
        again = PeftModel.from_pretrained(other(shape), tmp_path, config=config)
        assert set(layers(again.base_model.model)) == blocks


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("chosen", [[0], [1], 1, [0, 1]])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_layers_to_transform_chooses_among_them(name, chosen, targets):
    indices = [chosen] if isinstance(chosen, int) else chosen
    if targets is not None:  # PEFT takes indices with lists alone
        with pytest.raises(ValueError, match="layers_to_transform"):
            make(name, layers_to_transform=chosen, target_modules=targets)
        return
    found = set(layers(make(name, layers_to_transform=chosen).base_model.model))
    every = set(layers(make(name).base_model.model))
    assert found == {n for n in every if any(re.search(rf"\.(h|layer|layers)\.{i}\.", n) for i in indices)} != set()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


def test_multihead_attention_is_left_out_with_one_word_about_it():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = get_peft_model(Attending(), AttrSubspaceConfig(basis="random", dim=2))
    linears = {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)} | {"head"}
    assert set(layers(model.base_model.model)) == linears
    assert ["encoder.layers.1.self_attn" in str(one.message) for one in seen] == [True]
    with pytest.raises(ValueError, match=r"'encoder.layers.0.self_attn.out_proj' is inside an nn.MultiheadAttention"):
        get_peft_model(Attending(), AttrSubspaceConfig(basis="random", target_modules=["out_proj"]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exclude_modules": ["out_proj"]}, set()),
        ({"exclude_modules": ["self_attn"]}, set()),
        ({"exclude_modules": r".*self_attn.*"}, set()),
        ({"modules_to_save": ["self_attn"]}, set()),
        ({"layers_to_transform": [0]}, {"0"}),
        ({"exclude_modules": ["layers.0.self_attn"]}, {"1"}),
    ],
    ids=str,
)
def test_only_attention_that_nobody_has_excluded_is_warned_of(options, named):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        get_peft_model(Attending(), AttrSubspaceConfig(basis="random", dim=2, **options))
    told = " ".join(str(one.message) for one in seen if "MultiheadAttention" in str(one.message))
    assert set(re.findall(r"layers\.(\d)\.self_attn", told)) == named


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
def test_a_core_in_a_transformer_encoder_acts_in_evaluation_too(masked):
    # torch computes with the weights of an encoder layer in one kernel there, unless something stops it
    torch.manual_seed(0)
    base = Attending().eval()
    model = get_peft_model(base, AttrSubspaceConfig(basis="random", dim=2, init_weights=False))
    x, mask = torch.randn(2, 5, 16), None
    if masked:
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        found = model(x, mask)
        model.merge_adapter()
        expected = model(x, mask)
        with model.disable_adapter():
            plain = model(x, mask)
    shown = slice(None) if mask is None else ~mask
    torch.testing.assert_close(found[shown], expected[shown], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[shown], plain[shown], atol=1e-2)


def test_nothing_left_is_one_sentence():
    for options in ({"exclude_modules": r".*"}, {"layers_to_transform": [7]}, {"modules_to_save": ["0", "1"]}):
        with pytest.raises(ValueError, match=r"no linear layer is left to adapt.*give target_modules"):
            make("plain", **options)
    base = MODELS["llama"][0]()
    basis = mined(base, [f"model.layers.{i}.self_attn.q_proj" for i in range(3)])
    with pytest.raises(ValueError, match=r"layers_to_transform=\[7\] .* none of the modules that the basis covers"):
        get_peft_model(base, AttrSubspaceConfig(basis=basis, layers_to_transform=[7]))


class Holding(nn.Module):
    """A model as a part of another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("hold", [Holding, nn.DataParallel])
@pytest.mark.parametrize("name", [name for name, (_, task) in MODELS.items() if task])
def test_heads_of_a_model_inside_of_another_one_are_left_out_too(name, hold):
    base, task = MODELS[name]
    alone, held = (
        set(layers(inject_adapter_in_model(AttrSubspaceConfig(basis="random", dim=2, task_type=task), model)))
        for model in (base(), hold(base()))
    )
    assert {one.partition(".")[2] for one in held} == alone


def test_a_module_that_another_adapter_saves_in_full_has_no_core_inside():
    base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3))
    model = get_peft_model(base, AttrSubspaceConfig(basis="random", dim=2, modules_to_save=["2"]))
    model.add_adapter("second", AttrSubspaceConfig(basis="random", dim=2))
    assert set(layers(model.base_model.model)) == {"0", "1"}
    assert model.peft_config["second"].target_modules == {"0", "1"}


# Against a slow reference on random models


@st.composite
def trees(draw: Any, depth: int = 3) -> Any:
    """Nested dicts of layer kinds."""
    names = st.sampled_from(["layers", "head", "pooler", "proj", "a", "score", "0", "1"])
    leaves = st.sampled_from(["linear", "conv1d", "conv2d", "norm", "attention"])
    return draw(st.dictionaries(names, leaves if depth == 0 else leaves | trees(depth - 1), min_size=1, max_size=4))


def built(tree: Any) -> nn.Module:
    kinds: dict[str, Any] = {
        "linear": lambda: nn.Linear(4, 4),
        "conv1d": lambda: Conv1D(4, 4),
        "conv2d": lambda: nn.Conv2d(2, 2, 1),
        "norm": lambda: nn.LayerNorm(4),
        "attention": lambda: nn.MultiheadAttention(4, 2),
    }
    return kinds[tree]() if isinstance(tree, str) else nn.ModuleDict({name: built(one) for name, one in tree.items()})


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, str):
        return {prefix: tree}
    return {k: v for name, one in tree.items() for k, v in flat(one, f"{prefix}.{name}" if prefix else name).items()}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(trees(), st.sampled_from([None, "SEQ_CLS", "TOKEN_CLS"]), st.sampled_from([None, ["proj"], ["a", "head"]]),
       st.sampled_from([None, [0], [1]]))  # fmt: skip
def test_random_models(tree, task, excluded, indices):
    expected = set()
    for name, kind in flat(tree).items():
        parts = name.split(".")
        if kind not in ("linear", "conv1d"):
            continue
        if task and {"score", "classifier"}.intersection(parts):
            continue
        if task != "SEQ_CLS" and "pooler" in parts:
            continue
        if excluded and parts[-1] in excluded:
            continue
        # PEFT's index: the first number between the second level and the last, as in model.layers.0.proj
        numbers = [part for part in parts[2:-1] if part.isdigit()]
        if indices is not None and (not numbers or int(numbers[0]) not in indices):
            continue
        expected.add(name)
    config = AttrSubspaceConfig(
        basis="random", dim=1, exclude_modules=excluded, layers_to_transform=indices, task_type=None
    )
    config.task_type = task
    base = built(tree)
    from peft_attrsub.tuner.model import AttrSubspaceModel

    if not expected:
        with pytest.raises(ValueError, match="no linear layer is left"):
            AttrSubspaceModel(base, config, "default")
        return
    assert set(layers(AttrSubspaceModel(base, config, "default").model)) == expected


def test_a_mined_basis_and_all_linear_leave_attention_out(tmp_path):
    names = [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)] + ["head"]
    basis = mined(Attending(), names)
    with pytest.warns(UserWarning, match="MultiheadAttention"):
        model = get_peft_model(Attending(), AttrSubspaceConfig(basis=basis, target_modules="all-linear"))
    assert sorted(layers(model.base_model.model)) == sorted(names)


def test_a_basis_of_all_linear_layers_leaves_attention_out():
    basis = psv_basis(Attending(), 2)
    assert "encoder.layers.0.self_attn.out_proj" in basis.modules
    with pytest.warns(UserWarning, match=r"nn.MultiheadAttention \('encoder.layers.0.self_attn'"):
        model = get_peft_model(Attending(), AttrSubspaceConfig(basis=basis))
    found = set(layers(model.base_model.model))
    assert found == {one for one in basis.modules if not one.endswith("out_proj")}
