"""trainable_token_indices, ensure_weight_tying and target_parameters, next to stock LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration

from peft_attrsub import AttrSubspaceConfig, export_lora
from peft_attrsub.tuner.layer import AttrSubspaceLayer

from .checks import loss, same
from .models import ids
from .transformers_models import gpt2, llama

IDS = ids(3, 6, below=40)()
ROWS = [1, 5, 30]
TARGETS = ["q_proj", "v_proj"]


def _base(tie):
    torch.manual_seed(0)
    return llama(tie).eval()


def _ours(tie, **more):
    torch.manual_seed(1)
    config = AttrSubspaceConfig(basis="random", dim=3, target_modules=TARGETS, **more)
    return get_peft_model(_base(tie), config)


def _stock(tie, **more):
    return get_peft_model(_base(tie), LoraConfig(r=2, target_modules=TARGETS, **more))


def _train(model, steps=3):
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(IDS).logits).backward()
        optimizer.step()
    return model.eval()


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _auxiliary(model):
    """What is trained outside of the adapters, and which modules are wrapped for it."""
    parameters = {
        n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n and "attrsub_" not in n
    }
    kinds = (ModulesToSaveWrapper, TrainableTokensWrapper)
    return parameters, {(n, type(m)) for n, m in model.named_modules() if isinstance(m, kinds)}


EXTRAS = [
    {"trainable_token_indices": ROWS},
    {"trainable_token_indices": {"embed_tokens": ROWS}},
    {"trainable_token_indices": ROWS, "ensure_weight_tying": True},
    {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    {"modules_to_save": ["lm_head", "embed_tokens", "model.norm"], "ensure_weight_tying": True},
]


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:ensure_weight_tying", "ignore:.*no tied modules")
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_rows_and_tied_modules_train_save_reload_and_merge_as_with_lora(extra, tie, tmp_path):
    copies = [{k: list(v) if isinstance(v, list) else v for k, v in extra.items()} for _ in range(2)]
    model = _ours(tie, **copies[0])
    assert _auxiliary(model) == _auxiliary(_stock(tie, **copies[1]))
    plain = _base(tie)
    held = {n: p.clone() for n, p in plain.named_parameters()}
    assert same(_logits(model), _logits(plain))
    trained = _logits(_train(model))
    assert not same(trained, _logits(plain))
    model.save_pretrained(tmp_path / "adapter")
    assert same(_logits(PeftModel.from_pretrained(_base(tie), tmp_path / "adapter").eval()), trained)
    again = PeftModel.from_pretrained(_base(tie), tmp_path / "adapter")
    again.load_adapter(tmp_path / "adapter", "second")
    again.set_adapter("second")
    assert same(_logits(again.eval()), trained)
    merged = model.merge_and_unload()
    assert same(_logits(merged), trained, 1e-4)
    if tie and extra != EXTRAS[3]:
        assert merged.lm_head.weight is merged.model.embed_tokens.weight or torch.equal(
            merged.lm_head.weight, merged.model.embed_tokens.weight
        )
    if "trainable_token_indices" in extra:
        moved = (merged.model.embed_tokens.weight - held["model.embed_tokens.weight"]).abs().sum(1) > 0
        assert set(moved.nonzero().flatten().tolist()) <= set(ROWS)
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert not any(tensor.shape[0] == 40 for tensor in saved.values())


def test_a_saved_adapter_with_token_rows_opens_by_its_name_alone(tmp_path):
    _base(True).save_pretrained(tmp_path / "base")
    base = llama(True).from_pretrained(tmp_path / "base")
    config = AttrSubspaceConfig(basis="random", dim=3, target_modules=TARGETS, trainable_token_indices=ROWS)
    model = _train(get_peft_model(base, config))
    model.save_pretrained(tmp_path / "adapter")
    assert same(_logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), _logits(model))


@pytest.mark.parametrize("more", [{}, {"core": "block_diagonal"}, {"lora_modules": ["embed_tokens"]}], ids=str)
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], r".*(embed_tokens|q_proj)"], ids=str)
def test_a_layer_with_the_embedding_s_weight_has_its_update(targets, more, tmp_path):
    if "lora_modules" in more and "lm_head" in targets:
        return  # nothing asks for the embedding as a target
    model = _tied(target_modules=targets, **more)
    assert not [n for n, _ in model.named_parameters() if "lm_head.attrsub" in n]
    before = _logits(model)
    trained = _logits(_train(model))
    assert not same(trained, before)
    plain = _dense(model)
    assert same(_logits(plain), trained, 1e-4)

    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [key for key in saved if "lm_head.attrsub" in key]
    for lazy in (False, True):
        again = PeftModel.from_pretrained(_base(True), tmp_path / "adapter", low_cpu_mem_usage=lazy)
        again.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=lazy)
        assert same(_logits(again.eval()), trained)
        again.set_adapter("second")
        assert same(_logits(again), trained)
        mixed = again(IDS, adapter_names=["second", "__base__", "default"]).logits
        assert same(mixed[[0, 2]], trained[[0, 2]]) and same(mixed[1], _logits(_base(True))[1])
        again.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
        again.delete_adapter("second")
        again.set_adapter("mean")
        assert same(_logits(again), trained, 1e-4)
    with_transformers = _base(True)
    with_transformers.load_adapter(tmp_path / "adapter")
    assert same(_logits(with_transformers), trained)

    exported = export_lora(model, tmp_path / "lora")
    assert same(_logits(PeftModel.from_pretrained(_base(True), exported).eval()), trained, 1e-4)

    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert same(_logits(model), trained, 1e-4)
        model.unmerge_adapter()
        assert same(_logits(model), trained, 1e-4)
        with model.disable_adapter():
            assert same(_logits(model), _logits(_base(True)), 1e-4)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert same(_logits(merged), trained, 1e-4)


@pytest.mark.parametrize("named", ["lm_head", "embed_tokens", "shared"])
def test_embeddings_of_encoder_and_decoder_follow_the_shared_one(named, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.2}
    ids = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}
    config = BartConfig(**sizes, **heads, **ids, scale_embedding=True, decoder_start_token_id=1)
    base = BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    plain = copy.deepcopy(base)
    torch.manual_seed(1)
    config = AttrSubspaceConfig(basis="random", dim=3, target_modules=[named, "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(copy.deepcopy(base), config)
    for layer in model.modules():
        if isinstance(layer, AttrSubspaceLayer) and layer.has("default"):
            torch.nn.init.normal_(layer.attrsub_M["default"].weight, std=0.3)
    model.eval()
    tied = {n for n, m in model.base_model.model.named_modules() if isinstance(m, AttrSubspaceLayer) and m.tied}
    assert tied == {"lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"}
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, AttrSubspaceLayer) and layer.has("default"):
                a, core, b = layer.factors("default")
                delta = a @ core @ b.T
                modules[name].weight += delta.T if layer.layout.kind == "embedding" else delta
        expected, got = plain(**inputs).logits, model(**inputs).logits
        assert not same(expected, base(**inputs).logits)
        assert same(got, expected, 1e-4)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
        assert same(again(**inputs).logits, expected, 1e-4)
        assert same(model.merge_and_unload()(**inputs).logits, expected, 1e-4)


def _tied(**more):
    torch.manual_seed(1)
    config = AttrSubspaceConfig(basis="random", dim=3, scaling=1.5, ensure_weight_tying=True, **more)
    return get_peft_model(_base(True), config)


def _dense(model):
    """A copy of the base in which every update, computed from the factors, is added to the weight by hand."""
    plain = _base(True)
    modules = dict(plain.named_modules())
    added = set()
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, AttrSubspaceLayer) and layer.has("default"):
                a, core, b = layer.factors("default")
                delta = (a if core is None else a @ core) @ b.T * layer.scaling["default"]
                modules[name].weight += delta.T if layer.layout.kind == "embedding" else delta
                added.add(name)
    assert "model.embed_tokens" in added
    assert "lm_head" not in added
    return plain


def test_an_untied_model_only_warns():
    with pytest.warns(UserWarning, match="no tied modules"):
        _ours(False, ensure_weight_tying=True)


def test_bare_parameters_are_refused_by_name_and_an_empty_list_is_not():
    with pytest.raises(ValueError, match=r"experts.gate_up_proj.*target_modules.*LoraConfig"):
        AttrSubspaceConfig(basis="random", target_parameters=["mlp.experts.gate_up_proj"])
    assert AttrSubspaceConfig(basis="random", target_parameters=[]).target_parameters == []


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_conflicting_rows_are_refused_as_by_lora():
    wrong = [
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        {"trainable_token_indices": {"embed_tokens": ROWS}, "modules_to_save": ["embed_tokens"]},
    ]
    for extra in wrong:
        said = []
        for make in (_stock, _ours):
            with pytest.raises(ValueError, match="embed") as caught:
                make(True, **extra)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_rows_of_a_model_with_another_name_for_its_embedding():
    torch.manual_seed(0)
    config = AttrSubspaceConfig(basis="random", dim=3, target_modules=["c_attn"], trainable_token_indices=ROWS)
    model = _train(get_peft_model(gpt2(), config))
    trained = _logits(model)
    assert same(_logits(model.merge_and_unload()), trained, 1e-4)
