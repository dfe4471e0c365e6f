"""The judge of the cases: a failure of ours alone is a failure, one that stock LoRA shares is skipped."""

from __future__ import annotations

import pytest

from .oracle import Judged, ours_alone
from .subjects import Family, Subject

SUBJECT = Subject(Family("BertModel", "Bert", ("query",)), "random")


class Cases(Judged):
    def test_both_fail(self, subject, tmp_path):
        (tmp_path / "mine").mkdir()  # would fail if both had one folder
        raise KeyError("shared")

    def test_other_error(self, subject):
        raise ValueError("lora") if subject.is_stock else KeyError("ours")

    def test_ours_fails(self, subject):
        assert subject.is_stock, "ours"

    def test_missing_error(self, subject):
        with pytest.raises(ValueError, match="too deep"):
            subject.base() if not subject.is_stock else int("too deep")

    def test_works(self, subject):
        assert not subject.is_stock, "the second run is for failures only"

    @ours_alone
    def test_unjudged(self, subject):
        raise KeyError("ours")


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("test_both_fail", pytest.skip.Exception, "stock LoRA fails as well.*KeyError: 'shared'"),
        ("test_other_error", KeyError, "ours"),
        ("test_ours_fails", AssertionError, "ours"),
        ("test_missing_error", pytest.fail.Exception, "DID NOT RAISE"),
        ("test_unjudged", KeyError, "ours"),
    ],
)
def test_a_failed_case_is_run_under_stock_lora(case, error, words, tmp_path):
    more = {"tmp_path": tmp_path} if case == "test_both_fail" else {}
    with pytest.raises(error, match=words):
        getattr(Cases(), case)(SUBJECT, **more)


def test_a_case_that_works_is_run_once():
    Cases().test_works(SUBJECT)


@pytest.mark.parametrize("changes", [{}, {"init_weights": True, "layers_to_transform": [0]}])
def test_stock_lora_adapts_the_same_modules(changes):
    ours, stock = (s.config(**changes) for s in (SUBJECT, SUBJECT.stock()))
    assert stock.peft_type.value == "LORA" and stock.target_modules == ours.target_modules
    assert stock.init_lora_weights is ours.init_weights and stock.layers_to_transform == ours.layers_to_transform
