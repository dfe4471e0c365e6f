"""From a plain LoRA to cores: the part of its update that lies inside a basis.

M = A^T dW B ,   energy = ||M||^2 / ||dW||^2          (A, B orthonormal; dW = s lora_B lora_A)
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace

from torch import Tensor

from ..basis import Basis, BasisError, LoraAdapter
from ..basis.naming import PEFT_PREFIX, some
from ..basis.sources import check_fits
from ..basis.views import Dim
from . import keys
from .adapter_files import write_adapter
from .config import AttrSubspaceConfig
from .factors import written_widths
from .provider import BasisProvider


@dataclass
class Projection:
    """cores: module -> M (D_A x D_B). energy: module -> share of ||dW||^2 inside the basis, where dW is not zero.

    total_energy: the same over all modules of the adapter together.
    """

    cores: dict[str, Tensor]
    energy: dict[str, float]
    total_energy: float
    folder: str | None = None


def project_lora(
    adapter: str | os.PathLike[str],
    basis: Basis | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    attributes: list[str] | None = None,
    dim: Dim = None,
    missing: str = "error",
    overwrite: bool = False,
) -> Projection:
    """Project a saved LoRA onto a basis: M = A^T dW B in every module, the best that cores can do.

    Args:
        adapter: folder, Hub id or .safetensors of a LoRA. basis: a Basis, folder or Hub id.
        output: folder to write the resulting attribute-subspace adapter to, atomically.
        attributes, dim: the part of the basis to use, as in AttrSubspaceConfig.
        missing: "error", or "intersect" to lose modules of the LoRA that the basis lacks.

    Raises BasisError where the two do not fit, and for a LoRA that was never trained.
    """
    whole = basis if isinstance(basis, Basis) else Basis.from_pretrained(basis)
    part = whole.select(attributes, dim)
    lora = LoraAdapter(adapter)
    check_fits(lora, part, missing)
    lost = [*lora.unusable, *(module for module in lora.modules if module not in part.modules)]
    if lost:
        warnings.warn(f"modules of {lora.source!r} that the cores do not hold: {some(lost)}.", stacklevel=2)
    cores, energy, tensors = {}, {}, {}
    widths: dict[str, str] = {}
    kept = total = 0.0
    with lora:
        for module in lora.modules:
            left, right = (x.double() for x in lora.read(module))  # [n, r], [m, r]
            norm = float(((left.T @ left) * (right.T @ right)).sum())
            total += norm
            if module not in part.modules:
                if norm > 0:
                    energy[module] = 0.0
                continue
            a, b, slices = part.joint(module)
            core = (a.double().T @ left) @ (right.T @ b.double())
            kept += float(core.square().sum())
            if norm > 0:
                energy[module] = float(core.square().sum()) / norm
            cores[module] = core.float()
            tensors[f"{PEFT_PREFIX}{module}.{keys.CORE}"] = core.float()
            if whole.source is None:
                tensors[f"{PEFT_PREFIX}{module}.{keys.BASIS_A}"] = a
                tensors[f"{PEFT_PREFIX}{module}.{keys.BASIS_B}"] = b
                widths[module] = written_widths(slices)
    if total == 0:
        raise BasisError(f"every update of {lora.source!r} is zero: it was never trained.")
    result = Projection(cores, energy, kept / total)
    if output is not None:
        config = _config(lora, whole, part, dim, list(cores))
        config.basis_widths = widths or None
        provider = BasisProvider(replace(config, basis_in_adapter=False))
        for module in cores:
            tensors[f"{PEFT_PREFIX}{module}.{keys.FINGERPRINT}"] = provider.fingerprint(module).tensor()
        result.folder = write_adapter(output, config, tensors, overwrite, _read(adapter, basis))
    return result


def _read(adapter: str | os.PathLike[str], basis: Basis | str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """What a projection is made from: folders and files that it must not replace."""
    sources = basis.source if isinstance(basis, Basis) else basis
    return [adapter, *(sources if isinstance(sources, list) else [sources] if sources else [])]


def _config(lora: LoraAdapter, whole: Basis, part: Basis, dim: Dim, modules: list[str]) -> AttrSubspaceConfig:
    layouts = {m: part.layout(m).to_dict() for m in modules if part.layout(m).kind != "linear"}
    return AttrSubspaceConfig(
        basis=whole,
        basis_revision=whole.revision,
        basis_digest=whole.digest,
        basis_in_adapter=whole.source is None,
        attributes=part.attributes,
        dim=dim if dim is None or isinstance(dim, int) else dict(dim),
        target_modules=modules,
        module_layouts=layouts or None,
        base_model_name_or_path=lora.base_model,
        task_type=lora.config.get("task_type"),
        auto_mapping=lora.config.get("auto_mapping"),
        inference_mode=True,
    )
