"""Bases that have seen the task: the directions that its gradient asks for, before any training.

For every module, G_b (n x m) is the gradient of the loss on batch b with respect to its weight W. The basis takes the
leading singular triplets U S V^T of N, the mean gradient normalized as by Adam, with factored second moments v:

    N = mean_b G_b / sqrt(v) ,  v_ij = r_i c_j / sum_i r_i ,  r_i = mean_b sum_j G_bij^2 ,  c_j = mean_b sum_i G_bij^2

No parameter needs a gradient: G_b = g^T x of a linear layer comes from its input x and the gradient g of its output,
so frozen and quantized weights will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import grad as weight_gradients

from .._machine import free_memory
from .base_names import base_name_of
from .basis import Basis
from .config import AttributeRecord
from .errors import BasisError
from .layout import ModuleLayout
from .linalg import fix_signs, principal_svd, random_orthonormal
from .naming import check_attribute, some
from .task_loss import LossFn, model_loss, scalar, summed
from .weights import Modules, chosen_modules, layout_of

NORMALIZE = ("adam", "none")
# Columns of a sketch: gradients have flat spectra, and a sketch is thin beside a weight.
_WIDTH, _PER_DIRECTION = 16, 4
# Singular values below this share of the whole matrix are rounding.
_NOISE = 1e-5
# Share of the free memory that exact sums of gradients may take.
_FITS = 0.25
#: U (n x d), S (d), V (m x d).
Triplets = tuple[Tensor, Tensor, Tensor]


def gradient_basis(
    model: nn.Module,
    batches: Iterable[Any],
    dim: int = 8,
    *,
    loss_fn: LossFn | None = None,
    attribute: str = "task",
    modules: Modules = None,
    normalize: Literal["adam", "none"] = "adam",
    exclude: Basis | None = None,
    exact: bool | None = None,
) -> Basis:
    """The `dim` leading singular directions of the task's mean gradient in every module, at the weights as they are.

    The model is run in the mode that it is in; call model.eval() first for gradients without dropout. Its weights and
    their requires_grad stay as they are. If torch.distributed runs, gradients are summed over processes, each with its
    own batches.

    Args:
        model: the base model. batches: kept in memory; a few dozen samples of the task are enough.
        dim: directions per module.
        loss_fn: loss_fn(model, batch) -> scalar. Default: model(**batch).loss, with tensors moved to the model.
        attribute: its name in the basis.
        modules: names, endings or a regex as in PEFT's target_modules; None or "all-linear": every linear module.
            Modules that the loss does not depend on get no direction.
        normalize: "adam" divides by factored second moments (above), "none" takes the mean gradient.
        exclude: a basis whose directions are left out: U is orthogonal to its A and V to its B, so that
            `Basis.combine([exclude, found])` loses no column. Only its modules are looked at.
        exact: True sums whole gradients (n x m in float32 per module) in one pass over the batches; False sketches
            them with (n + m) x (4 dim + 16) numbers, in three passes ("none": two), and finds directions that hold
            nearly as much of the gradient. Default: exact where the sums take at most a quarter of the free memory.

    Raises:
        BasisError: no module is found, has a gradient, or keeps a direction outside of `exclude`.
        ValueError: no batches, a loss that is not a finite scalar.
    """
    check_attribute(attribute)
    if normalize not in NORMALIZE:
        raise BasisError(f"normalize must be 'adam' or 'none', got {normalize!r}.")
    chosen = chosen_modules(model, dim, modules)
    if exclude is not None:
        chosen = {name: module for name, module in chosen.items() if name in exclude.modules}
    layouts = {name: layout_of(module, name) for name, module in chosen.items()}
    if exact is None:
        exact = _fits(chosen, layouts)
    task = _Task(model, list(batches), loss_fn, chosen, layouts)
    found = _exact(task, dim, normalize, exclude) if exact else _sketched(task, dim, normalize, exclude)
    if not any(s.numel() for _, s, _ in found.values()):
        raise BasisError(
            f"the gradient is zero in all {len(chosen)} modules, or lies inside of the excluded basis "
            f"({some(list(chosen))}): do the loss and the batches belong to this model?"
        )
    # Modules without a gradient stay, without directions, so that the basis goes together with others of the model.
    found |= {name: _nothing(layouts[name]) for name in chosen if name not in found}
    record = AttributeRecord(attribute, kind="gradient", dim=dim)
    name = getattr(model, "name_or_path", None)
    return Basis.from_factors({attribute: found}, base_name_of(name).name if name else None, layouts, [record])


def select_basis(
    basis: Basis,
    model: nn.Module,
    batches: Iterable[Any],
    dim: int,
    *,
    loss_fn: LossFn | None = None,
    attribute: str = "selected",
) -> Basis:
    """The `dim` directions inside of a basis that the task's gradient asks for.

    In every module: the leading singular triplets of the gradient of a core at zero, A^T G B (D_A x D_B, G the mean
    gradient over the batches), taken back to the module: U = A U', V = B V'. One pass, and no sum larger than a core.
    Arguments and errors as in `gradient_basis`.
    """
    check_attribute(attribute)
    present = dict(model.named_modules())
    chosen = {name: present[name] for name in basis.modules if name in present}
    if not chosen:
        raise BasisError(f"the model has none of the modules of the basis ({some(basis.modules)}).")
    layouts = {name: layout_of(module, name) for name, module in chosen.items()}
    for name, layout in layouts.items():
        if layout.shape != basis.layout(name).shape:
            raise BasisError(
                f"module {name!r} has shape {layout.shape} in the model but {basis.layout(name).shape} in the basis: "
                "the basis was mined for another model."
            )
    bases = {name: basis.joint(name)[:2] for name in chosen}
    task = _Task(model, list(batches), loss_fn, chosen, layouts)
    sums: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        a, b = (x.to(gradient.device) for x in bases[name])
        _add(sums, name, a.T @ gradient @ b)

    task.run(take)
    found = {}
    for name, total in _collected(task, sums).items():
        a, b = bases[name]
        u, s, v = principal_svd(total.cpu(), dim)
        found[name] = (a @ u, s, b @ v)
    if not any(s.numel() for _, s, _ in found.values()):
        raise BasisError("the gradient is zero in all modules of the basis: do the loss and the batches belong to it?")
    found |= {name: _nothing(layouts[name]) for name in chosen if name not in found}
    record = AttributeRecord(attribute, kind="gradient", dim=dim)
    return Basis.from_factors({attribute: found}, basis.config.base_model, layouts, [record])


def _nothing(layout: ModuleLayout) -> Triplets:
    return torch.zeros(layout.n, 0), torch.zeros(0), torch.zeros(layout.m, 0)


def _fits(chosen: Mapping[str, nn.Module], layouts: Mapping[str, ModuleLayout]) -> bool:
    """Whether a float32 matrix for every weight is at most a quarter of the memory that is free where they are."""
    needed = 4 * sum(layouts[name].n * layouts[name].m for name in chosen)
    held = next((p for module in chosen.values() for p in module.parameters(recurse=False)), None)
    if held is not None and held.device.type == "cuda":
        free: int | None = torch.cuda.mem_get_info(held.device)[0]
    else:
        free = free_memory()
    return free is not None and needed <= _FITS * free


def _exact(task: _Task, dim: int, normalize: str, exclude: Basis | None) -> dict[str, Triplets]:
    """From sums of whole gradients, in one pass."""
    sums: dict[str, Tensor] = {}
    moments = _Moments()

    def take(name: str, gradient: Tensor) -> None:
        _add(sums, name, gradient)
        moments.add(name, gradient)

    task.run(take)
    found = {}
    for name, total in _collected(task, sums).items():
        left, right = moments.scales(task, name) if normalize == "adam" else (None, None)
        matrix = _scaled(total, left, right)
        size = float(matrix.norm())
        if exclude is not None:
            a, b = _columns(exclude, name, matrix.device)
            matrix = _outside(_outside(matrix, a).T, b).T
        found[name] = _resolved(principal_svd(matrix, dim), size)
    return found


def _sketched(task: _Task, dim: int, normalize: str, exclude: Basis | None) -> dict[str, Triplets]:
    """From sketches: Y = N Omega spans the leading left directions, and Q^T N with Q from Y holds the triplets."""
    scales: dict[str, tuple[Tensor, Tensor]] = {}
    if normalize == "adam":
        moments = _Moments()
        task.run(moments.add)
        scales = {name: moments.scales(task, name) for name in moments.names}
    width = _PER_DIRECTION * dim + _WIDTH
    ranges: dict[str, Tensor] = {}

    def sketch(name: str, gradient: Tensor) -> None:
        omega = random_orthonormal(gradient.shape[1], width, 0, name).to(gradient.device)
        _add(ranges, name, _scaled(gradient, *scales.get(name, (None, None))) @ omega)

    task.run(sketch)
    lefts = {}
    for name, y in _collected(task, ranges).items():
        if exclude is not None:
            y = _outside(y, _columns(exclude, name, y.device)[0])
        lefts[name] = torch.linalg.qr(y.double()).Q.float()
    cores: dict[str, Tensor] = {}

    def project(name: str, gradient: Tensor) -> None:
        _add(cores, name, lefts[name].T @ _scaled(gradient, *scales.get(name, (None, None))))

    task.run(project)
    found = {}
    for name, core in _collected(task, cores).items():
        size, left = float(core.norm()), lefts[name]
        if exclude is not None:
            a, b = _columns(exclude, name, core.device)
            core, left = _outside(core.T, b).T, _outside(left, a)
        u, s, v = principal_svd(core, dim)
        u, v = fix_signs(left @ u, v)
        found[name] = _resolved((u, s, v), size)
    return found


def _resolved(triplets: Triplets, size: float) -> Triplets:
    """The triplets that are more than the rounding of a matrix of this norm, on the CPU."""
    u, s, v = triplets
    d = int((s > _NOISE * size).sum())
    return u[:, :d].cpu(), s[:d].cpu(), v[:, :d].cpu()


def _outside(matrix: Tensor, columns: Tensor) -> Tensor:
    """The part of the columns of `matrix` that is orthogonal to orthonormal `columns`."""
    for _ in range(2):  # twice is enough
        matrix = matrix - columns @ (columns.T @ matrix)
    return matrix


class _Moments:
    """Sums over batches of the squares of a gradient, by row and by column."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        return list(self._rows)

    def add(self, name: str, gradient: Tensor) -> None:
        squares = gradient.square()
        _add(self._rows, name, squares.sum(1))
        _add(self._columns, name, squares.sum(0))

    def scales(self, task: _Task, name: str) -> tuple[Tensor, Tensor]:
        """1 / sqrt of the row factor (n) and of the column factor (m) of v; 0 where a row or column is zero."""
        rows, columns = (summed(x[name]) / task.count for x in (self._rows, self._columns))
        total = rows.sum()
        return tuple((1 / x.sqrt()).where(x > 0, 0) for x in (rows, columns / total))  # type: ignore[return-value]


@dataclass
class _Task:
    """A model, its loss on batches, and the modules whose gradients are wanted."""

    model: nn.Module
    batches: Sequence[Any]
    loss_fn: LossFn | None
    chosen: Mapping[str, nn.Module]
    layouts: Mapping[str, ModuleLayout]
    count: int = 0

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError("there are no batches: give at least one.")
        self.count = int(summed(torch.tensor(float(len(self.batches)))))

    def run(self, take: Callable[[str, Tensor], None]) -> None:
        """One pass: take(module, G_b) for every batch and module that its loss depends on."""
        loss_fn = self.loss_fn or model_loss
        with _tapped(self.model, self.chosen, self.layouts, take):
            for batch in self.batches:
                loss = scalar(loss_fn(self.model, batch))
                if not bool(loss.isfinite()):
                    raise ValueError(f"the loss of a batch is {float(loss)}: give batches with a finite loss.")
                if not loss.requires_grad:
                    raise BasisError(
                        f"the loss does not depend on any of the modules ({some(list(self.chosen))}): name others "
                        "with modules=, or see that loss_fn runs the model given to it, with gradients."
                    )
                loss.backward()  # type: ignore[no-untyped-call, unused-ignore]


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value.clone()


def _collected(task: _Task, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the batches of all processes, in the order of the modules; those never taken are left out."""
    return {name: summed(sums[name]) / task.count for name in task.chosen if name in sums}


def _scaled(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    return gradient if left is None or right is None else gradient * left[:, None] * right


def _columns(basis: Basis, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """A (n x D_A) and B (m x D_B) of a basis, orthonormal."""
    a, b, _ = basis.joint(name)
    return a.to(device), b.to(device)


class _Tap(torch.autograd.Function):
    """The output of a module, unchanged; the backward pass hands its gradient and the module's input to `take`.

    The input is a saved tensor, so that activation checkpointing and offloading treat it as any other.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.take(x, gradients[0])
        return gradients[0], None, None, None


@contextmanager
def _tapped(
    model: nn.Module,
    chosen: Mapping[str, nn.Module],
    layouts: Mapping[str, ModuleLayout],
    take: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Hand every weight gradient of the chosen modules to `take`; no parameter gets one meanwhile."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def taken(module: nn.Module, x: Tensor, gradient: Tensor) -> None:
            with torch.no_grad():
                take(name, _weight_gradient(module, layouts[name], x, gradient))

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not torch.is_grad_enabled() or not inputs:
                return output
            # A parameter that needs a gradient somewhere makes autograd come by here, with all weights frozen.
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            return _Tap.apply(output, anchor, inputs[0].detach(), lambda x, g: taken(module, x, g))

        return hook

    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = [module.register_forward_hook(hook_of(name)) for name, module in chosen.items()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)


def _weight_gradient(module: nn.Module, layout: ModuleLayout, x: Tensor, gradient: Tensor) -> Tensor:
    """dL / dW (n x m) in float32, from a module's input and the gradient of its output."""
    gradient = gradient.float()
    if layout.kind == "embedding":
        table = gradient.new_zeros(layout.m, layout.n)
        return table.index_add_(0, x.reshape(-1), gradient.reshape(-1, layout.n)).T
    x = x.float()
    if layout.kind == "linear":
        return gradient.reshape(-1, layout.n).T @ x.reshape(-1, layout.m)
    conv: Any = module
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise BasisError(
            f"a {type(module).__name__} with padding={conv.padding!r} and padding_mode={conv.padding_mode!r} is not "
            "supported by gradient_basis: leave it out of modules."
        )
    weight_gradient = getattr(weight_gradients, f"{layout.kind}_weight")
    shape = (layout.n, *layout.kernel)
    found: Tensor = weight_gradient(x, shape, gradient, conv.stride, conv.padding, conv.dilation, conv.groups)
    return found.flatten(1)
