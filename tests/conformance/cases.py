"""The cases that PEFT runs on every kind of model, by PEFT's names, as mixins: a suite picks those that apply to it.

PEFT keeps them in tests/testing_common.py. Adapters here are never no-ops, so that "works" always means a result.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from ..tuner.checks import no_warning, same, trainable
from .oracle import Judged
from .subjects import Subject

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
HALVES = [torch.float16, torch.bfloat16]


def adapter_parameters(model: PeftModel, adapter: str = "default") -> dict[str, nn.Parameter]:
    """What the tuner trains for this adapter, without the modules saved in full."""
    prefix = model.base_model.prefix
    found = {n: p for n, p in model.named_parameters() if f".{prefix}" in n and adapter in n.split(".")}
    assert found, f"no parameter of the tuner belongs to {adapter}"
    return found


def saved_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of modules trained in full."""
    return {name for name, _ in model.named_parameters() if ".modules_to_save." in name}


def equal_states(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """The same names with the same values."""
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def objective(output: Tensor) -> Tensor:
    """A loss that a layer norm before it does not make constant."""
    return (output * torch.linspace(-1.0, 1.0, output.shape[-1])).square().mean()


def check_folder(folder: Path, model: PeftModel, weights: str = WEIGHTS_FILE) -> None:
    """A folder of an adapter holds its weights and config, and nothing of the base model."""
    written = {path.name for path in folder.iterdir()}
    assert {weights, "adapter_config.json"} <= written
    assert not written & ({"model.safetensors", "config.json", WEIGHTS_FILE, PICKLE_FILE} - {weights})
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.base_model.model.config._name_or_path
    assert config["inference_mode"] is True and config["task_type"] == model.peft_config["default"].task_type


def check_card(folder: Path, model: PeftModel) -> None:
    """The card of a folder names the library and the base model, as the Hub wants it."""
    head = (folder / "README.md").read_text().split("---")[1]
    assert "library_name: peft" in head and f"base_model: {model.config._name_or_path}" in head


class Identity(Judged):
    """What an adapted model is, and what of it trains."""

    def test_attributes_parametrized(self, subject: Subject) -> None:
        model = subject.peft()
        assert all(callable(getattr(model, name)) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
        assert isinstance(model, PeftModel) and model.get_base_model().config is model.config

    def test_adapter_name(self, subject: Subject) -> None:
        model = subject.peft("test-adapter")
        assert adapter_parameters(model, "test-adapter") and model.active_adapters == ["test-adapter"]
        assert same(subject.output(model), subject.output(subject.peft("other name")), 1e-6)

    def test_prepare_for_training_parametrized(self, subject: Subject) -> None:
        ids = subject.family.inputs()["input_ids"]
        assert not subject.peft().get_input_embeddings()(ids).requires_grad
        prepared = prepare_model_for_kbit_training(subject.base())
        assert not trainable(prepared)
        model = get_peft_model(prepared, subject.config())
        model.enable_input_require_grads()
        assert model.get_input_embeddings()(ids).requires_grad
        assert trainable(model) == adapter_parameters(model).keys() | saved_parameters(model)

    def test_training(self, subject: Subject) -> None:
        model = subject.peft()
        objective(model(**subject.family.inputs())[0]).backward()
        expected = adapter_parameters(model).keys() | saved_parameters(model)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected == trainable(model)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        # The key projection's part of a softmax may cancel; nothing else here does.
        assert all(gradient.any() for name, gradient in gradients.items() if "k_proj" not in name)

    def test_training_layer_indexing(self, subject: Subject, tmp_path: Path) -> None:
        every = adapter_parameters(subject.peft())
        model = subject.peft(layers_to_transform=[0])
        first = adapter_parameters(model)
        assert 0 < len(first) < len(every)
        assert {re.search(r"\.(\d+)\.", name)[1] for name in first} == {"0"}
        objective(model(**subject.family.inputs())[0]).backward()
        assert all(p.grad is not None for p in first.values())
        model.save_pretrained(tmp_path)
        assert same(subject.output(subject.load(tmp_path)), subject.output(model), 1e-6)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_training_gradient_checkpointing(self, subject: Subject, use_reentrant: bool) -> None:
        model = subject.peft().train()
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False

        def gradients() -> dict[str, Tensor]:
            model.zero_grad()
            torch.manual_seed(3)  # of dropout
            objective(model(**subject.family.inputs())[0]).backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        expected = gradients()
        model.prepare_model_for_gradient_checkpointing(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        found = gradients()
        assert found.keys() == expected.keys() == trainable(model)
        assert all(same(found[name], gradient, 1e-4) for name, gradient in expected.items())

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_add_adapter_no_autocast_adapter_dtype(self, subject: Subject, dtype: torch.dtype, tmp_path: Path) -> None:
        model = get_peft_model(subject.base(dtype), subject.config(), autocast_adapter_dtype=False)
        model.add_adapter("added", subject.config(), autocast_adapter_dtype=False)
        model.save_pretrained(tmp_path)
        model.load_adapter(str(tmp_path), adapter_name="loaded", autocast_adapter_dtype=False)
        for name in ("default", "added", "loaded"):
            assert {p.dtype for p in adapter_parameters(model, name).values()} == {dtype}
        assert subject.output(model.eval()).isfinite().all()


class Disk(Judged):
    """What is saved comes back."""

    def test_save_pretrained(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.peft()
        model.save_pretrained(tmp_path)
        with no_warning("missing adapter keys", "peft_attrsub"):
            loaded = subject.load(tmp_path)
        assert equal_states(get_peft_model_state_dict(model), get_peft_model_state_dict(loaded))
        assert same(subject.output(loaded), subject.output(model), 1e-6)
        assert not trainable(loaded)
        check_folder(tmp_path, model)
        check_card(tmp_path, model)

    def test_save_pretrained_pickle(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.peft()
        model.save_pretrained(tmp_path, safe_serialization=False)
        check_folder(tmp_path, model, PICKLE_FILE)
        assert same(subject.output(subject.load(tmp_path)), subject.output(model), 1e-6)

    @pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "pickle"])
    def test_save_pretrained_selected_adapters(
        self, subject: Subject, safe_serialization: bool, tmp_path: Path
    ) -> None:
        model = subject.pair()
        weights = WEIGHTS_FILE if safe_serialization else PICKLE_FILE
        model.save_pretrained(tmp_path / "both", safe_serialization=safe_serialization)
        check_folder(tmp_path / "both", model, weights)
        check_folder(tmp_path / "both" / "other", model, weights)
        loaded = subject.load(tmp_path / "both")
        loaded.load_adapter(str(tmp_path / "both" / "other"), "other")
        for name in ("default", "other"):
            states = [get_peft_model_state_dict(m, adapter_name=name) for m in (model, loaded)]
            assert equal_states(*states)
            model.set_adapter(name)
            loaded.set_adapter(name)
            assert same(subject.output(loaded.eval()), subject.output(model), 1e-6)
        model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
        assert not (tmp_path / "one" / "other").exists()
        assert list(subject.load(tmp_path / "one").peft_config) == ["default"]

    def test_save_pretrained_adapter_name_substring(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.peft()
        expected = set(get_peft_model_state_dict(model))
        for i, name in enumerate(("default2", "other_default", "foodefault_bar", "efaul")):
            torch.manual_seed(i)
            model.add_adapter(name, subject.config())
        model.save_pretrained(tmp_path, selected_adapters=["default"])
        assert load_file(tmp_path / WEIGHTS_FILE).keys() == expected
        assert same(subject.output(subject.load(tmp_path)), subject.output(subject.peft()), 1e-6)

    def test_from_pretrained_config_construction(self, subject: Subject, tmp_path: Path) -> None:
        config = subject.config()
        model = get_peft_model(subject.base(), config).eval()
        model.save_pretrained(tmp_path)
        loaded = subject.load(tmp_path, is_trainable=False, config=config)
        assert loaded.peft_config["default"] is config and config.inference_mode
        assert same(subject.output(loaded), subject.output(model), 1e-6)

    def test_inference_safetensors(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.peft()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        objective(model(**subject.family.inputs())[0]).backward()
        optimizer.step()
        model.save_pretrained(tmp_path, safe_serialization=True)
        trained = subject.output(model)
        assert not same(trained, subject.output(subject.peft()), 1e-6)
        assert same(subject.output(subject.load(tmp_path)), trained, 1e-6)

    def test_peft_model_device_map(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.peft()
        model.save_pretrained(tmp_path)
        loaded = subject.load(tmp_path, device_map={"": "cpu"})
        assert same(subject.output(loaded), subject.output(model), 1e-6)

    def test_load_multiple_adapters(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.peft()
        model.save_pretrained(tmp_path)
        loaded = subject.load(tmp_path)
        for name in ("other", "yet-another"):
            result = loaded.load_adapter(str(tmp_path), adapter_name=name)
            assert not result.missing_keys and not result.unexpected_keys
            loaded.set_adapter(name)
            assert same(subject.output(loaded.eval()), subject.output(model), 1e-6)

    def test_load_model_low_cpu_mem_usage(self, subject: Subject, tmp_path: Path) -> None:
        model = subject.peft()
        model.save_pretrained(tmp_path)
        loaded = subject.load(tmp_path, low_cpu_mem_usage=True)
        loaded.load_adapter(str(tmp_path), adapter_name="other", low_cpu_mem_usage=True)
        assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
        for name in ("default", "other"):
            loaded.set_adapter(name)
            assert same(subject.output(loaded.eval()), subject.output(model), 1e-6)
        bare = subject.base()
        inject_adapter_in_model(subject.config(), bare, low_cpu_mem_usage=True)
        assert {p.device.type for p in bare.parameters()} == {"cpu", "meta"}

    def test_get_base_model_state_dict(self, subject: Subject) -> None:
        base = subject.base()
        original = clones(base.state_dict())
        model = subject.pair()
        assert equal_states(get_base_model_state_dict(model), original)
        with torch.no_grad():
            for name, parameter in model.get_base_model().named_parameters():
                if f".{model.base_model.prefix}" not in name and ".modules_to_save." not in name:
                    parameter.add_(1.0)
        assert not equal_states(get_base_model_state_dict(model), original)
        result = set_base_model_state_dict(model, original, strict=False)
        assert not result.missing_keys and not result.unexpected_keys
        assert equal_states(get_base_model_state_dict(model), original)
        assert same(subject.output(model), subject.output(subject.pair()), 1e-6)


class Embedded(Judged):
    """Models that take embeddings in place of token ids."""

    def test_passing_input_embeds_works(self, subject: Subject) -> None:
        model, inputs = subject.peft("test-adapter"), subject.family.inputs()
        with torch.no_grad():
            expected = model(**inputs)[0]
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
            # Some architectures scale embeddings themselves, so that what is given is taken as it is.
            assert same(model(**inputs)[0], expected, 1e-4)


class Generating(Judged):
    """Models that generate."""

    ask: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}  # noqa: RUF012

    def generate(self, subject: Subject, model: nn.Module, **more: Any) -> tuple[Tensor, Tensor]:
        """The sequences, and the scores of the first new token."""
        inputs = {"input_ids": subject.family.inputs()["input_ids"], **self.ask, **more}
        found = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
        return found.sequences, found.scores[0]

    def test_generate(self, subject: Subject) -> None:
        base, model = subject.base(), subject.peft()
        without, (sequences, scores) = self.generate(subject, base)[1], self.generate(subject, model)
        assert sequences.shape == (2, 5 if subject.family.seq2seq else 9)
        assert not same(scores, without, 1e-3)
        with model.disable_adapter():
            assert same(self.generate(subject, model)[1], without, 1e-6)
        merged = copy.deepcopy(model).merge_and_unload()
        assert same(self.generate(subject, merged)[1], scores, 1e-4)

    def test_generate_pos_args(self, subject: Subject) -> None:
        model, ids = subject.peft(), subject.family.inputs()["input_ids"]
        if subject.family.seq2seq:  # PEFT's own rule for sequence to sequence models
            with pytest.raises(TypeError):
                model.generate(ids, **self.ask)
        else:
            assert torch.equal(model.generate(ids, **self.ask), model.generate(input_ids=ids, **self.ask))

    def test_generate_half_prec(self, subject: Subject) -> None:
        model, inputs = subject.peft(dtype=torch.bfloat16), subject.family.inputs()
        inputs.pop("decoder_input_ids", None)
        assert model.generate(**inputs, **self.ask).shape == (2, 5 if subject.family.seq2seq else 9)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generate_with_mixed_adapter_batches(self, subject: Subject, beams: int) -> None:
        model = subject.pair("adapter0", "adapter1")
        alone = {}
        with model.disable_adapter():
            alone["__base__"] = self.generate(subject, model, num_beams=beams)
        for name in ("adapter0", "adapter1"):
            model.set_adapter(name)
            alone[name] = self.generate(subject, model, num_beams=beams)
        names = ["adapter1", "__base__"]
        sequences, scores = self.generate(subject, model, num_beams=beams, adapter_names=names)
        for i, name in enumerate(names):
            assert torch.equal(sequences[i], alone[name][0][i])
            found = {n: same(scores.view(2, -1)[i], alone[n][1].view(2, -1)[i], 1e-3) for n in alone}
            assert found == {n: n == name for n in alone}
