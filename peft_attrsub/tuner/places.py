"""Where the tensors of an adapted layer are in a state dict, and what an adapter file calls them.

A state dict has the names of the model at hand, of which torch leaves out the wrappers of FSDP and of activation
checkpointing, but not those of torch.compile and DDP. An adapter file has the names that the basis has (see `names`),
below PEFT's prefix. Every layer keeps its name, by adapter, in `module_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..basis import BasisError
from ..basis.naming import base_name, strip_peft_prefix
from .layer import AttrSubspaceLayer

# Torch's hooks remove them from the keys of a state dict and put them back on loading.
_NOT_IN_STATE_DICT = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Place:
    """One adapted layer, and what it is called.

    key: in the state dict of the model that was asked. file: in an adapter file saved from it, with PEFT's prefix if
    the model is a PeftModel. module: the same without. own: in the adapted model, without wrappers.
    """

    layer: AttrSubspaceLayer
    key: str
    file: str
    module: str
    own: str


def places(model: nn.Module, adapter: str) -> Iterator[Place]:
    """The layers of a PeftModel, a tuner or a model with injected adapters that have this adapter."""
    around = ""
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTuner):
            around = f"{name}.model." if name else "model."
        # Another adapter's copy of a whole module brings copies of the layers in it, which are not used.
        elif isinstance(layer, AttrSubspaceLayer) and layer.has(adapter) and ".modules_to_save." not in name:
            key = state_dict_name(name)
            own = base_name(name.removeprefix(around))
            module = layer.module_names.get(adapter, own)
            yield Place(layer, key, base_name(around) + module, module, own)


def state_dict_name(name: str) -> str:
    """The name of a module in a state dict, from its name in `named_modules`."""
    return ".".join(part for part in name.split(".") if part not in _NOT_IN_STATE_DICT)


def to_file(state_dict: Mapping[str, Tensor], model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of one adapter by their names in an adapter file, still with the adapter's name at the end."""
    found = {base_name(place.key): place for place in places(model, adapter)}
    owned = ((_owner(base_name(key), found), value) for key, value in state_dict.items())
    return {f"{own[0].file}.{own[1]}": value for own, value in owned if own is not None}


def to_model(
    tensors: Mapping[str, Tensor], model: nn.Module, adapter: str, saved: Callable[[str, str], str]
) -> dict[str, Tensor]:
    """The tensors of an adapter file by the names of the model's state dict.

    The model's own names serve too: adapters of before 0.1.0 have them, also with wrappers in them. A tensor that the
    layer does not have gets no adapter's name; one that belongs to no layer stays as it is.

    Args:
        saved: (key, adapter) -> the key without the adapter's name, as PEFT saves it.

    Raises BasisError where two tensors have the same place.
    """
    layers = list(places(model, adapter))
    by_key = {place.key: place for place in layers}
    held = {}
    for key in model.state_dict():
        own = _owner(key, by_key)
        if own is not None:
            held[own[0].key, saved(own[1], adapter)] = key
    found = {place.module: place for place in layers}
    for place in layers:
        found.setdefault(place.own, place)
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in tensors.items():
        own = _owner(strip_peft_prefix(base_name(key)), found)
        new = key
        if own is not None:
            new = held.get((own[0].key, own[1]), f"{own[0].key}.{own[1]}")
        if origin.setdefault(new, key) != key:
            raise BasisError(f"the adapter has {origin[new]!r} and {key!r}, which are both {new!r} in the model.")
        renamed[new] = value
    return renamed


def _owner(key: str, found: Mapping[str, Place]) -> tuple[Place, str] | None:
    """The layer that a tensor of the tuner belongs to, and the rest of the tensor's name."""
    parts = key.split(".")
    for i in range(1, len(parts)):
        place = found.get(".".join(parts[:i]))
        if place is not None and parts[i].startswith("attrsub_"):
            return place, ".".join(parts[i:])
    return None
