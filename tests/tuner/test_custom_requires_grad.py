"""Which parameters ask for a gradient, after every act that may change it. The bases A and B never do."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from .checks import activate, every_basis, every_case, layers, of_adapter, trainable
from .models import BASES, MLP, STACK, Case, TokenModel, ids, mined, pair

UP = {"target_modules": ["up"]}
SAVING = {"target_modules": ["up"], "modules_to_save": ["down"]}
TOKENS = Case("tokens", TokenModel, ids(6, 5))
KINDS = [
    pytest.param(MLP, UP, UP, id="same"),
    pytest.param(MLP, UP, {"target_modules": ["down"]}, id="different"),
    pytest.param(MLP, SAVING, SAVING, id="saved-modules"),
    pytest.param(MLP, UP, SAVING, id="one-saved-module"),
    pytest.param(TOKENS, {"target_modules": ["mix"]}, {"target_modules": ["tokens"]}, id="embedding"),
]
every_kind = pytest.mark.parametrize(("case", "one", "two"), KINDS)


@every_basis
@every_case
def test_a_fresh_adapter_trains_and_nothing_else_does(case, basis):
    model = case.peft(basis)
    assert trainable(model) == of_adapter(model, "default")


@every_basis
@every_case
def test_adding_a_frozen_adapter_freezes_no_other(case, basis):
    model = case.peft(basis)
    model.add_adapter("frozen", case.config(basis, inference_mode=True))
    assert trainable(model) == of_adapter(model, "default")


@every_basis
@every_case
def test_nothing_trains_in_inference_mode(case, basis):
    assert not trainable(case.peft(basis, inference_mode=True))


@every_basis
@every_kind
def test_the_active_adapter_trains(case, one, two, basis):
    model = pair(case, one, two, basis)
    assert trainable(model) == of_adapter(model, "one")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert trainable(model) == of_adapter(model, name)
        model.set_adapter(name, inference_mode=True)
        assert not trainable(model)


@every_basis
@every_kind
def test_disabled_adapters_do_not_train(case, one, two, basis):
    model = pair(case, one, two, basis)
    model.set_adapter("two")
    expected = of_adapter(model, "two")
    with model.disable_adapter():
        assert not trainable(model)
    assert trainable(model) == expected
    model.disable_adapter_layers()
    assert not trainable(model)
    model.enable_adapter_layers()
    assert trainable(model) == expected


@every_basis
def test_two_active_adapters_both_train(basis):
    model = pair(MLP, UP, {"target_modules": ["down"]}, basis)
    activate(model, ["one", "two"])
    assert trainable(model) == of_adapter(model, "one", "two")
    model.delete_adapter("one")
    assert trainable(model) == of_adapter(model, "two")


@every_basis
def test_set_requires_grad(basis):
    model = STACK.peft(basis, "one", target_modules=["layers.0.up"])
    more = {"target_modules": ["layers.0.up", "layers.1.up"], "modules_to_save": ["layers.2.up"]}
    model.add_adapter("two", STACK.config(basis, **more))
    one, two = of_adapter(model, "one"), of_adapter(model, "two")
    assert (len(one), len(two)) == (1, 4)
    model.set_requires_grad("two")
    assert trainable(model) == one | two
    model.set_requires_grad("one", requires_grad=False)
    assert trainable(model) == two
    model.set_requires_grad(["one", "two"], requires_grad=False)
    assert not trainable(model)
    model.set_requires_grad(["one"])
    assert trainable(model) == one


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("arguments", [UP, SAVING], ids=["cores", "saved-modules"])
@pytest.mark.parametrize("basis", BASES)
def test_loading(basis, arguments, is_trainable, low_cpu_mem_usage, tmp_path):
    MLP.peft(basis, **arguments).save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(MLP.base(), tmp_path, is_trainable=is_trainable, **options)

    def expect(*adapters: str) -> None:
        assert trainable(model) == (of_adapter(model, *adapters) if adapters else set())

    expect(*["default"] * is_trainable)
    assert model.peft_config["default"].inference_mode is not is_trainable
    model.load_adapter(tmp_path, adapter_name="other", is_trainable=is_trainable, **options)
    kept = ["default", "other"] if is_trainable else []
    expect(*kept)
    model.load_adapter(tmp_path, adapter_name="opposite", is_trainable=not is_trainable, **options)
    kept = kept or ["opposite"]
    expect(*kept)
    model.add_adapter("added", MLP.config(basis, **arguments))
    expect(*kept)


@pytest.mark.parametrize("basis", BASES)
def test_loading_keeps_what_the_user_set(basis, tmp_path):
    MLP.peft(basis).save_pretrained(tmp_path)
    model = MLP.peft(basis)
    first, second = layers(model).values()
    first.get_base_layer().weight.requires_grad = True
    second.attrsub_M["default"].weight.requires_grad = False
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_adapter(tmp_path, adapter_name="other")
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(after[name] for name in of_adapter(model, "other"))


@pytest.mark.parametrize("basis", [*BASES, "memory"])
def test_the_basis_never_asks_for_a_gradient(basis):
    model = MLP.peft(mined(MLP.base(), ["up", "down"]) if basis == "memory" else basis)
    acts = [
        lambda: None,
        lambda: model.requires_grad_(True),
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default"),
        lambda: model.add_adapter("other", MLP.config("random", seed=3)),
        lambda: model.set_adapter("other"),
        lambda: model.train(),
    ]
    for act in acts:
        act()
        for layer in layers(model).values():
            tensors = [t for name in layer.other_param_names for t in held(getattr(layer, name))]
            assert not any(tensor.requires_grad for tensor in tensors)
    names = {name.split(".")[-3] for name, _ in model.named_parameters() if "attrsub" in name}
    assert names == {"attrsub_M"}


def held(thing) -> list[torch.Tensor]:
    """Every tensor inside a tensor, a container or an object with slots or attributes, two levels deep."""
    found: list[torch.Tensor] = []
    level = [thing]
    for _ in range(3):
        below = []
        for item in level:
            if isinstance(item, torch.Tensor):
                found.append(item)
            elif isinstance(item, torch.nn.Module):
                found.extend([*item.parameters(), *item.buffers()])
            elif hasattr(item, "values"):
                below.extend(item.values())
            elif isinstance(item, (list, tuple)):
                below.extend(item)
            elif hasattr(item, "__dict__"):
                below.extend(vars(item).values())
        level = below
    return found
