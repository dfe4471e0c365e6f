"""PEFT's suites for models with a task head (tests/test_seq_classifier.py, tests/test_token_classification_qa.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper
from torch.nn.functional import cross_entropy

from ..tuner.checks import same
from .cases import Disk, Embedded, Identity, adapter_parameters, saved_parameters
from .oracle import Judged
from .subjects import Family, Subject, grid

SEQUENCES = [
    Family("BertForSequenceClassification", "Bert", ("query", "dense"), "SEQ_CLS"),
    Family("LlamaForSequenceClassification", "Llama", ("q_proj", "down_proj"), "SEQ_CLS"),
    Family("GPT2ForSequenceClassification", "GPT2", ("c_attn",), "SEQ_CLS"),
]
TOKENS = [
    Family("BertForTokenClassification", "Bert", ("query", "value"), "TOKEN_CLS"),
    Family("RobertaForTokenClassification", "Roberta", ("query", "value"), "TOKEN_CLS"),
]
ANSWERS = [
    Family("BertForQuestionAnswering", "Bert", ("query", "value"), "QUESTION_ANS"),
    Family("LlamaForQuestionAnswering", "Llama", ("q_proj", "v_proj"), "QUESTION_ANS"),
]
HEADS = ("classifier", "score", "qa_outputs")


def head(model: torch.nn.Module) -> torch.nn.Module:
    """The output layer of the task."""
    found = [getattr(model.get_base_model(), name) for name in HEADS if hasattr(model.get_base_model(), name)]
    assert len(found) == 1
    return found[0]


class Heads(Judged):
    """The head of the task trains in full, per adapter, and is saved with the adapter."""

    def test_modules_to_save_correctly_set(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.pair()
        wrapper = head(model)
        assert isinstance(wrapper, ModulesToSaveWrapper)
        assert wrapper.modules_to_save.keys() == {"default", "other"}
        assert not [name for name in adapter_parameters(model) if any(f".{head}." in name for head in HEADS)]
        with torch.no_grad():
            for parameter in wrapper.modules_to_save["default"].parameters():
                parameter.add_(1.0)
        expected = subject.output(model)
        model.set_adapter("other")
        assert not same(subject.output(model), expected, 1e-3)
        model.save_pretrained(tmp_path)
        assert same(subject.output(subject.load(tmp_path)), expected, 1e-6)

    def test_forward_with_labels(self, subject: Subject) -> None:
        model, inputs = subject.peft(), subject.family.inputs()
        with torch.no_grad():
            if subject.family.task == "QUESTION_ANS":
                starts, ends = torch.tensor([0, 2]), torch.tensor([3, 4])
                output = model(**inputs, start_positions=starts, end_positions=ends)
                expected = (cross_entropy(output.start_logits, starts) + cross_entropy(output.end_logits, ends)) / 2
            else:
                labels = torch.arange(2) if subject.family.task == "SEQ_CLS" else torch.arange(10).view(2, 5) % 3
                output = model(**inputs, labels=labels)
                expected = cross_entropy(output.logits.reshape(-1, 3), labels.reshape(-1))
        assert same(output.loss, expected)
        assert saved_parameters(model)


@pytest.mark.parametrize("subject", grid(SEQUENCES, 0, 2), ids=str)
class TestSequenceClassificationModels(Identity, Disk, Embedded, Heads):
    """What a head changes: what trains, what is saved, what is loaded."""


@pytest.mark.parametrize("subject", grid(TOKENS, 0, 3), ids=str)
class TestTokenClassificationModels(Identity, Heads):
    """What trains, and what is saved."""


@pytest.mark.parametrize("subject", grid(ANSWERS, 0, 3), ids=str)
class TestQuestionAnsweringModels(Identity, Heads):
    """As for tokens; two outputs, one head."""
