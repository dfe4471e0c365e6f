"""The update of one module as thin factors: dW = A M B^T, and its exact LoRA form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .fingerprint import Fingerprint

Slices = dict[str, tuple[slice, slice]]


@dataclass(frozen=True)
class Bases:
    """A (n x D_A), B (m x D_B), the columns of each attribute, and a key that is equal for equal bases.

    fingerprint: what cores trained in these bases are stored with; None where it is not known yet.
    start: the core (D_A x D_B) to start from; None: M = 0.
    """

    a: Tensor
    b: Tensor
    slices: Slices
    key: str
    fingerprint: Fingerprint | None = None
    start: Tensor | None = None


def blocks_of(slices: Slices) -> list[tuple[int, int]]:
    """Sizes (rows, columns) of the diagonal blocks of a core, one per attribute."""
    return [(a.stop - a.start, b.stop - b.start) for a, b in slices.values()]


def written_widths(slices: Slices) -> str:
    """The widths of all blocks as a config holds them: "16x16 12x8"."""
    return " ".join(f"{rows}x{columns}" for rows, columns in blocks_of(slices))


def read_widths(text: str) -> list[list[int]]:
    """The inverse of `written_widths`. Raises ValueError for any other text."""
    if not re.fullmatch(r"\d+x\d+( \d+x\d+)*", text):
        raise ValueError(f"{text!r} is not a list of widths such as '16x16 12x8'.")
    return [[int(x) for x in part.split("x", 1)] for part in text.split()]


def slices_of(names: list[str], blocks: list[list[int]]) -> Slices:
    """The inverse of `blocks_of`."""
    found: Slices = {}
    i = j = 0
    for name, (rows, columns) in zip(names, blocks, strict=True):
        found[name] = (slice(i, i + rows), slice(j, j + columns))
        i, j = i + rows, j + columns
    return found


def core_shape(a: Tensor, b: Tensor, slices: Slices, kind: str) -> tuple[int, ...]:
    """Shape of the trainable tensor of a core.

    kind: "full" (D_A x D_B), "block_diagonal" (all diagonal blocks in one row), "diagonal" (D) or "dials" (one number
    per attribute).
    """
    if kind == "block_diagonal":
        return (sum(prod(block) for block in blocks_of(slices)),)
    if kind == "diagonal":
        return (a.shape[1],)
    return (len(slices),) if kind == "dials" else (a.shape[1], b.shape[1])


def assemble(core: Tensor, slices: Slices, kind: str) -> Tensor:
    """M (D_A x D_B) from the trainable tensor."""
    if kind == "full":
        return core
    sizes = blocks_of(slices)
    if kind == "block_diagonal":
        parts = core.split([prod(size) for size in sizes])
        return torch.block_diag(*(part.view(size) for part, size in zip(parts, sizes, strict=True)))
    if kind == "dials":
        core = torch.cat([core[i : i + 1].expand(rows) for i, (rows, _) in enumerate(sizes)])
    return torch.diag(core)


def disassemble(matrix: Tensor, slices: Slices, kind: str) -> Tensor:
    """The trainable tensor whose core is nearest to `matrix`; what such a core cannot hold is lost."""
    if kind == "full":
        return matrix
    if kind == "block_diagonal":
        return torch.cat([matrix[a, b].reshape(-1) for a, b in slices.values()])
    diagonal = matrix.diagonal()
    if kind == "diagonal":
        return diagonal.clone()
    return torch.stack([diagonal[a].sum() / max(1, a.stop - a.start) for a, _ in slices.values()])


def scale_mask(slices: Slices, scales: dict[str, float], like: Tensor) -> Tensor:
    """Factors (D_A x D_B) for the entries of a core: s_a in the block of attribute a, s_a s_b between a and b."""
    mask = torch.ones_like(like)
    for name, factor in scales.items():
        rows, columns = slices[name]
        block = mask[rows, columns].clone()
        mask[rows] *= factor
        mask[:, columns] *= factor
        mask[rows, columns] = block * factor
    return mask


def to_lora(a: Tensor, core: Tensor, b: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """lora_B (n x r), lora_A (r x m) with lora_B lora_A = A M B^T.

    Without `rank` this is exact and needs no SVD: (A M, B^T), or (A, M B^T) where that is thinner. With
    `rank` it is the best approximation of that rank, from the SVD of the small core of the two QRs.
    """
    a, core, b = a.double(), core.double(), b.double()
    if rank is None or rank >= min(core.shape):
        if core.shape[1] <= core.shape[0]:
            return (a @ core).float(), b.T.float()
        return a.float(), (core @ b.T).float()
    qa, ra = torch.linalg.qr(a)
    qb, rb = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(ra @ core @ rb.T)
    root = s[:rank].sqrt()
    left, right = qa @ (u[:, :rank] * root), (qb @ (vh[:rank].T * root)).T
    return left.float(), right.float()
