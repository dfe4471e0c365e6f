"""Adapters of models without a vocabulary are saved without asking the Hub for one; a language model's keep theirs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM

from peft_attrsub import AttrSubspaceConfig, export_lora
from peft_attrsub.tuner.vocabulary import embedding_layers
from peft_attrsub.vggt import vggt_targets
from tests.vggt.small import tiny

from .transformers_models import bert, gpt2, llama, opt, vit


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that PEFT asks the Hub for; it answers that it cannot be reached."""
    names: list[str] = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda name, file, **more: names.append(name)
    )
    return names


@contextmanager
def silent() -> Iterator[None]:
    """A warning inside is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tuned(kind: str) -> PeftModel:
    model = tiny()
    model.name_or_path = model.config.name_or_path = "nobody/vggt"
    targets = vggt_targets("aggregator", model)
    if kind == "lora":
        return get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    return get_peft_model(model, AttrSubspaceConfig(basis="random", dim=2, target_modules=targets))


def keys(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return sorted(file.keys())


@pytest.mark.parametrize("kind", ["lora", "cores"])
def test_a_vggt_is_saved_without_a_question_and_with_the_same_tensors(
    kind: str, asked: list[str], tmp_path: Path
) -> None:
    model = tuned(kind)
    with pytest.warns(UserWarning, match="Could not find a config file in nobody/vggt"):
        model.save_pretrained(tmp_path / "auto")
    assert asked == ["nobody/vggt"]
    with silent():
        model.save_pretrained(tmp_path / "ours", save_embedding_layers=embedding_layers(model))
    assert asked == ["nobody/vggt"] and keys(tmp_path / "ours") == keys(tmp_path / "auto") != []


def test_an_export_asks_nothing(asked: list[str], tmp_path: Path) -> None:
    model = tuned("cores")
    with silent():
        export_lora(model, tmp_path / "lora")
    assert asked == [] and keys(tmp_path / "lora")


def test_a_language_model_keeps_a_vocabulary_that_has_grown(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(48)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="has been resized"):
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=embedding_layers(model))
    assert [key for key in keys(tmp_path / "adapter") if "embed_tokens" in key]


class Own(nn.Module):
    """Not of transformers, with a layer by one of the names that PEFT saves whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)


@pytest.mark.parametrize("make", [llama, opt, gpt2, bert, Own])
def test_models_with_a_vocabulary_are_left_to_peft(make: object) -> None:
    assert embedding_layers(make()) == "auto"  # type: ignore[operator]


@pytest.mark.parametrize("make", [vit, tiny, lambda: nn.Sequential(nn.Linear(2, 2))])
def test_models_without_one_are_not(make: object) -> None:
    assert embedding_layers(make()) is False  # type: ignore[operator]
