"""PEFT's suite for causal language models (tests/test_decoder_models.py)."""

from __future__ import annotations

import pytest

from .cases import Disk, Embedded, Generating, Identity
from .merging_cases import Converting, Merging
from .subjects import Family, grid

TASK = "CAUSAL_LM"
FAMILIES = [
    Family("LlamaForCausalLM", "Llama", ("q_proj", "down_proj"), TASK),
    Family("GPT2LMHeadModel", "GPT2", ("c_attn", "c_fc"), TASK),
    Family("OPTForCausalLM", "OPT", ("q_proj", "v_proj", "fc1"), TASK),
    Family("GPTJForCausalLM", "GPTJ", ("q_proj", "v_proj"), TASK),
    Family("Qwen2ForCausalLM", "Qwen2", ("q_proj", "gate_proj"), TASK),
    Family("Gemma3ForCausalLM", "Gemma3Text", ("v_proj", "up_proj"), TASK),
]


@pytest.mark.parametrize("subject", grid(FAMILIES, 1, 1), ids=str)
class TestDecoderModels(Identity, Disk, Merging, Embedded, Converting, Generating):
    """Every common case."""
