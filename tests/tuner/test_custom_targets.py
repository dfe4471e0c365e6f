"""Which modules an adapter lands on, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig

from .checks import cores, deltas, every_basis, layers, run, same
from .models import MLP, STACK, Case, ConvNet, Mlp, SharedNames, X

FIRST_UP = "body.layers.0.up"
UPS = {f"body.layers.{i}.up" for i in range(3)}
DOWNS = {f"body.layers.{i}.down" for i in range(3)}
LIFTS = {f"body.lift.{i}" for i in range(3)}
ALL = UPS | DOWNS | LIFTS | {"head"}


def blocks(*numbers: int) -> set[str]:
    """Both layers of these blocks."""
    return {f"body.layers.{i}.{name}" for i in numbers for name in ("up", "down")}


TARGETS = [
    ({"target_modules": ["up"]}, UPS),
    ({"target_modules": ["layers.1.up", "head"]}, {"body.layers.1.up", "head"}),
    ({"target_modules": {"lift.0"}}, {"body.lift.0"}),
    ({"target_modules": r"body\.layers\.[02]\.(up|down)"}, blocks(0, 2)),
    ({"target_modules": "head"}, {"head"}),
    ({"target_modules": "all-linear"}, ALL),
    ({"target_modules": "ALL-LINEAR"}, ALL),
    ({}, ALL),
    ({"target_modules": "all-linear", "exclude_modules": ["head", "up"]}, DOWNS | LIFTS),
    ({"target_modules": "all-linear", "exclude_modules": r"body\.layers\..*"}, LIFTS | {"head"}),
    ({"target_modules": ["up"], "exclude_modules": ["layers.2.up"]}, UPS - {"body.layers.2.up"}),
    ({"target_modules": ["up"], "layers_to_transform": 1}, {"body.layers.1.up"}),
    ({"target_modules": ["up", "down"], "layers_to_transform": [0, 2]}, blocks(0, 2)),
    ({"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "layers"}, {FIRST_UP}),
    ({"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, {FIRST_UP}),
    ({"target_modules": "all-linear", "modules_to_save": ["head"]}, ALL - {"head"}),
    ({"target_modules": ["up", "down"], "modules_to_save": ["layers.0"]}, blocks(1, 2)),
]


@every_basis
@pytest.mark.parametrize(("arguments", "expected"), TARGETS)
def test_targets(arguments, expected, basis):
    model = STACK.peft(basis, **arguments, init_weights=False)
    assert set(model.targeted_module_names) == expected
    assert {name.removeprefix("base_model.model.") for name in layers(model)} == expected
    assert not same(run(model, STACK), run(STACK.base(), STACK))


def test_one_short_name_at_three_places_has_three_cores():
    case = Case("shared", SharedNames, X)
    model = case.peft("random", target_modules=["proj"], init_weights=False)
    assert {tuple(delta.shape) for delta in deltas(model).values()} == {(6, 12), (10, 6), (4, 10)}
    one = case.peft("random", target_modules=["left.proj"])
    assert list(cores(one)) == ["base_model.model.left.proj"]


@every_basis
def test_a_name_that_is_not_there(basis):
    with pytest.raises(ValueError, match=r"nowhere.* not found in the base model"):
        MLP.peft(basis, target_modules=["nowhere"])
    with pytest.raises(ValueError, match=r"nowhere.* not found in the base model"):
        MLP.peft(basis, target_modules=r".*nowhere")


@every_basis
def test_a_layer_index_that_is_not_there(basis):
    with pytest.raises(ValueError, match="layers_to_transform"):
        STACK.peft(basis, target_modules=["up"], layers_to_transform=[7])


@every_basis
def test_everything_excluded(basis):
    with pytest.raises(ValueError, match="All modules were excluded"):
        MLP.peft(basis, target_modules=["up"], exclude_modules=r".*")
    with pytest.raises(ValueError, match="No modules were targeted"):
        MLP.peft(basis, target_modules=["up"], exclude_modules=["up"])


def test_an_exclusion_that_excludes_nothing_warns():
    with pytest.warns(UserWarning, match="no modules were excluded"):
        MLP.peft("random", target_modules=["up"], exclude_modules=["nowhere"])


class Odd(nn.Module):
    """A Linear beside one module of a kind that the method does not carry."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 12)
        self.odd = odd

    def forward(self, x):
        return self.lin(x)


UNSUPPORTED = [
    nn.BatchNorm2d(4),
    nn.LayerNorm(12),
    nn.MultiheadAttention(12, 2),
    nn.LSTM(12, 12),
    nn.ConvTranspose2d(4, 4, 3),
    nn.Bilinear(4, 4, 4),
    nn.EmbeddingBag(10, 4),
    nn.ReLU(),
    nn.Sequential(nn.Linear(4, 4)),
]


@every_basis
@pytest.mark.parametrize("odd", UNSUPPORTED, ids=lambda module: type(module).__name__)
def test_other_kinds_are_refused_by_name(odd, basis):
    with pytest.raises(ValueError, match=type(odd).__name__) as refusal:
        get_peft_model(Odd(odd), AttrSubspaceConfig(basis=basis, dim=2, target_modules=["lin", "odd"]))
    assert "odd" in str(refusal.value)


@every_basis
def test_the_inside_of_an_attention_module_is_refused(basis):
    # torch's attention reads out_proj.weight without calling out_proj: an adapter there would change nothing
    config = AttrSubspaceConfig(basis=basis, dim=2, target_modules=["out_proj"])
    with pytest.raises(ValueError, match="MultiheadAttention") as refusal:
        get_peft_model(Odd(nn.MultiheadAttention(12, 2)), config)
    assert "odd.out_proj" in str(refusal.value)
    config = AttrSubspaceConfig(basis=basis, dim=2, target_modules=r".*(lin|out_proj)", exclude_modules=["out_proj"])
    assert get_peft_model(Odd(nn.MultiheadAttention(12, 2)), config).targeted_module_names == ["lin"]


@every_basis
def test_a_failed_second_adapter_leaves_the_first_alone(basis):
    first = AttrSubspaceConfig(basis=basis, dim=2, target_modules=["lin"], init_weights=False)
    model = get_peft_model(Odd(nn.BatchNorm2d(4)), first)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.ones(2, 12)
    output = model(x)
    with pytest.raises(ValueError, match="BatchNorm2d"):
        model.add_adapter("second", AttrSubspaceConfig(basis=basis, dim=2, target_modules=["odd"]))
    assert list(model.peft_config) == ["default"] == list(model.base_model.peft_config)
    assert model.active_adapters == ["default"]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(x), output)


@every_basis
def test_all_linear_passes_over_convolutions(basis):
    case = Case("conv", lambda: ConvNet(nn.Conv2d(4, 8, 3), (4, 5, 5)), lambda: torch.ones(2, 4, 5, 5))
    assert case.peft(basis, target_modules="all-linear").targeted_module_names == ["head"]


def test_modules_to_save_are_copies_that_train():
    model = MLP.peft("random", target_modules=["up"], modules_to_save=["down"])
    assert model.modules_to_save == {"down"}
    wrapper = model.base_model.model.down
    copy, original = wrapper.modules_to_save["default"], wrapper.original_module
    assert copy.weight is not original.weight and torch.equal(copy.weight, original.weight)
    assert copy.weight.requires_grad and not original.weight.requires_grad
    with torch.no_grad():
        copy.weight.add_(1.0)
    assert not same(run(model, MLP), run(MLP.base(), MLP))
    with model.disable_adapter():
        assert torch.equal(run(model, MLP), run(MLP.base(), MLP))


def test_the_model_given_is_the_model_changed():
    base = Mlp()
    model = get_peft_model(base, AttrSubspaceConfig(basis="random", dim=2, target_modules=["up"]))
    assert model.get_base_model() is base
    assert base.up is next(iter(layers(model).values()))


def test_wrapping_twice_warns():
    base = MLP.base()
    get_peft_model(base, MLP.config("random"))
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        get_peft_model(base, MLP.config("random"), adapter_name="second")
