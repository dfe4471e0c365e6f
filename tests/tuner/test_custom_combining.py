"""Combining adapters into one: on a shared basis sums of adapters are sums of cores, exactly."""

from __future__ import annotations

import pytest
import torch

from .checks import deltas, run, same
from .models import BASES, MLP, pair


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.0, 1.0], [5.0, 0.01], [-1.0, -1.0], [0.5, -0.3]], ids=str)
@pytest.mark.parametrize("basis", BASES)
def test_a_weighted_adapter_is_the_weighted_sum(basis, weights):
    model = pair(MLP, {"scaling": 2.0}, {"scaling": 4.0}, basis)
    model.add_weighted_adapter(["one", "two"], weights, "sum")
    assert model.active_adapters == ["one"]
    first, second = deltas(model, "one"), deltas(model, "two")
    for name, delta in deltas(model, "sum").items():
        assert same(delta, weights[0] * first[name] + weights[1] * second[name])
    model.set_adapter("sum")
    assert torch.isfinite(run(model, MLP)).all()


def test_a_weighted_adapter_of_one():
    model = pair(MLP, {}, {})
    model.add_weighted_adapter(["one"], [-1.5], "back")
    assert all(same(delta, -1.5 * deltas(model, "one")[name]) for name, delta in deltas(model, "back").items())


def test_a_weighted_adapter_cancels():
    model = pair(MLP, {}, {})
    model.add_weighted_adapter(["one", "one"], [1.0, -1.0], "nothing")
    model.set_adapter("nothing")
    assert same(run(model, MLP), run(MLP.base(), MLP), 1e-6)


def test_a_weighted_adapter_takes_the_saved_module_of_the_one_that_has_it():
    model = MLP.peft("random", "one", target_modules=["up"], modules_to_save=["down"], init_weights=False)
    with torch.no_grad():
        model.base_model.model.down.modules_to_save["one"].weight.add_(1.0)
    model.add_adapter("two", MLP.config("random", target_modules=["up"], init_weights=False))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    saved = model.base_model.model.down.modules_to_save
    assert set(saved) == {"one", "sum"}
    model.set_adapter("sum")
    assert torch.isfinite(run(model, MLP)).all()


def test_a_weighted_adapter_of_two_saved_modules_is_refused():
    # a module trained in full is not a sum of updates: which of the two copies is meant cannot be known
    saving = {"target_modules": ["up"], "modules_to_save": ["down"]}
    model = pair(MLP, saving, saving)
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"one", "two"}


@pytest.mark.parametrize("basis", BASES)
def test_cat_and_linear_are_the_same_exact_sum(basis):
    model = pair(MLP, {"scaling": 2.0, "core": "block_diagonal"}, {"scaling": 0.5}, basis)
    for kind in ("linear", "cat"):
        model.add_weighted_adapter(["one", "two"], [0.5, -2.0], kind, combination_type=kind)
    first, second, cat = deltas(model, "one"), deltas(model, "two"), deltas(model, "cat")
    for name, delta in deltas(model, "linear").items():
        assert torch.equal(delta, cat[name])
        assert same(delta, 0.5 * first[name] - 2.0 * second[name])


KINDS = ["svd", "ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune", "magnitude_prune_svd", "Linear"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_combinations_are_refused_with_those_that_work(kind):
    model = pair(MLP, {}, {})
    with pytest.raises(ValueError, match=f"{kind!r}.*'linear' or 'cat'"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type=kind)
    assert set(model.peft_config) == {"one", "two"}


@pytest.mark.parametrize(
    ("adapters", "weights", "word"),
    [
        (["one", "two"], [1.0], "one weight each"),
        ([], [], "one weight each"),
        (["one", "three"], [1.0, 1.0], "'three'"),
        (["one", "two"], [1.0, float("nan")], "finite"),
    ],
)
def test_a_sum_that_is_asked_for_wrongly_leaves_the_model_alone(adapters, weights, word):
    model = pair(MLP, {}, {})
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=word):
        model.add_weighted_adapter(adapters, weights, "sum")
    assert set(model.peft_config) == {"one", "two"} and set(model.state_dict()) == before
