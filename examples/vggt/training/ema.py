"""The running mean of trained weights, to be evaluated and saved in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

_SHADOW = "shadow."


class Ema:
    """Exponential moving average of what is trained in a model, in float32:

        e <- d e + (1 - d) w ,   d = min(decay, (1 + n) / (10 + n)) ,   n = 0, 1, ... updates so far,

    so that the mean of a short run is not that of its start. Weights that are not trained are not held.
    Source: the schedule of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the running mean is {decay}: expected a number in [0, 1).")
        self.decay = decay
        self.updates = 0
        self._shadow = {name: parameter.detach().float().clone() for name, parameter in _trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in _trained(model).items():
            self._shadow[name].lerp_(parameter.detach().float(), 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the mean in place of its weights; afterwards, its weights, bit for bit."""
        trained = _trained(model)
        held = {name: parameter.detach().clone() for name, parameter in trained.items()}
        try:
            _copy(self._shadow, trained)
            yield
        finally:
            _copy(held, trained)

    def state_dict(self) -> dict[str, Tensor]:
        """A flat dict of tensors, for a checkpoint."""
        shadow = {_SHADOW + name: tensor for name, tensor in self._shadow.items()}
        return {"updates": torch.tensor(self.updates), **shadow}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state_dict; ValueError where it is of other weights."""
        given = {name.removeprefix(_SHADOW): tensor for name, tensor in state.items() if name != "updates"}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._shadow.items()}
        if {name: tuple(tensor.shape) for name, tensor in given.items()} != shapes:
            odd = sorted({*given} ^ {*shapes}) or [n for n in shapes if tuple(given[n].shape) != shapes[n]]
            raise ValueError(f"the stored running mean is of other weights than are trained here: see {odd[0]!r}.")
        self.updates = int(state["updates"])
        _copy(given, self._shadow)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


__all__ = ["Ema"]
