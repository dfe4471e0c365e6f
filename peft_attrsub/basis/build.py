"""build_basis: from saved LoRA adapters to a basis, module by module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .adapters import LoraAdapter
from .allocation import by_energy, by_gap, by_importance, effective_rank, parse_rule
from .base_names import base_name_of
from .basis import Basis
from .choosing import Chosen
from .choosing import rename as rename_modules
from .config import AttributeRecord, SourceRecord
from .errors import BasisError
from .forms import Updates, stack_updates
from .irls import Dimension, IrlsSettings, SharedSubspace, last_spectrum, mine_updates
from .layout import ModuleLayout
from .naming import check_attribute
from .processes import gather, process_share
from .roll_call import roll_call
from .sources import common_base, common_base_model, common_modules
from .storage import stored_dtype
from .weights import weight_spectrum

T = TypeVar("T")
Source = str | os.PathLike[str]
Adapters = Mapping[str, Sequence[Source]] | Sequence[Source]

# Records of a basis that the mining of a module yields.
_FOUND = ("first", "last", "weights", "residuals", "energy")


def build_basis(
    adapters: Adapters,
    *,
    dim: int = 16,
    alpha: float = 1.0,
    eps: float = 1e-6,
    max_iter: int = 50,
    tol: float = 1e-6,
    allocation: str = "uniform",
    base_model: str | nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    modules: Chosen = None,
    exclude: Chosen = None,
    rename: Mapping[str, str] | None = None,
    missing: str = "error",
    progress: bool = True,
) -> Basis:
    """Mine one robust shared subspace per attribute and module from saved LoRA adapters (paper, section 3.2).

        minimise over A, B of rank dim:   sum_i || A B^T - dW_i ||_F^alpha

    by exact factored IRLS: no n x m matrix is formed, modules are streamed, the adapters' own scaling
    (lora_alpha, rslora, patterns) is honoured, and multiplying all adapters by a constant changes no weight.

    Args:
        adapters: {attribute: [folder | Hub id | .safetensors]}, or a list (one attribute, "shared").
        dim: directions per module and attribute; a module whose updates span fewer gets those.
        alpha: in (0, 2]; 2 is plain averaging, 1 mutes outlier adapters (the paper gives no value).
        eps: smoothing, relative to the median ||dW_i||_F of the module.
        max_iter, tol: IRLS stops when the objective falls by less than tol, relatively.
        allocation: "uniform", "importance", "importance-literal", "energy", "energy:0.95" or "gap" (see
            `allocation`); for the last three dim is the most a module gets.
        base_model: name to record, whatever the adapters say; or the model itself, whose weights then give the
            effective ranks of the importance rules. Absolute paths are recorded by their last part.
        device: where to compute; default the CPU.
        dtype: of the stored factors, float32 or bfloat16, as a torch dtype or its name; inside it is float64.
        modules: restrict to these names, or to those in which a regular expression is found. exclude: one, or several
            regular expressions of modules to leave out.
        rename: {pattern: replacement} for module names, applied to every adapter by re.sub, for adapters of several
            versions of a library.
        missing: "error", or "intersect" to keep the modules that all adapters share.
        progress: show a bar, where standard error is a terminal.

    Of two adapters with the same tensors, one attribute takes one; adapters that were never trained are left out
    with a warning, near-copies are warned of (see `roll_call`).

    Adapters that record their base weights (see `identity`) must agree on them, and the basis records them too.

    Under `accelerate launch` the modules are split over the processes, and every process returns the whole.

    Raises:
        BasisError: names the adapter, the module and the setting that does not fit.
    """
    settings = _checked(dim, alpha, eps, max_iter, tol, dtype)
    rule, share = parse_rule(allocation)
    given = _open(adapters, rename)
    everyone = [adapter for row in given.values() for adapter in row]
    base = common_base(everyone)
    name, revision = common_base_model(everyone, base_model if isinstance(base_model, str) else None)
    if isinstance(base_model, nn.Module) and name is None and (own := getattr(base_model, "name_or_path", None)):
        name = base_name_of(own).name
    called = roll_call(given)
    opened = called.trained
    flat = [adapter for row in opened.values() for adapter in row]
    layouts = common_modules(flat, modules, missing, exclude)
    job = _Job(opened, layouts, settings, _device(device), progress)
    dims: dict[str, Mapping[str, Dimension]] = {}
    by_weight = None
    if rule in ("importance", "importance-literal") and isinstance(base_model, nn.Module):
        # The weights are the same for every attribute, and no adapter is read for them.
        by_weight = {m: effective_rank(weight_spectrum(base_model, m)) for m in layouts}
    for attribute in opened:
        if rule in ("importance", "importance-literal"):
            ranks = job.effective_ranks(attribute, dim) if by_weight is None else by_weight
            dims[attribute] = by_importance(ranks, job.limits(attribute), dim, rule == "importance-literal")
        else:
            rules: dict[str, Dimension] = {
                "uniform": dim,
                "energy": by_energy(share, dim),
                "gap": by_gap(dim),
            }
            dims[attribute] = dict.fromkeys(layouts, rules[rule])
    factors: dict[str, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}
    extras: dict[str, Tensor] = {}
    records = []
    for attribute in opened:
        found, sources = job.mine(attribute, dims[attribute])
        if not any(x.first.numel() for x in found.values()):
            raise BasisError(f"every update of attribute {attribute!r} is zero: its adapters were never trained.")
        factors[attribute] = {m: (x.u, x.s, x.v) for m, x in found.items()}
        for module, x in found.items():
            extras.update({f"{attribute}.{module}.{part}": getattr(x, part).contiguous() for part in _FOUND})
            extras[f"{attribute}.{module}.ranks"] = torch.tensor(
                [a.entries[module].rank for a in opened[attribute]]
            ).int()
        records.append(
            AttributeRecord(
                name=attribute,
                kind="adapters",
                sources=sources,
                untrained=[adapter.public_name for adapter in called.untrained[attribute]],
                dim=dim,
                allocation=allocation,
                alpha=alpha,
                eps=eps,
                max_iter=max_iter,
                tol=tol,
                iterations={m: x.iterations for m, x in found.items()},
            )
        )
    basis = Basis.from_factors(factors, name, layouts, records, extras, dtype)
    basis.config.base = base and replace(base, name=base_name_of(base.name).name)
    basis.config.base_model_revision = revision
    return basis


@dataclass
class _Job:
    """What every module needs: the open adapters by attribute, the layouts, the settings."""

    adapters: Mapping[str, list[LoraAdapter]]
    layouts: Mapping[str, ModuleLayout]
    settings: IrlsSettings
    device: torch.device
    progress: bool

    def mine(
        self, attribute: str, dims: Mapping[str, Dimension]
    ) -> tuple[dict[str, SharedSubspace], list[SourceRecord]]:
        """The subspaces of an attribute, and its adapters' records."""

        def one(module: str, updates: Updates) -> SharedSubspace:
            return mine_updates(updates, dims[module], self.settings).cast(torch.float32)

        sources: list[SourceRecord] = []
        found = self._each(attribute, one, f"mining {attribute}", sources)
        return found, sources

    def effective_ranks(self, attribute: str, dim: int) -> dict[str, float]:
        def of_update(module: str, updates: Updates) -> float:
            return effective_rank(last_spectrum(updates, dim, self.settings))

        return self._each(attribute, of_update, f"ranks of {attribute}")

    def limits(self, attribute: str) -> dict[str, int]:
        """The most directions the updates of a module can span: min(n, m, stacked rank)."""
        row = self.adapters[attribute]
        return {m: min(*x.shape, sum(a.entries[m].rank for a in row)) for m, x in self.layouts.items()}

    def _each(
        self,
        attribute: str,
        work: Callable[[str, Updates], T],
        title: str,
        sources: list[SourceRecord] | None = None,
    ) -> dict[str, T]:
        """`work` on every module of this process' share; the results of all processes, in order.

        sources: a list to which the adapters' records are added, hashed by the same threads.
        """
        names, main = process_share(list(self.layouts))
        found: dict[str, T] = {}
        bar = tqdm(total=len(names), desc=title, unit="module", disable=None if self.progress and main else True)
        row = self.adapters[attribute]

        def run(module: str) -> T:
            ranks = [adapter.entries[module].rank for adapter in row]
            pairs = (adapter.read(module) for adapter in row)
            result = work(module, stack_updates(pairs, self.layouts[module].shape, ranks, self.device))
            bar.update()
            return result

        failure: BasisError | None = None
        with bar, ExitStack() as files, _one_thread_each(self.device) as workers, ThreadPoolExecutor(workers) as pool:
            for adapter in row:
                files.enter_context(adapter)
            # Hashing reads the files from end to end: before the mining it also brings cold ones into memory.
            records = [] if sources is None else [pool.submit(_source, adapter) for adapter in row]
            try:
                found.update(zip(names, pool.map(run, names), strict=True))
            except BasisError as error:
                pool.shutdown(cancel_futures=True)
                failure = error
            else:
                if sources is not None:
                    sources.extend(record.result() for record in records)
        merged = gather(found, failure)
        return {module: merged[module] for module in self.layouts}


def _source(adapter: LoraAdapter) -> SourceRecord:
    return SourceRecord(adapter.public_name, adapter.revision, adapter.sha256())


@contextmanager
def _one_thread_each(device: torch.device) -> Iterator[int]:
    """How many modules to work on at a time: one per CPU thread, each single-threaded.

    The matrices are too small for several threads to share one of them well.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _open(adapters: Adapters, rules: Mapping[str, str] | None) -> dict[str, list[LoraAdapter]]:
    if isinstance(adapters, (str, os.PathLike)):
        raise BasisError(f"adapters={adapters!r} is one path: give a list, or a dict {{attribute: [paths]}}.")
    groups = adapters if isinstance(adapters, Mapping) else {"shared": adapters}
    if not groups:
        raise BasisError("no adapters were given: expected {attribute: [folders]} or a list of folders.")
    opened = {}
    for attribute, sources in groups.items():
        check_attribute(attribute)
        if isinstance(sources, (str, os.PathLike)):
            sources = [sources]
        if not sources:
            raise BasisError(f"attribute {attribute!r} has no adapters: give at least one folder.")
        opened[attribute] = [LoraAdapter(source) for source in sources]
        rename_modules(opened[attribute], rules)
    return opened


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BasisError(f"device={str(name)!r} cannot be used here: {reason}") from error
    return device


def _checked(dim: int, alpha: float, eps: float, max_iter: int, tol: float, dtype: torch.dtype | str) -> IrlsSettings:
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise BasisError(f"dim={dim!r} is no positive whole number.")
    if not 0 < alpha <= 2:
        raise BasisError(f"alpha={alpha!r} is outside (0, 2]: 2 is plain averaging, smaller mutes outliers more.")
    if not 0 < eps < inf:
        raise BasisError(f"eps={eps!r} is not positive and finite: weights would be infinite where an adapter fits.")
    if not isinstance(max_iter, int) or max_iter < 1:
        raise BasisError(f"max_iter={max_iter!r} is no positive whole number.")
    if not 0 <= tol < inf:
        raise BasisError(f"tol={tol!r} is not 0 or more: give the relative change of the objective to stop at.")
    stored_dtype(dtype)
    return IrlsSettings(alpha, eps, max_iter, tol)
