"""One adapter on every kind of model: start, names, training, switching off.

The behaviours are those PEFT's own suite asks of a method for custom models; the tests are ours.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from peft_attrsub import AttrSubspaceModel

from .checks import (
    base_weights,
    cores,
    deltas,
    every_basis,
    every_case,
    layers,
    learn,
    loss,
    of_adapter,
    run,
    same,
    trainable,
)
from .models import MLP


@every_basis
@every_case
def test_is_a_peft_model(case, basis):
    model = case.peft(basis)
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, AttrSubspaceModel)
    assert model.base_model.prefix == "attrsub_"
    assert model.active_peft_config.peft_type == "ATTRSUB"
    assert set(layers(model)) == {f"base_model.model.{name}" for name in model.targeted_module_names}


@every_case
def test_the_adapter_name_ends_every_core_name(case):
    model = case.peft("random", adapter="my-adapter")
    mine = [name for name, _ in model.named_parameters() if ".attrsub_M.my-adapter" in name]
    assert len(mine) == len(layers(model))
    assert all(name.endswith(".attrsub_M.my-adapter.weight") for name in mine)
    assert not any("default" in name for name, _ in model.named_parameters())


@every_basis
@every_case
def test_the_adapter_name_changes_nothing_else(case, basis):
    outputs, states = [], []
    for name in ("default", "adapter", "other-name"):
        model = case.peft(basis, adapter=name, draw=3, init_weights=False)
        outputs.append(run(model, case))
        states.append({key.replace(f".{name}", ".NAME"): value for key, value in model.state_dict().items()})
    assert not same(outputs[0], run(case.base(), case))
    for output, state in zip(outputs[1:], states[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


@every_case
def test_layers_show_the_base_layer(case):
    for name, layer in layers(case.peft("random")).items():
        base = layer.get_base_layer()
        assert layer.weight is base.weight, name
        if hasattr(base, "in_features"):
            assert (layer.in_features, layer.out_features) == (base.in_features, base.out_features)
        if hasattr(base, "in_channels"):
            assert (layer.in_features, layer.out_features) == (base.in_channels, base.out_channels)
        if hasattr(base, "num_embeddings"):
            assert (layer.in_features, layer.out_features) == (base.num_embeddings, base.embedding_dim)
        if isinstance(base, Conv1D):
            assert (layer.in_features, layer.out_features) == tuple(base.weight.shape)
        if hasattr(base, "bias"):
            assert layer.bias is base.bias


@every_basis
@every_case
def test_a_new_adapter_is_a_no_op(case, basis):
    expected = run(case.base(), case)
    model = case.peft(basis)
    assert same(run(model, case), expected, 1e-6)
    assert all(not delta.any() for delta in deltas(model).values())


@every_basis
@every_case
def test_init_weights_false_is_not_a_no_op(case, basis):
    output = run(case.peft(basis, init_weights=False), case)
    assert torch.isfinite(output).all()
    assert not same(output, run(case.base(), case), 1e-4)


@every_basis
@every_case
def test_gradients_reach_the_cores_and_saved_modules_alone(case, basis):
    model = case.peft(basis, init_weights=False).train()
    model(case.inputs()).square().sum().backward()
    assert trainable(model) == of_adapter(model, "default")
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trainable(model)
    assert all(core.grad.any() and torch.isfinite(core.grad).all() for core in cores(model).values())


@every_basis
@every_case
def test_only_the_cores_and_saved_modules_learn(case, basis):
    model = case.peft(basis)
    before = copy.deepcopy(model)
    learn(model, case)
    assert loss(run(model, case)) < loss(run(before, case))
    learned = of_adapter(model, "default")
    old = before.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, old[name]) != (name in learned), name


@every_basis
@every_case
def test_the_basis_does_not_learn(case, basis):
    # dW = A M B^T: the same M before and after training gives the same bits only if A and B stayed
    model = case.peft(basis, init_weights=False)
    start = {name: core.detach().clone() for name, core in cores(model).items()}
    expected = deltas(model)
    learn(model, case)
    assert not all(torch.equal(core, start[name]) for name, core in cores(model).items())
    with torch.no_grad():
        for name, core in cores(model).items():
            core.copy_(start[name])
    assert all(torch.equal(delta, expected[name]) for name, delta in deltas(model).items())


@every_case
def test_a_basis_is_no_parameter_and_a_buffer_only_where_it_is_stored(case):
    model, base = case.peft("random"), case.base()
    extra = of_adapter(model, "default")
    saved = {name for name in extra if "modules_to_save" in name}
    buffers = {name for name, _ in model.named_buffers() if "attrsub_" in name.rpartition(".default")[0]}
    endings = ("attrsub_A.default", "attrsub_B.default", "attrsub_M.default.basis")
    assert len(buffers) == 3 * len(layers(model)) and all(name.endswith(endings) for name in buffers)
    pointing = case.peft("random", save_basis=False)
    names = {name for name, _ in pointing.named_buffers()} - {f"base_model.model.{n}" for n, _ in base.named_buffers()}
    assert not any(name.endswith(endings[:2]) for name in names)
    assert len(list(model.named_parameters())) == len(list(base.named_parameters())) + len(extra)
    assert len(extra - saved) == len(layers(model))
    assert model.get_nb_trainable_parameters()[0] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if name in extra
    )


def test_the_core_is_a_square_of_the_asked_dimension():
    for dim in (1, 2, 4):
        shapes = {tuple(core.shape) for core in cores(MLP.peft("random", dim=dim)).values()}
        assert shapes == {(dim, dim)}


def test_the_dimension_cannot_exceed_the_weight():
    # down is 4 x 20: no more than four directions exist on its output side
    model = MLP.peft("psv", dim=16, init_weights=False)
    for name, core in cores(model).items():
        n, m = layers(model)[name].get_base_layer().weight.shape
        assert core.shape[0] <= n and core.shape[1] <= m
    model.merge_adapter()
    assert torch.isfinite(run(model, MLP)).all()


def test_scaling_scales_the_update():
    one = MLP.peft("psv", init_weights=False)
    three = MLP.peft("psv", init_weights=False, scaling=3.0)
    for name, delta in deltas(one).items():
        assert same(deltas(three)[name], 3.0 * delta)


def test_dropout_acts_in_training_only():
    model = MLP.peft("random", target_modules=["up"], dropout=0.5, init_weights=False)
    model.base_model.model.drop.p = 0.0  # leaves the adapter's dropout as the only noise
    assert torch.equal(run(model, MLP), run(model, MLP))
    model.train()
    assert not same(run(model, MLP), run(model, MLP))


@every_basis
@every_case
def test_disabled_is_the_base_model(case, basis):
    expected = run(case.base(), case)
    model = case.peft(basis)
    learn(model, case)
    trained = run(model, case)
    assert not same(trained, expected)
    with model.disable_adapter():
        assert torch.equal(run(model, case), expected)
    assert torch.equal(run(model, case), trained)
    model.disable_adapter_layers()
    assert torch.equal(run(model, case), expected)
    model.enable_adapter_layers()
    assert torch.equal(run(model, case), trained)


@every_basis
@every_case
def test_disabled_while_merged_is_the_base_model(case, basis):
    expected = run(case.base(), case)
    model = case.peft(basis)
    learn(model, case)
    trained = run(model, case)
    weights = base_weights(model)
    model.merge_adapter()
    assert not all(torch.equal(weights[name], weight) for name, weight in base_weights(model).items())
    assert same(run(model, case), trained)
    with model.disable_adapter():
        assert same(run(model, case), expected)
    assert same(run(model, case), trained)


@every_case
def test_leaving_the_context_restores_what_was(case):
    model = case.peft("random")
    with model.disable_adapter():
        assert all(layer.disable_adapters for layer in layers(model).values())
        assert not model.has_active_enabled_adapter
        with model.disable_adapter():
            pass
        assert all(layer.disable_adapters for layer in layers(model).values())
    assert not any(layer.disable_adapters for layer in layers(model).values())
    assert model.has_active_enabled_adapter
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert all(layer.disable_adapters for layer in layers(model).values())


def test_a_half_disabled_model_warns_and_ends_enabled():
    model = MLP.peft("random")
    first, second = layers(model).values()
    first.enable_adapters(False)
    assert not second.disable_adapters
    mixed = "some adapter layers that are enabled and others that are disabled"
    with pytest.warns(UserWarning, match=mixed), model.disable_adapter():
        assert second.disable_adapters
    assert not first.disable_adapters and not second.disable_adapters


def test_no_warning_about_biases():
    # the method trains no bias, so a disabled model is the base model and there is nothing to warn of
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = MLP.peft("random")
        with model.disable_adapter():
            run(model, MLP)


def test_an_exception_inside_the_context_still_restores():
    model = MLP.peft("random", init_weights=False)
    expected = run(model, MLP)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(run(model, MLP), expected)
