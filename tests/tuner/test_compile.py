"""torch.compile takes adapted layers in one graph: no breaks, the same numbers, the same gradients."""

import pytest
import torch
from peft import get_peft_model

from peft_attrsub import AttrSubspaceConfig

from .models import MLP, TokenModel

pytestmark = pytest.mark.slow  # compiling costs tens of seconds


@pytest.mark.parametrize(
    "options",
    [
        {"core": "full"},
        {"core": "full", "scaling": 0.5, "columns": "spectral"},
        {"core": "block_diagonal"},
        {"core": "dials"},
        {"target_modules": ["up"], "lora_modules": ["down"], "lora_rank": 2},
    ],
    ids=["full", "scaled-spectral", "blocks", "dials", "beside-lora"],
)
def test_one_graph_with_the_same_outputs_and_gradients(options):
    torch.compiler.reset()
    base = MLP.base()
    options = {"target_modules": ["up", "down"], **options}
    config = AttrSubspaceConfig(basis="psv", dim=3, init_weights=False, **options)
    model = get_peft_model(base, config)
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_trained_step_is_seen_by_the_compiled_model():
    torch.compiler.reset()
    model = get_peft_model(MLP.base(), AttrSubspaceConfig(basis="random", dim=3, target_modules=["up", "down"]))
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(5, 12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = compiled(x).detach()
    compiled(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), model(x))


def test_embedding_in_one_graph():
    torch.compiler.reset()
    config = AttrSubspaceConfig(basis="random", dim=3, target_modules=["tokens"], init_weights=False)
    model = get_peft_model(TokenModel(), config)
    x = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
