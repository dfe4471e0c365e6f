"""Mixed batches, a different adapter per sample, against the slow way: one sample at a time with set_adapter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig

from .checks import every_case, layers, same
from .mixing import BASE, alone, clean, mixed, one_at_a_time, shake
from .models import BY_NAME, GROUPED, MLP, Mlp, mined


def zoo() -> PeftModel:
    """An MLP whose adapters differ in everything: attributes, dims, core, scaling, modules, plain LoRA, columns."""
    base = MLP.base()
    basis = mined(base, ["up", "down"], dim=3)
    both = ["up", "down"]
    configs = {
        "plain": {"target_modules": both},
        "plain2": {"target_modules": both, "scaling": 2.5},
        "blocks": {"target_modules": both, "core": "block_diagonal"},
        "texture": {"target_modules": both, "attributes": ["texture"]},
        "swapped": {"target_modules": both, "attributes": ["geometry", "texture"]},
        "thin": {"target_modules": both, "dim": {"texture": 3, "geometry": 1}},
        "spectral": {"target_modules": both, "columns": "spectral"},
        "dropped": {"target_modules": both, "dropout": 0.5},
        "up": {"target_modules": ["up"]},
        "lora": {"target_modules": ["up"], "lora_modules": ["down"], "lora_rank": 2, "lora_alpha": 3},
        "lora2": {"target_modules": [], "lora_modules": both, "lora_rank": 3},
    }
    torch.manual_seed(3)
    made = {name: AttrSubspaceConfig(basis=basis, init_weights=False, **more) for name, more in configs.items()}
    model = get_peft_model(base, made["plain"], adapter_name="plain")
    for name, config in made.items():
        if name != "plain":
            model.add_adapter(name, config)
    return model.eval()


ZOO = zoo()
NAMES = [*ZOO.peft_config, BASE]


@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=9),
    st.sampled_from([(), (4,), (2, 3)]),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_any_mixture_is_one_sample_at_a_time(names, middle, seed):
    x = torch.randn(len(names), *middle, 12, generator=torch.Generator().manual_seed(seed))
    assert same(mixed(ZOO, x, names), one_at_a_time(ZOO, x, names))
    assert clean(ZOO)


@every_case
def test_every_kind_of_layer(case):
    model = case.peft("random", adapter="one", init_weights=False)
    model.add_adapter("two", case.config("random", init_weights=False, scaling=0.5))
    model.add_adapter("three", case.config("random", init_weights=False, dim=2))
    shake(model.eval())
    x = case.inputs()
    x = torch.cat([x, x.flip(0), x])[:6]
    names = ["two", "one", BASE, "three", "two", "one"]
    reference = one_at_a_time(model, x, names)
    assert same(mixed(model, x, names), reference)
    flipped = one_at_a_time(model, x, names[::-1])
    assert same(mixed(model, x, names[::-1]), flipped) and not same(flipped, reference, 1e-3)


class Frames(nn.Module):
    """A network that sees all frames of all scenes as one batch: (B, S, ...) to (B, S, 4)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("case", [*GROUPED, BY_NAME["conv2d"], BY_NAME["conv3d"], BY_NAME["embedding"], MLP], ids=str)
def test_rows_of_a_sample_stand_next_to_each_other(case):
    torch.manual_seed(0)
    arguments = {k: v for k, v in case.arguments.items() if k == "target_modules"}
    model = get_peft_model(
        Frames(case.model()), AttrSubspaceConfig(basis="random", dim=3, init_weights=False, **arguments)
    )
    model.add_adapter("two", AttrSubspaceConfig(basis="random", dim=3, init_weights=False, **arguments))
    x = case.inputs()
    x = torch.stack([torch.cat([x, x.flip(0)])[i : i + 2] for i in range(3)])  # [3, 2, ...]
    names = ["two", BASE, "default"]
    assert same(mixed(model.eval(), x, names), one_at_a_time(model, x, names))


def test_one_product_with_each_basis(monkeypatch):
    counted: list[tuple[int, ...]] = []
    kind = type(next(iter(layers(ZOO).values())))
    into = kind.project_in
    monkeypatch.setattr(kind, "project_in", lambda self, x, b: counted.append(tuple(x.shape)) or into(self, x, b))
    x = torch.randn(6, 12)
    mixed(ZOO, x, ["plain", "plain2", "blocks", "dropped", "plain", "plain2"])
    assert counted == [(6, 12), (6, 20)], "four adapters, one basis: one product with B per layer, for the whole batch"
    counted.clear()
    mixed(ZOO, x, ["plain", "texture", "plain2", BASE, "texture", "up"])
    assert counted == [(3, 12), (2, 12), (2, 20), (2, 20)], "two bases, and samples without an adapter left out"
    counted.clear()
    mixed(ZOO, x, [BASE] * 6)
    assert counted == []


def test_gradients_reach_each_core():
    model = zoo()
    names = ["plain", "lora", "plain2", "texture", "plain", BASE]
    for name in set(names) - {BASE}:
        model.set_requires_grad(name)
    x = torch.randn(6, 12, requires_grad=True)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(outputs: Tensor) -> list[Tensor | None]:
        return torch.autograd.grad(outputs.square().sum(), [x, *parameters.values()], allow_unused=True)

    found = gradients(model(x, adapter_names=names))
    parts = []
    for i, name in enumerate(names):
        parts.append(alone(model, name, lambda i=i: model(x[i : i + 1])))
        for other in set(names) - {BASE}:
            model.set_requires_grad(other)  # set_adapter has taken it away
    expected = gradients(torch.cat(parts))
    used = [n for n, g in zip(["x", *parameters], found, strict=True) if g is not None]
    assert {n.removesuffix(".weight").rsplit(".", 1)[-1] for n in used} == {"x", "plain", "lora", "plain2", "texture"}
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = zoo().to(dtype)
    names = ["plain", "lora", "blocks", BASE, "texture", "plain2"]
    x = torch.randn(6, 12, dtype=dtype)
    output = mixed(model, x, names)
    assert output.dtype == dtype
    assert same(output, one_at_a_time(model, x, names), 2e-2 if dtype == torch.bfloat16 else 1e-12)


def test_half_a_base_under_float32_cores():
    base = Mlp().to(torch.bfloat16)
    config = AttrSubspaceConfig(basis="random", dim=3, target_modules=["up", "down"], init_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("two", config)
    assert {p.dtype for n, p in model.named_parameters() if "attrsub_M" in n} == {torch.float32}
    x, names = torch.randn(4, 12, dtype=torch.bfloat16), ["two", BASE, "default", "two"]
    output = mixed(model.eval(), x, names)
    assert output.dtype == torch.bfloat16
    assert same(output, one_at_a_time(model, x, names), 2e-2)


@pytest.mark.parametrize("case", [MLP, BY_NAME["conv2d"], BY_NAME["embedding-and-conv1d"]], ids=str)
def test_autocast(case):
    model = case.peft("random", init_weights=False)
    model.add_adapter("two", case.config("random", init_weights=False))
    x = case.inputs()[:2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mixed(model.eval(), x, ["two", "default"])
        assert same(output.float(), one_at_a_time(model, x, ["two", "default"]).float(), 3e-2)


# What is refused, and what is left behind


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["plain"] * 5, ValueError, "Length of `adapter_names`.* 5 and 6"),
        (["plain"] * 3, ValueError, "Length of `adapter_names`.* 3 and 6"),
        ([], ValueError, "Length of `adapter_names`.* 0 and 6"),
        (["plain", "nobody"] * 3, ValueError, "non-existing adapter.*: nobody; the model has plain"),
        ("plain", TypeError, "expected a list"),
        ([0] * 6, TypeError, "expected a list"),
    ],
    ids=["fewer", "a-divisor", "none", "unknown", "string", "numbers"],
)
@pytest.mark.parametrize("keyword", [False, True])
def test_what_is_no_list_of_names_is_refused(names, error, words, keyword):
    x = torch.randn(6, 12)
    with pytest.raises(error, match=words):
        ZOO(x=x, adapter_names=names) if keyword else ZOO(x, adapter_names=names)
    assert clean(ZOO)


def test_training_mode_and_merged_adapters_are_refused():
    model, x = zoo(), torch.randn(2, 12)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model.train()(x, adapter_names=["plain", BASE])
    model.eval().merge_adapter(["plain"])
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
        model(x, adapter_names=["plain2", BASE])
    model.unmerge_adapter()
    assert same(mixed(model, x, ["plain2", BASE]), one_at_a_time(model, x, ["plain2", BASE]), 1e-4)


def test_disabled_adapters_stay_disabled():
    x = torch.randn(2, 12)
    with ZOO.disable_adapter():
        assert torch.equal(mixed(ZOO, x, ["plain", "lora"]), ZOO(x))
    assert not same(mixed(ZOO, x, ["plain", "lora"]), alone(ZOO, BASE, lambda: ZOO(x)), 1e-3)


class Flattened(nn.Module):
    """Pools pairs of samples, which leaves rows that belong to no one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 12)
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor, how: str = "pairs") -> Tensor:
        if how == "pairs":
            return self.up(x.unflatten(0, (-1, 2)).mean(1))
        return self.up(x[0]) if how == "vector" else self.conv(x.flatten()[None])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("pairs", r"names 4 samples.*linear.*\(2, 12\).*has to be 4"),
        ("vector", r"linear.*\(12,\)"),
        ("whole", r"conv1d.*\(1, 48\)"),
    ],
)
def test_rows_that_belong_to_no_sample_are_refused(how, words):
    config = AttrSubspaceConfig(basis="random", dim=2, target_modules=["up", "conv"], init_weights=False)
    model = get_peft_model(Flattened(), config).eval()
    with pytest.raises(ValueError, match=words):
        model(torch.randn(4, 12), how=how, adapter_names=["default", BASE] * 2)
    assert clean(model)
    assert model(torch.randn(4, 12)).shape == (2, 12)


def test_an_error_in_the_model_leaves_nothing_behind():
    model = three_heads()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 5), adapter_names=["one", "two"])
    assert clean(model)


# Modules that are trained in full


def three_heads(adapters: tuple[str, ...] = ("one", "two", "three")) -> PeftModel:
    """`one` and `three` train their own copy of `down`; `two` leaves it alone."""
    model = MLP.peft("random", adapter="one", init_weights=False, target_modules=["up"], modules_to_save=["down"])
    model.add_adapter("two", MLP.config("random", init_weights=False, target_modules=["up"]))
    if "three" in adapters:
        more = {"target_modules": ["up"], "modules_to_save": ["down"]}
        model.add_adapter("three", MLP.config("random", init_weights=False, **more))
    shake(model.eval())
    return model


@pytest.mark.parametrize("active", ["one", "two", "three"])
def test_modules_to_save(active):
    model, x = three_heads(), torch.randn(8, 12)
    names = ["one", "two", BASE, "three"] * 2
    reference = one_at_a_time(model, x, names)
    model.set_adapter(active)  # whichever is active: the names alone count
    assert same(mixed(model, x, names), reference)
    assert model.active_adapter == active and clean(model)


def test_modules_to_save_over_frames():
    torch.manual_seed(0)
    config = AttrSubspaceConfig(basis="random", dim=2, target_modules=["up"], modules_to_save=["down"])
    model = get_peft_model(Frames(Mlp()), config)
    model.add_adapter("two", config)
    shake(model.eval())
    x, names = torch.randn(3, 4, 12), ["two", BASE, "default"]
    assert same(mixed(model, x, names), one_at_a_time(model, x, names))


# torch.compile: compiling costs tens of seconds


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["peft-model", "base-model"])
def test_a_compiled_model_sees_the_names(whole):
    torch.compiler.reset()
    model, x = zoo(), torch.randn(4, 12)
    names = ["plain", "plain2", BASE, "texture"]
    expected = {tuple(order): one_at_a_time(model, x, order) for order in (names, names[::-1])}
    model.set_adapter("plain")
    plain = model(x)
    compiled = torch.compile(model, backend="eager") if whole else model
    if not whole:
        model.base_model.model.compile(backend="eager")
    assert same(compiled(x), plain)
    for order, reference in expected.items():
        assert same(mixed(compiled, x, list(order)), reference)
        assert same(compiled(x), plain)


@pytest.mark.slow
def test_compiled_wrappers_are_run_uncompiled_or_refused():
    torch.compiler.reset()
    model, x = three_heads(), torch.randn(4, 12)
    names = ["one", "two", BASE, "three"]
    expected = {tuple(order): one_at_a_time(model, x, order) for order in (names, names[::-1])}
    whole = torch.compile(model, backend="eager")
    whole(x)
    with pytest.raises(RuntimeError, match=r"compile the base model instead"):
        whole(x, adapter_names=names)
    assert clean(model)
    model.base_model.model.compile(backend="eager")
    model(x)
    for order, reference in expected.items():
        assert same(mixed(model, x, list(order)), reference)
