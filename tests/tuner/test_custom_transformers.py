"""The tuner on transformers models: training with checkpointing, generation, heads, tied weights, conversion."""

from __future__ import annotations

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file

from peft_attrsub import AttrSubspaceConfig
from tests import pairs

from .checks import cores, every_basis, has_tuner_layers, layers, learn, no_warning, run, same
from .models import BASES, Case
from .transformers_models import TOKENS, TRANSFORMERS, build, gpt2, llama, opt, vit

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


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], r".*embed_tokens"], ids=str)
@pytest.mark.parametrize("basis", BASES)
def test_tied_embeddings_warn(basis, targets):
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
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
