"""The whole path on small transformers: stock LoRA -> basis -> cores -> disk -> fresh process -> LoRA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_attrsub import AttrSubspaceConfig, Basis, build_basis, export_lora, project_lora
from tests.reference import energy_captured

from .helpers import stock_deltas
from .trained import MODELS, inputs, logits, study, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=list(MODELS))
def mined(request, tmp_path_factory):
    """(study, folder of the basis) for each architecture."""
    root = tmp_path_factory.mktemp(request.param)
    made = study(request.param, root)
    build_basis(made.adapters, dim=3, progress=False).save_pretrained(root / "basis")
    return made, root / "basis"


@pytest.fixture(scope="module")
def opt_mined(tmp_path_factory):
    root = tmp_path_factory.mktemp("opt-alone")
    made = study("opt", root)
    build_basis(made.adapters, dim=3, progress=False).save_pretrained(root / "basis")
    return made, root / "basis"


def tuned(made, basis, steps=3, **config):
    torch.manual_seed(0)
    model = get_peft_model(made.load(), AttrSubspaceConfig(basis=str(basis), **config))
    return train(model, made.kind, steps=steps)


def fresh_process(script, *args):
    """Run a script in a new interpreter that knows only the folder of the package."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- start, training, saving ----


def test_no_change_at_the_start(mined):
    made, basis = mined
    before = logits(made.load(), made.kind)
    model = get_peft_model(made.load(), AttrSubspaceConfig(basis=str(basis)))
    assert torch.equal(logits(model, made.kind), before)


def test_only_the_cores_are_trained_and_they_matter(mined):
    made, basis = mined
    model = get_peft_model(made.load(), AttrSubspaceConfig(basis=str(basis)))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("attrsub_M" in n for n in names)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = logits(model, made.kind)
    train(model, made.kind)
    assert (logits(model, made.kind) - before).abs().max() > 1e-4
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_every_module_of_the_adapters_gets_a_core(mined):
    made, folder = mined
    basis = Basis.from_pretrained(folder)
    model = get_peft_model(made.load(), AttrSubspaceConfig(basis=str(folder)))
    cored = {n.split(".attrsub_M")[0].removeprefix("base_model.model.") for n, _ in model.named_parameters()
             if "attrsub_M" in n}  # fmt: skip
    assert cored == set(basis.modules)
    stock = get_peft_model(made.load(), LoraConfig(r=1, target_modules=MODELS[made.kind][1]))
    assert cored == set(stock_deltas(stock))


def test_reload_in_this_process(mined, tmp_path):
    made, basis = mined
    model = tuned(made, basis)
    expected = logits(model, made.kind)
    assert (expected - logits(made.load(), made.kind)).abs().max() > 1e-4, "an untrained core proves nothing"
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(made.load(), str(tmp_path / "adapter"))
    assert torch.equal(logits(again, made.kind), expected)


def test_the_adapter_on_disk_is_only_the_cores_and_a_pointer(mined, tmp_path):
    made, folder = mined
    tuned(made, folder).save_pretrained(str(tmp_path / "adapter"))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored and all("attrsub_M" in key for key in stored)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"].startswith("ATTRSUB")
    assert Basis.from_pretrained(folder).digest in json.dumps(config)
    basis = Basis.from_pretrained(folder)
    trained = {key: tensor for key, tensor in stored.items() if key.endswith(".weight")}
    assert {key.removesuffix(".weight") + ".basis" for key in trained} == stored.keys() - trained.keys()
    for key, core in trained.items():
        module = key.removeprefix("base_model.model.").split(".attrsub_M")[0]
        A, B, _ = basis.joint(module)
        assert tuple(core.shape) == (A.shape[1], B.shape[1])


RELOAD = """
import sys, torch, peft_attrsub
from peft import PeftModel
from tests.basis.trained import Study, logits
from pathlib import Path
kind, base, adapter, out = sys.argv[1:]
torch.set_num_threads(1)
model = PeftModel.from_pretrained(Study(kind, Path(base), {}).load(), adapter)
torch.save(logits(model, kind), out)
"""


def test_reload_in_a_fresh_process_is_bit_equal(opt_mined, tmp_path):
    made, basis = opt_mined
    model = tuned(made, basis)
    model.save_pretrained(str(tmp_path / "adapter"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = logits(model, made.kind)
    torch.set_num_threads(threads)
    fresh_process(RELOAD, made.kind, made.base, tmp_path / "adapter", tmp_path / "out.pt")
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


# ---- merging, export, projection ----


def test_merge_and_unload(mined):
    made, basis = mined
    model = tuned(made, basis)
    expected = logits(model, made.kind)
    merged = model.merge_and_unload()
    assert type(merged) is type(made.load())
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in made.load().named_modules()]
    torch.testing.assert_close(logits(merged, made.kind), expected, atol=1e-5, rtol=1e-4)


def test_export_gives_a_stock_lora(mined, tmp_path):
    made, basis = mined
    model = tuned(made, basis)
    expected = logits(model, made.kind)
    folder = export_lora(model, tmp_path / "lora")
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    stock = PeftModel.from_pretrained(made.load(), str(folder))
    torch.testing.assert_close(logits(stock, made.kind), expected, atol=1e-5, rtol=1e-4)


def test_export_of_a_saved_adapter_is_the_same(mined, tmp_path):
    made, basis = mined
    model = tuned(made, basis)
    model.save_pretrained(str(tmp_path / "adapter"))
    one = load_file(Path(export_lora(model, tmp_path / "one")) / "adapter_model.safetensors")
    two = load_file(Path(export_lora(tmp_path / "adapter", tmp_path / "two")) / "adapter_model.safetensors")
    assert sorted(one) == sorted(two)
    stems = sorted({k.rsplit(".lora_", 1)[0] for k in one})
    for stem in stems:
        deltas = [f[f"{stem}.lora_B.weight"].flatten(1) @ f[f"{stem}.lora_A.weight"].flatten(1) for f in (one, two)]
        torch.testing.assert_close(deltas[0], deltas[1], atol=1e-6, rtol=1e-5)


WITHOUT_PLUGIN = """
import sys, torch
from peft import PeftModel
from transformers import OPTForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(OPTForCausalLM.from_pretrained(base), adapter).eval()
assert not any(name.startswith("peft_attrsub") for name in sys.modules)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids)).logits, out)
"""


def test_exported_lora_needs_no_plugin(opt_mined, tmp_path):
    made, basis = opt_mined
    model = tuned(made, basis)
    export_lora(model, tmp_path / "lora")
    torch.save(inputs("opt")["input_ids"], tmp_path / "ids.pt")
    fresh_process(WITHOUT_PLUGIN, made.base, tmp_path / "lora", tmp_path / "ids.pt", tmp_path / "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(model, "opt"), atol=1e-5, rtol=1e-4)


def test_projecting_an_adapter_inside_the_span_loses_nothing(mined, tmp_path):
    """An exported core lies in the span by construction: energy 1, the same outputs, the same cores."""
    made, basis = mined
    model = tuned(made, basis)
    expected = logits(model, made.kind)
    lora = export_lora(model, tmp_path / "lora")
    result = project_lora(str(lora), str(basis), tmp_path / "projected")
    assert result.total_energy == pytest.approx(1.0, abs=1e-5)
    assert set(result.energy) == set(Basis.from_pretrained(basis).modules)
    assert all(share == pytest.approx(1.0, abs=1e-4) for share in result.energy.values())
    again = PeftModel.from_pretrained(made.load(), str(tmp_path / "projected"))
    torch.testing.assert_close(logits(again, made.kind), expected, atol=1e-5, rtol=1e-4)


def test_projection_reports_the_share_that_fits(mined):
    """A source adapter is only partly inside the mined span; the share is ||A^T dW B||^2 / ||dW||^2."""
    made, folder = mined
    source = made.adapters["texture"][0]
    basis = Basis.from_pretrained(folder)
    result = project_lora(source, basis)
    updates = stock_deltas(PeftModel.from_pretrained(made.load(), source))
    assert set(result.energy) == set(updates)
    kept = total = 0.0
    for module, delta in updates.items():
        A, B, _ = basis.joint(module)
        share = energy_captured(delta, A, B)
        assert result.energy[module] == pytest.approx(share, abs=1e-4)
        torch.testing.assert_close(
            torch.as_tensor(result.cores[module]).double(), A.double().T @ delta.double() @ B.double(),
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip
        size = float(delta.double().square().sum())
        kept, total = kept + share * size, total + size
    assert min(result.energy.values()) < 0.9999, "the example must lose something"
    assert result.total_energy == pytest.approx(kept / total, abs=1e-4)
