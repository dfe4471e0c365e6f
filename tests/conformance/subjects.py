"""What the conformance cases run on: tiny transformers models of every task, and the ways to adapt them.

A family is an architecture with a task; a way is a kind of basis and core; a subject is one of each. Every subject
can also be had with stock LoRA on the same modules: see `oracle.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_attrsub import AttrSubspaceConfig, Basis

# eos_token_id None: what is generated has the length that was asked for.
_TOKENS = {"vocab_size": 40, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_LONG = {"max_position_embeddings": 32}
# Wider than a pretrained model's, so that an adapter on two narrow layers is seen in the output.
_WEIGHTS = {"initializer_range": 0.2}
_GROUPED = {**_SMALL, **_TOKENS, **_LONG, **_WEIGHTS, "num_key_value_heads": 1}
_ENCODER = {**_SMALL, **_TOKENS, **_LONG, **_WEIGHTS}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **_TOKENS, **_WEIGHTS}
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.2}
_STARTS = {"decoder_start_token_id": 1, "forced_eos_token_id": None}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}

#: Class of the config -> its arguments.
SIZES: dict[str, dict[str, Any]] = {
    "OPT": {**_SMALL, **_TOKENS, **_LONG, "ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.2},
    "GPT2": _GPT,
    "GPTJ": {**_GPT, "rotary_dim": 4},
    "Llama": _GROUPED,
    "Mistral": _GROUPED,
    "Qwen2": _GROUPED,
    "Gemma3Text": {**_GROUPED, "head_dim": 8, "sliding_window": 8},
    "Bart": {**_BART, **_HEADS, **_TOKENS, **_LONG, **_STARTS},
    "T5": {**_T5, **_TOKENS, "eos_token_id": None},
    "Bert": _ENCODER,
    "Roberta": _ENCODER,
    "Deberta": _ENCODER,
    "DebertaV2": _ENCODER,
    "CLIPText": {**_SMALL, **_LONG, "vocab_size": 40, "projection_dim": 12, "initializer_factor": 5.0},
}

_TEXT = torch.tensor([[3, 17, 5, 22, 9], [8, 4, 31, 2, 2]])
_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])


@dataclass(frozen=True)
class Family:
    """One architecture for one task: how it is made, what is adapted in it, what PEFT calls the task."""

    model: str  # the class in transformers
    sizes: str  # key of SIZES
    targets: tuple[str, ...]
    task: str | None = None
    labels: int = 3

    @property
    def seq2seq(self) -> bool:
        return self.task == "SEQ_2_SEQ_LM"

    def build(self) -> nn.Module:
        """The model in eval mode, with the same weights at every call."""
        more = {"num_labels": self.labels} if self.task in ("SEQ_CLS", "TOKEN_CLS") else {}
        config = getattr(transformers, f"{self.sizes}Config")(**SIZES[self.sizes], **more)
        with torch.random.fork_rng(devices=[]):  # what the caller draws next does not depend on it
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config).eval()
        model.config._name_or_path = model.name_or_path = f"nobody/{self.sizes}"
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Two sequences, one with a masked token."""
        inputs = {"input_ids": _TEXT.clone(), "attention_mask": _MASK.clone()}
        if self.seq2seq:
            inputs["decoder_input_ids"] = _TEXT[:, :3].clone()
        return inputs


@functools.cache
def mined(family: Family) -> Basis:
    """A basis in memory as mining gives it: two attributes of two directions for every target of the family."""
    generator = torch.Generator().manual_seed(7)
    model = family.build()
    endings = tuple(f".{target}" for target in family.targets)

    def factors(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        n, m = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        left = torch.linalg.qr(torch.randn(n, 2, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(m, 2, generator=generator)).Q
        return left, torch.tensor([2.0, 1.0]), right

    targets = {name: module for name, module in model.named_modules() if f".{name}".endswith(endings)}
    assert targets, f"{family.model} has none of {family.targets}"
    attributes = ("texture", "geometry")
    return Basis.from_factors({a: {name: factors(module) for name, module in targets.items()} for a in attributes})


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="conformance-")  # removed when the process ends


@functools.cache
def saved(family: Family) -> str:
    """The folder of the family's mined basis."""
    path = tempfile.mkdtemp(prefix=family.model, dir=_folder().name)
    mined(family).save_pretrained(path, overwrite=True)
    return path


#: Way -> config arguments for a family; `target_modules` is the family's unless they say otherwise.
WAYS: dict[str, Callable[[Family], dict[str, Any]]] = {
    "random": lambda family: {"basis": "random", "dim": 3},
    "psv-blocks": lambda family: {"basis": "psv", "dim": 3, "core": "block_diagonal"},
    "random-default-targets": lambda family: {"basis": "random", "dim": 3, "target_modules": None},
    "pointer": lambda family: {"basis": saved(family)},
    "memory-spectral-blocks": lambda family: {
        "basis": mined(family),
        "core": "block_diagonal",
        "columns": "spectral",
        "target_modules": None,
    },
    "dials": lambda family: {"basis": saved(family), "core": "dials"},
    "stored-blocks": lambda family: {"basis": saved(family), "save_basis": True, "core": "block_diagonal"},
}
STOCK = "stock-lora"
_AS_LORA = {"init_weights": "init_lora_weights", "dropout": "lora_dropout"}
_NOT_IN_LORA = {"basis", "dim", "scaling", "core", "columns", "save_basis"}


@dataclass(frozen=True)
class Subject:
    """A family adapted in one way."""

    family: Family
    way: str

    def __str__(self) -> str:
        return f"{self.family.model}-{self.way}"

    @property
    def is_stock(self) -> bool:
        return self.way == STOCK

    def stock(self) -> Subject:
        """The same modules under stock LoRA."""
        return dataclasses.replace(self, way=STOCK)

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.family.build().to(dtype)

    def config(self, **more: Any) -> PeftConfig:
        """A config that is not a no-op, unless `more` says init_weights=True."""
        shared = {"task_type": self.family.task, "target_modules": list(self.family.targets)}
        if not self.is_stock:
            arguments = {"init_weights": False, "scaling": 4.0, **WAYS[self.way](self.family)}
            return AttrSubspaceConfig(**{**shared, **arguments, **more})
        wanted = {name: value for name, value in {"init_weights": False, **more}.items() if name not in _NOT_IN_LORA}
        renamed = {_AS_LORA.get(name, name): value for name, value in wanted.items()}
        return LoraConfig(r=3, lora_alpha=12, **{**shared, **renamed})

    def peft(
        self, adapter: str = "default", draw: int = 0, dtype: torch.dtype = torch.float32, **more: Any
    ) -> PeftModel:
        """A fresh adapted model in eval mode; `draw` seeds what is drawn at random."""
        base = self.base(dtype)
        torch.manual_seed(draw)
        return get_peft_model(base, self.config(**more), adapter_name=adapter).eval()

    def pair(self, one: str = "default", two: str = "other", **more: Any) -> PeftModel:
        """A model with two adapters of different values; `one` is active."""
        model = self.peft(one, **more)
        torch.manual_seed(1)
        model.add_adapter(two, self.config(**more))
        return model.eval()

    def output(self, model: nn.Module, **more: Any) -> Tensor:
        """Logits, or the last hidden state, of the family's inputs, without gradients."""
        with torch.no_grad():
            return model(**self.family.inputs(), **more)[0]

    def load(self, folder: Any, **more: Any) -> PeftModel:
        """A fresh base model with the saved adapter on it."""
        return PeftModel.from_pretrained(self.base(), str(folder), **more).eval()


def grid(families: list[Family], whole: int, others: int) -> list[Subject]:
    """The first `whole` families in every way, each other one in `others` ways that go round."""
    names = list(WAYS)
    subjects = []
    for i, family in enumerate(families):
        turn = (i - whole) * others
        ways = names if i < whole else [names[(turn + k) % len(names)] for k in range(others)]
        subjects += [Subject(family, way) for way in ways]
    return subjects
