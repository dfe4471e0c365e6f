"""How x meets B and A in each type of layer: linear, embedding, convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .folded import folded_linear
from .forward_choice import choose, cores_of, sum_of_cores
from .layer import AttrSubspaceLayer


class Linear(AttrSubspaceLayer):
    """nn.Linear, transformers' Conv1D, and quantised linear layers."""

    def project_in(self, x: Tensor, b: Tensor) -> Tensor:
        return x @ b

    def _joint(self, x: Tensor) -> Tensor | None:
        fold = choose(self, x)
        if fold is None:
            return None
        names = cores_of(self)
        a, b = self.bases(names[0])
        core = sum_of_cores(self, names)
        base = self.get_base_layer()
        return folded_linear(x, core, base.weight, base.bias, a, b, transposed=self.fan_in_fan_out, fold=fold)


class Embedding(AttrSubspaceLayer):
    """nn.Embedding: the row of B that belongs to a token takes the place of B^T x."""

    def prepare_input(self, x: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        return x  # token ids: nothing to cast or to drop

    def project_in(self, x: Tensor, b: Tensor) -> Tensor:
        base = self.get_base_layer()
        rows = nn.functional.embedding(x, b, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        scale = self._get_embed_scale()
        return rows if scale is None else rows * scale.to(rows.dtype)


class _ConvNd(AttrSubspaceLayer):
    """B as the k x k convolution into D_B channels, then M and A as 1 x 1 convolutions.

    With groups, every group applies the same B to its own channels, and its own rows of A.
    """

    def project_in(self, x: Tensor, b: Tensor) -> Tensor:
        base, groups = self.get_base_layer(), self.layout.groups
        weight = self.layout.as_filter(b)
        if groups > 1:
            weight = weight.repeat(groups, *[1] * (weight.dim() - 1))
        padding = base.padding
        if base.padding_mode != "zeros":
            x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        return self._convolve(x, weight, None, base.stride, padding, base.dilation, groups)

    def apply_core(self, z: Tensor, core: Tensor) -> Tensor:
        return self._pointwise(z, core.repeat(self.layout.groups, 1))

    def project_out(self, z: Tensor, a: Tensor) -> Tensor:
        return self._pointwise(z, a)

    def _pointwise(self, z: Tensor, weight: Tensor) -> Tensor:
        ones = [1] * (len(self.layout.kernel) - 1)
        return self._convolve(z, weight.reshape(*weight.shape, *ones), groups=self.layout.groups)

    def _convolve(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = getattr(nn.functional, self.layout.kind)(*args, **kwargs)
        return result


class Conv1d(_ConvNd):
    """nn.Conv1d."""


class Conv2d(_ConvNd):
    """nn.Conv2d."""


class Conv3d(_ConvNd):
    """nn.Conv3d."""


LAYERS: dict[str, type[AttrSubspaceLayer]] = {
    "linear": Linear,
    "embedding": Embedding,
    "conv1d": Conv1d,
    "conv2d": Conv2d,
    "conv3d": Conv3d,
}
