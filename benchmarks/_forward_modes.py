"""One linear layer, factored and folded: the times that the choice between them rests on, and bfloat16's errors."""

from __future__ import annotations

import itertools
import time

import torch
from _common import median
from peft import get_peft_model
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig
from peft_attrsub.tuner import AttrSubspaceLayer
from peft_attrsub.tuner.folded import folded_linear
from peft_attrsub.tuner.forward_choice import FOLDING, TRAFFIC, cheaper

RULES = {
    "crossover": "one linear of each of VGGT's shapes; forward (Q = x B included), backward, and the forward pass of "
    "inference; thin: the update's products added onto the base's result; folded: W + A M B^T made and used; whole "
    "passes, base included; the two in turn, medians over rounds. ratio: median over rounds of thin / folded. auto: "
    "what forward_mode='auto' takes with the constants of peft_attrsub/tuner/forward_choice.py",
    "choice": "traffic, folding: the constants in use; fitted_*: those on a grid that lose the least here; lost: time "
    "of the passes chosen, over that of always taking the faster one, minus 1, summed over all rows of crossover",
    "bfloat16": "relative error of the update alone, Frobenius, against float64 of the same bfloat16 numbers: x and W "
    "are such that x W^T is exactly zero, so that the layer's output is what it makes of the update",
}
SHAPES = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]  # n x m: qkv, proj, fc1, fc2
Pass = tuple[float, float, float]


def _sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _passes(inputs: tuple[Tensor, ...], upstream: Tensor, fold: bool, device: str) -> Pass:
    """Seconds of the forward pass, the backward pass, and the forward pass of inference."""
    x, core, weight, bias, a, b = inputs
    ticks = [time.perf_counter()]
    y = folded_linear(x, core, weight, bias, a, b, fold=(fold, fold))
    _sync(device)
    ticks.append(time.perf_counter())
    y.backward(upstream)
    _sync(device)
    ticks.append(time.perf_counter())
    x.grad = core.grad = None
    with torch.no_grad():
        folded_linear(x, core, weight, bias, a, b, fold=(fold, fold))
    _sync(device)
    ticks.append(time.perf_counter())
    return ticks[1] - ticks[0], ticks[2] - ticks[1], ticks[3] - ticks[2]


def crossover(quick: bool, rounds: int, seed: int, device: str) -> list[dict]:
    """A row for each shape, number of tokens, width of the core, and pass."""
    torch.manual_seed(seed)
    shapes = [(24, 8), (8, 8)] if quick else SHAPES
    counts, dims = ([4, 12], [2]) if quick else ([512, 1374, 4096], [64, 256])
    rows: list[dict] = []
    for (n, m), tokens, d in itertools.product(shapes, counts, dims):
        draw = [torch.randn(*s, device=device) for s in ((tokens, m), (d, d), (n, m), (n,), (n, d), (m, d))]
        inputs = (draw[0].requires_grad_(), draw[1].requires_grad_(), *draw[2:])
        upstream = torch.randn(tokens, n, device=device)
        seen: dict[bool, list[Pass]] = {False: [], True: []}
        for round_ in range(rounds + 1):
            for fold in (False, True) if round_ % 2 else (True, False):
                taken = _passes(inputs, upstream, fold, device)
                if round_:  # the first warms up
                    seen[fold].append(taken)
        auto = [*cheaper(tokens, (n, m), (d, d)), cheaper(tokens, (n, m), (d, d), gradients=False)[0]]
        for i, name in enumerate(("forward", "backward", "inference")):
            thin, folded = ([one[i] for one in seen[fold]] for fold in (False, True))
            row = {"n": n, "m": m, "tokens": tokens, "d": d, "pass": name}
            row |= {"thin_ms": round(1e3 * median(thin), 3), "folded_ms": round(1e3 * median(folded), 3)}
            row["ratio"] = round(median(t / f for t, f in zip(thin, folded, strict=True)), 4)
            rows.append(row | {"auto": "folded" if auto[i] else "factored"})
    print("crossover measured", flush=True)
    return rows


def _lost(rows: list[dict], traffic: float, folding: float) -> float:
    taken = best = 0.0
    for row in rows:
        inference = row["pass"] == "inference"
        shape, dims = (row["n"], row["m"]), (row["d"], row["d"])
        fold = cheaper(row["tokens"], shape, dims, not inference, traffic, folding)[row["pass"] == "backward"]
        taken += row["folded_ms"] if fold else row["thin_ms"]
        best += min(row["folded_ms"], row["thin_ms"])
    return taken / best - 1


def fit(rows: list[dict]) -> dict:
    """The constants of the choice, those that suit these rows best, and what either loses."""
    grid = itertools.product((0.0, 4.0, 8.0, 16.0, 32.0, 64.0), (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0))
    # Of equally good ones the nearest to those in use.
    best = min(grid, key=lambda c: (_lost(rows, *c), abs(c[0] - TRAFFIC) + abs(c[1] - FOLDING)))
    return {
        "traffic": TRAFFIC,
        "folding": FOLDING,
        "lost": round(_lost(rows, TRAFFIC, FOLDING), 5),
        "fitted_traffic": best[0],
        "fitted_folding": best[1],
        "fitted_lost": round(_lost(rows, *best), 5),
    }


def bfloat16_errors(quick: bool, seed: int, device: str) -> list[dict]:
    """Error of an update of a bfloat16 layer, factored and folded, by the update's size."""
    size, d = (32, 4) if quick else (1024, 64)
    rows = []
    for relative in (1e-1, 1e-2, 1e-3, 1e-4):
        row: dict = {"relative_update": relative}
        for mode in ("factored", "folded"):
            torch.manual_seed(seed)
            base = nn.Linear(size, size, bias=False).requires_grad_(False)
            base.weight[:, 1::2] = -base.weight[:, ::2]
            x = torch.randn(256, size, device=device).bfloat16()
            x[:, 1::2] = x[:, ::2]
            config = AttrSubspaceConfig(
                basis="random", dim=d, target_modules=["0"], forward_mode=mode, init_weights=False
            )
            model = get_peft_model(nn.Sequential(base).bfloat16(), config).to(device)
            layer = next(one for one in model.modules() if isinstance(one, AttrSubspaceLayer))
            with torch.no_grad():
                norm = layer.get_delta_weight("default").norm()
                layer.attrsub_M["default"].weight *= relative * base.weight.float().norm() / norm
                exact = x.double() @ layer.get_delta_weight("default").double().T
                row[mode] = round(float((layer(x).double() - exact).norm() / exact.norm()), 5)
        rows.append(row)
    return rows
