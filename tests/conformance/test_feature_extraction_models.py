"""PEFT's suite for encoders without a head (tests/test_feature_extraction_models.py)."""

from __future__ import annotations

import pytest

from .cases import Disk, Embedded, Identity
from .merging_cases import Merging
from .subjects import Family, grid

TASK = "FEATURE_EXTRACTION"
FAMILIES = [
    Family("BertModel", "Bert", ("query", "value"), TASK),
    Family("RobertaModel", "Roberta", ("key", "intermediate.dense"), TASK),
    Family("DebertaModel", "Deberta", ("in_proj",), TASK),
    Family("DebertaV2Model", "DebertaV2", ("query_proj", "value_proj"), TASK),
]


@pytest.mark.parametrize("subject", grid(FAMILIES, 0, 2), ids=str)
class TestPeftFeatureExtractionModel(Identity, Disk, Merging, Embedded):
    """Every common case; there is nothing to generate."""
