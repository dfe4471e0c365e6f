"""Frozen bases of one layer, shared by the adapters that use them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class SharedBases(nn.Module):
    """adapter name -> frozen tensor, where adapters on the same basis hold the very same tensor.

    The tensors are neither parameters nor buffers, on purpose: nothing can switch requires_grad on for them,
    DistributedDataParallel does not broadcast them at every step, and `.to()` moves each of them once and
    keeps it shared. They follow the layer through `.to()`, `.half()`, deepcopy and pickle, and appear in the
    state dict only for adapters that store their basis.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = {}  # basis key -> tensor
        self._key_of: dict[str, str] = {}  # adapter -> basis key
        self.saved: set[str] = set()  # adapters whose tensor belongs in the state dict

    def find(self, key: str) -> Tensor | None:
        """The tensor already held under a basis key."""
        return self._tensors.get(key)

    def put(self, adapter: str, key: str, tensor: Tensor, saved: bool) -> None:
        """Let `adapter` use the basis `key`; `tensor` is dropped if that basis is already here."""
        self.discard(adapter)
        self._tensors.setdefault(key, tensor.detach())
        self._key_of[adapter] = key
        if saved:
            self.saved.add(adapter)

    def key(self, adapter: str) -> str:
        return self._key_of[adapter]

    def discard(self, adapter: str) -> None:
        if adapter in self._key_of:
            del self[adapter]

    def cast(self, adapter: str, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move the tensor of one adapter, for all adapters that share it."""
        key = self._key_of[adapter]
        self._tensors[key] = self._tensors[key].to(device=device, dtype=dtype)

    def widen(self, adapter: str, columns: int) -> None:
        """Give a basis that is still to be loaded its number of columns."""
        key = self._key_of[adapter]
        if self._tensors[key].shape[1] == 0:
            self._tensors[key] = self._tensors[key].new_zeros(self._tensors[key].shape[0], columns)

    # The mapping that PEFT expects of `other_param_names`

    def __getitem__(self, adapter: str) -> Tensor:
        return self._tensors[self._key_of[adapter]]

    def __delitem__(self, adapter: str) -> None:
        key = self._key_of.pop(adapter)
        self.saved.discard(adapter)
        if key not in self._key_of.values():
            del self._tensors[key]

    def __contains__(self, adapter: object) -> bool:
        return adapter in self._key_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._key_of)

    def __len__(self) -> int:
        return len(self._key_of)

    def keys(self) -> list[str]:
        return list(self._key_of)

    # The hooks by which torch moves, saves and loads

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedBases:
        super()._apply(fn, recurse)
        for key, tensor in self._tensors.items():
            moved = fn(tensor).detach()
            # A base model on the meta device is filled later; what is known here must not be lost with it.
            if moved.device.type != "meta":
                self._tensors[key] = moved
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for adapter in sorted(self.saved):
            destination[prefix + adapter] = self[adapter]

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for adapter in sorted(self.saved):
            name = prefix + adapter
            if name not in state_dict:
                missing_keys.append(name)
                continue
            if name in unexpected_keys:
                unexpected_keys.remove(name)
            loaded = state_dict[name].detach()
            if loaded.shape[0] != self[adapter].shape[0]:
                shapes = f"{tuple(loaded.shape)} in the checkpoint, {self[adapter].shape[0]} rows in the model"
                error_msgs.append(f"size mismatch for {name}: {shapes}: the adapter belongs to another model.")
                continue
            self._replace(adapter, loaded)

    def _replace(self, adapter: str, value: Tensor) -> None:
        """Use the loaded tensor; one that equals it is shared, else it gets a key of its own."""
        current = self[adapter]
        value = value.to(device=current.device, dtype=current.dtype)
        equal = (k for k, t in self._tensors.items() if t.shape == value.shape and torch.equal(t, value))
        key = next(equal, None)
        if key is None:
            # A key that nobody holds: an earlier load into this adapter may be shared by others by now.
            key = next(k for i in itertools.count() if (k := f"loaded:{adapter}:{i}") not in self._tensors)
            self._tensors[key] = value.clone()
        old, self._key_of[adapter] = self._key_of[adapter], key
        if old not in self._key_of.values():
            del self._tensors[old]

    def extra_repr(self) -> str:
        return ", ".join(f"{a}: {'x'.join(map(str, self[a].shape))}" for a in self)
