"""What keeps a run sound: the learning rate by step, clipping by groups, and steps that are left out.

A step whose loss or gradient is not finite changes no weight. It is counted under the name of what was not finite;
ten in a row end the run with the batch on the disk.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from peft_attrsub.evaluation.files import write_atomically

TOTAL = "total"
_GRADIENT = "gradient of "


class DivergedError(ValueError):
    """Too many steps in a row had to be left out."""


def learning_rate(
    step: int, steps: int, peak: float, *, start: float = 1e-8, final: float = 1e-8, warmup_share: float = 0.05
) -> float:
    """The rate of step 0 .. steps - 1: linear from start to peak, then a cosine to final. With t = step / steps, w =
    warmup_share:

        t < w:  start + (peak - start) t / w          else:  final + (peak - final) (1 + cos(pi (t - w) / (1 - w))) / 2

    `final` itself is reached at t = 1, one step after the last, as in the release. Source: paper, section 4.
    """
    if steps < 1 or not 0 <= warmup_share < 1:
        raise ValueError(f"{steps} steps, of which warm up {warmup_share}: expected 1 or more, and a share in [0, 1).")
    t = min(max(step / steps, 0.0), 1.0)
    if t < warmup_share:
        return start + (peak - start) * t / warmup_share
    along = (t - warmup_share) / (1 - warmup_share)
    return final + (peak - final) * (1 + math.cos(math.pi * along)) / 2


def clip_gradients(
    groups: Mapping[str, Iterable[nn.Parameter]], max_norm: float | None, *, by_group: bool = True
) -> dict[str, float]:
    """Scale gradients g of each group by min(1, max_norm / |g|), or all by one factor; the norms |g| before that.

    groups: parameters by name. by_group: a factor for each group (the release), else one for all (the paper).
    max_norm: None or 0 only measures. The result has the norm of every group, and of all under "total". Where a norm
    is not finite nothing is scaled: the step is to be left out. Waits for the device once.
    """
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"gradients are clipped at {max_norm}: expected a number above 0, or 0 for no clipping.")
    held = {name: [p for p in parameters if p.grad is not None] for name, parameters in groups.items()}
    if TOTAL in held:
        raise ValueError(f"a group of parameters is called {TOTAL!r}, the name of the norm of all: rename it.")
    norms = [get_total_norm([p.grad for p in parameters if p.grad is not None]) for parameters in held.values()]
    # A sharded gradient has a sharded norm.
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    device = next((norm.device for norm, parameters in zip(whole, held.values(), strict=True) if parameters), "cpu")
    stacked = torch.stack([norm.to(device, torch.float32) for norm in whole]) if whole else torch.zeros(1)
    values = torch.cat([stacked, torch.linalg.vector_norm(stacked)[None]]).tolist()
    result = dict(zip((*held, TOTAL), values, strict=True)) if whole else {TOTAL: 0.0}
    if max_norm and nonfinite_norm(result) is None:
        for name, parameters in held.items():
            if parameters:
                norm = torch.tensor(result[name if by_group else TOTAL], device=device)
                clip_grads_with_norm_(parameters, max_norm, norm)
    return result


def nonfinite_norm(norms: Mapping[str, float]) -> str | None:
    """ "gradient of GROUP" for the first norm that is not finite, or None."""
    return next((f"{_GRADIENT}{name}" for name, norm in norms.items() if not math.isfinite(norm)), None)


def is_of_gradient(term: str | None) -> bool:
    """Whether what was not finite is the norm of a gradient, and not a term of the loss."""
    return term is not None and term.startswith(_GRADIENT)


def agree(term: str | None, device: torch.device | str = "cpu") -> str | None:
    """One process's term for all, so that all leave out the same step: the first process's that has one.

    Every process calls it, with the name of what was not finite or None; without torch.distributed it changes nothing.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return term
    any_of = torch.tensor([term is not None], dtype=torch.int32, device=device)
    distributed.all_reduce(any_of, op=distributed.ReduceOp.MAX)
    if not int(any_of):
        return None
    terms: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(terms, term)
    return next(name for name in terms if name is not None)


class NanGuard:
    """Counts the steps that are left out, and ends a run that gets nowhere.

        term = agree(losses.nonfinite or nonfinite_norm(norms))
        if not guard.skips(step, term, batch): optimizer.step()

    folder: where the batch of the last step goes. limit: so many in a row end the run.
    skipped: how many in all, in_a_row: up to now, terms: how often each name. overflows: steps that fp16's gradient
    scaler left out, which are part of its search for a scale and do not count.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = 10) -> None:
        if limit < 1:
            raise ValueError(f"the limit of steps left out in a row is {limit}: expected 1 or more.")
        self.folder, self.limit = Path(folder), limit
        self.skipped, self.in_a_row, self.overflows = 0, 0, 0
        self.terms: Counter[str] = Counter()

    def skips(self, step: int, term: str | None, batch: Mapping[str, Any] | None = None) -> bool:
        """Whether to leave out this step: `term` names what was not finite, None nothing.

        batch: of this process, the micro-batch in which it was found; None on a process that has none to store.

        Raises:
            DivergedError: `limit` steps in a row; the batch is stored, the sentence says where.
        """
        if term is None:
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        self.terms[term] += 1
        if self.in_a_row < self.limit:
            return True
        where = "" if batch is None else f"; the last batch is in {save_batch(self._file(step), batch)}"
        counts = ", ".join(f"{name} {count} times" for name, count in self.terms.most_common())
        raise DivergedError(
            f"{self.in_a_row} steps in a row up to step {step} were left out because {term} was not finite (in all: "
            f"{counts}){where}: lower the learning rate or the clipping, or look at the data."
        )

    def _file(self, step: int) -> Path:
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        return self.folder / f"batch-step-{step:08d}-{rank}.safetensors"

    def state_dict(self) -> dict[str, Any]:
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "overflows": self.overflows}
        return counts | {"terms": dict(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.overflows = state.get("overflows", 0)  # older checkpoints have none
        self.terms = Counter(state["terms"])


def save_batch(path: str | os.PathLike[str], batch: Mapping[str, Any]) -> Path:
    """A batch as safetensors: its tensors, and all else (names of sequences, numbers of frames) as JSON."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in batch.items() if _is_tensor(value)}
    others = {key: value for key, value in batch.items() if not _is_tensor(value)}
    return write_atomically(path, save(tensors, metadata={"others": json.dumps(others, default=str)}))


def load_batch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The batch that `save_batch` stored."""
    with safe_open(os.fspath(path), framework="pt") as file:
        others = json.loads(file.metadata()["others"])
        return {key: file.get_tensor(key) for key in file.keys()} | others  # noqa: SIM118


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


__all__ = [
    "DivergedError",
    "NanGuard",
    "agree",
    "clip_gradients",
    "is_of_gradient",
    "learning_rate",
    "load_batch",
    "nonfinite_norm",
    "save_batch",
]
