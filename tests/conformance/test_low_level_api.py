"""PEFT's suite for state dicts and injection (tests/test_low_level_api.py).

Round trips over every kind of layer, the meta device and FSDP are in tests/tuner/test_custom_state_dict.py.
"""

from __future__ import annotations

import pytest
import torch
from peft import (
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig

from ..tuner.checks import layers, no_warning, same
from ..tuner.models import mined
from .cases import equal_states
from .subjects import WAYS, Family, Subject

LLAMA = Family("LlamaForCausalLM", "Llama", ("q_proj", "v_proj"), "CAUSAL_LM")
CLIP = Family("CLIPTextModelWithProjection", "CLIPText", ("q_proj", "v_proj"))
TIED = Family("OPTForCausalLM", "OPT", ("v_proj",), "CAUSAL_LM")
every_way = pytest.mark.parametrize("way", WAYS)


class Chain(nn.Module):
    """Square linear layers one after the other, under the names given; at two depths where nested."""

    def __init__(self, names: tuple[str, ...], nested: bool = False) -> None:
        super().__init__()
        place = self if not nested else nn.Module()
        if nested:
            self.inner = place
        for name in names:
            place.add_module(name, nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._modules.get("inner", self)._modules.values():
            x = torch.tanh(layer(x))
        return x


def chain(names: tuple[str, ...], nested: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Chain(names, nested).eval()


X = torch.linspace(-1, 1, 15).view(3, 5)


def adapted(base: nn.Module, names: tuple[str, ...], basis: str, adapter: str = "default", draw: int = 0, **more):
    """The chain with a core in each of these layers."""
    if basis == "mined":
        full = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
        more = {"basis": mined(base, full), "core": "block_diagonal", **more}
    else:
        more = {"basis": basis, "dim": 3, **more}
    config = AttrSubspaceConfig(target_modules=list(names), init_weights=False, **more)
    torch.manual_seed(draw)
    return get_peft_model(base, config, adapter_name=adapter).eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


class TestLowLevelFunctional:
    @every_way
    def test_inject_adapter_in_model(self, way):
        subject = Subject(LLAMA, way)
        base = subject.base()
        torch.manual_seed(0)
        model = inject_adapter_in_model(subject.config(), base).eval()
        assert type(model) is type(subject.base())
        assert same(subject.output(model), subject.output(subject.peft()), 1e-6)
        assert all(name.endswith(LLAMA.targets) for name in layers(model)) or "default" in way

    def test_get_peft_model_state_dict(self):
        model = inject_adapter_in_model(Subject(LLAMA, "random").config(), LLAMA.build())
        assert all(".attrsub_" in key for key in get_peft_model_state_dict(model))

    def test_modules_to_save(self):
        names = ("one", "two", "three")
        config = AttrSubspaceConfig(basis="random", dim=3, target_modules=["one"], modules_to_save=["two", "three"])
        model = inject_adapter_in_model(config, chain(names))
        assert isinstance(model.two, ModulesToSaveWrapper) and isinstance(model.three, ModulesToSaveWrapper)
        assert {"two.weight", "two.bias", "three.weight", "three.bias"} <= get_peft_model_state_dict(model).keys()
        assert model.two.weight.shape == (5, 5) and model.three.bias.shape == (5,)


class TestInjectAdapterFromStateDict:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @every_way
    def test_inject_from_state_dict_and_from_config_target_same_layers(self, way, low_cpu_mem_usage):
        subject = Subject(LLAMA, way)
        source = inject_adapter_in_model(subject.config(), subject.base()).eval()
        state = get_peft_model_state_dict(source)
        with no_warning("inconsistency"):
            model = inject_adapter_in_model(
                subject.config(init_weights=True),
                subject.base(),
                state_dict=state,
                low_cpu_mem_usage=low_cpu_mem_usage,
            )
        found = get_peft_model_state_dict(model)
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in state.items()}
        result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys and not [key for key in result.missing_keys if "attrsub" in key]
        assert same(subject.output(model.eval()), subject.output(source), 1e-6)

    def test_inject_from_state_dict_transformers(self):
        subject = Subject(LLAMA, "random")
        source = subject.base()
        source.add_adapter(subject.config())
        state = get_peft_model_state_dict(source)
        model = inject_adapter_in_model(subject.config(), subject.base(), state_dict=state)
        set_peft_model_state_dict(model, state)
        assert same(subject.output(model.eval()), subject.output(source.eval()), 1e-6)

    def test_inject_from_state_dict_transformers_irregular_targets(self):
        subject = Subject(LLAMA, "random")
        config = subject.config(target_modules=r".*\.0\.self_attn\.v_proj|.*\.1\.self_attn\.k_proj")
        state = get_peft_model_state_dict(inject_adapter_in_model(config, subject.base()))
        model = inject_adapter_in_model(config, subject.base(), state_dict=state)
        places = {".".join(name.split(".")[-3:]) for name in layers(model)}
        assert places == {"0.self_attn.v_proj", "1.self_attn.k_proj"}
        assert get_peft_model_state_dict(model).keys() == state.keys()

    @pytest.mark.parametrize("where", ["config", "state_dict"])
    def test_inject_from_state_dict_missing_and_extra_keys_warning(self, where):
        # One of the two names a module more than the other; the state dict decides.
        subject, extra = Subject(LLAMA, "random"), "model.layers.1.self_attn.q_proj"
        state = get_peft_model_state_dict(inject_adapter_in_model(subject.config(), subject.base()))
        more = {}
        if where == "config":
            state = {key: value for key, value in state.items() if not key.startswith(extra)}
        else:
            more = {"exclude_modules": [extra]}
        with pytest.warns(RuntimeWarning, match=rf"{where} contained these additional target modules: \['{extra}'\]"):
            model = inject_adapter_in_model(subject.config(**more), subject.base(), state_dict=state)
        assert get_peft_model_state_dict(model).keys() == state.keys()

    @pytest.mark.parametrize("compile_initial_model", [False, True])
    @pytest.mark.parametrize("way", ["random", "pointer"])
    def test_inject_from_state_dict_compiled_model(self, way, compile_initial_model):
        subject = Subject(LLAMA, way)
        first = torch.compile(subject.base()) if compile_initial_model else subject.base()
        first = inject_adapter_in_model(subject.config(), first)
        state = get_peft_model_state_dict(first)
        second = torch.compile(subject.base())
        second = inject_adapter_in_model(subject.config(init_weights=True), second, state_dict=state)
        found = get_peft_model_state_dict(second)
        bare = {key.removeprefix("_orig_mod."): value.shape for key, value in found.items()}
        assert bare == {key.removeprefix("_orig_mod."): value.shape for key, value in state.items()}

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    @pytest.mark.parametrize("way", ["random", "pointer"])
    def test_inject_from_state_dict_model_with_weight_conversion(self, way, low_cpu_mem_usage):
        # transformers renames the weights of CLIP's text models on loading, and PEFT follows it.
        subject = Subject(CLIP, way)
        source = inject_adapter_in_model(subject.config(), subject.base()).eval()
        state = get_peft_model_state_dict(source)
        target = inject_adapter_in_model(
            subject.config(init_weights=True), subject.base(), low_cpu_mem_usage=low_cpu_mem_usage
        )
        result = set_peft_model_state_dict(target, state, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not result.unexpected_keys and not [key for key in result.missing_keys if "attrsub" in key]
        assert {p.device.type for p in target.parameters()} == {"cpu"}
        assert same(subject.output(target.eval()), subject.output(source), 1e-6)


#: What a key of a state dict may be mistaken for, in every place of a name.
PARTS = ["baz", "attrsub", "attrsub_M", "weight", "bias"]


class TestPeftStateDict:
    @pytest.mark.parametrize("adapter", ["default", "other", "v_proj"])
    @every_way
    def test_get_peft_model_state_dict_removes_adapter_name(self, way, adapter):
        subject = Subject(TIED, way)
        model = subject.peft(adapter, modules_to_save=["lm_head"])
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        assert any(key.endswith(".lm_head.weight") for key in state)
        for key in state:
            assert f".{adapter}." not in key.split("attrsub_")[-1] and "modules_to_save" not in key
            assert key.split(".attrsub_")[0].endswith("proj") or "lm_head" in key or "default" in way

    @pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("basis", ["random", "mined"])
    def test_get_and_set_peft_model_state_dict_names(self, basis, part, nested):
        names = ("foo_linear", f"foo_{part}", f"{part}_foo", f"foo_{part}_foo", f"{part}_foo_{part}")
        self.check_round_trip(names, basis, nested, "default")

    @pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
    @pytest.mark.parametrize("adapter", ["foo", "foo_baz", "attrsub_foo"])
    @pytest.mark.parametrize("basis", ["random", "mined"])
    def test_get_and_set_peft_model_state_dict_adapter_name_same_as_module_name(self, basis, adapter, nested):
        names = ("foo", "foo_baz", "baz_foo", "foo_baz_foo", "attrsub_foo")
        self.check_round_trip(names, basis, nested, adapter)

    def check_round_trip(self, names, basis, nested, adapter):
        source = adapted(chain(names, nested), names, basis, adapter)
        assert len(layers(source)) == 5 and not same(run(source), run(chain(names, nested)), 1e-4)
        state = get_peft_model_state_dict(source, adapter_name=adapter)
        target = adapted(chain(names, nested), names, basis, adapter, draw=1)
        assert not same(run(target), run(source), 1e-4)
        result = set_peft_model_state_dict(target, state, adapter_name=adapter)
        assert not result.unexpected_keys
        assert same(run(target), run(source), 1e-6)
        assert equal_states(get_peft_model_state_dict(target, adapter_name=adapter), state)

    @pytest.mark.parametrize("basis", ["random", "mined"])
    def test_base_model_module_named_like_peft_prefix(self, basis):
        model = adapted(chain(("one", "attrsub_foobar")), ("one",), basis)
        imposter = model.base_model.model.attrsub_foobar
        assert not imposter.weight.requires_grad and not imposter.bias.requires_grad
        state = get_peft_model_state_dict(model)
        assert state and not [key for key in state if "attrsub_foobar" in key]

    def test_trained_modules_to_save_module_named_like_peft_prefix_round_trip(self):
        names = ("one", "attrsub_head")
        source = adapted(chain(names), ("one",), "random", modules_to_save=["attrsub_head"])
        with torch.no_grad():
            source.base_model.model.attrsub_head.modules_to_save["default"].weight.fill_(0.3)
        target = adapted(chain(names), ("one",), "random", draw=1, modules_to_save=["attrsub_head"])
        result = set_peft_model_state_dict(target, get_peft_model_state_dict(source))
        assert not result.unexpected_keys and same(run(target), run(source), 1e-6)

    @pytest.mark.parametrize("basis", ["random", "psv", "mined"])
    def test_set_peft_model_state_dict_preserves_input(self, basis):
        def model(draw):
            return adapted(chain(("one", "two")), ("one",), basis, draw=draw, modules_to_save=["two"])

        state = get_peft_model_state_dict(model(0))
        before = dict(state)
        for draw in (1, 2):
            set_peft_model_state_dict(model(draw), state)
        assert list(state) == list(before) and all(state[key] is value for key, value in before.items())


class TestGetBaseModelStateDict:
    def test_strict_missing_and_unexpected_keys(self):
        model = Subject(LLAMA, "random").peft()
        state = get_base_model_state_dict(model)
        removed, *_ = state
        fewer = {key: value for key, value in state.items() if key != removed}
        more = {**state, "unexpected.weight": torch.zeros(1)}
        for changed, words in ((fewer, "Missing key"), (more, "Unexpected key")):
            with pytest.raises(RuntimeError, match=words):
                set_base_model_state_dict(model, changed, strict=True)
        assert set_base_model_state_dict(model, fewer, strict=False).missing_keys == [removed]
        assert set_base_model_state_dict(model, more, strict=False).unexpected_keys == ["unexpected.weight"]

    @every_way
    def test_multiple_adapters(self, way):
        subject = Subject(LLAMA, way)
        model = subject.peft("one")
        model.add_adapter("two", subject.config(target_modules=["v_proj"]))
        assert get_base_model_state_dict(model).keys() == subject.base().state_dict().keys()
