"""TRL's trainers. `make test-slow` installs trl and its datasets; without them these tests are skipped.

DPO, GRPO, KTO and RLOO copy a trained adapter to one named "ref", by the names of its parameters: everything with
".default." in its name (trl/trainer/dpo_trainer.py, grpo_trainer.py, kto_trainer.py, rloo_trainer.py).
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from .wrapped import adapted, config, every_kind, llama, logits, word_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def arguments(kind, folder, steps=2):
    return kind(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )


def preferences():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: make test-slow installs it")
    rows = [{"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran to some far hill"}] * 4
    return datasets.Dataset.from_list(rows)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@every_kind
def test_sft_trains_and_saves(kind, tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed: make test-slow installs it")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: make test-slow installs it")
    trainer = trl.SFTTrainer(
        model=llama(),
        args=arguments(trl.SFTConfig, tmp_path / "run", steps=4),
        train_dataset=datasets.Dataset.from_list([{"text": "the cat sat on a mat"}] * 8),
        processing_class=tokenizer,
        peft_config=config(kind, tmp_path),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
    assert_close(logits(loaded), logits(trainer.model.eval()))


@every_kind
def test_dpo_reference_is_the_trained_policy(kind, tokenizer, tmp_path):
    """With policy = reference every log ratio is zero: the first loss is log 2, and the rewards are nil."""
    trl = pytest.importorskip("trl", reason="trl is not installed: make test-slow installs it")
    data = preferences()
    model = adapted(kind, tmp_path)
    policy = logits(model)
    trainer = trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, tmp_path / "run"),
        train_dataset=data,
        processing_class=tokenizer,
    )
    held = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert set(held.peft_config) == {"default", "ref"}
    assert_close(logits(held), policy)
    held.base_model.set_adapter("ref")
    reference = logits(held)
    held.base_model.set_adapter("default")
    assert_close(reference, policy)
    with held.disable_adapter():
        assert not torch.allclose(logits(held), policy, atol=1e-3), "a trained adapter differs from the base"
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-4)
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(0.0, abs=1e-5)
    held = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert not torch.allclose(logits(held), policy, atol=1e-4), "the policy is trained"
    held.base_model.set_adapter("ref")
    assert_close(logits(held), reference)


@every_kind
def test_dpo_on_a_fresh_adapter(kind, tokenizer, tmp_path):
    """With a config, the reference is the base without the adapter."""
    trl = pytest.importorskip("trl", reason="trl is not installed: make test-slow installs it")
    data = preferences()
    trainer = trl.DPOTrainer(
        model=llama(),
        args=arguments(trl.DPOConfig, tmp_path / "run", steps=3),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config(kind, tmp_path),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses[-1] < losses[0]
