"""PEFT's suite for sequence to sequence models (tests/test_encoder_decoder_models.py)."""

from __future__ import annotations

import pytest

from .cases import Disk, Generating, Identity
from .merging_cases import Merging
from .subjects import Family, grid

TASK = "SEQ_2_SEQ_LM"
FAMILIES = [
    Family("BartForConditionalGeneration", "Bart", ("q_proj", "fc1"), TASK),
    Family("T5ForConditionalGeneration", "T5", ("q", "v", "wi"), TASK),
]


@pytest.mark.parametrize("subject", grid(FAMILIES, 0, 2), ids=str)
class TestEncoderDecoderModels(Identity, Disk, Merging, Generating):
    """Every common case but embeddings as input, which PEFT's sequence to sequence wrapper is not asked for."""
