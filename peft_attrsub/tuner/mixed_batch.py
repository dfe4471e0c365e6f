"""Mixed batches: a different adapter for every sample of one forward pass.

    y_i = W x_i + s_i A M_i (B^T x_i)        for sample i with core M_i and scaling s_i

Adapters differ only in M, so all samples whose adapters stand on one basis share one product with B, one batched
product with the stacked s_i M_i, and one product with A; each further basis (other attributes or dims of the same
one included) costs its own three. Plain LoRA entries have nothing to share and run one adapter at a time.

The convention is PEFT's: `model(..., adapter_names=["a", "b", "__base__", ...])`, in eval mode, one name per sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapted import AdaptedLayer

#: The name that stands for the model without any adapter.
BASE = "__base__"
Names = tuple[str, ...]
_INSIDE = (
    "adapter_names with modules_to_save cannot run inside torch.compile(PeftModel): compile the base model instead, "
    "model.base_model.model.compile(), which steps aside for a mixed batch."
)


@contextmanager
def mixed_batch(tuner: BaseTuner, names: Sequence[str], args: Any, kwargs: Any) -> Iterator[None]:
    """Within it, sample i of the model's batch runs with adapter names[i].

    args, kwargs: of the call about to be made; the batch is counted there where it can be found.
    Raises ValueError in training mode, with merged adapters, for unknown names and for a wrong count; TypeError if
    `names` is no list of names.
    """
    modules = list(_walk(tuner, tuner.tuner_layer_cls))
    names = _checked(tuner, modules, names)
    check_count(tuner, names, args, kwargs)
    wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
    with ExitStack() as undo:
        # An attribute and no hook: torch.compile notices that an attribute has changed.
        for module in modules:
            if module is tuner or isinstance(module, tuner.tuner_layer_cls):
                undo.callback(setattr, module, "sample_adapters", module.sample_adapters)
                module.sample_adapters = names
        if wrappers:
            undo.enter_context(_uncompiled())
        for wrapper in wrappers:
            hook = partial(_wrapper_hook, names=names)
            undo.callback(wrapper.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _walk(root: nn.Module, leaf: type) -> Iterator[nn.Module]:
    """The modules of a model, but of adapted layers only the base: the rest grows with the number of adapters."""
    found, stack = {id(root)}, [root]
    while stack:
        module = stack.pop()
        yield module
        inner = [module.base_layer] if isinstance(module, leaf) else module._modules.values()
        for child in inner:
            if isinstance(child, nn.Module) and id(child) not in found:
                found.add(id(child))
                stack.append(child)


def add_updates(layer: AdaptedLayer, names: Names, x: Tensor, result: Tensor) -> Tensor:
    """result + the update of each sample's adapter; samples of BASE, and of adapters without this layer, untouched.

    x: rows = len(names) * k, the k rows of a sample next to each other (frames of a scene, tokens of a sequence);
    or one row that all samples share, such as position ids: then the result has a row per sample. Linear (rows, ...,
    m), convolution (rows, C, ...), embedding (rows, ...). result: what the base layer gives for x.
    Raises ValueError for another number of rows.
    """
    groups = _groups(layer, names)
    if not groups:
        return result
    n = len(names)
    x, result = _by_sample(layer, x, n), _by_sample(None, result, n)  # [n, k, ...]
    if len(groups) == 1 and len(groups[0]) == n:
        total = result + _update(layer, names, x)
    else:
        rows = [torch.tensor(samples, device=x.device) for samples in groups]
        updates = [
            _update(layer, tuple(names[i] for i in samples), x.index_select(0, index))
            for samples, index in zip(groups, rows, strict=True)
        ]
        update = torch.cat(updates)
        wide = torch.promote_types(result.dtype, update.dtype)
        total = result.to(wide).index_add(0, torch.cat(rows), update.to(wide))
    return total.flatten(0, 1).to(result.dtype)


def _groups(layer: AdaptedLayer, names: Names) -> list[list[int]]:
    """Samples whose adapters stand on the same A and B here, group by group."""
    keys: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        if name in layer.latent:
            layer.bases(name)  # made now, or shared with those of another adapter
        if name in layer.attrsub_M:
            keys[name] = id(layer.attrsub_A[name]), id(layer.attrsub_B[name])
        elif layer.has(name) or name in layer.tied:
            keys[name] = name  # a plain LoRA shares nothing; a tied adapter is the embedding's
    groups: dict[Any, list[int]] = {}
    for i, name in enumerate(names):
        if name in keys:
            groups.setdefault(keys[name], []).append(i)
    return list(groups.values())


def _update(layer: AdaptedLayer, names: Names, x: Tensor) -> Tensor:
    """s_i A M_i (B^T x_i) for x (g, k, ...) and the g names of one group: (g, k, ...)."""
    size = x.shape[:2]
    rows = x.flatten(0, 1)
    first = names[0]
    if all(name == first for name in names):
        return layer.update(rows, first).unflatten(0, size)
    a, b = layer.bases(first, x.device)
    cores = torch.stack([layer.core(name, x) for name in names])  # [g, D_A, D_B]
    scaling = [layer.scaling[name] for name in names]
    if any(s != 1.0 for s in scaling):
        cores = cores * torch.tensor(scaling, dtype=cores.dtype, device=cores.device)[:, None, None]
    z = layer.project_in(layer.prepare_input(rows, first, b.dtype), b).to(cores.dtype)
    mixed = _mix(layer, z.unflatten(0, size), cores).to(a.dtype)
    return layer.project_out(mixed.flatten(0, 1), a).unflatten(0, size)


def _mix(layer: AdaptedLayer, z: Tensor, cores: Tensor) -> Tensor:
    """M_i z_i: linear z (g, k, ..., D_B), convolution z (g, k, groups * D_B, ...)."""
    if not layer.layout.kernel:
        flat = z.flatten(1, -2)  # [g, rows, D_B]
        return (flat @ cores.mT).unflatten(1, z.shape[1:-1])
    channels = z.unflatten(2, (layer.layout.groups, -1)).flatten(4)  # [g, k, groups, D_B, pixels]
    mixed = torch.einsum("nab,nkgbp->nkgap", cores, channels)
    return mixed.flatten(2, 3).unflatten(-1, z.shape[3:])


def _by_sample(layer: AdaptedLayer | None, x: Tensor, n: int) -> Tensor:
    """(n k, ...) as (n, k, ...), a single row for every sample; `layer`, whose input x is, decides what fits."""
    if layer is not None:
        kind, spatial = layer.layout.kind, len(layer.layout.kernel) - 1
        dims = spatial + 2 if layer.layout.kernel else 1 if kind == "embedding" else 2
        if x.dim() < dims or (x.shape[0] != 1 and x.shape[0] % n):
            raise ValueError(
                f"adapter_names names {n} samples, but a {kind} layer got an input of shape {tuple(x.shape)}, which "
                f"cannot be dealt out to them: the first dimension has to be {n}, or a multiple of it with the rows "
                "of a sample next to each other."
            )
    if x.shape[0] == 1 and n > 1:
        return x.expand(n, *x.shape[1:]).unsqueeze(1)
    return x.unflatten(0, (n, x.shape[0] // n))


# What is refused, in the words of PEFT


def _checked(tuner: BaseTuner, modules: Sequence[nn.Module], names: Sequence[str]) -> Names:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names is {names!r}, expected a list with the name of one adapter per sample.")
    if tuner.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode: call model.eval(), or train one adapter "
            "at a time."
        )
    if any(module.merged for module in modules if isinstance(module, tuner.tuner_layer_cls)):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    unknown = sorted(set(names) - {BASE} - set(tuner.peft_config))
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; the model has "
            f"{', '.join(tuner.peft_config)}, and {BASE!r} stands for none."
        )
    return tuple(names)


def _main_input(tuner: BaseTuner, args: Any, kwargs: Any) -> Tensor | None:
    """The tensor that holds the batch; None where no argument is sure to be it."""
    first = next(iter(inspect.signature(tuner.model.forward).parameters), "")
    main = getattr(tuner.model, "main_input_name", "")
    for candidate in (*args[:1], *(kwargs.get(name) for name in (first, main, "inputs_embeds"))):
        if isinstance(candidate, Tensor) and candidate.dim():
            return candidate
    return None


def check_count(tuner: BaseTuner, names: Names, args: Any, kwargs: Any) -> None:
    """Raises ValueError unless the batch, where the arguments show it, has one sample per name."""
    batch = _main_input(tuner, args, kwargs)
    if not names or (batch is not None and len(batch) != len(names)):
        count = "none" if batch is None else len(batch)
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {count} respectively."
        )


# Modules that PEFT trains in full, one copy per adapter


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run what torch.compile has compiled as plain Python: it would not notice the hooks on PEFT's wrappers."""
    if torch.compiler.is_compiling():
        raise RuntimeError(_INSIDE)
    try:
        stance = torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise RuntimeError(_INSIDE) from error
    with stance:
        yield


def _wrapper_hook(wrapper: Any, args: Any, kwargs: Any, names: Names) -> tuple[Any, Any]:
    """Hand PEFT's wrapper of a fully trained module one name per row, BASE for adapters that have no copy of it."""
    known = [name if name in wrapper._adapters else BASE for name in names]
    if args and len(args[0]) == 1 and len(known) > 1:
        args = (args[0].expand(len(known), *args[0].shape[1:]), *args[1:])
    elif args and len(args[0]) % len(known) == 0:
        known = [name for name in known for _ in range(len(args[0]) // len(known))]
    return args, {**kwargs, "adapter_names": known}
