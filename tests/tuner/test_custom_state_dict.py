"""State dicts and injection without a PeftModel: what integrations such as transformers and diffusers use."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from torch.distributed.fsdp import FullyShardedDataParallel

from .checks import cores, every_basis, every_case, layers, no_warning, of_adapter, run, same, trainable
from .models import BASES, MLP, STACK, Case


def inject(case: Case, basis, init_weights: bool = False, **options):
    """Our layers put straight into the base model, with cores that are not zero unless asked for."""
    config = case.config(basis, init_weights=init_weights)
    return inject_adapter_in_model(config, case.base(), **options).eval()


@every_basis
@every_case
def test_state_dict_of_the_adapter(case, basis):
    model = case.peft(basis, init_weights=False)
    state = get_peft_model_state_dict(model)
    names = of_adapter(model, "default")
    expected = {n.replace("modules_to_save.default.", "").replace(".default.weight", ".weight") for n in names}
    assert expected <= state.keys()
    assert not any("default" in name for name in state)
    base = {f"base_model.model.{name}" for name in case.base().state_dict()}
    assert base & state.keys() == base & expected


@every_basis
@every_case
def test_state_dict_into_another_model_under_another_name(case, basis):
    model = case.peft(basis, init_weights=False)
    expected = run(model, case)
    other = case.peft(basis, adapter="other", draw=9, init_weights=False)
    assert not same(run(other, case), expected, 1e-4)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model), adapter_name="other")
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "attrsub" in name and "other" in name]
    assert same(run(other, case), expected, 1e-6)


def test_one_adapter_takes_one_state_dict_after_another():
    # swapping what a live adapter stands for: each state dict brings a basis of its own, and the last one counts
    model = MLP.peft("random", seed=0)
    sources = [MLP.peft("random", seed=seed, draw=seed, init_weights=False) for seed in (1, 2, 3, 1)]
    for source in sources:
        set_peft_model_state_dict(model, get_peft_model_state_dict(source))
        assert same(run(model, MLP), run(source, MLP), 1e-6)
    model.add_adapter("other", MLP.config("random", seed=4, init_weights=False))
    model.set_adapter("other")
    expected = run(model, MLP)
    set_peft_model_state_dict(model, get_peft_model_state_dict(sources[1]))
    assert torch.equal(run(model, MLP), expected)


@every_basis
@every_case
def test_injection_round_trip(case, basis):
    model = inject(case, basis)
    assert not isinstance(model, PeftModel) and type(model) is type(case.base())
    expected = run(model, case)
    assert not same(expected, run(case.base(), case), 1e-4)
    state = get_peft_model_state_dict(model)
    torch.manual_seed(54321)
    again = inject(case, basis, init_weights=True)
    assert not same(run(again, case), expected, 1e-4)
    result = set_peft_model_state_dict(again, state)
    assert not result.unexpected_keys
    assert same(run(again, case), expected, 1e-6)


@every_basis
@every_case
def test_injection_is_get_peft_model(case, basis):
    wrapped = case.peft(basis, init_weights=False)
    injected = inject(case, basis)
    state = get_peft_model_state_dict(wrapped)
    if "modules_to_save" in case.arguments:  # PEFT finds these by the bare name, as integrations pass it
        state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    set_peft_model_state_dict(injected, state)
    assert same(run(injected, case), run(wrapped, case), 1e-6)
    assert trainable(injected) == {name.removeprefix("base_model.model.") for name in trainable(wrapped)}


@every_basis
@every_case
def test_injection_on_the_meta_device(case, basis):
    source = inject(case, basis)
    state = get_peft_model_state_dict(source)
    model = inject(case, basis, low_cpu_mem_usage=True)
    assert {core.device.type for core in cores(model).values()} == {"meta"}
    assert {layer.get_base_layer().weight.device.type for layer in layers(model).values()} == {"cpu"}
    result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert same(run(model, case), run(source, case), 1e-6)


@every_basis
@every_case
def test_a_model_made_on_the_meta_device_is_filled_by_a_state_dict(case, basis):
    source = case.peft(basis, init_weights=False)
    model = get_peft_model(case.base(), case.config(basis), low_cpu_mem_usage=True).eval()
    assert {core.device.type for core in cores(model).values()} == {"meta"}
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert same(run(model, case), run(source, case), 1e-6)


@pytest.mark.parametrize("basis", BASES)
def test_an_adapter_added_on_the_meta_device(basis):
    source = MLP.peft(basis, init_weights=False)
    model = MLP.peft(basis, init_weights=False)
    first = run(model, MLP)
    model.add_adapter("other", MLP.config(basis), low_cpu_mem_usage=True)
    assert {core.device.type for core in cores(model, "other").values()} == {"meta"}
    assert {core.device.type for core in cores(model, "default").values()} == {"cpu"}
    assert torch.equal(run(model, MLP), first)
    set_peft_model_state_dict(model, get_peft_model_state_dict(source), "other", low_cpu_mem_usage=True)
    model.set_adapter("other")
    assert same(run(model, MLP), run(source, MLP), 1e-6)


@pytest.mark.parametrize("basis", BASES)
def test_injection_by_the_keys_of_a_state_dict(basis):
    # the config knows less than the checkpoint: the checkpoint's keys decide, and PEFT says that they differ
    source = inject(STACK, basis)
    state = get_peft_model_state_dict(source)
    base = STACK.base()
    with pytest.warns(RuntimeWarning, match="state_dict contained these additional target modules"):
        model = inject_adapter_in_model(STACK.config(basis, target_modules=["head"]), base, state_dict=state)
    assert set(layers(model)) == set(layers(source))
    set_peft_model_state_dict(model, state)
    assert same(run(model.eval(), STACK), run(source, STACK), 1e-6)


@pytest.mark.parametrize("basis", BASES)
def test_injection_by_agreeing_keys_gives_no_warning(basis):
    state = get_peft_model_state_dict(inject(STACK, basis))
    with no_warning("inconsistency"):
        model = inject_adapter_in_model(STACK.config(basis), STACK.base(), state_dict=state)
    assert len(layers(model)) == 10


@pytest.mark.parametrize("basis", BASES)
def test_two_injected_adapters_are_switched_and_deleted(basis):
    model = inject(MLP, basis)
    first = run(model, MLP)
    torch.manual_seed(1)
    inject_adapter_in_model(MLP.config(basis, init_weights=False), model, "other")
    assert set(cores(model, "other")) == set(cores(model))
    set_adapter(model, "other")
    second = run(model, MLP)
    assert not same(second, first, 1e-4)
    assert trainable(model) == of_adapter(model, "other")
    set_requires_grad(model, ["default", "other"], requires_grad=False)
    assert not trainable(model)
    set_adapter(model, "default")
    assert same(run(model, MLP), first)
    delete_adapter(model, "other", prefix="attrsub_")
    assert not cores(model, "other")
    assert same(run(model, MLP), first)


def test_injected_cores_can_be_cast():
    model = inject(Case("half", MLP.model, MLP.sample, MLP.arguments), "random").to(torch.bfloat16)
    assert {core.dtype for core in cores(model).values()} == {torch.bfloat16}
    cast_adapter_dtype(model, "default")
    assert {core.dtype for core in cores(model).values()} == {torch.float32}
    assert torch.isfinite(run(model, MLP, torch.bfloat16)).all()


@every_basis
@every_case
def test_the_base_state_dict_goes_out_and_in(case, basis):
    base = case.base().state_dict()
    original = {name: value.clone() for name, value in base.items()}
    model = case.peft(basis, init_weights=False)
    extracted = get_base_model_state_dict(model)
    assert extracted.keys() == original.keys()
    assert all(torch.equal(extracted[name], value) for name, value in original.items())
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(1.0)
    result = set_base_model_state_dict(model, original, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(get_base_model_state_dict(model)[name], value) for name, value in original.items())


@pytest.fixture(scope="module")
def one_process_group():
    """A group of this process alone, enough for FSDP to wrap a model."""
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@every_basis
@every_case
def test_state_dict_of_a_model_under_fsdp(case, basis, one_process_group):
    model = case.peft(basis, init_weights=False)
    expected = run(model, case)
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert same(run(sharded, case), expected, 1e-6)
    state = {name: value.clone() for name, value in get_peft_model_state_dict(sharded).items()}
    fresh = case.peft(basis)
    result = set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert same(run(fresh, case), expected, 1e-6)
