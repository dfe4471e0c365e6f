"""Frozen bases of one layer, shared by the adapters that use them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class SharedBases(nn.Module):
    """adapter name -> frozen tensor, where adapters on the same basis hold the very same one.

    What an adapter stores is a persistent buffer, which every loader finds. What it only points to is a plain
    attribute, so that DistributedDataParallel does not broadcast it at every step, whatever it wraps. Nothing can
    switch requires_grad on for either, and both stay shared through `.to()`, deepcopy and pickle. Inside a forward
    pass, call the module: wrappers that offload buffers bring them back around the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pointed: dict[str, Tensor] = {}  # adapter -> tensor, for adapters that do not store it
        self._basis_keys: dict[str, str] = {}  # adapter -> key of its basis

    def forward(self, adapter: str, device: torch.device | None = None) -> Tensor:
        """The basis of an adapter; on `device`, if that is given."""
        held = self._buffers.get(adapter)
        if held is None:
            held = self._pointed[adapter]
        if device is None or held.device == device:
            return held
        # A wrapper moved the layer without calling .to(): follow it, once.
        moved = held.to(device)
        self._exchange(held, moved)
        return moved

    def holder(self, key: str, stored: bool) -> str | None:
        """An adapter that stands on the basis of this key, and stores it as told.

        Stored bases keep the precision they came in, others take that of the layer: the two are not shared.
        """
        found = (adapter for adapter, held in self._basis_keys.items() if held == key)
        return next((adapter for adapter in found if self.stores(adapter) == stored), None)

    def put(self, adapter: str, key: str, tensor: Tensor, stored: bool) -> None:
        """Let `adapter` use the basis `key`; `tensor` is dropped if that basis is already here."""
        holder = self.holder(key, stored)
        tensor = tensor.detach() if holder is None else self[holder]
        self._basis_keys[adapter] = key
        if stored:
            # Not register_buffer, which refuses adapters whose name is also that of a method.
            self._buffers[adapter] = tensor
        else:
            self._pointed[adapter] = tensor

    def stores(self, adapter: str) -> bool:
        """Whether the adapter's tensor belongs in the state dict."""
        return adapter in self._buffers

    def key(self, adapter: str) -> str:
        return self._basis_keys[adapter]

    def cast(self, adapter: str, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move the tensor of one adapter, for all adapters that share it."""
        held = self[adapter]
        self._exchange(held, held.to(device=device, dtype=dtype))

    def fill(self, adapter: str, key: str, tensor: Tensor) -> None:
        """Give an adapter other values, in the dtype and on the device of the old ones unless those are meta.

        A tensor that equals one held here is shared; other adapters keep what they have.
        """
        current, value = self[adapter], tensor.detach()
        if not current.is_meta:
            value = value.to(device=current.device, dtype=current.dtype)
        stored = self.stores(adapter)
        same = next((name for name in self if self.stores(name) == stored and equal(value, self[name])), None)
        if same is None:
            value = value.clone()
            # A key that nobody holds: whoever shared the old values does not share these.
            candidates = (key, *(f"{key}:{i}" for i in range(len(self))))
            self._basis_keys[adapter] = next(k for k in candidates if self.holder(k, stored) in (None, adapter))
        else:
            value, self._basis_keys[adapter] = self[same], self._basis_keys[same]
        self._where(adapter)[adapter] = value

    def _where(self, adapter: str) -> dict[str, Any]:
        return self._buffers if adapter in self._buffers else self._pointed

    def _exchange(self, old: Tensor, new: Tensor) -> None:
        for adapter in self:
            if self[adapter] is old:
                self._where(adapter)[adapter] = new

    # The mapping that PEFT expects of `other_param_names`

    def __getitem__(self, adapter: str) -> Tensor:
        held: Tensor = self._where(adapter)[adapter]
        return held

    def __delitem__(self, adapter: str) -> None:
        del self._where(adapter)[adapter], self._basis_keys[adapter]

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._basis_keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._basis_keys)

    def __len__(self) -> int:
        return len(self._basis_keys)

    def keys(self) -> list[str]:
        return list(self._basis_keys)

    # The hooks by which torch copies, moves, saves and loads

    def _replicate_for_data_parallel(self) -> SharedBases:
        replica: SharedBases = super()._replicate_for_data_parallel()
        # Else a replica that is moved would take the tensors of the original with it.
        replica._pointed, replica._basis_keys = dict(self._pointed), dict(self._basis_keys)
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedBases:
        moved: dict[int, Tensor] = {}
        for adapter in self:
            held = self[adapter]
            if id(held) not in moved:
                moved[id(held)] = moved_with_values(fn, held)
            self._where(adapter)[adapter] = moved[id(held)]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        seen: set[int] = set()
        for adapter in self:
            if self.stores(adapter):
                held = self[adapter]
                # safetensors refuses one tensor under two names.
                destination[prefix + adapter] = held.clone() if id(held) in seen else held
                seen.add(id(held))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Not torch's own, which copies into the tensor and so into every adapter that shares it.
        for adapter in self:
            name = prefix + adapter
            if not self.stores(adapter):
                continue
            if name not in state_dict:
                missing_keys.append(name)
                continue
            loaded, held = state_dict[name], self[adapter]
            if loaded.shape != held.shape:
                shapes = f"{tuple(loaded.shape)} in the checkpoint, {tuple(held.shape)} in the model"
                error_msgs.append(f"size mismatch for {name}: {shapes}: the adapter belongs to another model.")
                continue
            self.fill(adapter, f"loaded:{adapter}", loaded)
        if strict:
            known = {prefix + adapter for adapter in self if self.stores(adapter)}
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]

    def extra_repr(self) -> str:
        return ", ".join(f"{a}: {'x'.join(map(str, self[a].shape))}" for a in self)


def equal(x: Tensor, y: Tensor) -> bool:
    """Whether y, in the dtype of x, is x, though a loader or a wrapper may have copied one; never on meta."""
    return not y.is_meta and (x is y or (x.shape == y.shape and torch.equal(x, y.to(x))))


_probes = itertools.count(1)


def moved_with_values(fn: Callable[[Tensor], Tensor], held: Tensor) -> Tensor:
    """fn(held), but with the values of `held`: what a basis holds is known even where a model has no weights yet."""
    moved = fn(held).detach()
    if held.is_meta or moved is held:
        return moved
    if moved.is_meta:  # a base model on the meta device is filled later
        return held
    # `to_empty` gives memory as it finds it; a small tensor of known values shows whether fn keeps them.
    values = [float(1 + (next(_probes) + i) % 31) for i in range(8)]
    probe = torch.tensor(values, dtype=held.dtype, device=held.device)
    if fn(probe).detach().cpu().double().tolist() == values:
        return moved
    return held.to(moved)
