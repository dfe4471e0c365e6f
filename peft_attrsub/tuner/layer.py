"""The layer: y = W x + scaling * A M (B^T dropout(x)), for linear layers, convolutions and embeddings.

A and B are frozen and shared by adapters on the same basis; M is trained. The same layer can carry a plain
LoRA (y = W x + s * lora_B lora_A x) for modules listed in `lora_modules`: there A = lora_B, B^T = lora_A are
trained and there is no core.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from ..basis import BasisError
from ..basis.layout import ModuleLayout
from ..basis.weights import holds_values
from . import keys
from .adapted import AdaptedLayer
from .arrival import Arrival, check_arrival
from .config import AttrSubspaceConfig
from .factor import Core, Factor
from .factors import Bases, Slices, assemble, core_shape, disassemble, scale_mask, slices_of
from .fingerprint import Fingerprint
from .mixed_batch import add_updates
from .provider import LatentBases
from .quantised import backend_of, basis_dtype, keep_bias, undo_packing
from .scales import Scales
from .shared_buffers import SharedBases
from .tying import merged_with_source, tied_update

_INIT_STD = 0.5


class AttrSubspaceLayer(nn.Module, Scales, BaseTunerLayer):
    """What all layer types share: adapters, merging, dtypes. Subclasses say how x meets B and A."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # PEFT is untyped; torch would say Tensor | Module

    adapter_layer_names = ("attrsub_M", "attrsub_lora_A", "attrsub_lora_B")
    other_param_names = (
        "attrsub_A",
        "attrsub_B",
        "attrsub_dropout",
        "scaling",
        "initial_scaling",
        "scale_steps",
        "slices",
        "core_kind",
        "attribute_scales",
        "forward_mode",
        "latent",
        "module_names",
        "tied",
    )

    #: The adapter of each sample while a mixed batch runs (see `mixed_batch`).
    sample_adapters: tuple[str, ...] | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        layout: ModuleLayout,
        fan_in_fan_out: bool = False,
        get_apply_tensor_subclass: Any = None,
    ) -> None:
        super().__init__()
        Scales.__init__(self)
        self.base_layer = base_layer
        self.layout = layout
        self.fan_in_fan_out = fan_in_fan_out
        # Any: torch types the values of a ModuleDict as Module.
        self.attrsub_M: Any = nn.ModuleDict()  # adapter -> Core: see `factors.core_shape`
        self.attrsub_lora_A: Any = nn.ModuleDict()  # adapter -> Factor: r x m
        self.attrsub_lora_B: Any = nn.ModuleDict()  # adapter -> Factor: n x r
        self.attrsub_A = SharedBases()  # adapter -> n x D_A
        self.attrsub_B = SharedBases()  # adapter -> m x D_B
        self.attrsub_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.slices: dict[str, Slices] = {}
        self.core_kind: dict[str, str] = {}  # adapter -> "full", "block_diagonal", "diagonal" or "dials"
        #: adapter -> factors by attribute that are not 1 (see `dials.set_attribute_scale`).
        self.attribute_scales: dict[str, dict[str, float]] = {}
        self.forward_mode: dict[str, str] = {}
        #: Adapters whose A and B should have come with their weights and have not yet.
        self.latent: dict[str, LatentBases] = {}
        self.module_names: dict[str, str] = {}  # adapter -> what its file and its basis call this module
        #: Adapters that this layer takes from the input embedding, which has its weight (see `tying`).
        self.tied: dict[str, AdaptedLayer] = {}
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # switched by peft.helpers.disable_input_dtype_casting
        self.merged_adapters: list[str] = []
        self.out_features = layout.n
        self.in_features = layout.kernel[0] * layout.groups if layout.kernel else layout.m
        self.quantization_backend = backend_of(
            self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass
        )

    # Adapters

    def add_core(
        self, adapter: str, bases: Bases | LatentBases, config: AttrSubspaceConfig, inference_mode: bool
    ) -> None:
        """Give `adapter` a core on `bases`; LatentBases: its A and B arrive with the adapter's weights."""
        self._begin(adapter, config)
        kind = self.core_kind[adapter] = config.core
        self.scaling[adapter] = float(config.scaling)
        if isinstance(bases, LatentBases):
            self.latent[adapter] = bases
            bases = bases.empty(self.layout, adapter)
        self.slices[adapter] = bases.slices
        stored = config.stores_basis
        self.attrsub_A.put(adapter, bases.key, bases.a, stored)
        self.attrsub_B.put(adapter, bases.key, bases.b, stored)
        core = torch.zeros(core_shape(bases.a, bases.b, bases.slices, kind))
        if not config.init_weights:
            nn.init.normal_(core, std=_INIT_STD)
        elif bases.start is not None and not core.is_meta:
            core.copy_(disassemble(bases.start, bases.slices, kind))
        self.attrsub_M[adapter] = Core(core)
        if bases.fingerprint is not None:
            self.attrsub_M[adapter].basis = bases.fingerprint.tensor()
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
        self.attrsub_lora_A[adapter] = Factor(a)
        self.attrsub_lora_B[adapter] = Factor(b)
        self._finish(adapter, inference_mode)

    def tie(self, adapter: str, source: AdaptedLayer, config: AttrSubspaceConfig) -> None:
        """Take `adapter` from the input embedding `source`; nothing is trained or saved here."""
        self._begin(adapter, config)
        self.tied[adapter] = source

    def shared(self, key: str, stored: bool) -> Bases | None:
        """The bases already held under a key (see `BasisProvider.key`) by an adapter that stores them, or does not."""
        adapter = self.attrsub_A.holder(key, stored)
        if adapter is None or self.attrsub_B.key(adapter) != key or adapter in self.latent:
            return None
        a, b = self.attrsub_A[adapter], self.attrsub_B[adapter]
        return Bases(a, b, self.slices[adapter], key, self.fingerprint(adapter))

    def fingerprint(self, adapter: str) -> Fingerprint | None:
        """Of the basis that the adapter's core belongs to; None while that is unknown."""
        return Fingerprint.read(self.attrsub_M[adapter].basis)

    def _begin(self, adapter: str, config: AttrSubspaceConfig) -> None:
        for name in self.adapter_layer_names + self.other_param_names:
            if adapter in getattr(self, name):
                del getattr(self, name)[adapter]
        p = config.dropout
        self.attrsub_dropout[adapter] = nn.Dropout(p) if p > 0 else nn.Identity()
        self.forward_mode[adapter] = config.forward_mode

    def _finish(self, adapter: str, inference_mode: bool) -> None:
        self.initial_scaling[adapter] = self.scaling[adapter]
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            # PEFT knows `weight` and `qweight` by name; other libraries call it otherwise.
            held = next(chain(base_layer.parameters(), base_layer.buffers()), None)
            device = None if held is None else held.device
        # PEFT would bring trained values to eight bits, which rounds them, whatever they are brought to afterwards.
        return device, dtype if dtype is not None and holds_values(dtype) else None

    def _move_adapter_to_device_of_base_layer(self, adapter: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter, device)
        where, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        where = device or where
        if where is None or where.type == "meta":
            return
        for held in (self.attrsub_A, self.attrsub_B):
            if adapter in held and not held[adapter].is_meta:
                # A stored basis is saved again, so it keeps the precision that it came in.
                held.cast(adapter, where, None if held.stores(adapter) else basis_dtype(dtype))

    def cast_stored_bases(self, adapter: str) -> None:
        """Bring a stored basis to the dtype of the base layer: what `autocast_adapter_dtype=False` asks for."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for held in (self.attrsub_A, self.attrsub_B):
            if held.stores(adapter):
                held.cast(adapter, None, basis_dtype(dtype))

    def arrival(self, adapter: str, state_dict: Mapping[str, Tensor], prefix: str) -> Arrival:
        """What a state dict holds for the core of an adapter of this layer."""
        names = (keys.CORE, keys.FINGERPRINT, keys.BASIS_A, keys.BASIS_B, keys.OLD_SIZES)
        return Arrival(*(state_dict.get(prefix + keys.in_model(name, adapter)) for name in names))

    def check_state_dict(self, state_dict: dict[str, Any], prefix: str, shapes: bool = True) -> dict[str, Arrival]:
        """The cores that a model's state dict holds for this layer; see `check_arrival` for errors.

        Brings the state dict up to date: today's names, and fingerprints where it has none.
        shapes: raise BasisError for cores and bases of another shape, too.
        """
        keys.rename_old(state_dict, prefix, [*self.attrsub_M, *self.attrsub_lora_A])
        found = {}
        for adapter in self.attrsub_M:
            arrival = self.arrival(adapter, state_dict, prefix)
            if check_arrival(arrival, self, adapter, prefix.rstrip(".")):
                found[adapter] = arrival
                if shapes:
                    self._check_shapes(adapter, arrival, prefix.rstrip("."))
                if arrival.fingerprint is None:
                    # A basis that comes with the weights is another than the model's; nobody says which.
                    mine = self.attrsub_M[adapter].basis
                    told = torch.zeros_like(mine) if arrival.brings_basis else mine
                    state_dict[prefix + keys.in_model(keys.FINGERPRINT, adapter)] = told
        return found

    def _check_shapes(self, adapter: str, arrival: Arrival, module: str) -> None:
        held = self.attrsub_M[adapter].weight, self.attrsub_A[adapter], self.attrsub_B[adapter]
        if held[1].shape[1] == held[2].shape[1] == 0:
            return  # the shapes arrive with the weights
        for name, mine, its in zip(("core", "A", "B"), held, (arrival.core, arrival.a, arrival.b), strict=True):
            if its is not None and its.shape != mine.shape:
                raise BasisError(
                    f"{name} of module {module!r} has shape {tuple(its.shape)} in the weights and {tuple(mine.shape)} "
                    f"in adapter {adapter!r}: they were trained with another kind of core, other attributes or other "
                    "dims; load them under another adapter name."
                )

    def make_room(self, adapter: str, arrival: Arrival) -> None:
        """Take what is known of a basis that comes with the weights of its adapter, before the weights are written.

        Older adapter files alone hold the widths of their bases (see `keys`).
        """
        if not self.attrsub_A.stores(adapter) or arrival.a is None or arrival.b is None or arrival.core is None:
            return
        if arrival.sizes is not None:
            self.slices[adapter] = slices_of(
                list(self.slices[adapter]), keys.old_blocks(arrival.sizes, arrival.a, arrival.b)
            )
        for held, value in ((self.attrsub_A, arrival.a), (self.attrsub_B, arrival.b)):
            if held[adapter].shape != value.shape and held[adapter].shape[1] == 0:
                held.fill(adapter, f"loaded:{adapter}", value)
        module, shape = self.attrsub_M[adapter], arrival.core.shape
        if module.weight.numel() == 0 and module.weight.shape != shape:
            empty = module.weight.new_zeros(shape)
            module.weight = nn.Parameter(empty, requires_grad=module.weight.requires_grad)
        self.latent.pop(adapter, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before the children load: a core never comes into a foreign basis, whoever loads it.
        for adapter, arrival in self.check_state_dict(state_dict, prefix).items():
            self.make_room(adapter, arrival)
            state_dict.pop(prefix + keys.in_model(keys.OLD_SIZES, adapter), None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # The update

    def core(self, adapter: str, *inputs: Tensor) -> Tensor:
        """M (D_A x D_B); `inputs` are what it is about to meet, see `Factor`."""
        core: Tensor = self.attrsub_M[adapter](partial(self._assembled, adapter), *inputs)
        return core

    def _assembled(self, adapter: str, weight: Tensor, *inputs: Tensor) -> Tensor:
        core = assemble(weight, self.slices[adapter], self.core_kind[adapter])
        scales = self.attribute_scales.get(adapter)
        return core if not scales else core * scale_mask(self.slices[adapter], scales, core)

    def bases(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A (n x D_A) and B (m x D_B); on `device`, if that is given."""
        if adapter in self.latent:
            self._settle(adapter)
        return self.attrsub_A(adapter, device), self.attrsub_B(adapter, device)

    def _settle(self, adapter: str) -> None:
        """A and B did not come with weights so far: see whether some loader wrote them, else make them."""
        held = [self.attrsub_A[adapter], self.attrsub_B[adapter]]
        if all(x.numel() and not x.is_meta and bool(x.any()) for x in held):
            del self.latent[adapter]
            return
        made = self.latent[adapter].make(adapter, self)
        for shared, value in ((self.attrsub_A, made.a), (self.attrsub_B, made.b)):
            shared.fill(adapter, made.key, value)
        if made.fingerprint is not None:
            self.attrsub_M[adapter].basis = made.fingerprint.tensor()
        core = self.attrsub_M[adapter].weight
        if made.start is not None and not core.is_meta and not bool(core.any()):
            with torch.no_grad():
                core.copy_(disassemble(made.start, made.slices, self.core_kind[adapter]))
        del self.latent[adapter]
        self._move_adapter_to_device_of_base_layer(adapter)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor | None, Tensor]:
        """A (n x D_A), M (D_A x D_B) or None for a plain LoRA, B (m x D_B), without the scaling."""
        if adapter in self.attrsub_lora_A:
            left, right = self.attrsub_lora_B[adapter](_itself), self.attrsub_lora_A[adapter](_itself)
            return left, None, right.T
        a, b = self.bases(adapter)
        return a, self.core(adapter), b

    def has(self, adapter: str) -> bool:
        return adapter in self.attrsub_M or adapter in self.attrsub_lora_A

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * A M B^T in the layout of the base weight, in float32 (or wider)."""
        if adapter in self.tied:
            return self.tied[adapter].get_delta_weight(adapter)
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
            if not self.has(adapter) and adapter not in self.tied:
                continue
            if merged_with_source(self, adapter):
                self.merged_adapters.append(adapter)
                continue
            self.require_merging()
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
            if merged_with_source(self, adapter) or not (self.has(adapter) or adapter in self.tied):
                continue
            weight = self.get_base_weight()
            if self.quantization_backend is not None:
                self.set_base_weight(weight - self.get_delta_weight(adapter).to(weight))
            else:
                weight -= self.get_delta_weight(adapter).to(weight)

    def weight_for_basis(self, module: str) -> Tensor:
        """The base weight (n x m) without merged adapters, for a basis that is made from it."""
        weight = self.layout.as_matrix(self.unmerged_weight(), self.fan_in_fan_out)
        if weight.device.type == "meta":
            raise BasisError(f"basis='psv' needs the weight of {module!r}, which is on the meta device: load it.")
        return weight

    def unmerged_weight(self) -> Tensor:
        """The base weight without the adapters that are merged into it at the moment."""
        weight = self.get_base_weight()
        for adapter in self.merged_adapters:
            weight = weight - self.get_delta_weight(adapter).to(weight)
        return weight

    def get_base_weight(self) -> Tensor:
        """The base weight, dequantized where it is quantized."""
        undo_packing(self.get_base_layer())
        weight: Tensor = super().get_base_weight()
        return weight

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write the base weight; a quantised one is quantised again."""
        before = self.get_base_layer()
        super().set_base_weight(weight_data)
        keep_bias(before, self.get_base_layer())

    def require_merging(self) -> None:
        """Raise ValueError if adapters cannot be merged into the base weight."""
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"the weight is quantised by {backend.backend_name} and cannot be changed, so the adapter cannot be "
                "merged: use the model with the adapter as it is."
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
            if self.has(adapter) or adapter in self.tied:
                result = result + self.update(x, adapter)
        return result.to(dtype)

    def _joint(self, x: Tensor) -> Tensor | None:
        """Base and update in one, for layer types and moments that allow it; None: one after the other."""
        return None

    def update(self, x: Tensor, adapter: str) -> Tensor:
        """scaling * A M (B^T dropout(x)): three thin products, in the dtype of the frozen bases."""
        if adapter in self.tied:
            return tied_update(self, adapter, x)
        if adapter in self.attrsub_lora_A:
            right, left = self.attrsub_lora_A[adapter], self.attrsub_lora_B[adapter]
            z = right(self._into_lora, self.prepare_input(x, adapter, right.weight.dtype))
            update: Tensor = left(self._out_of_lora, z * self.scaling[adapter])
            return update
        a, b = self.bases(adapter, x.device)
        z = self.project_in(self.prepare_input(x, adapter, b.dtype), b)
        z = self.attrsub_M[adapter](partial(self._through_core, adapter), z)
        return self.project_out(z.to(a.dtype), a)

    def _through_core(self, adapter: str, weight: Tensor, z: Tensor) -> Tensor:
        core = self._assembled(adapter, weight) * self.scaling[adapter]
        return self.apply_core(z.to(core.dtype), core)

    def _into_lora(self, weight: Tensor, x: Tensor) -> Tensor:
        return self.project_in(x, weight.T)

    def _out_of_lora(self, weight: Tensor, z: Tensor) -> Tensor:
        return self.project_out(z, weight)

    def prepare_input(self, x: Tensor, adapter: str, dtype: torch.dtype) -> Tensor:
        dropped: Tensor = self.attrsub_dropout[adapter](self._cast_input_dtype(x, dtype))
        return dropped

    @abstractmethod
    def project_in(self, x: Tensor, b: Tensor) -> Tensor:
        """B^T x: (..., m) -> (..., D_B)."""

    def apply_core(self, z: Tensor, core: Tensor) -> Tensor:
        """M z: (..., D_B) -> (..., D_A)."""
        return nn.functional.linear(z, core)

    def project_out(self, z: Tensor, a: Tensor) -> Tensor:
        """A z: (..., D_A) -> (..., n)."""
        return nn.functional.linear(z, a)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "attrsub." + super().__repr__()


def _itself(weight: Tensor) -> Tensor:
    return weight
