"""Scales of the consensus start, found on a few batches before training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..basis import BasisError
from ..basis.task_loss import LossFn, model_loss, scalar, summed
from .config import AttrSubspaceConfig
from .dials import adapters_of, check_unmerged
from .factors import disassemble
from .places import Place
from .provider import BasisProvider
from .start import CONSENSUS, Start, scales_of

# Batches from which on every second one is held out to stop early.
_ENOUGH = 4
# Steps without a better loss on the held-out batches after which the search ends, and what counts as better.
_PATIENCE, _BETTER = 2, 1e-4
# What a loss that is not finite counts as: the search turns back from there.
_VERY_BAD = 1e30


def calibrate_start(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    per: Literal["attribute", "module"] = "attribute",
    max_steps: int = 15,
    adapter_name: str | None = None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Find the scales s_a of the consensus start on batches of the task, and leave the cores there.

    Minimizes the mean loss over s_a in M = sum_a s_a M_a alone, where M_a is the core of attribute a's consensus (see
    `AttrSubspaceConfig.init_weights`), by L-BFGS. With four batches or more, every second one is held out and the
    scales with the lowest loss there are taken. The start is never worse than zero on the batches given: if no scales
    are better, the cores are set to zero. What the cores held before is lost, so call it before training, and before
    the model is wrapped for distributed training; if torch.distributed runs, losses are averaged over processes.

    Args:
        model: a PeftModel or a model with injected adapters, with the adapter active. Dropout is off meanwhile.
        batches: kept in memory and each read about 2 to 3 * max_steps times; a few dozen samples are enough.
        loss_fn: loss_fn(model, batch) -> scalar. Default: model(**batch).loss, with tensors moved to the model.
        per: "attribute" finds one scale per attribute, "module" one per attribute and module.
        max_steps: most steps of L-BFGS. adapter_name: default the active adapter. verbose: print what was found.

    Returns:
        {attribute: scale}; with per="module" {module: {attribute: scale}}.

    Raises:
        ValueError: no adapter or no batches, a merged adapter, a model whose output has no loss.
        BasisError: no attribute of the adapter's basis has a consensus, or the basis is not at hand.
    """
    if per not in ("attribute", "module"):
        raise ValueError(f"per must be 'attribute' or 'module', got {per!r}.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}.")
    given = list(batches)
    if not given:
        raise ValueError("calibrate_start got no batches: give at least one.")
    adapters = adapters_of(model, adapter_name)
    if len(adapters) > 1:
        raise ValueError(f"adapters {', '.join(a[0] for a in adapters)} are active: name one with adapter_name.")
    name, config, cored = adapters[0]
    check_unmerged(name, cored)
    scales, directions = _directions(name, config, cored)
    search = _Search(model, loss_fn or model_loss, name, cored, list(scales), directions, per == "module")
    first = search.point(scales)
    with _only_cores(model, [place.layer.attrsub_M[name].weight for place in cored]):
        best = _minimize(search, first, given, max_steps)
        zero = torch.zeros_like(best)
        losses = [search.loss(point, given) for point in (zero, best)]
        if not losses[1] < losses[0]:
            best, losses[1] = zero, losses[0]
        search.write(best)
    found = search.table(best)
    if per == "attribute":
        config.init_weights, config.init_scale = "consensus", dict(found)
    if verbose:
        print(_told(found, losses, per == "module"), flush=True)
    return found


def _directions(
    name: str, config: AttrSubspaceConfig, cored: Sequence[Place]
) -> tuple[dict[str, float], list[dict[str, Tensor]]]:
    """Scales to begin with, and by layer: attribute -> what its consensus adds to the trained tensor."""
    own = copy.copy(config)
    own.basis_in_adapter = config.basis is None
    provider = BasisProvider(own)
    basis, whole = provider.basis, provider.whole
    if basis is None or whole is None:
        raise BasisError(
            f"adapter {name!r} has no basis with a consensus at hand (basis={config.basis!r}): make it from a basis "
            "that was mined from adapters."
        )
    scale = config.init_scale if config.init_weights == CONSENSUS else None
    scales = scales_of(basis, scale)
    if not any(scales.values()):
        scales = scales_of(basis, None)
    start = Start(basis, whole, config.core, scales)
    found = []
    for place in cored:
        a, b = place.layer.bases(name)
        slices = place.layer.slices[name]
        parts = start.parts(place.module, a, b, slices, basis.stored(place.module))
        weight = place.layer.attrsub_M[name].weight
        found.append({x: disassemble(part, slices, config.core).to(weight) for x, part in parts.items()})
    return scales, found


class _Search:
    """The loss and its gradient as functions of the scales: one vector, of k entries or k for every module."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        adapter: str,
        cored: Sequence[Place],
        names: list[str],
        directions: list[dict[str, Tensor]],
        by_module: bool,
    ) -> None:
        self._model, self._loss_fn, self._names, self._by_module = model, loss_fn, names, by_module
        self._modules = [place.module for place in cored]
        self._cores: list[nn.Parameter] = [place.layer.attrsub_M[adapter].weight for place in cored]
        self._directions = directions

    def point(self, scales: Mapping[str, float]) -> Tensor:
        one = [scales[name] for name in self._names]
        return torch.tensor(one * (len(self._cores) if self._by_module else 1), dtype=torch.float64, device="cpu")

    def table(self, point: Tensor) -> dict[str, Any]:
        rows = [dict(zip(self._names, row, strict=True)) for row in self._rows(point).tolist()]
        return dict(zip(self._modules, rows, strict=True)) if self._by_module else rows[0]

    def _rows(self, point: Tensor) -> Tensor:
        return point.reshape(-1, len(self._names)).expand(len(self._cores), -1)

    def write(self, point: Tensor) -> None:
        with torch.no_grad():
            for core, parts, row in zip(self._cores, self._directions, self._rows(point).tolist(), strict=True):
                core.zero_()
                for name, scale in zip(self._names, row, strict=True):
                    core.add_(parts[name], alpha=scale)

    @torch.no_grad()
    def loss(self, point: Tensor, batches: Sequence[Any]) -> float:
        """Mean over batches."""
        self.write(point)
        losses = [float(scalar(self._loss_fn(self._model, batch))) for batch in batches]
        return _finite(_mean(torch.tensor([sum(losses) / len(losses)], dtype=torch.float64)))

    def loss_and_gradient(self, point: Tensor, batches: Sequence[Any]) -> tuple[float, Tensor]:
        self.write(point)
        for core in self._cores:
            core.grad = None
        total = 0.0
        for batch in batches:
            loss = scalar(self._loss_fn(self._model, batch)) / len(batches)
            loss.backward()
            total += float(loss.detach())
        # dL / ds_a = sum over modules of <dL / dM, M_a>
        rows = [
            [0.0 if core.grad is None else float((core.grad.double() * parts[n]).sum()) for n in self._names]
            for core, parts in zip(self._cores, self._directions, strict=True)
        ]
        table = torch.tensor(rows, dtype=torch.float64, device="cpu")
        gradient = table.reshape(-1) if self._by_module else table.sum(0)
        both = _mean(torch.cat([torch.tensor([total], dtype=torch.float64), gradient]))
        value = _finite(both[:1])
        return value, both[1:] if value < _VERY_BAD else torch.zeros_like(both[1:])


def _minimize(search: _Search, first: Tensor, batches: Sequence[Any], max_steps: int) -> Tensor:
    """The point with the lowest loss on the held-out batches that L-BFGS passes through."""
    enough = len(batches) >= _ENOUGH
    fit, held = (batches[::2], batches[1::2]) if enough else (batches, batches)
    point = first.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([point], lr=1, max_iter=1, max_eval=4, line_search_fn="strong_wolfe")

    def closure() -> float:
        with torch.enable_grad():
            value, gradient = search.loss_and_gradient(point.detach(), fit)
        point.grad = gradient
        return value

    best, lowest, waited = first, search.loss(first, held), 0
    for _ in range(max_steps):
        before = point.detach().clone()
        optimizer.step(closure)
        now = point.detach().clone()
        if torch.equal(now, before) or not bool(now.isfinite().all()):
            break
        value = search.loss(now, held)
        waited = 0 if value < lowest * (1 - _BETTER) else waited + 1
        if value < lowest:
            best, lowest = now, value
        if waited >= _PATIENCE:
            break
    return best


@contextmanager
def _only_cores(model: nn.Module, cores: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients for these parameters alone; afterwards everything is as before."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    mine = {id(core) for core in cores}
    try:
        model.eval()
        for parameter, _, _ in wanted:
            parameter.requires_grad_(id(parameter) in mine)
        yield
    finally:
        for parameter, flag, gradient in wanted:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _mean(values: Tensor) -> Tensor:
    """The mean over processes, where there are several."""
    return summed(values) / float(summed(values.new_ones(1)))


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if abs(number) < _VERY_BAD else _VERY_BAD


def _told(found: Mapping[str, Any], losses: Sequence[float], by_module: bool) -> str:
    lines = [f"loss {losses[0]:.4g} with the update at zero, {losses[1]:.4g} at the start found:"]
    if losses[0] == losses[1]:
        lines = [f"loss {losses[0]:.4g}; no start is better than zero, so the cores are zero."]
    elif by_module:
        columns = list(zip(*(row.items() for row in found.values()), strict=True))
        for column in columns:
            values = sorted(value for _, value in column)
            middle = values[len(values) // 2]
            lines.append(f"  {column[0][0]}: {middle:.3f} (median; {values[0]:.3f} to {values[-1]:.3f} over modules)")
    else:
        lines += [f"  {name}: {scale:.3f}" for name, scale in found.items()]
    return "calibrate_start: " + "\n".join(lines)
