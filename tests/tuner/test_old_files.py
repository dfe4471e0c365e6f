"""Adapters of before 0.1.0 load: other names of tensors, widths of a stored basis in the file, no fingerprints."""

import json
import re
import warnings
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig, Basis, BasisError, export_lora, hotswap_adapter, psv_basis

from .checks import deltas

DTYPES = [None, torch.bfloat16, torch.float16]


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"up": nn.Linear(12, 20), "conv": nn.Conv2d(3, 4, 3), "tokens": nn.Embedding(30, 8), "down": nn.Linear(20, 6)}
    )


def kinds(folder: Any) -> dict[str, dict[str, Any]]:
    psv_basis(base(), dim=4).save_pretrained(folder / "basis")
    saved, linears = str(folder / "basis"), ["up", "down"]
    return {
        "pointer": {"basis": saved, "target_modules": linears},
        "blocks": {"basis": saved, "target_modules": linears, "core": "block_diagonal"},
        "random": {"basis": "random", "dim": 3, "target_modules": ["up", "conv", "tokens", "down"]},
        "psv and lora": {
            "basis": "psv",
            "dim": 3,
            "target_modules": linears,
            "lora_modules": ["conv"],
            "lora_rank": 2,
        },
        "memory": {"basis": psv_basis(base(), dim=4), "target_modules": linears},
        "blocks in the file": {
            "basis": saved,
            "target_modules": linears,
            "core": "block_diagonal",
            "save_basis": True,
        },
    }


def in_old_names(tensors: dict[str, Tensor], widths: dict[str, str] | None) -> dict[str, Tensor]:
    """What today's tensors of an adapter, or of a model, were called; the widths of a basis were a tensor, too."""
    old = {re.sub(r"(attrsub_(?:M|lora_A|lora_B)(?:\.default)?)\.weight$", r"\1", key): value
           for key, value in tensors.items() if not key.endswith(".basis")}  # fmt: skip
    for module, text in (widths or {}).items():
        sizes = torch.tensor([[int(x) for x in pair.split("x")] for pair in text.split()])
        key = next(key for key in old if f".{module}.attrsub_A" in key)
        old[key.replace("attrsub_A", "attrsub_sizes")] = sizes
    return old


def as_before(folder: Any, dtype: torch.dtype | None) -> None:
    """Rewrite a saved adapter as it would have been saved before 0.1.0, and then cast by hand."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = in_old_names(load_file(folder / "adapter_model.safetensors"), config.pop("basis_widths"))
    config.pop("module_prefixes", None)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    cast = {key: value if dtype is None else value.to(dtype) for key, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in cast.items()}, folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:weights for adapter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["pointer", "blocks", "random", "psv and lora", "memory", "blocks in the file"])
def test_every_way_in(tmp_path, kind, dtype):
    config = AttrSubspaceConfig(init_weights=False, **kinds(tmp_path)[kind])
    source = get_peft_model(base(), config)
    wanted, state = deltas(source), source.state_dict()
    source.save_pretrained(tmp_path / "old")
    widths = PeftConfig.from_pretrained(tmp_path / "old").basis_widths
    as_before(tmp_path / "old", dtype)
    keys = load_file(tmp_path / "old" / "adapter_model.safetensors").keys()
    assert not any(key.endswith(("attrsub_M.weight", ".basis")) for key in keys)
    tolerance = 1e-6 if dtype is None else 0.03

    def check(model: PeftModel) -> None:
        found = deltas(model)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * float(value.abs().max()))

    model = PeftModel.from_pretrained(base(), tmp_path / "old")
    check(model)
    model.load_adapter(tmp_path / "old", "default")
    check(model)
    set_peft_model_state_dict(model, load_file(tmp_path / "old" / "adapter_model.safetensors"))
    check(model)
    hotswap_adapter(model, tmp_path / "old")
    check(model)
    export_lora(tmp_path / "old", tmp_path / "lora")
    lora = PeftModel.from_pretrained(base(), tmp_path / "lora")
    for name, value in wanted.items():
        found = lora.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(found, value, rtol=0, atol=max(tolerance, 1e-5) * float(value.abs().max()))
    # Saved again it is of today.
    model.save_pretrained(tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(PeftModel.from_pretrained(base(), tmp_path / "new"))
    if dtype is None:
        # The state dict of a whole model, as a checkpoint has it.
        again = get_peft_model(base(), PeftConfig.from_pretrained(tmp_path / "old"))
        old = in_old_names(state, None)
        for key, value in in_old_names(load_file(tmp_path / "new" / "adapter_model.safetensors"), widths).items():
            if key.endswith("attrsub_sizes"):
                old[f"{key}.default"] = value
        again.load_state_dict(old)
        check(again)


def test_widths_that_a_cast_has_rounded_are_told_or_refused(tmp_path):
    # bfloat16 holds whole numbers up to 256 only
    wide = nn.Sequential(nn.Linear(310, 310))
    factors = torch.linalg.qr(torch.randn(310, 302, generator=torch.Generator().manual_seed(0))).Q
    for dims, fits in (((301,), True), ((201, 101), True), ((257, 45), False)):
        parts, at = {}, 0
        for i, d in enumerate(dims):
            columns = factors[:, at : at + d]
            parts[f"part{i}"] = {"0": (columns, torch.linspace(2, 1, d), columns)}
            at += d
        source = get_peft_model(wide, AttrSubspaceConfig(basis=Basis.from_factors(parts), init_weights=False))
        wanted = deltas(source)
        folder = tmp_path / "-".join(map(str, dims))
        source.save_pretrained(folder)
        source.unload()
        as_before(folder, torch.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if fits:
                found = deltas(PeftModel.from_pretrained(wide, folder))
                for name, value in wanted.items():
                    torch.testing.assert_close(found[name], value, rtol=0, atol=0.05 * float(value.abs().max()))
            else:
                with pytest.raises((ValueError, BasisError), match=r"attrsub_sizes.*do not add up"):
                    PeftModel.from_pretrained(nn.Sequential(nn.Linear(310, 310)), folder)


def test_an_old_basis_in_place_of_another_has_no_fingerprint_of_that(tmp_path):
    options = {"basis": "random", "dim": 3, "target_modules": ["up"], "init_weights": False}
    source = get_peft_model(base(), AttrSubspaceConfig(seed=1, **options))
    source.save_pretrained(tmp_path)
    as_before(tmp_path, None)
    model = get_peft_model(base(), AttrSubspaceConfig(seed=2, **options))
    model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, deltas(source)[name]) for name, value in deltas(model).items())
    assert model.base_model.model["up"].fingerprint("default") is None
