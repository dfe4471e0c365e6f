"""Cores on weights that HQQ, optimum-quanto and bitsandbytes have quantised on a CPU, without transformers.

Run it with `pip install hqq optimum-quanto bitsandbytes`; each library is skipped where it is missing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig, export_lora, psv_basis

pytestmark = pytest.mark.slow

LINEARS = ["0", "2"]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()


def hqq(bits: int) -> nn.Module:
    module = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed", exc_type=ImportError)
    model, recipe = plain(), module.BaseQuantizeConfig(nbits=bits, group_size=64)
    for i in (0, 2):
        model[i] = module.HQQLinear(model[i], recipe, compute_dtype=torch.float32, device="cpu")
    return model


def quanto(kind: str) -> nn.Module:
    module = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed", exc_type=ImportError)
    model = plain()
    module.quantize(model, weights=getattr(module, kind))
    module.freeze(model)
    return model


def bnb(bits: int) -> nn.Module:
    module = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed", exc_type=ImportError)
    model = plain()
    for i in (0, 2):
        n, m = model[i].weight.shape
        if bits == 4:
            new = module.Linear4bit(m, n, compute_dtype=torch.float32, quant_type="nf4")
        else:
            new = module.Linear8bitLt(m, n, has_fp16_weights=False)
        new.load_state_dict(model[i].state_dict())
        model[i] = new
    return model.to("cpu").eval()


# How to quantise, whether an adapter can be merged, and the library's own error of a weight that is quantised again.
KINDS: dict[str, tuple[Callable[[], nn.Module], bool, float]] = {
    "hqq 8": (lambda: hqq(8), True, 0.02),
    "hqq 4": (lambda: hqq(4), True, 0.3),
    "quanto int8": (lambda: quanto("qint8"), False, 0.0),
    "quanto int4": (lambda: quanto("qint4"), False, 0.0),
    "quanto float8": (lambda: quanto("qfloat8"), False, 0.0),
    "bitsandbytes 4": (lambda: bnb(4), True, 0.3),
    "bitsandbytes 8": (lambda: bnb(8), True, 0.03),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch(rows: int = 300) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))


@every_kind
@pytest.mark.parametrize("forward_mode", ["auto", "folded"])
@pytest.mark.parametrize("basis", ["random", "psv", "mined"])
def test_train_save_load_export_merge(kind, basis, forward_mode, tmp_path):
    make, merges, error = KINDS[kind]
    x = batch()
    with torch.no_grad():
        # Of another copy: bitsandbytes packs a 4-bit weight for inference at once, and cannot be trained through then.
        expected = make()(x)
    named = psv_basis(plain(), dim=4) if basis == "mined" else basis
    config = AttrSubspaceConfig(
        basis=named, dim=4, target_modules=LINEARS, init_weights=False, scaling=0.05, forward_mode=forward_mode
    )
    model = get_peft_model(make(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    layers = [model.base_model.model[i] for i in (0, 2)]
    for layer in layers:
        assert float(layer.attrsub_M["default"].weight.grad.norm()) > 0
    model.eval()
    # Bitsandbytes has another kernel for evaluation, of less precision.
    near = {"atol": (0.02 if "bits" in kind else 1e-4) * float(expected.abs().max()), "rtol": 0}
    with torch.no_grad():
        trained = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), expected, **near)
        assert not torch.allclose(trained, expected, **near)
        model.save_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(PeftModel.from_pretrained(make(), tmp_path / "adapter")(x), trained, **near)
        deltas = [layer.get_delta_weight("default") for layer in layers]
        export_lora(tmp_path / "adapter", tmp_path / "lora")
        twin = PeftModel.from_pretrained(plain(), tmp_path / "lora")
        for name, delta in zip(LINEARS, deltas, strict=True):
            found = twin.base_model.model.get_submodule(name).get_delta_weight("default")
            torch.testing.assert_close(found, delta, atol=1e-5, rtol=1e-4)
        if not merges:
            with pytest.raises(ValueError, match=r"module '0'.*cannot be merged"):
                model.merge_and_unload()
            torch.testing.assert_close(model(x), trained, **near)
            return
        merged = model.merge_and_unload()
        near["atol"] = error * float(trained.abs().max())
        torch.testing.assert_close(merged(x), trained, **near)
        assert merged[0].bias is not None


@every_kind
def test_psv_is_that_of_the_dequantised_weight(kind):
    make, _, _ = KINDS[kind]
    model = get_peft_model(make(), AttrSubspaceConfig(basis="psv", dim=4, target_modules=["0"]))
    near = torch.linalg.svd(plain()[0].weight.detach()).U[:, :4]
    overlap = torch.linalg.svdvals(model.base_model.model[0].bases("default")[0].T @ near)
    assert overlap.min() > 0.8, overlap


@pytest.mark.parametrize("kind", [kind for kind, (_, merges, _) in KINDS.items() if merges])
def test_a_weight_that_has_run_inference_is_read_and_merged(kind):
    make, _, error = KINDS[kind]

    def adapted(basis: str, used: bool) -> nn.Module:
        model = make()
        if used:
            with torch.no_grad():
                model(batch())  # bitsandbytes packs a 4-bit weight anew for this
        config = AttrSubspaceConfig(basis=basis, dim=4, target_modules=LINEARS, init_weights=False, scaling=0.05)
        torch.manual_seed(2)
        return get_peft_model(model, config).eval()

    fresh, used = (adapted("psv", used).base_model.model[0].bases("default")[0] for used in (False, True))
    torch.testing.assert_close((fresh.T @ used).abs(), torch.eye(4), atol=0.02, rtol=0)
    with torch.no_grad():
        model = adapted("random", True)
        expected = model(batch())
        near = {"atol": error * float(expected.abs().max()), "rtol": 0}
        model.merge_adapter()
        torch.testing.assert_close(model(batch()), expected, **near)
        model.unmerge_adapter()
        torch.testing.assert_close(model(batch()), expected, **near)
