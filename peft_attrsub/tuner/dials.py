"""The share of each attribute in an adapter's update, read and changed at run time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite

from torch import nn

from .config import AttrSubspaceConfig
from .layer import AttrSubspaceLayer
from .places import Place, places


def attribute_scales(model: nn.Module, adapter_name: str | None = None) -> dict[str, dict[str, float]]:
    """The dials of an adapter with core="dials": module -> {attribute: s_a} of dW = sum_a s_a U_a S_a V_a^T.

    The numbers hold for the model as it is: with the config's scaling, and what set_scale and set_attribute_scale did.

    Args:
        model: a PeftModel or a model with injected adapters. adapter_name: default the active adapter.

    Raises ValueError for an unknown adapter, and for other cores, whose attributes mix or have many numbers each.
    """
    table = {}
    for name, _, cored in adapters_of(model, adapter_name):
        for place in cored:
            layer = place.layer
            if layer.core_kind[name] != "dials":
                raise ValueError(
                    f"adapter {name!r} has core={layer.core_kind[name]!r}: only core='dials' has one number per "
                    "attribute."
                )
            factors = layer.attribute_scales.get(name, {})
            values = layer.attrsub_M[name].weight.detach().float().tolist()
            table[place.module] = {
                attribute: value * layer.scaling[name] * factors.get(attribute, 1.0)
                for attribute, value in zip(layer.slices[name], values, strict=True)
            }
    return table


def set_attribute_scale(model: nn.Module, scales: Mapping[str, float], adapter_name: str | None = None) -> None:
    """Multiply the part that attributes have in an adapter's update: 0 turns one off, 1 restores it exactly.

    In the core M, the block of attribute a is multiplied by s_a, and in a full core the blocks that map the directions
    of b to those of a by s_a s_b. For "block_diagonal", "diagonal" and "dials" the update is thus a sum over
    attributes, each times its scale. Plain LoRA parts and modules_to_save are not changed. The scales are not saved
    with the adapter; export_lora and merging apply them.

    Args:
        model: a PeftModel or a model with injected adapters. scales: {attribute: factor}; others stay as they are.
        adapter_name: default the active adapters.

    Raises ValueError for an unknown adapter or attribute, a factor that is not finite, and a merged adapter.
    """
    for attribute, factor in scales.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not isfinite(factor):
            raise ValueError(f"the scale of an attribute must be a finite number, got {attribute!r}: {factor!r}.")
    found = adapters_of(model, adapter_name)
    for name, config, cored in found:
        for attribute in scales:
            if attribute not in (config.attributes or []):
                raise ValueError(
                    f"adapter {name!r} has no attribute {attribute!r}: it has {', '.join(config.attributes or [])}."
                )
        check_unmerged(name, cored)
    for name, _, cored in found:
        for place in cored:
            held = {**place.layer.attribute_scales.get(name, {}), **{a: float(x) for a, x in scales.items()}}
            place.layer.attribute_scales[name] = {a: x for a, x in held.items() if x != 1}


@contextmanager
def disable_attributes(model: nn.Module, attributes: Sequence[str], adapter_name: str | None = None) -> Iterator[None]:
    """Turn attributes of an adapter off inside of a `with` block; see `set_attribute_scale`."""
    names = [attributes] if isinstance(attributes, str) else list(attributes)
    layers = [(name, place.layer) for name, _, cored in adapters_of(model, adapter_name) for place in cored]
    before = [(layer, name, layer.attribute_scales.get(name)) for name, layer in layers]
    set_attribute_scale(model, dict.fromkeys(names, 0.0), adapter_name)
    try:
        yield
    finally:
        for layer, name, scales in before:
            if scales is None:
                layer.attribute_scales.pop(name, None)
            else:
                layer.attribute_scales[name] = scales


def check_unmerged(name: str, cored: Sequence[Place]) -> None:
    if any(name in place.layer.merged_adapters for place in cored):
        raise ValueError(
            f"adapter {name!r} is merged into the base weights, so the scale of an attribute cannot change: call "
            "unmerge_adapter() first."
        )


def adapters_of(model: nn.Module, name: str | None) -> list[tuple[str, AttrSubspaceConfig, list[Place]]]:
    """Name, config and cored layers of an adapter, or of all active ones."""
    held = (getattr(m, "peft_config", None) for m in model.modules())
    configs: dict[str, object] = next((found for found in held if isinstance(found, dict)), {})
    ours = {key: config for key, config in configs.items() if isinstance(config, AttrSubspaceConfig)}
    if name is None:
        active = {a for m in model.modules() if isinstance(m, AttrSubspaceLayer) for a in m.active_adapters}
        names = [key for key in ours if key in active]
    else:
        names = [name] if name in ours else []
    if not names:
        wanted = "active attribute-subspace adapter" if name is None else f"attribute-subspace adapter {name!r}"
        raise ValueError(f"the model has no {wanted}: it has {', '.join(ours) or 'none'}.")
    found = []
    for key in names:
        cored = [place for place in places(model, key) if key in place.layer.attrsub_M]
        found.append((key, ours[key], cored))
    return found
