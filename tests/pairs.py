"""Pairs of other people's packages: whether they work together at all, before a test of ours on top of them judges us.

Each check uses stock parts only and returns "" where the pair works, else one sentence. `python tests/pairs.py` prints
"package: sentence" for each broken pair, with the package that should step back, and exits with 1;
requirements/update_constraints.py relies on it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import sys
import tempfile
from collections.abc import Callable

import torch


def _sentence(title: str, check: Callable[[], None]) -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check()
    except Exception as error:  # whatever two packages do to each other
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{title} do not work together, whatever peft_attrsub does: {type(error).__name__}: {first}"
    return ""


def _versions(*packages: str) -> str:
    return " and ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


@functools.cache
def transformers_adapters() -> str:
    """transformers' own add_adapter, set_adapter, disable_adapters and load_adapter with PEFT's LoRA."""

    def check() -> None:
        from peft import LoraConfig
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=16, num_key_value_heads=2, **sizes)
        model = LlamaForCausalLM(config)
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="one")
        model.set_adapter("one")
        model.disable_adapters()
        model.enable_adapters()
        model(torch.zeros(1, 2, dtype=torch.long))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            LlamaForCausalLM(config).load_adapter(folder)

    return _sentence(_versions("transformers", "peft"), check)


@functools.cache
def transformers_prefixes() -> str:
    """transformers' load_adapter of a LoRA that was trained on the model inside, whose names lack a prefix."""

    def check() -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config, ids = LlamaConfig(vocab_size=16, **sizes), torch.arange(4)[None]
        whole = LlamaForCausalLM(config).eval()
        inner = LlamaModel(config).eval()
        inner.load_state_dict(whole.model.state_dict())
        lora = get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            lora.save_pretrained(folder)
            whole.load_adapter(folder)
            torch.testing.assert_close(whole.model(ids).last_hidden_state, lora(ids).last_hidden_state)

    return _sentence(_versions("transformers", "peft"), check)


@functools.cache
def torchao_int8() -> str:
    """PEFT's LoRA on a linear layer in torchao's int8."""

    def check() -> None:
        import types

        import torchao.quantization
        from peft import LoraConfig, get_peft_model

        model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
        # What PEFT asks of a quantized transformers model.
        recipe = types.SimpleNamespace(get_apply_tensor_subclass=torchao.quantization.Int8WeightOnlyConfig)
        model.hf_quantizer = types.SimpleNamespace(quantization_config=recipe)
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))(torch.ones(1, 16))

    return _sentence(_versions("torchao", "torch", "peft"), check)


@functools.cache
def compiled_peft() -> str:
    """torch.compile with one graph through PEFT's own wrapper and LoRA."""

    def check() -> None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.ones(1, 4))
        torch.compiler.reset()

    return _sentence(_versions("torch", "peft"), check)


#: The package that steps back where a pair is broken -> its check. Torch is the caller's and steps nowhere.
PAIRS: dict[str, Callable[[], str]] = {"transformers": transformers_adapters, "torchao": torchao_int8}


if __name__ == "__main__":
    broken = {package: found for package, check in PAIRS.items() if (found := check())}
    for package, sentence in broken.items():
        print(f"{package}: {sentence}")
    sys.exit(bool(broken))
