"""AdaLoRA's budget of ranks over a training, its penalty, and its memory for an exact continuation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import Tensor

from .options import ModelSettings

_ADAPTER = "default"


class AdaLora:
    """The part of AdaLoRA that acts between steps: PEFT's allocator, and what it remembers.

        W + s B diag(e) A ,  loss + w mean_P |P P^T - I|_F  over the factors P = A, B^T

    Source: Zhang et al., arXiv 2303.10512; PEFT does the allocation.
    """

    def __init__(self, model: Any) -> None:
        self._tuner: Any = model.base_model
        self._config: AdaLoraConfig = self._tuner.peft_config[_ADAPTER]

    @staticmethod
    def config(settings: ModelSettings, steps: int | None, shared: Mapping[str, Any]) -> AdaLoraConfig:
        """PEFT's config: ranks stay for the first share of the steps, fall by a cubic, and stay for the last."""
        if steps is None:
            raise ValueError("AdaLoRA spreads its budget over the training: say how many steps there are.")
        if steps < 2:
            raise ValueError(f"--steps {steps} is too few for AdaLoRA, whose ranks fall in between: give 2 or more.")
        warm, final = int(settings.adalora_warm * steps), int(settings.adalora_final * steps)
        first = settings.adalora_init_rank or max(settings.rank + 1, math.ceil(1.5 * settings.rank))
        return AdaLoraConfig(
            init_r=first,
            target_r=settings.rank,
            tinit=warm,
            tfinal=final,
            deltaT=settings.adalora_every,
            total_step=steps,
            orth_reg_weight=settings.adalora_orthogonal,
            **shared,
        )

    def penalty(self) -> Tensor:
        """w mean |P P^T - I|_F over the factors, a scalar."""
        norms = []
        for name, p in self._tuner.model.named_parameters():
            words = name.split(".")
            if "lora_A" in words or "lora_B" in words:
                gram = p @ p.T if "lora_A" in words else p.T @ p
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)))
        return self._config.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, step: int) -> None:
        """Average the importances, which needs the gradients, and set entries of e to 0 as the budget asks."""
        for name, parameter in self._tuner.model.named_parameters():
            if ".lora_" in name and parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # a head that the loss leaves out
        last = self._config.total_step - self._config.tfinal
        if step > last and self._tuner.rankallocator.ipt:
            # The step of the last allocation was skipped; it forgets the importances, so they tell.
            self._tuner.update_and_allocate(last)
        self._tuner.update_and_allocate(step)

    def state(self) -> dict[str, Tensor]:
        """Smoothed importances and the masks so far."""
        allocator = self._tuner.rankallocator
        found = {f"adalora/mean/{name}": tensor for name, tensor in allocator.exp_avg_ipt.items()}
        found |= {f"adalora/spread/{name}": tensor for name, tensor in allocator.exp_avg_unc.items()}
        masks = self._config.rank_pattern or {}
        return found | {f"adalora/mask/{name}": torch.tensor(mask) for name, mask in masks.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        allocator = self._tuner.rankallocator
        devices = {name: parameter.device for name, parameter in self._tuner.model.named_parameters()}

        def part(what: str) -> dict[str, Tensor]:
            start = f"adalora/{what}/"
            return {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}

        allocator.reset_ipt()
        for what, held in (("mean", allocator.exp_avg_ipt), ("spread", allocator.exp_avg_unc)):
            held.update({name: tensor.clone().to(devices[name]) for name, tensor in part(what).items()})
        # Only that a name is there counts: PEFT then goes on averaging instead of starting anew.
        allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in allocator.exp_avg_ipt.items()}
        self._config.rank_pattern = {name: mask.tolist() for name, mask in part("mask").items()} or None


__all__ = ["AdaLora"]
