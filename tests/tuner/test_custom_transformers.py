"""The tuner on transformers models: training with checkpointing, generation, heads, tied weights, conversion."""

from __future__ import annotations

import pytest
import torch
from peft import (
    PeftModel,
    convert_to_lora,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from peft_attrsub import AttrSubspaceConfig
from tests import pairs

from .checks import cores, every_basis, has_tuner_layers, layers, learn, no_warning, run, same, trainable
from .models import BASES, Case
from .transformers_models import TOKENS, TRANSFORMERS, bert, build, gpt2, llama, opt, vit

every_model = pytest.mark.parametrize("case", TRANSFORMERS, ids=str)
DECODERS = [
    pytest.param(opt, ["q_proj", "v_proj"], id="opt"),
    pytest.param(llama, ["q_proj", "down_proj"], id="llama"),
    pytest.param(gpt2, ["c_attn"], id="gpt2"),
]
every_decoder = pytest.mark.parametrize(("model", "targets"), DECODERS)


def config(basis="random", **more) -> AttrSubspaceConfig:
    """A config that is no no-op, so that its effect can be seen."""
    return AttrSubspaceConfig(basis=basis, **{"dim": 4, "init_weights": False, **more})


def logits(model, x=None, **more) -> torch.Tensor:
    """Output logits without gradients."""
    with torch.no_grad():
        return model(x() if x else TOKENS(), **more).logits


@every_basis
@every_model
def test_train_save_load_merge(case, basis, tmp_path):
    base = run(case.base(), case)
    model = case.peft(basis)
    assert same(run(model, case), base, 1e-6)
    learn(model, case)
    trained = run(model, case)
    assert not same(trained, base, 1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert same(run(loaded, case), trained)
    merged = model.merge_and_unload()
    assert same(run(merged, case), trained, 1e-4) and not has_tuner_layers(merged)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("basis", BASES)
@every_decoder
def test_gradient_checkpointing(model, targets, basis, use_reentrant):
    peft = get_peft_model(build(model), config(basis, target_modules=targets)).train()
    for module in peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    peft.base_model.model.config.use_cache = False

    def gradients():
        peft.zero_grad()
        peft(TOKENS()).logits.square().mean().backward()
        return {
            name: parameter.grad.clone() for name, parameter in peft.named_parameters() if parameter.grad is not None
        }

    expected = gradients()
    assert expected.keys() == trainable(peft)
    peft.prepare_model_for_gradient_checkpointing(peft)
    peft.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients()
    assert checkpointed.keys() == expected.keys()
    assert all(same(checkpointed[name], gradient, 1e-6) for name, gradient in expected.items())
    assert all(gradient.any() for gradient in expected.values())


@pytest.mark.parametrize("basis", BASES)
@every_decoder
def test_generation(model, targets, basis):
    base = build(model)
    ask = {"input_ids": TOKENS(), "max_new_tokens": 5, "do_sample": False}
    without = base.generate(**ask, return_dict_in_generate=True, output_scores=True).scores[0]
    peft = get_peft_model(base, config(basis, target_modules=targets, scaling=4.0))
    adapted = peft.generate(**ask, return_dict_in_generate=True, output_scores=True)
    assert adapted.sequences.shape == (2, 12)
    assert not same(adapted.scores[0], without, 1e-3)
    with peft.disable_adapter():
        again = peft.generate(**ask, return_dict_in_generate=True, output_scores=True).scores[0]
    assert same(again, without, 1e-6)
    assert torch.equal(peft.generate(TOKENS(), max_new_tokens=5, do_sample=False), adapted.sequences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_decoder
def test_generation_in_half_precision(model, targets, dtype):
    peft = get_peft_model(build(model).to(dtype), config(target_modules=targets))
    mask = torch.ones_like(TOKENS())
    mask[0, :2] = 0
    found = peft.generate(input_ids=TOKENS(), attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert found.shape == (2, 10)


@every_decoder
def test_embeddings_as_input(model, targets):
    peft = get_peft_model(build(model), config(target_modules=targets))
    embedded = peft.get_input_embeddings()(TOKENS())
    assert same(logits(peft, lambda: None, inputs_embeds=embedded), logits(peft))


@every_decoder
def test_inputs_that_ask_for_gradients(model, targets):
    peft = get_peft_model(build(model), config(target_modules=targets))
    assert not peft.get_input_embeddings()(TOKENS()).requires_grad
    prepared = prepare_model_for_kbit_training(build(model))
    assert not trainable(prepared)
    peft = get_peft_model(prepared, config(target_modules=targets))
    peft.enable_input_require_grads()
    assert peft.get_input_embeddings()(TOKENS()).requires_grad
    assert all(name.endswith("attrsub_M.default") for name in trainable(peft))


@every_basis
@every_decoder
def test_layers_to_transform(model, targets, basis, tmp_path):
    everywhere = get_peft_model(build(model), config(basis, target_modules=targets))
    first = get_peft_model(build(model), config(basis, target_modules=targets, layers_to_transform=[0]))
    assert 2 * len(layers(first)) == len(layers(everywhere))
    assert not any(".1." in name for name in layers(first))
    first.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(model), tmp_path)
    assert same(logits(loaded), logits(first), 1e-6)


@every_basis
@pytest.mark.parametrize(("model", "head"), [(opt, "lm_head"), (llama, "lm_head"), (gpt2, "lm_head")])
def test_all_linear_leaves_the_output_embedding_alone(model, head, basis):
    for targets in ("all-linear", None):
        names = {
            name.rpartition(".")[2]
            for name in layers(get_peft_model(build(model), config(basis, target_modules=targets)))
        }
        assert names and head not in names


@pytest.mark.parametrize("basis", BASES)
def test_a_classification_head_is_saved_for_every_adapter(basis, tmp_path):
    more = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = get_peft_model(build(bert), config(basis, **more))
    assert "classifier" in model.modules_to_save
    model.add_adapter("other", config(basis, **more))
    assert set(model.base_model.classifier.modules_to_save) == {"default", "other"}
    assert any("classifier.modules_to_save.default" in name for name in trainable(model))
    with torch.no_grad():
        model.base_model.classifier.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert same(logits(PeftModel.from_pretrained(build(bert), tmp_path)), expected, 1e-6)


@pytest.mark.parametrize("basis", BASES)
def test_all_linear_leaves_a_classification_head_alone(basis):
    model = get_peft_model(build(bert), config(basis, target_modules="all-linear", task_type="SEQ_CLS"))
    assert not any(name.endswith("classifier") for name in layers(model))


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r".*embed_tokens"], ids=str)
@pytest.mark.parametrize("basis", BASES)
def test_tied_embeddings_warn(basis, targets):
    with pytest.warns(UserWarning, match="no implementation exists to tie the adapters"):
        model = get_peft_model(build(llama, tie=True), config(basis, target_modules=targets))
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        model.merge_adapter()
    with no_warning("tie"):
        get_peft_model(build(llama), config(basis, target_modules=targets)).merge_adapter()
    with no_warning("tie"):
        get_peft_model(build(llama, tie=True), config(basis, target_modules=["q_proj"])).merge_adapter()


@pytest.mark.parametrize("save_embedding_layers", ["auto", True, False])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r".*embed_tokens"], ids=str)
def test_a_targeted_embedding_is_saved_along(targets, save_embedding_layers, tmp_path):
    model = get_peft_model(build(llama), config(target_modules=targets))
    if save_embedding_layers == "auto":
        with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
            model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (name in tensors) is bool(save_embedding_layers)
    if save_embedding_layers:
        assert torch.equal(tensors[name], model.base_model.model.model.embed_tokens.base_layer.weight)
    assert same(logits(PeftModel.from_pretrained(build(llama), tmp_path)), logits(model), 1e-6)


def test_saved_modules_are_copied_for_their_adapter_only():
    model = get_peft_model(build(llama), config(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    model.add_adapter("other", config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    inner = model.base_model.model
    assert list(inner.model.embed_tokens.modules_to_save) == ["default"]
    assert list(inner.lm_head.modules_to_save) == ["other"]


@every_basis
@every_decoder
def test_a_merged_model_is_a_transformers_model(model, targets, basis, tmp_path):
    peft = get_peft_model(build(model), config(basis, target_modules=targets))
    expected = logits(peft)
    merged = peft.merge_and_unload()
    assert type(merged) is type(build(model))
    merged.save_pretrained(tmp_path)
    assert same(logits(type(merged).from_pretrained(tmp_path).eval()), expected, 1e-4)


@every_basis
@pytest.mark.parametrize(("model", "targets"), [DECODERS[0].values, DECODERS[1].values], ids=["opt", "llama"])
def test_peft_converts_it_to_lora(model, targets, basis):
    # a core of D x D is an update of rank D at most: a LoRA of that rank holds all of it
    peft = get_peft_model(build(model), config(basis, target_modules=targets))
    assert peft.supports_lora_conversion()
    expected = logits(peft)
    lora_config, state = convert_to_lora(peft, rank=4)
    lora = get_peft_model(build(model), lora_config).eval()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    assert same(logits(lora), expected, 1e-4)
    assert not same(logits(build(model)), expected, 1e-3)


@every_basis
def test_transformers_own_adapter_calls(basis):
    if broken := pairs.transformers_adapters():
        pytest.skip(broken)
    model = build(llama)
    without = logits(model)
    model.add_adapter(config(basis, target_modules=["q_proj"]), adapter_name="texture")
    adapted = logits(model)
    assert len(cores(model, "texture")) == 2 and not same(adapted, without, 1e-4)
    model.disable_adapters()
    assert same(logits(model), without, 1e-6)
    model.enable_adapters()
    assert same(logits(model), adapted, 1e-6)
    model.add_adapter(config(basis, target_modules=["v_proj"]), adapter_name="geometry")
    model.set_adapter("geometry")
    assert not same(logits(model), adapted, 1e-4)
    model.set_adapter("texture")
    assert same(logits(model), adapted, 1e-6)


@every_basis
def test_a_vision_transformer_adapts_its_patch_convolution(basis):
    case = Case("vit", lambda: build(vit), TRANSFORMERS[-1].sample)
    model = case.peft(basis, target_modules=["projection"], init_weights=False)
    assert [type(layer).__name__ for layer in layers(model).values()] == ["Conv2d"]
    expected = logits(model, case.sample)
    assert not same(expected, logits(case.base(), case.sample), 1e-4)
    assert same(logits(model.merge_and_unload(), case.sample), expected)
