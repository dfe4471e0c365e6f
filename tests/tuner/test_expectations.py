"""Adapters saved as adapter_model.bin, and PEFT's features that take LoRA only."""

from __future__ import annotations

import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_attrsub import AttrSubspaceConfig, BasisError, export_lora, hotswap_adapter

from .checks import run, same
from .models import MLP
from .transformers_models import llama


def _saved(folder, **more):
    model = MLP.peft("random", init_weights=False)
    model.save_pretrained(folder, **more)
    return model


def test_peft_loads_a_pickle_of_tensors(tmp_path):
    model = _saved(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert same(run(PeftModel.from_pretrained(MLP.base(), tmp_path).eval(), MLP), run(model, MLP))


class _Runs:
    """What a hostile pickle does: it makes a file while it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_reader_runs_a_pickle(tmp_path):
    _saved(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    mark = tmp_path / "ran"
    torch.save({"x": _Runs(mark)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        PeftModel.from_pretrained(MLP.base(), tmp_path / "adapter")
    model = MLP.peft("random")
    for read in (
        lambda: hotswap_adapter(model, tmp_path / "adapter"),
        lambda: export_lora(tmp_path / "adapter", tmp_path / "lora"),
    ):
        with pytest.raises(BasisError, match=r"adapter_model\.bin.*save it again as safetensors"):
            read()
    assert not mark.exists() and not (tmp_path / "lora").exists()


@pytest.mark.parametrize("loaded", ["add_adapter", "load_adapter"])
def test_transformers_hotswap_puts_in_another_adapter(loaded, tmp_path):
    def base():
        torch.manual_seed(0)
        return llama()

    config = AttrSubspaceConfig(basis="random", dim=2, target_modules=["q_proj"], init_weights=False)
    inputs = torch.tensor([[1, 2, 3]])
    outputs = {}
    for seed, name in enumerate("ab"):
        model = base()
        torch.manual_seed(seed)
        saved = get_peft_model(model, config).eval()
        saved.save_pretrained(tmp_path / name)
        outputs[name] = saved(inputs).logits
    model = base()
    if loaded == "add_adapter":
        model.add_adapter(config, "default")
    else:
        model.load_adapter(str(tmp_path / "b"), "default")
    model.eval()
    held = {n: p for n, p in model.named_parameters() if "attrsub_M" in n}
    for name in "aba":
        info = model.load_adapter(str(tmp_path / name), adapter_name="default", hotswap=True)
        assert not info.missing_keys
        assert torch.allclose(model(inputs).logits, outputs[name], atol=1e-6)
    assert all(p is held[n] for n, p in model.named_parameters() if "attrsub_M" in n)
    model.save_pretrained(tmp_path / "by transformers")
    other = AttrSubspaceConfig(basis="random", dim=3, target_modules=["q_proj"])
    get_peft_model(base(), other).save_pretrained(tmp_path / "wide")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for wrong, error in ((tmp_path / "wide", "basis"), (tmp_path / "absent", "absent")):
        with pytest.raises(BasisError, match=error):
            model.load_adapter(str(wrong), adapter_name="default", hotswap=True)
    with pytest.raises(ValueError, match="peft_model_id"):
        model.load_adapter(adapter_name="default", hotswap=True, peft_config=config, adapter_state_dict={})
    with pytest.raises(ValueError, match="existing adapter"):
        model.load_adapter(str(tmp_path / "a"), adapter_name="other", hotswap=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = base()
    again.enable_peft_hotswap()
    again.load_adapter(str(tmp_path / "b"), "default")
    again.load_adapter(str(tmp_path / "by transformers"), "default")
    assert torch.allclose(again.eval()(inputs).logits, outputs["a"], atol=1e-6)
