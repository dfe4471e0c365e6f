"""A 3D model that is not ours and no transformers model: Depth Anything 3 from PyPI, small, with random weights.

From LoRAs of stock PEFT to a basis, cores, disk and a merged model. Run it with

    pip install --no-deps depth-anything-3 && pip install addict einops omegaconf

(its other requirements are for its viewer and its evaluation, and pin NumPy 1). The same way through transformers'
Llama, GPT-2, OPT and ViT, tiny and random, is in tests/basis/test_trained.py.
"""

from __future__ import annotations

import warnings
from importlib import resources

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_attrsub import AttrSubspaceConfig, build_basis, export_lora
from peft_attrsub.tuner import AttrSubspaceLayer

pytestmark = pytest.mark.slow  # 34 M parameters

# Blocks 4 and later attend over all views in turn; `head` is a DPT of convolutions.
TARGETS = r"backbone\.pretrained\.blocks\.(\d|10|11)\.(attn\.(qkv|proj)|mlp\.fc[12])|head\.projects\.\d"
MODULES = 12 * 4 + 4


@pytest.fixture(scope="module")
def weights():
    """Random weights of da3-small; skips where the package is not there."""
    cfg = pytest.importorskip(
        "depth_anything_3.cfg", reason="depth-anything-3 cannot be imported here", exc_type=ImportError
    )
    pytest.importorskip("depth_anything_3.model.da3", reason="its model cannot be imported here", exc_type=ImportError)

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = resources.files("depth_anything_3") / "configs" / "da3-small.yaml"
            torch.manual_seed(0)
            return cfg.create_object(cfg.load_config(str(path))).eval()

    try:
        load()(views())
    except Exception as error:  # its dependencies have moved on
        pytest.skip(f"depth-anything-3 does not run here, without any adapter: {type(error).__name__}: {error}")
    state = load().state_dict()

    def model():
        fresh = load()
        fresh.load_state_dict(state)
        return fresh

    return model


def views():
    return torch.rand(1, 2, 3, 56, 70, generator=torch.Generator().manual_seed(1))


def depth(model):
    with torch.no_grad():
        return model(views()).depth


def near(found, expected, tolerance=1e-4):
    return bool((found - expected).abs().max() < tolerance * expected.abs().max())


@pytest.fixture(scope="module")
def basis(weights, tmp_path_factory):
    """Mined from two LoRAs for each of two attributes, saved."""
    root = tmp_path_factory.mktemp("da3")
    adapters = {}
    for attribute in ("texture", "geometry"):
        adapters[attribute] = []
        for i in range(2):
            base = weights()
            torch.manual_seed(10 * len(attribute) + i)
            lora = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
            lora.save_pretrained(root / f"{attribute}-{i}")
            adapters[attribute].append(root / f"{attribute}-{i}")
    build_basis(adapters, dim=4, progress=False).save_pretrained(root / "basis")
    return root / "basis"


def test_train_save_load_merge_export(weights, basis, tmp_path):
    before = depth(weights())
    model = get_peft_model(weights(), AttrSubspaceConfig(basis=str(basis)))
    layers = [module for module in model.modules() if isinstance(module, AttrSubspaceLayer)]
    assert len(layers) == MODULES
    assert model.get_nb_trainable_parameters()[0] == MODULES * 8**2
    assert near(depth(model), before, 1e-6), "a new adapter changes nothing"
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(views()).depth.log().square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = depth(model)
    assert not near(trained, before, 1e-3)
    model.save_pretrained(tmp_path / "adapter")
    assert near(depth(PeftModel.from_pretrained(weights(), tmp_path / "adapter")), trained, 1e-5)
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert near(depth(PeftModel.from_pretrained(weights(), tmp_path / "lora")), trained)
    assert near(depth(model.merge_and_unload()), trained)
