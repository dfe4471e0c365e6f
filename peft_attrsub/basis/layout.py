"""How a module's weight is read as a matrix W (n x m): n outputs, m inputs.

| kind             | weight in torch            | n             | m                          |
|------------------|----------------------------|---------------|----------------------------|
| linear           | out x in (Conv1D: in x out)| out           | in                         |
| conv1d / 2d / 3d | out x in/groups x k...     | out           | in/groups * product(k...)  |
| embedding        | num_embeddings x dim       | dim           | num_embeddings             |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from .errors import BasisError
from .typed_json import Fields, is_whole, short

if TYPE_CHECKING:
    import torch
    from torch import nn

_CONV_KINDS = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
KINDS = ("linear", *_CONV_KINDS.values(), "embedding")
_SIZE = "whole numbers from 1 up"


@dataclass(frozen=True)
class ModuleLayout:
    """Shape of one module as a matrix: `n` x `m`; `kernel` = (in/groups, k...) for convolutions."""

    kind: str
    n: int
    m: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    #: Keys of a newer version, kept as they are.
    unknown: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.m

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"kind": self.kind, "shape": [self.n, self.m]}
        if self.kernel:
            record["kernel"] = list(self.kernel)
        if self.groups != 1:
            record["groups"] = self.groups
        return record

    @classmethod
    def from_dict(cls, record: object, where: str = "a module layout") -> ModuleLayout:
        """Read what `to_dict` wrote; `where` is named in the error."""
        fields = Fields(record, where)
        kind, shape = fields.one_of("kind", KINDS), fields.row("shape", _SIZE, _is_size)
        kernel, groups = fields.row("kernel", _SIZE, _is_size, None), fields.whole("groups", 1, 1)
        if len(shape) != 2:
            raise fields.wrong("shape", shape, "two whole numbers n, m")
        sides = 1 + int(kind[4]) if kind in _CONV_KINDS.values() else 0
        n, m = shape
        if len(kernel) != sides or (sides and prod(kernel) != m) or (groups != 1 and not sides):
            raise BasisError(f"{where} is damaged: {short(record)} is not a module layout that this version knows.")
        return cls(kind, n, m, tuple(kernel), groups, fields.unknown())

    @classmethod
    def from_lora(cls, lora_a: tuple[int, ...], lora_b: tuple[int, ...], embedding: bool) -> ModuleLayout:
        """Layout of the adapted module, from the shapes of lora_A (r x m or r x in x k...) and lora_B."""
        if embedding:
            return cls("embedding", lora_b[0], lora_a[1])
        if len(lora_a) == 2:
            return cls("linear", lora_b[0], lora_a[1])
        return cls(_CONV_KINDS[len(lora_a)], lora_b[0], prod(lora_a[1:]), tuple(lora_a[1:]))

    @classmethod
    def of(cls, module: nn.Module) -> ModuleLayout | None:
        """Layout of a torch module, or None when no basis can describe it."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        if isinstance(module, nn.Embedding):
            return cls("embedding", module.embedding_dim, module.num_embeddings)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            kernel = (module.in_channels // module.groups, *module.kernel_size)
            return cls(f"conv{len(kernel) - 1}d", module.out_channels, prod(kernel), kernel, module.groups)
        if isinstance(module, Conv1D):
            return cls("linear", module.nf, module.nx)
        if isinstance(module, nn.Linear):
            return cls("linear", module.out_features, module.in_features)
        return None

    def as_matrix(self, weight: torch.Tensor, fan_in_fan_out: bool = False) -> torch.Tensor:
        """The module's weight as W (n x m)."""
        if self.kind == "embedding" or (self.kind == "linear" and fan_in_fan_out):
            return weight.T
        return weight.flatten(1)

    def as_weight(self, matrix: torch.Tensor, fan_in_fan_out: bool = False) -> torch.Tensor:
        """The inverse of `as_matrix`."""
        if self.kind == "embedding" or (self.kind == "linear" and fan_in_fan_out):
            return matrix.T
        return matrix.reshape(self.n, *self.kernel) if self.kernel else matrix

    def as_filter(self, columns: torch.Tensor) -> torch.Tensor:
        """B (m x d) of a convolution as the filter bank (d x in/groups x k...) that computes B^T x."""
        return columns.T.reshape(columns.shape[1], *self.kernel)


def _is_size(value: object) -> bool:
    return is_whole(value, 1)
