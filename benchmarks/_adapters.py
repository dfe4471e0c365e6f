"""LoRA adapters with a planted shared subspace, written to disk by stock PEFT.

    dW_i = (lora_alpha / r) B_i A_i,   B_i = (U0 K_i + E_i) G_i^-1  [n x r],   A_i = G_i (V0 + F_i)^T  [r x m]

U0 [n x r] and V0 [m x r] are shared by all adapters i of a module; K_i [r x r] is an adapter's own mixing of them;
E_i and F_i are its individual part, Gaussian, with the decaying spectrum of the shared part; G_i [r x r] is an
arbitrary gauge, which leaves dW_i as it is but not the stored factors: training prefers none.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_attrsub._machine import available_cores

LINEARS = {
    "attn.qkv": (1024, 3072),
    "attn.proj": (1024, 1024),
    "mlp.fc1": (1024, 4096),
    "mlp.fc2": (4096, 1024),
}  # in, out

# spread: how far the cores of two adapters differ; None: cores with no common part at all.
# outlier: the first adapter is unrelated to the others and this many times as large.
# gauge: False leaves the factors of all adapters aligned, the best case for methods that average factors.
FIXTURES = {
    "shared": {"spread": 0.5, "outlier": 0.0, "gauge": True},
    "aligned-factors": {"spread": 0.5, "outlier": 0.0, "gauge": False},
    "one-outlier": {"spread": 0.5, "outlier": 10.0, "gauge": True},
    "no-common-core": {"spread": None, "outlier": 0.0, "gauge": True},
}
INDIVIDUAL = 0.3  # size of the individual part against the shared one, on either side
DECAY = 5.0  # singular values fall as exp(-j / DECAY)


def vggt_shapes(blocks: int = 24, width: int = 1024) -> dict[str, tuple[int, int]]:
    """{module: (in, out)} of VGGT-1B's aggregator: 24 frame and 24 global blocks of four linears."""
    factor = width / 1024
    return {
        f"aggregator.{kind}_blocks.{i}.{name}": (int(m * factor), int(n * factor))
        for kind in ("frame", "global")
        for i in range(blocks)
        for name, (m, n) in LINEARS.items()
    }


def meta_model(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """A model that has the names and shapes and no memory."""
    root = nn.Module()
    for name, (m, n) in shapes.items():
        *parents, leaf = name.split(".")
        at = root
        for part in parents:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.add_module(leaf, nn.Linear(m, n, bias=False, device="meta"))
    return root


def _generator(*parts) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))


def _gauge(r: int, generator: torch.Generator) -> torch.Tensor:
    """An invertible r x r matrix: a rotation with its columns stretched."""
    return torch.linalg.qr(torch.randn(r, r, generator=generator))[0] * torch.exp(
        0.7 * torch.randn(r, generator=generator)
    )


def factors(module: str, shape: tuple[int, int], index: int, fixture: str, rank: int, seed: int):
    """(A [r x m], B [n x r]) of adapter `index`, from names and seed only: other modules do not matter."""
    m, n = shape
    kind = FIXTURES[fixture]
    shared = _generator(seed, module)
    fall = torch.exp(-torch.arange(rank) / DECAY).sqrt()
    u = torch.randn(n, rank, generator=shared) / n**0.5
    v = torch.randn(m, rank, generator=shared) / m**0.5
    own = _generator(seed, module, index)
    unrelated = kind["outlier"] > 0 and index == 0
    if unrelated:
        u = torch.randn(n, rank, generator=own) / n**0.5 * kind["outlier"]
        v = torch.randn(m, rank, generator=own) / m**0.5
    noise = torch.randn(rank, rank, generator=own)
    if kind["spread"] is None:
        core = noise / rank**0.5
    else:
        core = torch.eye(rank) + kind["spread"] * noise / rank**0.5
    core = fall[:, None] * core
    b = u @ core + INDIVIDUAL * torch.randn(n, rank, generator=own) / n**0.5 * fall
    a = v * fall + INDIVIDUAL * torch.randn(m, rank, generator=own) / m**0.5 * fall
    g = _gauge(rank, own) if kind["gauge"] else torch.eye(rank)
    scale = 0.1  # an adapter is small against its weight; no method may care
    return (scale * a @ g.T).T.contiguous(), torch.linalg.solve(g, b, left=False).contiguous()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch on one thread per call: so small products gain nothing from more, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_adapters(
    folder: Path, shapes: dict, count: int, *, fixture: str = "shared", rank: int = 16, seed: int = 0
) -> list[str]:
    """`count` adapter folders under `folder`, saved by PEFT; kept when written before to the same description."""
    wanted = {
        "shapes": {k: list(v) for k, v in shapes.items()},
        "count": count,
        "fixture": fixture,
        "rank": rank,
        "seed": seed,
        "recipe": 1,
    }
    marker = folder / "complete.json"
    paths = [folder / f"texture-{i}" for i in range(count)]
    if not marker.exists() or json.loads(marker.read_bytes()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        leaves = sorted({name.rsplit(".", 1)[1] for name in shapes})
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=leaves)
        model = get_peft_model(meta_model(shapes), config, low_cpu_mem_usage=True)

        def fill(name: str, index: int) -> None:
            layer = model.get_submodule(f"base_model.model.{name}")
            a, b = factors(name, shapes[name], index, fixture, rank, seed)
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)

        with _one_thread_each(), ThreadPoolExecutor(min(4, available_cores())) as pool:
            for i, path in enumerate(paths):
                list(pool.map(fill, shapes, [i] * len(shapes)))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PEFT looks for a base model's config on the Hub and finds none
                    model.save_pretrained(path)
        marker.write_text(json.dumps(wanted), encoding="utf-8")
    return [str(p) for p in paths]
