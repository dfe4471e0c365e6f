"""Two-layer transformers built from a config, one per way of naming and storing weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from .models import Case, floats, ids

# eos_token_id None: what is generated has the length that was asked for.
IDS_OF = {"vocab_size": 40, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def opt() -> PreTrainedModel:
    """OPT with its input and output embeddings tied."""
    more = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(**SMALL, **IDS_OF, **more))


def llama(tie: bool = False) -> PreTrainedModel:
    """Llama, untied unless asked for."""
    more = {"num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": tie}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **IDS_OF, intermediate_size=24, **more))


def gpt2() -> PreTrainedModel:
    """GPT-2, whose linear layers are Conv1D."""
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **IDS_OF))


def bert() -> PreTrainedModel:
    """BERT with a classification head."""
    config = BertConfig(**SMALL, **IDS_OF, intermediate_size=24, max_position_embeddings=32, num_labels=3)
    return BertForSequenceClassification(config)


def vit() -> PreTrainedModel:
    """A vision transformer whose patch embedding is a convolution."""
    config = ViTConfig(**SMALL, image_size=8, patch_size=4, intermediate_size=24, num_labels=3)
    return ViTForImageClassification(config)


class Logits(nn.Module):
    """A transformers model as the cases want it: a tensor in, its logits out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


def _wrapped(model: Callable[[], PreTrainedModel]) -> Callable[[], nn.Module]:
    return lambda: Logits(model())


def build(model: Callable[[], PreTrainedModel], **more) -> PreTrainedModel:
    """The model itself, the same weights at every call, in eval mode."""
    torch.manual_seed(0)
    return model(**more).eval()


TOKENS = ids(2, 7, below=40)
PIXELS = floats(2, 3, 8, 8)
TRANSFORMERS = [
    Case("opt", _wrapped(opt), TOKENS, {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    Case("llama", _wrapped(llama), TOKENS, {"target_modules": ["q_proj", "o_proj", "down_proj"]}),
    Case("gpt2", _wrapped(gpt2), TOKENS, {"target_modules": ["c_attn", "c_proj"]}),
    Case("bert", _wrapped(bert), TOKENS, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    Case("vit", _wrapped(vit), PIXELS, {"target_modules": r".*(projection|query|q_proj|fc1|dense)"}),
]
