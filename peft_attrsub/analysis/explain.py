"""Which attribute explains an adapter: the share of its update that lies inside the basis.

    share of attribute a   ||U_a^T dW V_a||_F^2 / ||dW||_F^2
    jointly                ||A^T dW B||_F^2 / ||dW||_F^2          (A, B the orthonormal union; paper, section 3.4)

An update without any relation to the basis has d_out d_in / (n m) of its energy there, on average.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..basis import Basis, BasisError, LoraAdapter
from ..basis.basis import Dim
from ..basis.sources import check_fits

CAPTURED_RULE = (
    "Captured energy is the share of the squared Frobenius norm of an update that lies inside the subspace. An update "
    "unrelated to the basis has d_out d_in / (n m) of it there: the expected share. Shares of attributes overlap, so "
    "they need not add up to the joint one."
)


@dataclass(frozen=True)
class Share:
    """share of ||dW||^2 inside a subspace, and the share expected of an unrelated update."""

    share: float
    expected: float


@dataclass(frozen=True)
class CapturedModule:
    """norm: ||dW||_F^2 of the module; joint and by attribute: what lies inside."""

    module: str
    norm: float
    joint: Share
    attributes: dict[str, Share]


@dataclass(frozen=True)
class Captured:
    """How much of an adapter lies inside a basis.

    joint, attributes: over the adapter's whole ||dW||^2, modules that the basis lacks (`missing`) included.
    modules: one by one, those whose update is not zero.
    """

    adapter: str
    joint: Share
    attributes: dict[str, Share]
    modules: list[CapturedModule]
    missing: list[str]


def captured_energy(
    adapter: str | os.PathLike[str],
    basis: Basis | str | os.PathLike[str],
    attributes: Sequence[str] | None = None,
    dim: Dim = None,
) -> Captured:
    """The share of a saved LoRA's ||dW||_F^2 inside the basis, per module and attribute.

    Args:
        adapter: folder, Hub id or .safetensors of a LoRA. basis: a Basis, folder or Hub id.
        attributes, dim: the part of the basis to use, as in AttrSubspaceConfig.

    Raises:
        BasisError: when the two have no module in common, or one in different shapes.
    """
    whole = basis if isinstance(basis, Basis) else Basis.from_pretrained(basis)
    part = whole.select(attributes, dim)
    lora = LoraAdapter(adapter)
    check_fits(lora, part, "skip")
    parts = {"": part, **{a: part.select([a]) for a in part.attributes}}
    found, missing, lost = [], [], 0.0
    with lora:
        for module in lora.modules:
            left, right = (x.double() for x in lora.read(module))  # [n, r], [m, r]
            norm = float(((left.T @ left) * (right.T @ right)).sum())
            if module not in part.modules:
                missing.append(module)
                lost += norm
            elif norm > 0:
                shares = {name: _share(view, module, left, right, norm) for name, view in parts.items()}
                found.append(CapturedModule(module, norm, shares.pop(""), shares))
    if not found:
        raise BasisError(f"every update of {lora.source!r} in the basis' modules is zero: it was never trained.")
    total = lost + sum(one.norm for one in found)
    whole_shares = {
        name: Share(
            sum(one.norm * _of(one, name).share for one in found) / total,
            sum(one.norm * _of(one, name).expected for one in found) / total,
        )
        for name in parts
    }
    return Captured(lora.public_name, whole_shares.pop(""), whole_shares, found, missing)


def _of(one: CapturedModule, name: str) -> Share:
    return one.attributes[name] if name else one.joint


def _share(basis: Basis, module: str, left: Tensor, right: Tensor, norm: float) -> Share:
    a, b, _ = basis.joint(module)
    core: Tensor = (a.double().T @ left) @ (right.T @ b.double())
    layout = basis.layout(module)
    inside = float(core.square().sum()) if core.numel() else 0.0
    return Share(min(1.0, inside / norm), a.shape[1] * b.shape[1] / (layout.n * layout.m))
