"""The small ViT of `digits.py`: how it is made, trained and scored, and the worker processes that do it."""

from __future__ import annotations

import multiprocessing
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from digits_data import IMAGE_SIZE
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

TARGETS = r"vit\.layers\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])"  # all linear layers but the classifier

R = TypeVar("R")

# Once per process. A model this small gains nothing from a second thread, so the cores are shared out as processes.
torch.set_num_threads(1)
logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def new_vit(seed: int) -> nn.Module:
    """A ViT of 0.3 M parameters: pictures [N, 1, 32, 32] as 16 patches, 4 layers of width 96, 10 classes."""
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE_SIZE,
            patch_size=8,
            num_channels=1,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=192,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def load_vit(folder: Path) -> nn.Module:
    return ViTForImageClassification.from_pretrained(folder)


def fit(
    model: nn.Module,
    batch: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    title: str | None = None,
) -> None:
    """AdamW on cross-entropy: linear warm-up over a tenth of the steps, then cosine; gradient norm clipped at 1."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1, cycle_momentum=False)
    model.train()
    for _ in tqdm(range(steps), desc=title, disable=title is None, unit="step"):
        pictures, labels = batch()
        F.cross_entropy(model(pixel_values=pictures).logits, labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module, pictures: Tensor) -> Tensor:
    """[N, 10]"""
    model.eval()
    return torch.cat([model(pixel_values=part).logits for part in pictures.split(200)])


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100 * (logits(model, pictures).argmax(-1) == labels).float().mean().item()


def stream(*words: object) -> torch.Generator:
    """A random generator of its own for every purpose: more draws of one never change another."""
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


class Workers:
    """`count` processes of one thread each; with one, everything runs in this process."""

    def __init__(self, count: int) -> None:
        self.pool = None
        if count > 1:
            self.pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)  # after a failure, what has not begun is dropped

    def run(self, function: Callable[..., R], jobs: Sequence[tuple[Any, ...]], title: str) -> list[R]:
        """function(*job) for every job, in order, under one progress bar."""
        if self.pool is None:
            return [function(*job) for job in tqdm(jobs, desc=title, unit="run")]
        futures = [self.pool.submit(function, *job) for job in jobs]
        for future in tqdm(as_completed(futures), desc=title, total=len(jobs), unit="run"):
            future.result()  # raises at once what went wrong in a worker
        return [future.result() for future in futures]
