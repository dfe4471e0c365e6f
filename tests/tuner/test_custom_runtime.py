"""Copies, pickles, compiled graphs, fresh processes: the model as an object, and bases that come back the same."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests import pairs

from .checks import cores, deltas, every_basis, every_case, layers, learn, loss, run, same, trainable
from .models import BASES, BY_NAME, MLP, STACK, mined, pair

ROOT = Path(__file__).resolve().parents[2]


@every_basis
@every_case
def test_a_deep_copy_is_apart(case, basis):
    model = case.peft(basis, init_weights=False)
    expected = run(model, case)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, case), expected)
    assert trainable(twin) == trainable(model)
    learn(twin, case)
    assert torch.equal(run(model, case), expected)
    assert not same(run(twin, case), expected)
    twin.unload()
    assert layers(model) and torch.equal(run(model, case), expected)


@every_basis
@every_case
def test_a_pickled_model_comes_back(case, basis):
    model = case.peft(basis, init_weights=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(run(twin, case), run(model, case))
        assert trainable(twin) == trainable(model)
        twin.merge_adapter()
        assert same(run(twin, case), run(model, case))


def test_adapters_on_one_basis_hold_it_once_also_after_a_copy():
    model = MLP.peft(mined(MLP.base(), ["up", "down"]), dim=None)
    for i in range(9):
        model.add_adapter(f"more-{i}", copy.deepcopy(model.peft_config["default"]))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        for layer in layers(twin).values():
            for held in (layer.attrsub_A, layer.attrsub_B):
                assert len({held[name].data_ptr() for name in twin.peft_config}) == 1


@pytest.mark.parametrize(
    "name", ["mlp", "mlp-saved-head", "gpt-conv1d", "embedding", "embedding-scaled", "conv1d", "conv2d", "conv3d"]
)
@every_basis
def test_one_graph_without_breaks(name, basis):
    if broken := pairs.compiled_peft():
        pytest.skip(broken)
    # aot_eager traces forward and backward as the real compiler does, without the minutes of generating code
    case = BY_NAME[name]
    model = case.peft(basis, init_weights=False)
    expected = run(model, case)
    loss(model(case.inputs())).backward()
    gradients = {n: core.grad.clone() for n, core in cores(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(run(compiled, case), expected)
    loss(compiled(case.inputs())).backward()
    assert all(same(core.grad, gradients[n]) for n, core in cores(model).items())


def test_two_active_adapters_in_one_graph():
    if broken := pairs.compiled_peft():
        pytest.skip(broken)
    model = pair(MLP, {}, {})
    model.base_model.set_adapter(["one", "two"])
    expected = run(model, MLP)
    torch._dynamo.reset()
    assert same(run(torch.compile(model, fullgraph=True, backend="aot_eager"), MLP), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv2d", "embedding"])
def test_compiled_by_the_default_backend(name):
    case = BY_NAME[name]
    model = case.peft("psv", init_weights=False)
    expected = run(model, case)
    torch._dynamo.reset()
    assert same(run(torch.compile(model, fullgraph=True), case), expected, 1e-4)


@pytest.mark.parametrize("basis", BASES)
def test_a_compiled_model_saves_the_same_names(basis, tmp_path):
    model = MLP.peft(basis, init_weights=False)
    expected = run(model, MLP)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(MLP.inputs())
    compiled.save_pretrained(tmp_path)
    assert same(run(PeftModel.from_pretrained(MLP.base(), tmp_path), MLP), expected, 1e-6)


def test_the_seed_makes_the_random_basis():
    # cores of ones show the basis alone
    def update(**more):
        model = STACK.peft("random", **more)
        with torch.no_grad():
            for core in cores(model).values():
                core.fill_(1.0)
        return deltas(model)

    torch.manual_seed(1)
    first = update(seed=3)
    torch.manual_seed(2)
    again, other = update(seed=3), update(seed=4)
    assert all(torch.equal(again[name], delta) for name, delta in first.items())
    assert not any(same(other[name], delta, 1e-3) for name, delta in first.items())
    alike = [delta for name, delta in first.items() if name.endswith(".up")]
    assert not same(alike[0], alike[1], 1e-3) and not same(alike[1], alike[2], 1e-3)


SCRIPT = """
import sys, torch
import peft_attrsub
from peft import PeftModel
from tests.tuner.models import MLP
for folder in sys.argv[1:]:
    torch.manual_seed(999)
    model = PeftModel.from_pretrained(MLP.base(), folder)
    with torch.no_grad():
        torch.save(model(MLP.inputs()), folder + "/output.pt")
"""


def test_a_fresh_process_gives_the_same_output(tmp_path):
    expected = {}
    for basis, save_basis in (("random", "auto"), ("random", True), ("random", False), ("psv", "auto")):
        folder = tmp_path / f"{basis}-{save_basis}"
        model = MLP.peft(basis, draw=5, init_weights=False, save_basis=save_basis, seed=len(expected))
        learn(model, MLP)
        model.save_pretrained(folder)
        expected[folder] = run(model, MLP)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", SCRIPT, *map(str, expected)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, output in expected.items():
        assert same(torch.load(folder / "output.pt"), output, 1e-6), folder.name
