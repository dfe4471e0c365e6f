"""Subspace files of the authors' public release, read into a Basis and written from one.

One safetensors file holds, for every adapted matrix, A (d x in) and B (out x d), under the keys

    {frame_blocks|global_blocks}.{attn|mlp}.{qkv|proj|fc1|fc2}.{layer}.{A|B}      VGGT
    decoder.{module}.{weight}.{layer}.{A|B}                                        Pi3

for an update dW = B M A with a core M. Our dW = A M B^T has them the other way round: U spans the columns of
their B, V the rows of their A.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._files import clear_abandoned, partial_prefix
from .basis import Basis
from .config import AttributeRecord
from .errors import BasisError
from .files import check_file
from .naming import check_attribute, natural_key, some
from .tensor_file import write_tensors

#: Order in which the release concatenates attributes (its file names say which of them).
RELEASE_ATTRIBUTES = ("light", "camera", "geometry", "texture")

_KEY = re.compile(r"(frame_blocks|global_blocks|decoder)\.(\w+)\.(\w+)\.(\d+)\.([AB])")
_MODULE = re.compile(r"(?:aggregator\.(frame_blocks|global_blocks)|(decoder))\.(\d+)\.(\w+)\.(\w+)")
_LAYOUT = "{frame_blocks|global_blocks|decoder}.{module}.{weight}.{layer}.{A|B}"
# Cosine between two columns below which they count as orthogonal (rounding to bfloat16 stays below).
_ORTHOGONAL = 1e-2
# Smallest singular value of unit columns below which they span fewer directions than there are columns.
_DEPENDENT = 1e-5
# Singular values closer than this factor are ties and keep the file's order; bfloat16 is good to 1.004.
_TIE = 1.01

Attributes = str | Sequence[str] | Mapping[str, int]


def convert_release(
    path: str | os.PathLike[str],
    *,
    attributes: Attributes = "shared",
    base_model: str | None = "facebook/VGGT-1B",
) -> Basis:
    """Read a subspace file of the authors' release (see the module) into a Basis, in float32.

    Kept exactly, for every module and attribute: span(U) = span(B's columns) and span(V) = span(A's rows), so any
    update B M A that the file allows is one of ours, with another core. Where the columns of B and the rows of A
    are orthogonal, as singular vectors scaled by S^(1/2) are, each one is kept up to its length, S_j is
    |B_j| |A_j|, and they are sorted by it (those within 1 % stay in the file's order), so that a smaller `dim`
    keeps the strongest. Else U S V^T is the SVD of B A, and single columns are not kept. Lost are the release's
    scaling (alpha / r = 2; see AttrSubspaceConfig.scaling) and where the subspaces came from, which the file does
    not tell.

    Args:
        path: a .safetensors file.
        attributes: names for the d directions of each matrix. One name: all of them. A list: split evenly, in
            this order (the release concatenates light, camera, geometry, texture, d each). A dict
            {name: directions}: split as it says.
        base_model: name of the model to record.

    Raises:
        BasisError: no such file or no safetensors, foreign keys, an A without its B or of another width, NaN,
            dependent columns, or a width that cannot be split into the attributes.
    """
    names = [attributes] if isinstance(attributes, str) else list(attributes)
    for name in names:
        check_attribute(name)
    if not names or len(set(names)) != len(names):
        raise BasisError(f"attributes={attributes!r} must name one attribute or more, each once.")
    tensors = _read(path)
    factors: dict[str, dict[str, tuple[Tensor, Tensor, Tensor]]] = {name: {} for name in names}
    widths: dict[str, set[int]] = {name: set() for name in names}
    for module in sorted(tensors, key=natural_key):
        a, b = tensors.pop(module)
        start = 0
        for name, d in _split(attributes, names, a.shape[0], module).items():
            part = slice(start, start + d)
            factors[name][module] = _triplets(f"module {module!r}, attribute {name!r}", b[:, part], a[part].T)
            widths[name].add(d)
            start += d
    records = [AttributeRecord(n, dim=max(widths[n]) if len(widths[n]) == 1 else None) for n in names]
    return Basis.from_factors(factors, base_model, records=records)


def to_release_layout(basis: Basis, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write a basis as one file of the release's layout: A = S^(1/2) V^T, B = U S^(1/2), attributes side by side.

    `convert_release(path, attributes={name: dim, ...})` gives the same U, S, V back, up to rounding.

    Raises:
        BasisError: a module that the layout has no key for (only VGGT's aggregator and Pi3's decoder have), or a
            file in the way.
    """
    final = check_file(path)
    if final.exists() and not overwrite:
        raise BasisError(f"{str(final)!r} exists already: give another name, or overwrite=True.")
    tensors = {}
    for module in basis.modules:
        key = _key(module)
        rows, columns = [], []
        for attribute in basis.attributes:
            u, s, v = (t.float() for t in basis.factors(module, attribute))
            rows.append(s.sqrt()[:, None] * v.T)
            columns.append(u * s.sqrt())
        tensors[f"{key}.A"], tensors[f"{key}.B"] = torch.cat(rows).contiguous(), torch.cat(columns, 1).contiguous()
    prefix = partial_prefix(final)
    clear_abandoned(final.parent, prefix)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-", dir=final.parent) as beside:
            write_tensors(tensors, Path(beside) / final.name)
            os.replace(Path(beside) / final.name, final)
    except OSError as error:
        raise BasisError(f"{str(final)!r} cannot be written ({error.strerror}): give another place.") from error
    return final


def _read(path: str | os.PathLike[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> A (d x m), B (n x d)."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise BasisError(f"{str(path)!r} is no file: give a .safetensors file of the release's subspaces.")
    pairs: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (no mapping)
                module, side = _module(key, str(path))
                pairs.setdefault(module, {})[side] = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise BasisError(f"{str(path)!r} is truncated or no safetensors file ({error}).") from error
    if not pairs:
        raise BasisError(f"{str(path)!r} holds no tensor: expected keys like {_LAYOUT}.")
    found = {}
    for module, sides in pairs.items():
        lacking = [side for side in "AB" if side not in sides]
        if lacking:
            raise BasisError(f"{str(path)!r} lacks {_key(module)}.{lacking[0]}, the partner of a tensor it holds.")
        a, b = sides["A"], sides["B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise BasisError(
                f"{str(path)!r}: {_key(module)} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected A (d, in) and "
                "B (out, d) of one width d."
            )
        if not (a.is_floating_point() and b.is_floating_point() and a.isfinite().all() and b.isfinite().all()):
            raise BasisError(f"{str(path)!r}: A or B of {_key(module)} holds NaN, inf or whole numbers.")
        found[module] = (a, b)
    return found


def _module(key: str, path: str) -> tuple[str, str]:
    """('aggregator.frame_blocks.3.attn.qkv', 'A') from 'frame_blocks.attn.qkv.3.A'."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise BasisError(f"{path!r} holds the key {key!r}, which is not of the release's layout {_LAYOUT}.")
    blocks, part, weight, layer, side = match.groups()
    prefix = "" if blocks == "decoder" else "aggregator."
    return f"{prefix}{blocks}.{int(layer)}.{part}.{weight}", side


def _key(module: str) -> str:
    """The inverse of `_module`, without the side."""
    match = _MODULE.fullmatch(module)
    if match is None:
        raise BasisError(
            f"module {module!r} has no key in the release's layout {_LAYOUT}: select() the modules of the aggregator "
            "or decoder first."
        )
    blocks, decoder, layer, part, weight = match.groups()
    return f"{blocks or decoder}.{part}.{weight}.{layer}"


def _split(attributes: Attributes, names: list[str], width: int, module: str) -> dict[str, int]:
    """Directions of each attribute, in order."""
    if isinstance(attributes, Mapping):
        if sum(attributes.values()) != width or min(attributes.values()) < 1:
            raise BasisError(
                f"module {module!r} has {width} directions, but attributes={dict(attributes)!r} share out "
                f"{sum(attributes.values())}; each attribute needs one or more."
            )
        return dict(attributes)
    if width % len(names):
        raise BasisError(
            f"module {module!r} has {width} directions, which {len(names)} attributes ({some(names, 4)}) cannot share "
            "evenly: give attributes={name: directions}."
        )
    return dict.fromkeys(names, width // len(names))


def _triplets(where: str, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (n x d), S (d), V (m x d) with the spans of b (n x d) and a (m x d); float64 inside."""
    b, a = b.double(), a.double()
    lengths = [x.norm(dim=0) for x in (b, a)]
    units = [x / length for x, length in zip((b, a), lengths, strict=True)]
    grams = [x.T @ x for x in units]
    d = b.shape[1]
    if any(
        not bool(length.min() > 0) or float(_smallest(g)) < _DEPENDENT
        for length, g in zip(lengths, grams, strict=True)
    ):
        raise BasisError(
            f"{where}: the {d} directions of A or of B are not independent ({b.shape[0]} x {a.shape[0]} matrix), so "
            "there is no basis that keeps both spans; is the file whole, and split into the right attributes?"
        )
    if all(bool((g - torch.eye(d, dtype=g.dtype)).abs().max() < _ORTHOGONAL) for g in grams):
        s = lengths[0] * lengths[1]
        order = ((s / s.max()).log() / log(_TIE)).round().argsort(descending=True, stable=True)
        # One QR takes away what rounding left of a cosine, and keeps each column's direction.
        u, v = (_gram_schmidt(x[:, order]) for x in units)
        s = s[order].cummin(0).values
    else:
        (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a)
        left, s, right = torch.linalg.svd(rb @ ra.T)
        u, v = qb @ left, qa @ right.T
    # Stored transposed, so these views are what is stored.
    return u.T.float().contiguous().T, s.float(), v.T.float().contiguous().T


def _smallest(gram: Tensor) -> Tensor:
    """Smallest singular value of x, from x^T x."""
    return torch.linalg.eigvalsh(gram)[0].clamp_min(0).sqrt()


def _gram_schmidt(x: Tensor) -> Tensor:
    q, r = torch.linalg.qr(x)
    return q * r.diagonal().sign()
