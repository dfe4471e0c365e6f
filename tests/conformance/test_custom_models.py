"""PEFT's suite for models of any kind (tests/test_custom_models.py): the cases that no file of tests/tuner holds.

The others are in tests/tuner/test_custom_*.py and test_mixed_batches.py; README.md says which is where.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig

from ..tuner.checks import activate, base_weights, cores, has_tuner_layers, layers, learn, run, same, trainable
from ..tuner.models import BASES, BY_NAME, MLP, Case, floats, mined

LAYERS = [BY_NAME[name] for name in ("mlp", "conv2d-and-head", "embedding-and-conv1d", "conv3d")]
every_layer = pytest.mark.parametrize("case", LAYERS, ids=str)
every_basis = pytest.mark.parametrize("basis", BASES)


class Attention(nn.Module):
    """A layer norm, attention over all tokens, and two linear layers: one block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.down(torch.tanh(self.up(x)))


class Nested(nn.Module):
    """PyTorch's own encoder layer, with attention inside, under a head."""

    def __init__(self) -> None:
        super().__init__()
        # In evaluation PyTorch runs this layer as one fused call, which reads weights and calls no module.
        self.block = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


ATTENTION = [Case("attention", Attention, floats(2, 5, 12)), Case("encoder-layer", Nested, floats(2, 5, 12))]
every_attention = pytest.mark.parametrize("case", ATTENTION, ids=str)


@every_attention
@pytest.mark.parametrize("targets", ["all-linear", None])
@every_basis
@pytest.mark.filterwarnings("ignore:.*MultiheadAttention")
def test_mha_gradients_set_correctly(case, basis, targets):
    # What is adapted does something: PyTorch's attention reads weights without calling their module.
    model = case.peft(basis, target_modules=targets, init_weights=False)
    assert not same(run(model, case), run(case.base(), case), 1e-3)
    model.train()
    model(case.inputs()).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and g.any() for g in gradients.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_attention
@every_basis
@pytest.mark.filterwarnings("ignore:.*MultiheadAttention")
def test_unload_adapter_multihead_attention(case, basis, tmp_path):
    base, model = run(case.base(), case), case.peft(basis, target_modules="all-linear", init_weights=False)
    adapted = run(model, case)
    model.save_pretrained(tmp_path)
    assert same(run(PeftModel.from_pretrained(case.base(), tmp_path).eval(), case), adapted, 1e-6)
    model.merge_adapter()
    assert same(run(model, case), adapted, 1e-4)
    model.unmerge_adapter()
    unloaded = model.unload()
    assert not has_tuner_layers(unloaded) and same(run(unloaded, case), base, 1e-6)


@every_layer
@every_basis
def test_disable_adapter_is_reentrant(case, basis):
    model = case.peft(basis, init_weights=False)
    adapted, base = run(model, case), run(case.base(), case)
    training = trainable(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert same(run(model, case), base, 1e-6)
        assert same(run(model, case), base, 1e-6)
    assert same(run(model, case), adapted, 1e-6) and trainable(model) == training


@every_layer
@every_basis
@pytest.mark.filterwarnings("ignore:.*additionally merging")
def test_sequential_merge_matches_batch_merge_and_unmerge_restores_base(case, basis):
    def three() -> PeftModel:
        model = case.peft(basis, "one", init_weights=False)
        for draw, name in enumerate(("two", "three")):
            torch.manual_seed(draw + 1)
            model.add_adapter(name, case.config(basis, init_weights=False))
        return model.eval()

    whole, steps = three(), three()
    weights = base_weights(whole)
    names = ["one", "two", "three"]
    whole.merge_adapter(names)
    for name in names:
        steps.merge_adapter([name])
    assert all(layer.merged_adapters == names for layer in layers(steps).values())
    assert same(run(steps, case), run(whole, case), 1e-4)
    activated = three()
    activate(activated, names)
    assert same(run(activated, case), run(whole, case), 1e-4)
    steps.unmerge_adapter()
    assert all(same(weight, weights[name]) for name, weight in base_weights(steps).items())


def test_load_adapter_in_another_order_than_the_state_was_saved(tmp_path):
    # PEFT's test_mha_load_init_model_first: the model exists first, the adapter arrives later.
    for case in ATTENTION[:1]:
        model = case.peft("random", target_modules=["up", "down"], init_weights=False)
        learn(model, case)
        model.save_pretrained(tmp_path / "one")
        late = case.peft("random", target_modules=["up", "down"])
        late.load_adapter(str(tmp_path / "one"), "late")
        late.set_adapter("late")
        assert same(run(late.eval(), case), run(model, case), 1e-6)


@pytest.mark.parametrize("save", [True, "auto"])
@pytest.mark.parametrize("core", ["full", "block_diagonal"])
def test_adding_multiple_adapters_of_several_widths(core, save, tmp_path):
    # PEFT's multi-rank adapters: here the number of directions differs between adapters on one basis.
    basis = mined(MLP.base(), ["up", "down"], dim=3)
    shared = {"core": core, "save_basis": save, "target_modules": ["up"], "init_weights": False}
    model = MLP.peft(basis, "wide", dim=3, **shared)
    model.add_adapter("narrow", MLP.config(basis, dim={"texture": 2, "geometry": 1}, **shared))
    sizes = {name: {core.numel() for core in cores(model, name).values()} for name in ("wide", "narrow")}
    expected = {"full": [36, 9], "block_diagonal": [18, 5]}[core]
    assert [sizes["wide"], sizes["narrow"]] == [{n} for n in expected]
    outputs = {}
    for name in sizes:
        model.set_adapter(name)
        outputs[name] = run(model, MLP)
    assert not same(outputs["wide"], outputs["narrow"], 1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.base(), tmp_path / "wide", adapter_name="wide")
    loaded.load_adapter(str(tmp_path / "narrow"), "narrow")
    for name, output in outputs.items():
        loaded.set_adapter(name)
        assert same(run(loaded.eval(), MLP), output, 1e-6)


def test_default_target_modules_not_set():
    # A LoRA on a model that PEFT does not know must say its targets; a basis says them itself.
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(MLP.base(), LoraConfig())
    for basis in (*BASES, mined(MLP.base(), ["up"])):
        model = get_peft_model(MLP.base(), AttrSubspaceConfig(basis=basis, dim=2))
        expected = {"up", "down"} if isinstance(basis, str) else {"up"}
        assert {name.rpartition(".")[2] for name in layers(model)} == expected
