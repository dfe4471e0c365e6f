"""PiSSA: a LoRA that starts from the leading part of W, which is taken out of W.

    W = s B0 A0 + R ,  trained: s B A from (B0, A0) ,  frozen: R

so dW = s (B A - B0 A0) = s [B, B0] [A; -A0]: a plain LoRA of twice the rank on the untouched W, which is how the
adapter is saved. Source: Meng et al., arXiv 2404.02948.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear
from safetensors.torch import save_file
from torch import Tensor

_ADAPTER = "default"
_PREFIX = "base_model.model."


class Pissa:
    """Starts every Linear of a LoRA model as PiSSA does, and keeps B0, A0. Convolutions keep their plain LoRA.

    iterations: of a randomised SVD; None: an exact one.
    """

    def __init__(self, model: Any, iterations: int | None = None) -> None:
        self._model = model
        self._layers = {
            name.removeprefix(_PREFIX): module for name, module in model.named_modules() if isinstance(module, Linear)
        }
        self._start: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in self._layers.items():
            if min(layer.get_base_layer().weight.shape) < layer.r[_ADAPTER]:
                continue  # W has no such rank: the plain LoRA stays
            layer.pissa_init(_ADAPTER, "pissa" if iterations is None else f"pissa_niter_{iterations}")
            b, a = _factors(layer)
            self._start[name] = (b.detach().clone(), a.detach().clone())

    def state(self) -> dict[str, Tensor]:
        """B0 and A0: an SVD is not the same to the last bit on every machine."""
        found: dict[str, Tensor] = {}
        for name, (b, a) in self._start.items():
            found |= {f"pissa/{name}/B": b, f"pissa/{name}/A": a}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take W apart by the saved B0 and A0, where they differ from those of this machine."""
        with torch.no_grad():
            for name, (b, a) in self._start.items():
                weight, scale = self._layers[name].get_base_layer().weight, self._layers[name].scaling[_ADAPTER]
                b0, a0 = (state[f"pissa/{name}/{part}"].to(weight.device) for part in ("B", "A"))
                if torch.equal(b, b0) and torch.equal(a, a0):
                    continue
                weight.copy_((weight.float() + scale * (b @ a - b0 @ a0)).to(weight.dtype))
                self._start[name] = (b0.clone(), a0.clone())

    def save(self, folder: Path) -> None:
        """Write the plain LoRA of twice the rank that stands on the untouched W."""
        tensors = get_peft_model_state_dict(self._model, save_embedding_layers=False)
        config: LoraConfig = copy.deepcopy(self._model.peft_config[_ADAPTER])
        for name, (b0, a0) in self._start.items():
            b, a = (factor.detach() for factor in _factors(self._layers[name]))
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.cat([b, b0], 1)
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = torch.cat([a, -a0])
        # s stays alpha / rank: both are doubled.
        config.rank_pattern = dict.fromkeys(self._start, 2 * config.r)
        config.alpha_pattern = dict.fromkeys(self._start, 2 * config.lora_alpha)
        config.inference_mode = True
        base = self._model.get_base_model()
        config.base_model_name_or_path = config.base_model_name_or_path or base.name_or_path or None
        config.save_pretrained(
            str(folder),
            auto_mapping_dict={"base_model_class": type(base).__name__, "parent_library": type(base).__module__},
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """B (n x r) and A (r x m)."""
    return layer.lora_B[_ADAPTER].weight, layer.lora_A[_ADAPTER].weight


__all__ = ["Pissa"]
