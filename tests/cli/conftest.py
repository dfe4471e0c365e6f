"""Adapters on disk and the command as real processes."""

import pytest
import torch

from tests.basis.helpers import SHAPES, random_factors, save_lora

from .zygote import Zygote


@pytest.fixture(scope="session")
def cli():
    """cli("info", folder) runs `peft-attrsub info folder` in a process of its own."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def adapters(tmp_path):
    """tmp_path/adapters/{texture,geometry}-{0,1,2}: six small LoRA adapters."""
    generator = torch.Generator().manual_seed(0)
    for name in ("texture", "geometry"):
        for i in range(3):
            save_lora(tmp_path / "adapters" / f"{name}-{i}", random_factors(SHAPES, 3, generator))
    return tmp_path / "adapters"
