"""Half precision: float16 and bfloat16 bases, cores in float32 or not, autocast, inputs left uncast."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch.utils._python_dispatch import TorchDispatchMode

from .checks import base_weights, cores, deltas, every_basis, every_case, layers, loss, no_warning, run, same
from .models import BASES, BY_NAME, MLP

HALVES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def half(case, basis, dtype, autocast_adapter_dtype=True, **more):
    """A PeftModel on a half precision base."""
    torch.manual_seed(4)
    config = case.config(basis, **more)
    return get_peft_model(case.base(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype).eval()


@pytest.mark.parametrize("autocast", [True, False])
@every_half
@every_basis
@every_case
def test_forward_and_merge_in_half_precision(case, basis, dtype, autocast):
    model = half(case, basis, dtype, autocast, init_weights=False)
    assert {core.dtype for core in cores(model).values()} == {torch.float32 if autocast else dtype}
    adapted = run(model, case, dtype)
    assert adapted.dtype == dtype and torch.isfinite(adapted).all()

    # the same core on the same base in float32 is the truth that half precision rounds
    exact = case.peft(basis, init_weights=False)
    wide = {n: v.float() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    exact.load_state_dict(wide)
    if basis == "random":  # PSV reads the rounded weight: its basis is that of another matrix
        assert same(adapted.float(), run(exact, case), 4 * TOLERANCE[dtype])

    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert {weight.dtype for weight in base_weights(model).values()} == {dtype}
        assert same(run(model, case, dtype).float(), adapted.float(), 4 * TOLERANCE[dtype])
        model.unmerge_adapter()
        assert same(run(model, case, dtype).float(), adapted.float(), 4 * TOLERANCE[dtype])
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert same(run(merged, case, dtype).float(), adapted.float(), 4 * TOLERANCE[dtype])


@every_half
@every_basis
@every_case
def test_a_new_adapter_is_a_no_op_in_half_precision(case, basis, dtype):
    assert torch.equal(run(half(case, basis, dtype), case, dtype), run(case.base(dtype), case, dtype))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mlp", "mlp-saved-head", "embedding-and-conv1d", "conv2d"])
def test_the_dtype_of_the_cores(name, dtype, autocast, low_cpu_mem_usage, tmp_path):
    case = BY_NAME[name]
    expected = torch.float32 if autocast else dtype

    def dtypes(model, adapter):
        return {core.dtype for core in cores(model, adapter).values()}

    model = get_peft_model(case.base(dtype), case.config("random"), autocast_adapter_dtype=autocast)
    model.add_adapter("other", case.config("random"), autocast_adapter_dtype=autocast)
    assert dtypes(model, "default") == dtypes(model, "other") == {expected}
    model.save_pretrained(tmp_path)

    options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(case.base(dtype), tmp_path, **options)
    loaded.load_adapter(tmp_path / "other", adapter_name="other", **options)
    loaded.load_adapter(tmp_path, adapter_name="third", **options)
    for adapter in ("default", "other", "third"):
        assert dtypes(loaded, adapter) == {expected}
    assert {weight.dtype for weight in base_weights(loaded).values()} == {dtype}


@every_half
@pytest.mark.parametrize("basis", BASES)
def test_the_whole_model_can_be_cast(basis, dtype):
    model = MLP.peft(basis, init_weights=False)
    exact = run(model, MLP)
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    frozen = [held["default"] for la in layers(model).values() for held in (la.attrsub_A, la.attrsub_B)]
    assert {tensor.dtype for tensor in frozen} == {dtype}
    cast = run(model, MLP, dtype)
    assert cast.dtype == dtype and same(cast.float(), exact, 4 * TOLERANCE[dtype])
    assert same(run(model.merge_and_unload(), MLP, dtype).float(), exact, 4 * TOLERANCE[dtype])


@every_half
@pytest.mark.parametrize("basis", BASES)
def test_merge_and_unmerge_in_half_precision_loses_no_more_than_rounding(basis, dtype):
    model = half(MLP, basis, dtype, init_weights=False)
    before, updates = base_weights(model), deltas(model)
    model.merge_adapter()
    for name, weight in base_weights(model).items():
        assert same(weight.float(), before[name].float() + updates[name].float(), TOLERANCE[dtype])
    model.unmerge_adapter()
    assert all(same(w.float(), before[n].float(), TOLERANCE[dtype]) for n, w in base_weights(model).items())


@every_basis
@every_case
def test_training_under_autocast(case, basis):
    model = case.peft(basis, init_weights=False)
    exact = run(model, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(run(model, case).float(), exact, 6e-2)
        loss(model.train()(case.inputs()).float()).backward()
    for core in cores(model).values():
        assert core.dtype == core.grad.dtype == torch.float32
        assert torch.isfinite(core.grad).all() and core.grad.any()


@every_half
@pytest.mark.parametrize("basis", BASES)
def test_training_on_a_half_precision_base_keeps_float32_gradients(basis, dtype):
    model = half(MLP, basis, dtype).train()
    loss(model(MLP.inputs(dtype)).float()).backward()
    for core in cores(model).values():
        assert core.grad.dtype == torch.float32
        assert torch.isfinite(core.grad).all() and core.grad.any()


class Casts(TorchDispatchMode):
    """Counts the tensors of one shape that operations copy into bfloat16."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.count += result.shape == self.shape
        return result


@pytest.mark.parametrize("active", [True, False])
def test_input_casting_can_be_switched_off(active):
    # a hook casts the input of the base layer, as layerwise casting does: the adapter then leaves it alone
    model = half(MLP, "random", torch.bfloat16, target_modules=["up"], init_weights=False)
    (layer,) = layers(model).values()
    layer.get_base_layer().register_forward_pre_hook(lambda module, args: (args[0].to(torch.bfloat16),))
    x = MLP.inputs(torch.float32)
    assert layer.cast_input_dtype_enabled
    with disable_input_dtype_casting(model, active=active), Casts(x.shape) as casts:
        assert layer.cast_input_dtype_enabled is not active
        try:
            assert torch.isfinite(model(x)).all()
        except RuntimeError:
            assert active  # the dtypes do not meet, which is what the caller asked for
    assert casts.count == 1 if active else casts.count >= 1
    assert layer.cast_input_dtype_enabled


def test_casting_gives_no_warning():
    with no_warning():
        run(half(MLP, "psv", torch.bfloat16), MLP, torch.bfloat16)
