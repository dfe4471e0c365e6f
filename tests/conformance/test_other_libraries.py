"""transformers' own adapter calls, safetensors, torch.compile, DataParallel, sentence-transformers and diffusers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BertConfig, BertModel, pipeline

from peft_attrsub import AttrSubspaceConfig, build_basis

from .wrapped import adapted, config, every_kind, llama, logits, word_tokenizer


@pytest.fixture
def saved(tmp_path):
    """Save the base and a trained adapter on it; their folders, and the logits."""

    def save(kind):
        llama().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = adapted(kind, tmp_path, base=base)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", logits(model)

    return save


@every_kind
def test_transformers_load_adapter(kind, saved):
    base, adapter, expected = saved(kind)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    assert_close(logits(model), expected)


@every_kind
def test_transformers_add_save_load_adapter(kind, tmp_path):
    model = llama()
    torch.manual_seed(1)
    model.add_adapter(config(kind, tmp_path, trained=True))
    model.save_pretrained(tmp_path / "adapter")
    fresh = llama()
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert_close(logits(fresh.eval()), logits(model.eval()))
    assert not torch.allclose(logits(fresh), logits(llama()), atol=1e-4)


@every_kind
def test_from_pretrained_of_an_adapter(kind, saved):
    _, adapter, expected = saved(kind)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(str(adapter)).eval()), expected)


@every_kind
def test_pipeline(kind, saved):
    _, adapter, expected = saved(kind)
    run = pipeline("text-generation", model=str(adapter), tokenizer=word_tokenizer())
    assert_close(logits(run.model.eval()), expected)


@every_kind
def test_safetensors_of_the_whole_state_dict(kind, tmp_path):
    model = adapted(kind, tmp_path)
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    fresh = adapted(kind, tmp_path, trained=False)
    fresh.load_state_dict(load_file(tmp_path / "whole.safetensors"))
    assert_close(logits(fresh), logits(model))


@every_kind
def test_a_compiled_base(kind, tmp_path):
    """The base is compiled first, so module names hold "_orig_mod."; the adapter's files must not."""
    expected = adapted(kind, tmp_path)
    base = torch.compile(llama(), backend="eager")
    model = adapted(kind, tmp_path, base=base)
    assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-5)
    if kind == "lora":  # its files keep "_orig_mod.", and a plain one does not load onto a compiled base
        return
    expected.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(torch.compile(llama(), backend="eager"), tmp_path / "adapter").eval()
    assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "compiled")
    back = PeftModel.from_pretrained(llama(), tmp_path / "compiled").eval()
    assert_close(logits(back), logits(expected), rtol=1e-4, atol=1e-5)


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.nn.parallel.replicate makes of a module, with copies of its tensors, on the CPU.

    Every module becomes `_replicate_for_data_parallel()` of itself; then children, parameters and buffers are put in,
    the parameters as plain attributes (torch/nn/parallel/replicate.py).
    """
    modules = list(module.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for original in modules:
        copy = copies[id(original)]
        copy._former_parameters = {}
        for name, child in original._modules.items():
            copy._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in original._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:
                held = parameter.detach().clone().requires_grad_(parameter.requires_grad)
                setattr(copy, name, held)
                copy._former_parameters[name] = held
        for name, buffer in original._buffers.items():
            copy._buffers[name] = None if buffer is None else buffer.clone()
    return copies[id(module)]


@every_kind
def test_a_data_parallel_replica(kind, tmp_path):
    model = adapted(kind, tmp_path)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    expected = logits(model)
    copy = replica(model)
    assert_close(logits(copy), expected)
    copy.to(torch.float64)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name
    assert_close(logits(model), expected, rtol=0, atol=0)


@pytest.mark.slow
@every_kind
def test_sentence_transformers(kind, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="make test-slow installs sentence-transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertModel(BertConfig(vocab_size=20, **shape))
    bert.save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    targets = ["query", "value"]

    def model():
        return library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")

    if kind == "lora":
        chosen = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    elif kind in ("random", "psv"):
        chosen = AttrSubspaceConfig(basis=kind, dim=4, target_modules=targets, init_weights=False)
    else:
        for i in range(2):
            lora = BertModel.from_pretrained(tmp_path / "bert")
            torch.manual_seed(20 + i)
            made = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
            get_peft_model(lora, made).save_pretrained(tmp_path / f"lora-{i}")
        basis = build_basis({"style": [tmp_path / "lora-0", tmp_path / "lora-1"]}, dim=4, progress=False)
        basis.save_pretrained(tmp_path / "basis")
        chosen = AttrSubspaceConfig(
            basis=str(tmp_path / "basis"), save_basis=kind == "stored", target_modules=targets, init_weights=False
        )
    sentences = ["the cat sat", "on a mat"]
    first = model()
    plain = first.encode(sentences)
    first.add_adapter(chosen)
    expected = first.encode(sentences)
    assert abs(expected - plain).max() > 1e-4
    first.save_pretrained(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(again.encode(sentences) - expected).max() < 1e-5
    first[0].auto_model.save_pretrained(tmp_path / "adapter")
    other = model()
    other.load_adapter(str(tmp_path / "adapter"))
    assert abs(other.encode(sentences) - expected).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "random", "psv"])
def test_diffusers_unet(kind, tmp_path):
    """Two adapters on a tiny UNet, their weights by `set_adapters`; saved with PEFT's state dict, loaded again."""
    library = pytest.importorskip("diffusers", reason="make test-slow installs diffusers")

    def unet():
        torch.manual_seed(0)
        model = library.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        return model.eval()

    def run(model):
        generator = torch.Generator().manual_seed(1)
        sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        with torch.no_grad():
            return model(sample, 5, text).sample

    targets = ["to_q", "to_v"]
    if kind == "lora":
        chosen = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    else:
        chosen = AttrSubspaceConfig(basis=kind, dim=2, target_modules=targets, init_weights=False)
    model = unet()
    plain = run(model)
    model.add_adapter(chosen, adapter_name="one")
    torch.manual_seed(7)
    model.add_adapter(chosen, adapter_name="two")
    outputs = {}
    for weight in (0.0, 0.5, 1.0):
        model.set_adapters(["one", "two"], weights=[weight, 0.0])
        outputs[weight] = run(model)
    assert_close(outputs[0.0], plain, rtol=1e-4, atol=1e-5)
    assert (outputs[1.0] - plain).abs().max() > 1e-4
    full, half = (outputs[w] - plain for w in (1.0, 0.5))
    assert 0 < half.norm() < full.norm()
    state = get_peft_model_state_dict(model, adapter_name="one")
    fresh = unet()
    fresh.add_adapter(chosen, adapter_name="one")
    set_peft_model_state_dict(fresh, state, adapter_name="one")
    assert_close(run(fresh), outputs[1.0], rtol=1e-4, atol=1e-5)
    model.disable_adapters()
    assert_close(run(model), plain)
    model.enable_adapters()
    model.set_adapters("one")
    assert_close(run(model), outputs[1.0], rtol=1e-4, atol=1e-5)
    model.delete_adapters("two")
    assert_close(run(model), outputs[1.0], rtol=1e-4, atol=1e-5)
