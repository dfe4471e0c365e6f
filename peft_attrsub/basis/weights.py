"""Bases that need no adapters: principal singular vectors of the base weight ("psv"), or random ones."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .base_names import base_name_of
from .basis import Basis
from .config import AttributeRecord
from .errors import BasisError
from .layout import ModuleLayout
from .linalg import principal_svd, random_orthonormal
from .naming import natural_key

Modules = str | Sequence[str] | None


def psv_basis(model: nn.Module, dim: int = 16, modules: Modules = None) -> Basis:
    """The leading `dim` singular vectors of every base weight W = U S V^T (the paper's "PSV" baseline).

    Args:
        model: its modules' weights are read. modules: names, endings or a regex as in PEFT's
            target_modules; None or "all-linear": every linear module.
    """
    chosen = chosen_modules(model, dim, modules)
    found = {name: principal_svd(_matrix(module, name), dim) for name, module in chosen.items()}
    return _from_weights("psv", found, chosen, AttributeRecord("psv", kind="psv", dim=dim), model)


def random_basis(model: nn.Module, dim: int = 16, seed: int = 0, modules: Modules = None) -> Basis:
    """`dim` random orthonormal directions per module and side: the baseline that any basis has to beat.

    The same seed gives the same basis on every machine; S is 1. Arguments as in `psv_basis`.
    """
    chosen = chosen_modules(model, dim, modules)
    found = {name: random_factors(layout_of(module, name), dim, seed, name) for name, module in chosen.items()}
    record = AttributeRecord("random", kind="random", dim=dim, seed=seed)
    return _from_weights("random", found, chosen, record, model)


def random_factors(layout: ModuleLayout, dim: int, seed: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (n x d), S = 1 (d), V (m x d) with d = min(dim, n, m)."""
    d = min(dim, *layout.shape)
    u = random_orthonormal(layout.n, d, seed, f"{name} out")
    v = random_orthonormal(layout.m, d, seed, f"{name} in")
    return u, torch.ones(d), v


def weight_spectrum(model: nn.Module, name: str) -> Tensor:
    """Singular values of a module's base weight."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise BasisError(f"base_model has no module {name!r}, which the adapters adapt.") from error
    w = _matrix(module, name).double()
    gram = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()


def layout_of(module: nn.Module, name: str) -> ModuleLayout:
    """The module's layout; a module that no basis can describe is refused by name."""
    layout = ModuleLayout.of(module)
    if layout is None:
        raise BasisError(f"module {name!r} is a {type(module).__name__}, for which there is no basis.")
    return layout


def holds_values(dtype: torch.dtype) -> bool:
    """Whether a weight of this dtype holds its values: integers and 8-bit floats are codes, scaled by their layer."""
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def dequantises_itself(weight: object) -> bool:
    """Whether a weight is a tensor of a quantisation library that can give its values as an ordinary tensor."""
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize


def _matrix(module: nn.Module, name: str) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    layout, weight = layout_of(module, name), module.weight
    if dequantises_itself(weight):
        weight = weight.dequantize()  # type: ignore[operator]
    if not isinstance(weight, Tensor) or not holds_values(weight.dtype):
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise BasisError(
            f"the weight of module {name!r} is quantised ({kind}), and only its {type(module).__name__} can read it: "
            "make the basis from the model before it was quantised."
        )
    return layout.as_matrix(weight.detach(), fan_in_fan_out=isinstance(module, Conv1D))


def chosen_modules(model: nn.Module, dim: int, modules: Modules) -> dict[str, nn.Module]:
    from peft.tuners.tuners_utils import check_target_module_exists

    if not isinstance(dim, int) or dim < 1:
        raise BasisError(f"dim={dim!r} is no positive whole number.")
    everything = modules is None or modules == "all-linear"
    names = SimpleNamespace(target_modules=modules, target_parameters=None)
    found = {}
    for name, module in model.named_modules():
        if everything:
            layout = ModuleLayout.of(module)
            if name and layout is not None and layout.kind == "linear":
                found[name] = module
        elif name and check_target_module_exists(names, name):
            layout_of(module, name)
            found[name] = module
    if not found:
        raise BasisError(f"modules={modules!r} matches nothing in the {type(model).__name__} given.")
    return {name: found[name] for name in sorted(found, key=natural_key)}


def _from_weights(
    attribute: str,
    factors: dict[str, tuple[Tensor, Tensor, Tensor]],
    chosen: dict[str, nn.Module],
    record: AttributeRecord,
    model: nn.Module,
) -> Basis:
    layouts = {name: layout_of(module, name) for name, module in chosen.items()}
    name = getattr(model, "name_or_path", None)
    return Basis.from_factors({attribute: factors}, base_name_of(name).name if name else None, layouts, [record])
