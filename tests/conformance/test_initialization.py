"""PEFT's suite for the start of an adapter (tests/test_initialization.py), as far as it is not about one method.

Not here: LoRA's own ways to draw its matrices and its patterns of ranks. Hot swapping is in
tests/tuner/test_hotswap.py, names inside the prefix in tests/tuner/test_custom_config.py.
"""

from __future__ import annotations

import functools
import random
import re
import warnings

import peft
import pytest
import torch
from peft import (
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig

from ..tuner.checks import learn, no_warning, same, trainable
from ..tuner.models import MLP, Case
from .cases import adapter_parameters
from .oracle import Judged
from .subjects import STOCK, WAYS, Family, Subject, grid

LLAMA = Family("LlamaForCausalLM", "Llama", ("q_proj", "down_proj"), "CAUSAL_LM")
BART = Family("BartForConditionalGeneration", "Bart", ("q_proj", "fc1"), "SEQ_2_SEQ_LM")
RANDOM = Subject(LLAMA, "random")
every_subject = pytest.mark.parametrize("subject", grid([LLAMA], 1, 0), ids=str)


def both(**arguments):
    """Ours and stock LoRA, for cases where LoRA says what is right."""
    return pytest.mark.parametrize("subject", [RANDOM, RANDOM.stock()], ids=str, **arguments)


@every_subject
class TestInitWeights(Judged):
    def test_lora_linear_init_default(self, subject):
        assert same(subject.output(subject.peft(init_weights=True)), subject.output(subject.base()), 1e-6)

    def test_lora_linear_false(self, subject):
        assert not same(subject.output(subject.peft(init_weights=False)), subject.output(subject.base()), 1e-3)

    def test_modules_to_save_targets_lora_layer_raises(self, subject):
        # A module saved in full that has the adapter's name would be found inside the adapted layers.
        with pytest.raises(ValueError, match="does not conflict with any of the targeted modules"):
            subject.peft("foobar", modules_to_save=["foobar"])


class TestNoInfiniteRecursionDeepspeed:
    @pytest.mark.parametrize("name", [name for name in peft.__all__ if name.startswith("PeftModel")])
    def test_no_infinite_recursion(self, name, monkeypatch):
        # DeepSpeed wraps __init__ and asks for an attribute before the module has any.
        model_class = getattr(peft, name)
        original = model_class.__init__

        @functools.wraps(original)
        def asking(self, *args, **more):
            assert not hasattr(self, "no such attribute")
            original(self, *args, **more)

        monkeypatch.setattr(model_class, "__init__", asking)
        base = nn.Module()
        base.linear = nn.Linear(10, 10)
        base.prepare_inputs_for_generation = base._prepare_encoder_decoder_kwargs_for_generation = None
        assert trainable(model_class(base, AttrSubspaceConfig(basis="random", dim=3, target_modules=["linear"])))


class TestCustomModelConfigWarning:
    def test_warning_name(self):
        for subject, name in ((RANDOM, "nobody/Llama"), (MLP, "None")):
            base = subject.base()
            config = subject.config() if subject is RANDOM else MLP.config("random")
            with no_warning("renamed"):
                get_peft_model(base, config)
            config.base_model_name_or_path = "custom_name"
            with pytest.warns(UserWarning, match=f"renamed from 'custom_name' to '{name}'"):
                get_peft_model(subject.base(), config)


@every_subject
class TestLowCpuMemUsage(Judged):
    # Loading is in the common cases; here is what starts on the meta device.
    def test_get_peft_model_low_cpu_mem_usage_works(self, subject):
        model = get_peft_model(subject.base(), subject.config(), low_cpu_mem_usage=True)
        assert {p.device.type for p in adapter_parameters(model).values()} == {"meta"}
        set_peft_model_state_dict(model, get_peft_model_state_dict(subject.peft()), low_cpu_mem_usage=True)
        assert same(subject.output(model.eval()), subject.output(subject.peft()), 1e-6)

    def test_inject_adapter_low_cpu_mem_usage_works(self, subject):
        source = subject.peft()
        model = subject.base()
        inject_adapter_in_model(subject.config(), model, low_cpu_mem_usage=True)
        assert {p.device.type for p in model.parameters()} == {"meta", "cpu"}
        state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(source).items()}
        assert not set_peft_model_state_dict(model, state, low_cpu_mem_usage=True).unexpected_keys
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert same(subject.output(model.eval()), subject.output(source), 1e-6)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_mixed_model_from_pretrained_low_cpu_mem_usage_works(self, subject, low_cpu_mem_usage, tmp_path):
        source = subject.peft()
        source.save_pretrained(tmp_path)
        try:
            model = PeftMixedModel.from_pretrained(subject.base(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        except ValueError as error:  # PEFT's list of methods that mix is closed: then one sentence
            assert re.search("mixed models|PeftMixedModel", str(error))
            return
        assert same(subject.output(model.eval()), subject.output(source), 1e-6)


@every_subject
class TestMissingKeys(Judged):
    def test_from_pretrained_missing_keys_warning(self, subject, tmp_path):
        model = subject.peft()
        removed = next(iter(adapter_parameters(model)))
        state = {name: value for name, value in model.state_dict().items() if name != removed}
        model.state_dict = lambda: state
        model.save_pretrained(tmp_path)
        # Warn or raise, but name the module.
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                subject.load(tmp_path)
            except Exception as error:
                told = [*told, error]
        module = removed.split(f".{model.base_model.prefix}")[0].removeprefix("base_model.model.")
        assert [entry for entry in told if module in str(getattr(entry, "message", entry))]


def factors(model: nn.Module, original: dict[str, Tensor], adapter: str) -> set[float]:
    """What the updates of an adapter are, as multiples of the original ones."""
    found = set()
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            delta, first = layer.get_delta_weight(adapter), original[f"{adapter} {name}"]
            found.add(round(float((delta * first).sum() / first.square().sum()), 4))
            assert same(delta, first * max(found), 1e-4)
    return found


class TestScaling:
    """set_scale, scale_layer and unscale_layer do what they do in LoRA, which is the oracle."""

    def play(self, subject: Subject, moves: list[tuple]) -> list:
        model = subject.pair("default", "other", target_modules=["q_proj"])
        tuned = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        original = {f"{a} {name}": m.get_delta_weight(a) for name, m in tuned.items() for a in ("default", "other")}
        base, story = subject.output(subject.base()), []
        for move, *arguments in moves:
            if move == "set_adapter":
                model.set_adapter(*arguments)
            else:
                for layer in tuned.values():
                    getattr(layer, move)(*arguments)
            story.append([factors(model, original, a) for a in ("default", "other")])
        # The forward pass follows, in whichever way it is computed.
        output = subject.output(model)
        assert not same(output, base, 1e-4)
        assert same(subject.output(model.merge_and_unload()), output, 1e-4)
        return story

    @pytest.mark.parametrize("way", WAYS)
    def test_scaling_simple_multiple_times_and_multiple_adapters(self, way):
        simple = [("scale_layer", 2), ("unscale_layer", None), ("set_scale", "default", 3), ("unscale_layer", 3)]
        times = [
            ("scale_layer", 3),
            ("scale_layer", 2),
            ("unscale_layer", 3),
            ("unscale_layer",),
            ("unscale_layer", None),
        ]
        again = [("set_scale", "default", 2), ("set_scale", "default", 3)]
        several = [
            ("set_scale", "other", 2),
            ("set_scale", "default", 0.25),
            ("unscale_layer", None),
            ("scale_layer", 2),
        ]
        switched = [("set_adapter", "other"), ("unscale_layer", None), ("scale_layer", 3)]
        moves = [*simple, *times, *again, *several, *switched]
        assert self.play(Subject(LLAMA, way), moves) == self.play(Subject(LLAMA, STOCK), moves)

    def test_scaling_at_random(self):
        draw = random.Random(0)
        for _ in range(5):
            moves = []
            for _ in range(8):
                adapter, factor = draw.choice(["default", "other"]), draw.choice([0.5, 1, 2, 3])
                moves.append(
                    draw.choice(
                        [
                            ("set_scale", adapter, factor),
                            ("scale_layer", factor),
                            ("unscale_layer", draw.choice([None, factor])),
                            ("set_adapter", adapter),
                        ]
                    )
                )
            assert self.play(RANDOM, moves) == self.play(RANDOM.stock(), moves), moves


def tied(family: Family) -> nn.Module:
    """The family's model with its embeddings tied."""
    model = family.build()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


class TestWeightTying:
    """`ensure_weight_tying`: stock LoRA and ours."""

    NAMES = (["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"])

    @both()
    @pytest.mark.parametrize("names", NAMES, ids=str)
    def test_weight_tying_tied_model(self, subject, names):
        model = get_peft_model(tied(LLAMA), subject.config(modules_to_save=names, ensure_weight_tying=True))
        inner = model.base_model.model
        embedding, head = inner.model.embed_tokens, inner.lm_head
        assert isinstance(embedding, ModulesToSaveWrapper) and isinstance(head, ModulesToSaveWrapper)
        one, two = (wrapper.modules_to_save["default"].weight for wrapper in (embedding, head))
        assert one is two or one.data_ptr() == two.data_ptr()

    @both()
    @pytest.mark.parametrize("names", NAMES, ids=str)
    def test_weight_tying_tied_model_target_modules(self, subject, names):
        targets = ["q_proj", *names]
        model = get_peft_model(tied(LLAMA), subject.config(target_modules=targets, ensure_weight_tying=True)).eval()
        inner = model.base_model.model
        assert isinstance(inner.model.embed_tokens, BaseTunerLayer) and isinstance(inner.lm_head, BaseTunerLayer)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**LLAMA.inputs())[0].square().mean().backward()
        optimizer.step()
        one, two = (layer.get_delta_weight("default") for layer in (inner.model.embed_tokens, inner.lm_head))
        assert one.any() and same(one, two, 1e-6)

    @both()
    def test_weight_tying_tied_model_no_embed(self, subject):
        with pytest.warns(UserWarning, match="no tied modules are added"):
            model = get_peft_model(tied(LLAMA), subject.config(ensure_weight_tying=True))
        inner = model.base_model.model
        assert inner.lm_head.weight is inner.model.embed_tokens.weight

    @both()
    @pytest.mark.parametrize("names", NAMES[:2], ids=str)
    def test_alt_weight_tying_tied_model(self, subject, names):
        # Not asked to tie a tied model, or asked to tie one that is not: a warning, and nothing tied.
        for base, ensure in ((tied(LLAMA), False), (LLAMA.build(), True)):
            with pytest.warns(UserWarning, match="tie"):
                model = get_peft_model(base, subject.config(modules_to_save=names, ensure_weight_tying=ensure))
            inner = model.base_model.model
            wrapped = {isinstance(m, ModulesToSaveWrapper) for m in (inner.lm_head, inner.model.embed_tokens)}
            assert wrapped == {True, False}

    @both()
    @pytest.mark.parametrize("names", NAMES[:2], ids=str)
    def test_weight_tying_enc_dec_modules_to_save(self, subject, names):
        subject = Subject(BART, subject.way)
        model = get_peft_model(tied(BART), subject.config(modules_to_save=names, ensure_weight_tying=True))
        inner = model.base_model.model
        places = (
            inner.model.shared,
            inner.model.encoder.embed_tokens,
            inner.model.decoder.embed_tokens,
            inner.lm_head,
        )
        assert all(isinstance(place, ModulesToSaveWrapper) for place in places)
        assert len({place.modules_to_save["default"].weight.data_ptr() for place in places}) == 1


class TestTrainableTokens:
    """`trainable_token_indices`: some rows of an embedding train with the adapter."""

    @both()
    @pytest.mark.parametrize("given", [[3, 17], {"embed_tokens": [3, 17]}], ids=["list", "dict"])
    def test_only_params_are_updated(self, subject, given, tmp_path):
        model = subject.peft(trainable_token_indices=given)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, TrainableTokensWrapper)
        every = torch.arange(40)
        before = embedding(every).detach().clone()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(**LLAMA.inputs())[0].square().mean().backward()
        optimizer.step()
        moved = (embedding(every).detach() != before).any(dim=1).nonzero().flatten()
        assert moved.tolist() == [3, 17]
        expected = subject.output(model)
        model.save_pretrained(tmp_path)
        loaded = subject.load(tmp_path)
        assert same(subject.output(loaded), expected, 1e-6)
        with loaded.disable_adapter():
            assert same(subject.output(loaded), subject.output(subject.base()), 1e-6)
        assert same(subject.output(loaded.merge_and_unload()), expected, 1e-4)

    @both()
    def test_trainable_token_indices_targets_head_and_embedding(self, subject):
        model = subject.peft(trainable_token_indices={"lm_head": [0], "embed_tokens": [0]})
        names = [name for name in trainable(model) if "trainable_tokens" in name]
        assert len(names) == 2

    @both()
    def test_set_adapter_non_overlapping_trainable_token_indices(self, subject):
        model = subject.peft("one", trainable_token_indices=[3])
        model.add_adapter("two", subject.config(trainable_token_indices=[17]))
        rows = []
        for name in ("one", "two"):
            model.set_adapter(name)
            rows.append({n.rpartition(".")[2] for n in trainable(model) if "trainable_tokens" in n})
        assert rows == [{"one"}, {"two"}]


class TestTargetParameters:
    def test_target_parameters_are_refused_or_adapted(self):
        # Stacked weights of experts that are no modules: an adapter, or a sentence that names the option.
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.up = nn.Linear(12, 12)
                self.stack = nn.Parameter(torch.randn(3, 12, 4))

            def forward(self, x: Tensor) -> Tensor:
                return torch.einsum("bi,eio->bo", self.up(x), self.stack)

        case = Case("experts", Experts, MLP.sample)
        LoraConfig(r=2, target_modules=[], target_parameters=["stack"])
        try:
            config = case.config("random", target_parameters=["stack"], target_modules=["up"], init_weights=False)
        except ValueError as error:
            assert "target_parameters" in str(error)
        else:
            model = get_peft_model(case.base(), config)
            learn(model, case)
            assert isinstance(model, PeftModel) and any("stack" in name for name in trainable(model))
