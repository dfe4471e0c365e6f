"""transformers' Trainer: resuming and going back to the best model give the numbers of an unbroken run.

Trainer loads a checkpoint's adapter into the adapter that the model has already (`_load_from_checkpoint` and
`_load_best_model` in transformers/trainer.py call `model.load_adapter(folder, name, is_trainable=True)`).
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import peft_attrsub

from .wrapped import KINDS, adapted, every_kind, llama, logits, mine

STEPS = 6


class Sentences(torch.utils.data.Dataset):
    """Twelve sentences of eight random tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, 128, (12, 8), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model: PeftModel, folder: object, steps: int = STEPS, rate: float = 0.05, **more: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@every_kind
def test_resume_equals_an_unbroken_run(kind, tmp_path):
    whole = trainer(adapted(kind, tmp_path, trained=False), tmp_path / "whole")
    whole.train()
    broken = trainer(adapted(kind, tmp_path, trained=False), tmp_path / "broken", steps=4)
    broken.train()
    resumed = trainer(adapted(kind, tmp_path, trained=False), tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == STEPS
    assert_close(losses(resumed), losses(whole), rtol=1e-5, atol=1e-6)
    assert_close(logits(resumed.model.eval()), logits(whole.model.eval()), rtol=1e-5, atol=1e-5)


@every_kind
def test_best_model_comes_back(kind, tmp_path):
    """The highest loss counts as the best here: that is the first checkpoint, whatever the adapter learns."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(adapted(kind, tmp_path, False), tmp_path / "run", eval_strategy="steps", eval_steps=2, **best)
    run.train()
    *earlier, last = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    found = max(earlier)
    assert found > last + 1e-4, "the best model must not be the last"
    assert run.evaluate()["eval_loss"] == pytest.approx(found, rel=1e-6)
    reloaded = PeftModel.from_pretrained(llama(), run.state.best_model_checkpoint).eval()
    assert_close(logits(run.model.eval()), logits(reloaded))


@pytest.mark.parametrize("resume", ["trainer", "load_adapter"])
def test_a_rebuilt_basis_is_refused(resume, tmp_path):
    """Between stop and resume the folder is mined anew: the cores belong to directions that are gone."""
    stopped = trainer(adapted("pointer", tmp_path, trained=False), tmp_path / "run", steps=2)
    stopped.train()
    mine(tmp_path, seed=50)
    model = adapted("pointer", tmp_path, trained=False)
    run, checkpoint = trainer(model, tmp_path / "run"), str(tmp_path / "run" / "checkpoint-2")
    load = {
        "trainer": lambda: run.train(resume_from_checkpoint=checkpoint),
        "load_adapter": lambda: model.load_adapter(checkpoint, "default"),
    }[resume]
    with pytest.raises(peft_attrsub.BasisError, match="basis"):
        load()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_checkpoint_runs_on_its_own(kind, tmp_path):
    run = trainer(adapted(kind, tmp_path, trained=False), tmp_path / "run", steps=2)
    run.train()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "run" / "checkpoint-2").eval()
    assert_close(logits(loaded), logits(run.model.eval()))
