"""Whether a model has a vocabulary that PEFT has to look after when it saves an adapter."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

#: Modules that PEFT saves whole where they are targeted.
_LAYERS = ("embed_tokens", "lm_head")


def embedding_layers(model: nn.Module) -> Literal["auto", False]:
    """`save_embedding_layers` for `save_pretrained` and `get_peft_model_state_dict`: False without a vocabulary.

    "auto" has PEFT look for the config of the base to see whether its vocabulary was resized: a request to the Hub at
    every save, and a warning where it finds none. A model without vocabulary (no `vocab_size` in its config, no
    nn.Embedding as input, no layer `embed_tokens` or `lm_head`) saves the same tensors either way.

        model.save_pretrained(folder, save_embedding_layers=embedding_layers(model))
    """
    wrapped: Any = model
    base: nn.Module = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    configs: list[Any] = [getattr(base, "config", None)]
    configs.append(getattr(configs[0], "text_config", None))
    if any(_value(config, "vocab_size") is not None for config in configs):
        return "auto"
    return "auto" if _embeds(base) else False


def _value(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)


def _embeds(base: nn.Module) -> bool:
    if any(name.rpartition(".")[2] in _LAYERS for name, _ in base.named_modules()):
        return True
    try:
        inputs = base.get_input_embeddings()  # type: ignore[operator]  # of transformers
    except (AttributeError, NotImplementedError, TypeError):
        return False
    return isinstance(inputs, nn.Embedding)


__all__ = ["embedding_layers"]
