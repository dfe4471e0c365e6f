"""An adapted layer as the files around it see it, which the class itself is built from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..basis.layout import ModuleLayout

if TYPE_CHECKING:
    import torch

    from .factors import Slices
    from .fingerprint import Fingerprint
    from .shared_buffers import SharedBases


class AdaptedLayer(Protocol):
    """y = W x + sum over active adapters of scaling * A M (B^T x); see `layer.AttrSubspaceLayer`."""

    base_layer: nn.Module
    layout: ModuleLayout
    fan_in_fan_out: bool
    quantization_backend: Any
    attrsub_M: Any
    attrsub_lora_A: Any
    attrsub_A: SharedBases
    attrsub_B: SharedBases
    attrsub_dropout: nn.ModuleDict
    scaling: dict[str, float]
    slices: dict[str, Slices]
    forward_mode: dict[str, str]
    latent: dict[str, Any]
    tied: dict[str, AdaptedLayer]

    @property
    def active_adapters(self) -> list[str]: ...

    @property
    def disable_adapters(self) -> bool: ...

    @property
    def merged(self) -> bool: ...

    def get_base_layer(self) -> Any:
        """The layer that is adapted."""

    def has(self, adapter: str) -> bool:
        """Whether the adapter has a core or a plain LoRA here."""

    def fingerprint(self, adapter: str) -> Fingerprint | None:
        """Of the basis that the adapter's core belongs to."""

    def weight_for_basis(self, module: str) -> Tensor:
        """The base weight (n x m) without merged adapters."""

    def bases(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A (n x D_A) and B (m x D_B)."""

    def core(self, adapter: str, *inputs: Tensor) -> Tensor:
        """M (D_A x D_B)."""

    def factors(self, adapter: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """A, M or None for a plain LoRA, B, without the scaling."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * A M B^T in the layout of the base weight."""

    def update(self, x: Tensor, adapter: str) -> Tensor:
        """scaling * A M (B^T x)."""

    def prepare_input(self, x: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        """x as B meets it: cast, with dropout."""

    def project_in(self, x: Tensor, b: Tensor) -> Tensor:
        """B^T x: (..., m) -> (..., D_B)."""

    def project_out(self, z: Tensor, a: Tensor) -> Tensor:
        """A z: (..., D_A) -> (..., n)."""
