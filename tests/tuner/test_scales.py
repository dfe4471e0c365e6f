"""The strength of an adapter at run time, next to stock LoRA with the same factors."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from peft_attrsub import AttrSubspaceConfig

from .checks import deltas, layers, run, same
from .mixing import mixed, one_at_a_time
from .models import BY_NAME, MLP, X, pair

ADAPTERS = ("one", "two")


def _tensor(held):
    """A trained tensor, whether it is held as a parameter or by a module."""
    return getattr(held, "weight", held)


def _twins():
    """The same two LoRA adapters, once as stock LoRA and once as plain LoRA parts of our tuner."""
    stock = get_peft_model(MLP.base(), LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]), ADAPTERS[0])
    stock.add_adapter(ADAPTERS[1], LoraConfig(r=2, lora_alpha=7, target_modules=["up", "down"]))
    plain = {"lora_modules": ["up", "down"], "target_modules": []}
    ours = get_peft_model(MLP.base(), AttrSubspaceConfig(**plain, lora_rank=3, lora_alpha=5), ADAPTERS[0])
    ours.add_adapter(ADAPTERS[1], AttrSubspaceConfig(**plain, lora_rank=2, lora_alpha=7))
    theirs = {n: m for n, m in stock.named_modules() if isinstance(m, LoraLayer)}
    torch.manual_seed(3)
    with torch.no_grad():
        for name, layer in layers(ours).items():
            for adapter in ADAPTERS:
                theirs[name].lora_B[adapter].weight.normal_()
                _tensor(layer.attrsub_lora_A[adapter]).copy_(theirs[name].lora_A[adapter].weight)
                _tensor(layer.attrsub_lora_B[adapter]).copy_(theirs[name].lora_B[adapter].weight)
    return stock.eval(), ours.eval(), list(theirs.values()), list(layers(ours).values())


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_scalings_does_what_it_does_to_stock_lora(seed):
    rng = random.Random(seed)
    stock, ours, theirs, mine = _twins()
    for _ in range(12):
        call, factor = rng.choice(["set", "scale", "unscale", "reset", "activate"]), rng.uniform(-2.0, 2.0)
        active = rng.choice([["one"], ["two"], ["one", "two"]])
        adapter = rng.choice([*ADAPTERS, "absent"])
        for model, found in ((stock, theirs), (ours, mine)):
            if call == "activate":
                model.base_model.set_adapter(active)
            for layer in found:
                if call == "set":
                    layer.set_scale(adapter, factor)
                elif call == "scale":
                    layer.scale_layer(factor)
                elif call == "unscale":
                    layer.unscale_layer(factor)
                elif call == "reset":
                    layer.unscale_layer()
        assert same(run(ours, MLP), run(stock, MLP), 1e-4), (call, factor)
    weights = [rng.uniform(-1.0, 1.0), rng.uniform(-1.0, 1.0)]
    for model, type_ in ((stock, "cat"), (ours, rng.choice(["cat", "linear"]))):
        model.add_weighted_adapter(list(ADAPTERS), weights, "sum", combination_type=type_)
        model.set_adapter("sum")
    assert same(run(ours, MLP), run(stock, MLP), 1e-4)


@pytest.mark.parametrize("form", ["factored", "folded"])
@pytest.mark.parametrize("name", ["mlp", "embedding-and-conv1d", "conv2d-and-head", "mlp-spectral-blocks"])
def test_a_scale_acts_wherever_the_update_does_and_is_undone_exactly(name, form):
    case = BY_NAME[name]
    one = {"scaling": 0.7, "forward_mode": form}
    model = pair(case, one, one)
    before, plain = deltas(model, "one"), run(model, case)
    for layer in layers(model).values():
        layer.set_scale("one", 0.3)
    assert all(same(d, 0.3 * before[n]) for n, d in deltas(model, "one").items())
    reference = pair(case, {**one, "scaling": 0.7 * 0.3}, one)
    wanted = run(reference, case)
    assert not same(wanted, plain)
    assert same(run(model, case), wanted)
    names = ["one", "two", "one", "__base__", "two", "one"]
    x = case.inputs()
    names = names[: len(x)]
    assert same(mixed(model, x, names), one_at_a_time(reference, x, names))
    model.set_adapter("one")
    model.merge_adapter()
    assert same(run(model, case), wanted, 1e-4)
    for layer in layers(model).values():
        for change in (lambda x: x.set_scale("one", 2.0), lambda x: x.scale_layer(2.0), lambda x: x.unscale_layer()):
            with pytest.raises(ValueError, match="unmerge"):
                change(layer)
    model.unmerge_adapter()
    for layer in layers(model).values():
        layer.set_scale("one", 1.0)
    assert all(torch.equal(d, before[n]) for n, d in deltas(model, "one").items())


def test_scalings_inside_scalings_come_back_to_the_very_number():
    model = pair(MLP, {"scaling": 0.7}, {"scaling": 1 / 3})
    model.base_model.set_adapter(["one", "two"])
    held = {name: dict(layer.scaling) for name, layer in layers(model).items()}
    rng = random.Random(0)
    for _ in range(50):
        factors = [rng.choice([0, 0.0, 1, rng.uniform(-3, 3), rng.uniform(-3, 3)]) for _ in range(4)]
        for layer in layers(model).values():
            for factor in factors:
                layer.scale_layer(factor)
            for factor in reversed(factors):
                layer.unscale_layer(factor)
        assert held == {name: layer.scaling for name, layer in layers(model).items()}


def test_a_zero_that_was_not_set_cannot_be_undone():
    model = pair(MLP, {}, {})
    for layer in layers(model).values():
        with pytest.raises(ValueError, match=r"unscale_layer\(\)"):
            layer.unscale_layer(0)


def test_scales_follow_their_adapter():
    model = pair(MLP, {"scaling": 2.0}, {})
    for layer in layers(model).values():
        layer.scale_layer(0.5)
        layer.scale_layer(3.0)
    model.delete_adapter("one")
    model.add_adapter("one", MLP.config("random", scaling=5.0, init_weights=False))
    for layer in layers(model).values():
        layer.set_adapter(["one"])
        layer.unscale_layer()
        assert layer.scaling["one"] == 5.0
        layer.scale_layer(0.1)
        layer.unscale_layer(0.1)
        assert layer.scaling["one"] == 5.0
    assert torch.isfinite(model(X())).all()
