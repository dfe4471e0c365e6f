"""forward_mode: every way gives the same numbers, auto takes the cheaper one, and falls back where it must."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_attrsub import AttrSubspaceConfig, Basis, explain_forward
from peft_attrsub.tuner.forward_choice import cheaper, choose

from .checks import activate, cores, deltas, layers, same
from .models import MLP, TokenModel

MODES = ["auto", "factored", "folded"]


class Wide(nn.Module):
    """A Linear (12 -> 8) and a Conv1D (8 -> 12): few enough inputs that auto folds with a few tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 8)
        self.down = Conv1D(12, 8)
        nn.init.normal_(self.down.weight, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def model(mode: str = "auto", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """Wide with an adapter that is no no-op, the same numbers for every mode."""
    torch.manual_seed(0)
    base = Wide().to(dtype).eval()
    options = {"basis": "psv", "dim": 3, "init_weights": False, **options}
    torch.manual_seed(1)
    return get_peft_model(base, AttrSubspaceConfig(target_modules=["up", "down"], forward_mode=mode, **options)).eval()


def inputs(tokens: int = 40) -> Tensor:
    return torch.randn(2, tokens // 2, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()


def results(peft_model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every core."""
    y = peft_model(x)
    wanted = [x, *cores(peft_model).values()]
    return [y, *torch.autograd.grad(y.square().mean(), wanted)]


def passes(peft_model: nn.Module, x: Tensor) -> list[Any]:
    """What the choice says of each layer on an input of as many tokens."""
    return [choose(layer, torch.randn(*x.shape[:-1], layer.in_features)) for layer in layers(peft_model).values()]


def uneven() -> Basis:
    """Two attributes on `up` that share a direction on the input side only: D_A = 4, D_B = 3."""
    generator = torch.Generator().manual_seed(7)
    a = torch.linalg.qr(torch.randn(8, 4, generator=generator))[0]
    b = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0]
    strengths = torch.tensor([2.0, 1.0])
    one, two = {"up": (a[:, :2], strengths, b[:, :2])}, {"up": (a[:, 2:], strengths, b[:, 1:])}
    return Basis.from_factors({"texture": one, "geometry": two})


@pytest.mark.parametrize("mode", ["auto", "folded"])
@pytest.mark.parametrize("tokens", [2, 10, 40])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"core": "block_diagonal"},
        {"core": "diagonal"},
        {"core": "dials"},
        {"scaling": 0.3, "columns": "spectral"},
        {"basis": "random", "dim": 5},
        {"dim": 1},
    ],
    ids=["full", "blocks", "diagonal", "dials", "scaled-spectral", "random", "one"],
)
def test_every_mode_gives_the_same_values_and_gradients(mode, tokens, options):
    x = inputs(tokens)
    expected = results(model("factored", **options), x)
    fast = model(mode, **options)
    few = mode == "auto" and tokens == 2  # then base and update come one after the other
    assert all((fold is None) == few for fold in passes(fast, x))
    for got, slow in zip(results(fast, x), expected, strict=True):
        assert same(got, slow)
    with torch.no_grad():
        assert same(fast(x), expected[0])


@pytest.mark.parametrize("core", ["full", "block_diagonal"])
def test_a_core_with_more_rows_than_columns(core):
    x, found = inputs(), []
    for mode in ("factored", "folded"):
        torch.manual_seed(0)
        base = Wide()
        torch.manual_seed(1)
        options: dict[str, Any] = {"target_modules": ["up"], "core": core, "forward_mode": mode, "init_weights": False}
        found.append(get_peft_model(base, AttrSubspaceConfig(basis=uneven(), **options)))
    narrow = layers(found[0])["base_model.model.up"]
    assert narrow.core("default").shape == (4, 3)
    for got, expected in zip(*(results(one, x) for one in found), strict=True):
        assert same(got, expected)


def test_auto_follows_the_model_of_costs_and_inference_folds_earlier():
    n, m, d = 3072, 1024, 64
    assert cheaper(256, (n, m), (d, d)) == (False, False)
    assert cheaper(2 * m, (n, m), (d, d)) == (True, False)
    assert cheaper(2 * n, (n, m), (d, d)) == (True, True)
    assert [cheaper(t, (n, m), (d, d), gradients=False)[0] for t in (256, m - 50)] == [False, True]
    for gradients in (True, False):
        for forward_or_backward in range(2):
            said = [cheaper(t, (n, m), (d, d), gradients)[forward_or_backward] for t in range(1, 8000, 50)]
            assert said == sorted(said) and len(set(said)) == 2
    wide = model()
    assert passes(wide, inputs(2)) == [None] * 2
    assert passes(wide, inputs(10)) == [(False, True), (True, False)]
    assert passes(wide, inputs(40)) == [(True, True)] * 2
    with torch.no_grad():
        assert [fold[0] for fold in passes(wide, inputs(8))] == [True, True]


def kept(layer: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps of one layer, leaving out what was there before and core-sized products."""
    known = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    known |= {held[name].untyped_storage().data_ptr() for held in (layer.attrsub_A, layer.attrsub_B) for name in held}
    shapes = []

    def pack(t: Tensor) -> Tensor:
        assert t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), "x is kept"
        if t.untyped_storage().data_ptr() not in known and t.shape[0] != layer.attrsub_A["default"].shape[1]:
            shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return shapes


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_keeps_x_or_makes_a_copy_of_the_weight_last(mode):
    for layer in layers(model(mode)).values():
        x = torch.randn(40, layer.in_features, requires_grad=True)
        assert kept(layer, x) == [(40, 3)]


def hooked(peft_model: PeftModel) -> None:
    for layer in layers(peft_model).values():
        layer.get_base_layer().register_forward_hook(lambda module, args, output: 2 * output)


def replaced(peft_model: PeftModel) -> None:
    for layer in layers(peft_model).values():
        base = layer.get_base_layer()
        base.forward = base.forward


class Louder(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclassed(peft_model: PeftModel) -> None:
    for layer in layers(peft_model).values():
        base = layer.get_base_layer()
        louder = Louder(layer.in_features, layer.out_features)
        weight = base.weight.T if layer.fan_in_fan_out else base.weight
        louder.load_state_dict({"weight": weight, "bias": base.bias})
        layer.base_layer, layer.fan_in_fan_out = louder.requires_grad_(False), False


def trained(peft_model: PeftModel) -> None:
    for layer in layers(peft_model).values():
        layer.get_base_layer().requires_grad_(True)


def parametrised(peft_model: PeftModel) -> None:
    for layer in layers(peft_model).values():
        nn.utils.parametrizations.weight_norm(layer.get_base_layer())


@pytest.mark.parametrize("mode", ["auto", "folded"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (hooked, "has hooks"),
        (replaced, "forward has been replaced"),
        (subclassed, "is a Louder"),
        (trained, "being trained itself"),
        (parametrised, "is a Parametrized"),
    ],
    ids=["hooked", "replaced", "subclassed", "trained", "parametrised"],
)
def test_a_base_layer_that_does_more_than_a_linear_is_called_as_it_is(mode, change, why):
    x, slow, fast = inputs(), model("factored"), model(mode)
    for one in (slow, fast):
        change(one)
    assert passes(fast, x) == [None, None]
    assert explain_forward(fast, 40).count(why) == 2
    for got, expected in zip(results(fast, x), results(slow, x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["auto", "folded"])
def test_dropout_is_factored_while_training(mode):
    wide, plain = model(mode, dropout=0.5), model("factored", dropout=0.5)
    x = inputs()
    assert passes(wide, x) == [(True, True)] * 2
    wide.train()
    plain.train()
    assert passes(wide, x) == [None, None] and "dropout > 0" in explain_forward(wide, 40)
    outputs = []
    for one in (wide, plain):
        torch.manual_seed(6)
        outputs.append(one(x))
    assert torch.equal(*outputs)


def test_a_plain_lora_entry_is_factored():
    config = {"target_modules": ["up"], "lora_modules": ["down"], "lora_rank": 2}
    mlp = MLP.peft("psv", forward_mode="folded", **config)
    with torch.no_grad():
        assert passes(mlp, inputs()) == [(True, True), None]
    assert "no active adapter has a core here" in explain_forward(mlp, 40)


@pytest.mark.parametrize("mode", ["auto", "folded"])
def test_active_adapters_on_one_basis_are_summed_and_others_fall_back(mode):
    wide = model(mode)
    torch.manual_seed(5)
    for name, basis in (("two", "psv"), ("other", "random")):
        options = {"basis": basis, "dim": 3, "init_weights": False, "scaling": 0.4, "forward_mode": mode}
        wide.add_adapter(name, AttrSubspaceConfig(target_modules=["up", "down"], **options))
    x = inputs().detach()
    for names, folds in ((["default", "two"], True), (["default", "other"], False), (["other"], True)):
        activate(wide, names)
        assert all((fold is not None) is folds for fold in passes(wide, x))
        for layer in layers(wide).values():
            one = torch.randn(40, layer.in_features)
            weight = layer.get_base_weight() + sum(layer.get_delta_weight(name) for name in names)
            weight = weight.T if layer.fan_in_fan_out else weight
            assert same(layer(one), nn.functional.linear(one, weight, layer.get_base_layer().bias))
            gradients = torch.autograd.grad(
                layer(one).square().sum(), [layer.attrsub_M[name].weight for name in names]
            )
            assert all(bool(g.abs().sum() > 0) for g in gradients)
    activate(wide, ["default", "other"])
    assert "different bases" in explain_forward(wide, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auto_never_folds_into_a_narrow_weight(dtype):
    wide = model(dtype=dtype)
    assert passes(wide, inputs().to(dtype)) == [None, None]
    assert "would round small updates away" in explain_forward(wide, 40)
    plain = model("factored", dtype=dtype)
    assert torch.equal(wide(inputs().to(dtype)), plain(inputs().to(dtype)))


def test_auto_never_folds_under_autocast():
    wide = model()
    with torch.autocast("cpu", torch.bfloat16):
        assert passes(wide, inputs()) == [None, None]
        assert "autocast to bfloat16" in explain_forward(wide, 40)
        assert torch.equal(wide(inputs()), model("factored")(inputs()))
    assert passes(wide, inputs()) == [(True, True)] * 2


def test_folding_into_bfloat16_loses_small_cores_that_the_factored_form_keeps():
    """The error of the update alone, against float64: what is left after taking the base away."""
    errors = {}
    for mode in ("factored", "folded"):
        wide = model(mode, dtype=torch.bfloat16)
        layer = layers(wide)["base_model.model.up"]
        layer.attrsub_M["default"].weight.data *= 1e-3
        # A base that is zero on x but not in W: the output is the update and nothing else.
        base, x = layer.get_base_layer(), torch.randn(64, 12, generator=torch.Generator().manual_seed(2)).bfloat16()
        base.bias.data.zero_()
        x[:, 1::2] = x[:, ::2]
        base.weight.data[:, 1::2] = -base.weight.data[:, ::2]
        exact = x.double() @ layer.get_delta_weight("default").detach().double().T
        errors[mode] = float((layer(x).detach().double() - exact).norm() / exact.norm())
    assert errors["factored"] < 0.02 and errors["folded"] > 10 * errors["factored"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training_is_the_same(mode, reentrant):
    x, wide = inputs(), model(mode)
    expected = results(model("factored"), x)[2:]
    checkpoint(wide, x, use_reentrant=reentrant).square().mean().backward()
    for core, gradient in zip(cores(wide).values(), expected, strict=True):
        assert same(core.grad, gradient)


@pytest.mark.parametrize("mode", ["auto", "folded"])
def test_transforms_of_functions_get_ordinary_operations(mode):
    wide, slow = model(mode), model("factored")
    found = []
    for one in (wide, slow):
        held = dict(cores(one).items())
        names = {f"{name}.attrsub_M.default.weight": core.detach() for name, core in held.items()}

        def loss(values: dict[str, Tensor], x: Tensor, one: nn.Module = one) -> Tensor:
            return torch.func.functional_call(one, values, (x,)).square().mean()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(names, inputs().detach()))
        found.append(torch.func.jvp(lambda x, one=one: one(x), (inputs().detach(),), (inputs().detach(),))[1])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[2][name])
    torch.testing.assert_close(found[1], found[3])


@pytest.mark.parametrize("mode", MODES)
def test_disabling_merging_and_deleting_work_in_every_mode(mode):
    wide, x = model(mode), inputs().detach()
    expected = wide(x)
    with wide.disable_adapter():
        assert "switched off" in explain_forward(wide, 40)
        torch.manual_seed(0)
        assert same(wide(x), Wide()(x))
    wide.merge_adapter()
    assert "merged" in explain_forward(wide, 40)
    assert same(wide(x), expected)
    wide.unmerge_adapter()
    assert same(wide(x), expected)
    wide.add_adapter("two", AttrSubspaceConfig(basis="psv", dim=3, target_modules=["up", "down"]))
    wide.delete_adapter("default")
    assert all(layer.forward_mode == {"two": "auto"} for layer in layers(wide).values())


def test_the_mode_is_no_part_of_a_saved_adapter(tmp_path):
    wide = model("folded")
    wide.save_pretrained(tmp_path)
    assert "forward_mode" not in json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = PeftModel.from_pretrained(Wide().eval(), tmp_path)
    assert all(layer.forward_mode == {"default": "auto"} for layer in layers(loaded).values())
    config = AttrSubspaceConfig.from_pretrained(tmp_path)
    config.forward_mode = "factored"
    loaded = PeftModel.from_pretrained(Wide().eval(), tmp_path, config=config)
    assert passes(loaded, inputs()) == [None, None]
    for name, delta in deltas(wide).items():
        assert same(deltas(loaded)[name], delta)


def test_explain_forward_is_a_table_of_what_happens_now():
    wide = model()
    head, up, down = explain_forward(wide, 10).splitlines()
    assert head.split() == ["module", "W", "D", "forward", "backward", "why"]
    assert up.split()[:5] == ["base_model.model.up", "8x12", "3", "factored", "folded"]
    assert down.split()[:5] == ["base_model.model.down", "12x8", "3", "folded", "factored"]
    assert "from about 12 forward, 8 backward" in up
    with torch.no_grad():
        assert explain_forward(wide, 10).splitlines()[1].split()[:5] == [
            "base_model.model.up",
            "8x12",
            "3",
            "folded",
            "-",
        ]
    tokens = get_peft_model(TokenModel(), AttrSubspaceConfig(basis="random", dim=3, target_modules=["tokens"]))
    assert "kind embedding" in explain_forward(tokens, 10)


def test_what_cannot_be_explained_or_configured_is_refused():
    with pytest.raises(ValueError, match="no adapted layer"):
        explain_forward(Wide(), 10)
    with pytest.raises(ValueError, match="tokens=0"):
        explain_forward(model(), 0)
    with pytest.raises(ValueError, match="forward_mode='fast' is unknown: use one of 'auto', 'factored', 'folded'"):
        AttrSubspaceConfig(basis="psv", forward_mode="fast")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_every_mode_is_one_graph_on_both_sides_of_the_crossover(mode):
    torch.compiler.reset()
    wide, slow = model(mode), model("factored")
    compiled = torch.compile(wide, fullgraph=True, backend="aot_eager")
    for tokens in (4, 40):
        x = inputs(tokens)
        with torch.no_grad():
            assert same(compiled(x), slow(x))
        y = compiled(x)
        gradients = torch.autograd.grad(y.square().mean(), [x, *cores(wide).values()])
        for got, expected in zip([y, *gradients], results(slow, x), strict=True):
            assert same(got, expected, 1e-4)
