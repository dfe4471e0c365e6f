"""Hot swap of one adapter in place: the outputs of the other one, no new compilation, all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from safetensors.torch import load_file, save_file
from torch import nn

from peft_attrsub import AttrSubspaceConfig, BasisError, hotswap_adapter, psv_basis

from .checks import loss
from .models import Mlp


class Net(nn.Module):
    """A trunk with cores, a plain LoRA part, and a head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mlp, self.mid, self.head = Mlp().eval(), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.mlp(x))))


OPTIONS = {
    "target_modules": ["up", "down"],
    "lora_modules": ["mid"],
    "lora_rank": 2,
    "modules_to_save": ["head"],
    "init_weights": False,
}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def basis(tmp_path):
    psv_basis(Net(), dim=4).save_pretrained(tmp_path / "basis")
    return str(tmp_path / "basis")


def save(folder, basis, draw=0, **changes):
    """A saved adapter with random values; its folder, and its outputs."""
    model = get_peft_model(Net(), AttrSubspaceConfig(basis=basis, **{**OPTIONS, **changes})).eval()
    torch.manual_seed(draw)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return str(folder), model(X).detach()


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "changes", [{}, {"core": "block_diagonal"}, {"core": "dials"}, {"save_basis": True}, {"scaling": 0.5}], ids=str
)
def test_the_swapped_model_is_the_loaded_one(basis, tmp_path, changes):
    first, before = save(tmp_path / "first", basis, 0, **changes)
    second, after = save(tmp_path / "second", basis, 1, **changes)
    model = PeftModel.from_pretrained(Net(), first).eval()
    torch.testing.assert_close(model(X), before)
    hotswap_adapter(model, second)
    torch.testing.assert_close(model(X), after)
    assert not torch.allclose(before, after)
    hotswap_adapter(model, first, "default")
    torch.testing.assert_close(model(X), before)


def test_generated_bases_swap_too(tmp_path):
    first, _ = save(tmp_path / "first", "random", 0, dim=3, save_basis=False)
    second, after = save(tmp_path / "second", "random", 1, dim=3, save_basis=False)
    other, _ = save(tmp_path / "other", "random", 1, dim=3, save_basis=False, seed=9)
    model = PeftModel.from_pretrained(Net(), first).eval()
    hotswap_adapter(model, second)
    torch.testing.assert_close(model(X), after)
    with pytest.raises(BasisError, match="its basis is 'random'"):
        hotswap_adapter(model, other)


def test_other_adapters_and_the_bases_stay(basis, tmp_path):
    first, _ = save(tmp_path / "first", basis, 0)
    second, after = save(tmp_path / "second", basis, 1)
    model = PeftModel.from_pretrained(Net(), first).eval()
    model.load_adapter(first, "other")
    before = values(model)
    hotswap_adapter(model, second, "other")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("other" in name for name in changed)
    layer = model.base_model.model.mlp.up
    assert layer.attrsub_A["default"] is layer.attrsub_A["other"]
    model.set_adapter("other")
    torch.testing.assert_close(model.eval()(X), after)


def test_an_optimiser_keeps_its_parameters(basis, tmp_path):
    first, _ = save(tmp_path / "first", basis, 0)
    second, _ = save(tmp_path / "second", basis, 1)
    model = PeftModel.from_pretrained(Net(), first, is_trainable=True).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    hotswap_adapter(model, second)
    assert all(a is b for a, b in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True))
    before = loss(model(X))
    before.backward()
    optimizer.step()
    assert loss(model(X)) < before
    pending = loss(model(X))
    hotswap_adapter(model, first)
    with pytest.raises(RuntimeError, match="inplace"):
        pending.backward()  # of values that are gone: autograd notices


def test_values_take_the_dtype_of_the_model(basis, tmp_path):
    first, _ = save(tmp_path / "first", basis, 0)
    second, after = save(tmp_path / "second", basis, 1)
    model = PeftModel.from_pretrained(Net(), first).eval().bfloat16()
    hotswap_adapter(model, second)
    assert model.base_model.model.mlp.up.attrsub_M["default"].weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(X.bfloat16()).float(), after, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"core": "block_diagonal"}, "core is 'block_diagonal'"),
        ({"scaling": 2.0}, "scaling is 2.0"),
        ({"columns": "spectral"}, "columns is 'spectral'"),
        ({"lora_rank": 3}, "lora_rank is 3"),
        ({"dim": 2}, "dim .*other columns in module"),
        ({"target_modules": ["up"]}, "no tensors for .*down.attrsub_M"),
        ({"target_modules": ["up", "down", "head"], "modules_to_save": None}, "head"),
        ({"modules_to_save": ["head", "drop"], "lora_modules": None}, "lora_rank|no tensors for .*mid"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_changes_nothing(basis, tmp_path, changes, words):
    first, before = save(tmp_path / "first", basis, 0)
    other, _ = save(tmp_path / "other", basis, 1, **changes)
    model = PeftModel.from_pretrained(Net(), first).eval()
    held = values(model)
    with pytest.raises(BasisError, match=words):
        hotswap_adapter(model, other)
    unchanged(model, held)
    torch.testing.assert_close(model(X), before)


def test_another_basis_is_refused_by_digest_and_by_value(basis, tmp_path):
    torch.manual_seed(7)
    moved = Net()
    with torch.no_grad():
        moved.mlp.up.weight.normal_()
    psv_basis(moved, dim=4).save_pretrained(tmp_path / "moved")
    first, _ = save(tmp_path / "first", basis, 0)
    pointing, _ = save(tmp_path / "pointing", str(tmp_path / "moved"), 1)
    bringing, _ = save(tmp_path / "bringing", "random", 1, dim=4)
    model = PeftModel.from_pretrained(Net(), first).eval()
    held = values(model)
    with pytest.raises(BasisError, match=r"its basis is .*digest.*, the model's .*digest"):
        hotswap_adapter(model, pointing)
    with pytest.raises(BasisError, match="attributes is"):
        hotswap_adapter(model, bringing)
    standing, _ = save(tmp_path / "standing", basis, 0, save_basis=True)
    tensors = load_file(f"{standing}/adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("up.attrsub_B"))
    tensors[key] = tensors[key].flip(1).contiguous()
    save_file(tensors, f"{standing}/adapter_model.safetensors")
    with pytest.raises(BasisError, match=r"brings another basis for module .*up"):
        hotswap_adapter(model, standing)
    unchanged(model, held)


def test_the_same_dim_said_otherwise_fits(basis, tmp_path):
    first, _ = save(tmp_path / "first", basis, 0)
    second, after = save(tmp_path / "second", basis, 1, dim=4)  # all that the basis holds
    model = PeftModel.from_pretrained(Net(), first).eval()
    hotswap_adapter(model, second)
    torch.testing.assert_close(model(X), after)


def test_a_damaged_tensor_late_in_the_file_stops_all(basis, tmp_path):
    first, _ = save(tmp_path / "first", basis, 0)
    second, _ = save(tmp_path / "second", basis, 1)
    tensors = load_file(f"{second}/adapter_model.safetensors")
    last = sorted(tensors)[-1]
    tensors[last] = tensors[last].reshape(1, *tensors[last].shape).contiguous()
    save_file(tensors, f"{second}/adapter_model.safetensors")
    model = PeftModel.from_pretrained(Net(), first).eval()
    held = values(model)
    with pytest.raises(BasisError, match="shape"):
        hotswap_adapter(model, second)
    unchanged(model, held)


def test_states_of_the_model_that_cannot_be_swapped(basis, tmp_path):
    first, _ = save(tmp_path / "first", basis, 0)
    with pytest.raises(ValueError, match="PeftModel"):
        hotswap_adapter(Net(), first)
    model = PeftModel.from_pretrained(Net(), first).eval()
    with pytest.raises(ValueError, match="no adapter 'second'"):
        hotswap_adapter(model, first, "second")
    with pytest.raises(BasisError, match="not found"):
        hotswap_adapter(model, str(tmp_path / "nowhere"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(model, first)
    empty = get_peft_model(Net(), AttrSubspaceConfig(basis=basis, **OPTIONS), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="meta"):
        hotswap_adapter(empty, first)


def test_peft_s_own_hotswap_refuses_and_changes_nothing(basis, tmp_path):
    first, _ = save(tmp_path / "first", basis, 0)
    second, _ = save(tmp_path / "second", basis, 1)
    model = PeftModel.from_pretrained(Net(), first).eval()
    held = values(model)
    with pytest.raises(ValueError, match="ATTRSUB"):
        peft_hotswap(model, second, adapter_name="default", torch_device="cpu")
    unchanged(model, held)


@pytest.mark.parametrize("inside", [False, True], ids=["whole-model", "a-part"])
def test_a_compiled_model_is_not_compiled_again(basis, tmp_path, inside):
    torch.compiler.reset()
    first, before = save(tmp_path / "first", basis, 0)
    second, after = save(tmp_path / "second", basis, 1)
    model = PeftModel.from_pretrained(Net(), first).eval()
    frames = []

    def backend(graph, inputs):
        frames.append(len(inputs))
        return graph.forward

    if inside:
        model.base_model.model.mlp = torch.compile(model.base_model.model.mlp, backend=backend)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), before)
        graphs = len(frames)
        assert graphs > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            for folder, outputs in ((second, after), (first, before), (second, after)):
                hotswap_adapter(compiled, folder)
                torch.testing.assert_close(compiled(X), outputs)
    assert len(frames) == graphs


def test_loading_and_switching_compiles_again_which_the_swap_spares(basis, tmp_path):
    """What the test above would look like if it could not fail."""
    torch.compiler.reset()
    first, _ = save(tmp_path / "first", basis, 0)
    model = PeftModel.from_pretrained(Net(), first).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(X)
        model.load_adapter(copy.copy(first), "second")
        model.set_adapter("second")
        with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match=r"[Rr]ecompil"):
            compiled(X)


@pytest.mark.slow
def test_inductor_s_code_sees_the_new_values(basis, tmp_path):
    torch.compiler.reset()
    first, before = save(tmp_path / "first", basis, 0)
    second, after = save(tmp_path / "second", basis, 1)
    model = PeftModel.from_pretrained(Net(), first).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), before)
        with torch._dynamo.config.patch(error_on_recompile=True):
            hotswap_adapter(compiled, second)
            torch.testing.assert_close(compiled(X), after)
