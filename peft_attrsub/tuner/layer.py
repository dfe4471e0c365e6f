"""The layer: y = W x + scaling * A M (B^T dropout(x)), for linear layers, convolutions and embeddings.

A and B are frozen and shared by adapters on the same basis; M is trained. The same layer can carry a plain
LoRA (y = W x + s * lora_B lora_A x) for modules listed in `lora_modules`: there A = lora_B, B^T = lora_A are
trained and there is no core.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..basis.layout import ModuleLayout
from .config import AttrSubspaceConfig
from .factors import Bases, Slices, assemble, blocks_of, core_shape, slices_of
from .mixed import add_updates
from .shared import SharedBases

_INIT_STD = 0.5


class AttrSubspaceLayer(nn.Module, BaseTunerLayer):
    """What all layer types share: adapters, merging, dtypes. Subclasses say how x meets B and A."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # PEFT is untyped; torch would say Tensor | Module

    adapter_layer_names = ("attrsub_M", "attrsub_lora_A", "attrsub_lora_B")
    other_param_names = (
        "attrsub_A",
        "attrsub_B",
        "attrsub_sizes",
        "attrsub_dropout",
        "scaling",
        "slices",
        "block_diagonal",
        "forward_mode",
    )

    #: The adapter of each sample while a mixed batch runs (see `mixed`).
    sample_adapters: tuple[str, ...] | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        layout: ModuleLayout,
        fan_in_fan_out: bool = False,
        get_apply_tensor_subclass: Any = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layout = layout
        self.fan_in_fan_out = fan_in_fan_out
        self.attrsub_M = nn.ParameterDict()  # adapter -> core (D_A x D_B), or its diagonal blocks in a row
        self.attrsub_lora_A = nn.ParameterDict()  # adapter -> r x m
        self.attrsub_lora_B = nn.ParameterDict()  # adapter -> n x r
        self.attrsub_A = SharedBases()  # adapter -> n x D_A
        self.attrsub_B = SharedBases()  # adapter -> m x D_B
        self.attrsub_sizes = SharedBases()  # adapter -> (attributes x 2) widths of their column blocks
        self.attrsub_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.slices: dict[str, Slices] = {}
        self.block_diagonal: dict[str, bool] = {}
        self.forward_mode: dict[str, str] = {}
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # switched by peft.helpers.disable_input_dtype_casting
        self.merged_adapters: list[str] = []
        self.out_features = layout.n
        self.in_features = layout.kernel[0] * layout.groups if layout.kernel else layout.m
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass
        )

    # Adapters

    def add_core(self, adapter: str, bases: Bases | None, config: AttrSubspaceConfig, inference_mode: bool) -> None:
        """Give `adapter` a core on `bases`; None: its A and B arrive with the adapter's weights."""
        self._begin(adapter, config)
        block = self.block_diagonal[adapter] = config.core == "block_diagonal"
        self.scaling[adapter] = float(config.scaling)
        if bases is None:
            n, m = self.layout.shape
            empty = {name: (slice(0, 0), slice(0, 0)) for name in config.attributes or [""]}
            bases = Bases(torch.zeros(n, 0), torch.zeros(m, 0), empty, f"empty:{adapter}")
        self.slices[adapter] = bases.slices
        stored = config.stores_basis
        self.attrsub_A.put(adapter, bases.key, bases.a, stored)
        self.attrsub_B.put(adapter, bases.key, bases.b, stored)
        self.attrsub_sizes.put(adapter, bases.key, torch.tensor(blocks_of(bases.slices)), stored)
        core = torch.zeros(core_shape(bases.a, bases.b, bases.slices, block))
        if not config.init_weights:
            nn.init.normal_(core, std=_INIT_STD)
        self.attrsub_M[adapter] = nn.Parameter(core)
        self._finish(adapter, inference_mode)

    def add_lora(self, adapter: str, config: AttrSubspaceConfig, inference_mode: bool) -> None:
        """Give `adapter` a plain LoRA on this module."""
        self._begin(adapter, config)
        rank = config.lora_rank
        self.scaling[adapter] = float(config.lora_alpha) / rank
        a, b = torch.empty(rank, self.layout.m), torch.zeros(self.layout.n, rank)
        nn.init.kaiming_uniform_(a, a=5**0.5)
        if not config.init_weights:
            nn.init.normal_(b, std=_INIT_STD / self.layout.m**0.5)
        self.attrsub_lora_A[adapter] = nn.Parameter(a)
        self.attrsub_lora_B[adapter] = nn.Parameter(b)
        self._finish(adapter, inference_mode)

    def shared(self, key: str) -> Bases | None:
        """The bases already held under a key (see `BasisProvider.key`)."""
        a, b = self.attrsub_A.find(key), self.attrsub_B.find(key)
        if a is None or b is None:
            return None
        adapter = next(name for name in self.attrsub_A if self.attrsub_A.key(name) == key)
        return Bases(a, b, self.slices[adapter], key)

    def _begin(self, adapter: str, config: AttrSubspaceConfig) -> None:
        for name in self.adapter_layer_names + self.other_param_names:
            if adapter in getattr(self, name):
                del getattr(self, name)[adapter]
        p = config.dropout
        self.attrsub_dropout[adapter] = nn.Dropout(p) if p > 0 else nn.Identity()
        self.forward_mode[adapter] = config.forward_mode

    def _finish(self, adapter: str, inference_mode: bool) -> None:
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter, device)
        where, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        where = device or where
        if dtype is not None and not dtype.is_floating_point:
            dtype = None
        if where is None or where.type == "meta":
            return
        for held in (self.attrsub_A, self.attrsub_B):
            if adapter in held and held[adapter].device.type != "meta":
                held.cast(adapter, where, dtype)

    def make_room(self, adapter: str, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Take the widths of an adapter that brings its own basis from the state dict it is loaded from."""
        keys = {part: f"{prefix}attrsub_{part}.{adapter}" for part in ("A", "B", "M", "sizes")}
        if adapter not in self.attrsub_A.saved or any(key not in state_dict for key in keys.values()):
            return
        self.slices[adapter] = slices_of(list(self.slices[adapter]), state_dict[keys["sizes"]].tolist())
        self.attrsub_A.widen(adapter, state_dict[keys["A"]].shape[1])
        self.attrsub_B.widen(adapter, state_dict[keys["B"]].shape[1])
        core, shape = self.attrsub_M[adapter], state_dict[keys["M"]].shape
        if core.shape != shape:
            empty = torch.zeros(shape, dtype=core.dtype, device=core.device)
            self.attrsub_M[adapter] = nn.Parameter(empty, requires_grad=core.requires_grad)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before the children load: an adapter whose basis comes with its weights has no shapes yet.
        for adapter in list(self.attrsub_M):
            self.make_room(adapter, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # The update

    def core(self, adapter: str) -> Tensor:
        """M (D_A x D_B)."""
        return assemble(self.attrsub_M[adapter], self.slices[adapter], self.block_diagonal[adapter])

    def factors(self, adapter: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """A (n x D_A), M (D_A x D_B) or None for a plain LoRA, B (m x D_B), without the scaling."""
        if adapter in self.attrsub_lora_A:
            return self.attrsub_lora_B[adapter], None, self.attrsub_lora_A[adapter].T
        a, b = self.attrsub_A[adapter], self.attrsub_B[adapter]
        if self.attrsub_M[adapter].numel() == 0 and a.shape[1] == 0 and adapter in self.attrsub_A.saved:
            raise ValueError(
                f"adapter {adapter!r} stores its basis in its own weights, and they have not been loaded: "
                "use PeftModel.from_pretrained, or set basis_in_adapter=False in the config to start afresh."
            )
        return a, self.core(adapter), b

    def has(self, adapter: str) -> bool:
        return adapter in self.attrsub_M or adapter in self.attrsub_lora_A

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * A M B^T in the layout of the base weight, in float32 (or wider)."""
        a, core, b = self.factors(adapter)
        wide = torch.promote_types(a.dtype, torch.float32)
        left = a.to(wide) if core is None else a.to(wide) @ core.to(wide)
        delta = (left @ b.to(wide).T) * self.scaling[adapter]
        return self.layout.as_weight(delta, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W <- W + dW. safe_merge checks that the result is finite before writing it."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.has(adapter):
                continue
            self._require_merging()
            weight = self.get_base_weight()
            if safe_merge or self.quantization_backend is not None:
                merged = weight + self.get_delta_weight(adapter).to(weight)
                if safe_merge and not bool(torch.isfinite(merged).all()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
                self.set_base_weight(merged)
            else:
                weight += self.get_delta_weight(adapter).to(weight)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """W <- W - dW for every merged adapter."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if not self.has(adapter):
                continue
            weight = self.get_base_weight()
            if self.quantization_backend is not None:
                self.set_base_weight(weight - self.get_delta_weight(adapter).to(weight))
            else:
                weight -= self.get_delta_weight(adapter).to(weight)

    def unmerged_weight(self) -> Tensor:
        """The base weight without the adapters that are merged into it at the moment."""
        weight = self.get_base_weight()
        for adapter in self.merged_adapters:
            weight = weight - self.get_delta_weight(adapter).to(weight)
        return weight

    def _require_merging(self) -> None:
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"{backend.backend_name} weights cannot be changed, so the adapter cannot be merged: "
                "keep it beside them."
            )

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if not self.merged and self.sample_adapters is None and not args and not kwargs:
            joint = self._joint(x)
            if joint is not None:
                return joint
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.sample_adapters is not None:
            return add_updates(self, self.sample_adapters, x, result)
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in self.active_adapters:
            if self.has(adapter):
                result = result + self._update(x, adapter)
        return result.to(dtype)

    def _joint(self, x: Tensor) -> Tensor | None:
        """Base and update in one, for layer types and moments that allow it; None: one after the other."""
        return None

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        """scaling * A M (B^T dropout(x)): three thin products, in the dtype of the frozen bases."""
        a, core, b = self.factors(adapter)
        if b.device != x.device:
            # A sharding wrapper moved the layer without calling .to(): follow it, once.
            self._follow(adapter, x.device)
            a, core, b = self.factors(adapter)
        z = self._into(self._enter(x, adapter, b.dtype), b)
        if core is None:
            return self._out_of(z * self.scaling[adapter], a)
        z = self._mix(z.to(core.dtype), core * self.scaling[adapter]).to(a.dtype)
        return self._out_of(z, a)

    def _enter(self, x: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        dropped: Tensor = self.attrsub_dropout[adapter](self._cast_input_dtype(x, dtype))
        return dropped

    def _follow(self, adapter: str, device: torch.device) -> None:
        for held in (self.attrsub_A, self.attrsub_B):
            if adapter in held:
                held.cast(adapter, device, None)

    @abstractmethod
    def _into(self, x: Tensor, b: Tensor) -> Tensor:
        """B^T x: (..., m) -> (..., D_B)."""

    def _mix(self, z: Tensor, core: Tensor) -> Tensor:
        """M z: (..., D_B) -> (..., D_A)."""
        return nn.functional.linear(z, core)

    def _out_of(self, z: Tensor, a: Tensor) -> Tensor:
        """A z: (..., D_A) -> (..., n)."""
        return nn.functional.linear(z, a)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "attrsub." + super().__repr__()
