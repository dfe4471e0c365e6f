"""Bases of random orthonormal directions at VGGT's shapes, and models of those shapes that take no memory."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from _adapters import meta_model
from torch import Tensor, nn

from peft_attrsub import Basis
from peft_attrsub.basis.joint import orthonormalise


def write_basis(folder: Path, shapes: dict[str, tuple[int, int]], attributes: int, dim: int, seed: int = 0) -> str:
    """A saved basis on {module: (in, out)}; kept if the folder is there already. Directions are windows of a long
    draw: what a basis costs to read does not depend on what is in it, as long as no column is dropped."""
    if not folder.exists():
        longest = max(max(shape) for shape in shapes.values()) * dim
        generator = torch.Generator().manual_seed(seed)
        # One draw per attribute: windows of one draw could hold the same columns.
        pools = [torch.randn(2 * longest + 1, generator=generator) for _ in range(attributes)]

        def directions(n: int, attribute: int, *name: str) -> Tensor:
            start = zlib.crc32("/".join(name).encode()) % longest
            columns = pools[attribute][start : start + n * dim].reshape(n, dim)
            return orthonormalise({"": columns / columns.norm(dim=0)}).q

        factors = {
            f"attribute-{a}": {
                name: (directions(n, a, name, "U"), torch.linspace(2, 1, dim), directions(m, a, name, "V"))
                for name, (m, n) in shapes.items()
            }
            for a in range(attributes)
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        Basis.from_factors(factors).save_pretrained(folder)
    return str(folder)


def hollow_model(shapes: dict[str, tuple[int, int]], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Linears of these shapes on the CPU whose weights nobody has written to, so that they take no memory yet."""
    return meta_model(shapes).to(dtype).to_empty(device="cpu")
