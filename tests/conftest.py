"""What holds for every test: no network, one seed, the same random examples in every run."""

from __future__ import annotations

import os

# Read once when the libraries are imported, so before any of them. Processes that a test starts inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# PEFT imports torchao where it is installed; these leave one line of its talk on stderr instead of four.
os.environ["TORCHAO_FORCE_SKIP_LOADING_SO_FILES"] = "1"
os.environ["TORCH_LOGS"] = "-torch.utils._pytree"

import random

import hypothesis
import numpy as np
import pytest
import torch

# Timing depends on the machine, and a failure that comes and goes teaches nothing.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed 0 for every generator before each test, so that order and selection do not matter."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
