"""A mined basis of three attributes, its analysis, and the command as real processes."""

import pytest
import torch

from peft_attrsub import build_basis
from peft_attrsub.analysis import analyse
from tests.basis.helpers import random_factors, save_lora, save_many
from tests.cli.conftest import cli

__all__ = ["cli"]

DEEP = {f"blocks.{i}.{name}": shape for i in (0, 2, 10) for name, shape in (("fc", (24, 20)), ("proj", (16, 28)))}


def adapters(root, attributes=("texture", "geometry", "camera"), shapes=DEEP, k=4, rank=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {a: save_many(root / a, [random_factors(shapes, rank, g) for _ in range(k)]) for a in attributes}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def groups(root):
    return adapters(root)


@pytest.fixture(scope="module")
def basis(groups):
    """Three attributes of four adapters each, six modules of two kinds in three layers, dim 3."""
    return build_basis(groups, dim=3, progress=False)


@pytest.fixture(scope="module")
def task(root):
    """A LoRA on all modules of the basis and one more."""
    shapes = {**DEEP, "head": (5, 6)}
    return save_lora(root / "task", random_factors(shapes, 4, torch.Generator().manual_seed(9)))


@pytest.fixture(scope="module")
def analysis(basis, task):
    return analyse(basis, [task], draws=50, mismatches=2, seed=3)


@pytest.fixture(scope="module")
def record(analysis):
    return analysis.to_dict()
