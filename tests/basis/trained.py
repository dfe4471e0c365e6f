"""Small real transformers, and LoRA adapters that stock PEFT trains on them for a few steps."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0,
        )
    )  # fmt: skip


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


def vit():
    return ViTForImageClassification(
        ViTConfig(
            image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


MODELS = {
    "opt": (opt, ["q_proj", "v_proj", "fc1"]),
    "llama": (llama, ["q_proj", "k_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),  # transformers' Conv1D: in x out
    "vit": (vit, ["fc1", "projection"]),  # `projection` is the patch embedding, a Conv2d
}


@dataclass
class Study:
    """A base model on disk and the adapters trained on it, by attribute."""

    kind: str
    base: Path
    adapters: dict[str, list[str]]

    def load(self):
        return type(MODELS[self.kind][0]()).from_pretrained(self.base).eval()


def inputs(kind, seed=0, n=3):
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(n, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(0, 64, (n, 12), generator=generator)}


def logits(model, kind, seed=0):
    model.eval()
    with torch.no_grad():
        return model(**inputs(kind, seed)).logits


def train(model, kind, steps=3, seed=0, lr=1e-2):
    """A few AdamW steps on random tokens or random labels; deterministic in `seed`."""
    batch = inputs(kind, seed=1000 + seed)
    generator = torch.Generator().manual_seed(seed)
    batch["labels"] = torch.randint(0, 5, (3,), generator=generator) if kind == "vit" else batch["input_ids"]
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def study(kind, root, attributes=("texture", "geometry"), per_attribute=2):
    """Save a base model under `root` and train `per_attribute` LoRA adapters for each attribute."""
    root = Path(root)
    make, targets = MODELS[kind]
    torch.manual_seed(0)
    make().save_pretrained(root / "base")
    result = Study(kind, root / "base", {})
    for a, attribute in enumerate(attributes):
        result.adapters[attribute] = []
        for i in range(per_attribute):
            torch.manual_seed(100 * a + i)
            config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
            model = train(get_peft_model(result.load(), config), kind, seed=100 * a + i)
            folder = root / "adapters" / attribute / f"{attribute}-{i}"
            model.save_pretrained(str(folder))
            result.adapters[attribute].append(str(folder))
    return result
