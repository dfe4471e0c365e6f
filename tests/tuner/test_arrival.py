"""A core never comes into a foreign basis: after a load the update is that of the source, or there is an error."""

import copy
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_attrsub import AttrSubspaceConfig, Basis, BasisError, hotswap_adapter

from .checks import deltas, layers

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"0": (20, 12), "2": (6, 20)}


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6))


def mined(seed: int) -> Basis:
    generator = torch.Generator().manual_seed(seed)

    def factors(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
        left, right = (torch.linalg.qr(torch.randn(k, 3, generator=generator)).Q for k in (n, m))
        return left, torch.tensor([3.0, 2.0, 1.0]), right

    return Basis.from_factors({a: {m: factors(*shape) for m, shape in SHAPES.items()} for a in ("texture", "camera")})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two bases that no shape tells apart: saved, and in memory."""
    folder = tmp_path_factory.mktemp("bases")
    found: dict[str, Any] = {}
    for seed, name in enumerate(("one", "two")):
        mined(seed).save_pretrained(folder / name)
        found |= {name: str(folder / name), f"{name} in memory": mined(seed)}
    return found


def written(saved: dict[str, Any], options: dict[str, Any]) -> AttrSubspaceConfig:
    basis = options["basis"]
    options = {**options, "basis": saved.get(basis, basis)}
    if basis in ("random", "psv"):
        options |= {"attributes": None, "dim": options["dim"] if isinstance(options["dim"], int) else None}
    if basis == "psv" or basis.endswith("memory"):
        options["save_basis"] = "auto"
    return AttrSubspaceConfig(target_modules=list(SHAPES), init_weights=False, **options)


OPTIONS = st.fixed_dictionaries(
    {
        "basis": st.sampled_from(["one", "two", "one in memory", "two in memory", "random", "psv"]),
        "attributes": st.sampled_from([None, ["texture"], ["camera", "texture"]]),
        "dim": st.sampled_from([None, 2, 3, {"texture": 1, "camera": 3}, {"texture": 3, "camera": 1}]),
        "columns": st.sampled_from(["orthonormal", "spectral"]),
        "core": st.sampled_from(["full", "block_diagonal", "diagonal", "dials"]),
        "save_basis": st.sampled_from(["auto", True, False]),
        "seed": st.sampled_from([0, 1]),
    }
)


def only_cores(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "attrsub_M" in key}


def arrive(way: str, source: PeftModel, model: PeftModel) -> None:
    if way in ("load_adapter", "hotswap"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            if way == "hotswap":
                hotswap_adapter(model, folder)
            else:
                model.load_adapter(folder, "default")
    elif way == "set_peft_model_state_dict":
        set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    elif way == "cores alone":
        set_peft_model_state_dict(model, only_cores(get_peft_model_state_dict(source)))
    elif way == "load_state_dict":
        model.load_state_dict(source.state_dict(), strict=False)
    else:
        model.load_state_dict(only_cores(source.state_dict()), strict=False)


WAYS = ["load_adapter", "hotswap", "set_peft_model_state_dict", "cores alone", "load_state_dict", "raw cores alone"]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mine=OPTIONS, change=OPTIONS, same=st.sets(st.sampled_from(sorted(("basis", "attributes", "dim", "columns",
       "core", "save_basis", "seed")))), way=st.sampled_from(WAYS), other_base=st.booleans())  # fmt: skip
def test_right_or_refused(saved, mine, change, same, way, other_base):
    theirs = {key: mine[key] if key in same else value for key, value in change.items()}
    try:
        configs = written(saved, theirs), written(saved, mine)
        torch.manual_seed(1)
        source = get_peft_model(base(int(other_base)), configs[0])
        torch.manual_seed(2)
        model = get_peft_model(base(), configs[1])
    except (ValueError, BasisError):  # no such config
        return
    wanted, before = deltas(source), deltas(model)
    try:
        arrive(way, source, model)
    except (BasisError, RuntimeError, ValueError) as error:
        assert theirs != mine or other_base, f"refused though nothing differs: {error}"
        assert all(torch.equal(value, before[name]) for name, value in deltas(model).items()), "half written"
        return
    found = deltas(model)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_both_bases_are_named(saved, way):
    source, model = (
        get_peft_model(base(), AttrSubspaceConfig(basis=saved[n], init_weights=False)) for n in ("one", "two")
    )
    with pytest.raises(BasisError) as caught:
        arrive(way, source, model)
    text = str(caught.value)
    assert all(name in text for name in (saved["one"][-30:], saved["two"][-30:])), text


def test_weights_without_a_fingerprint_load_with_one_warning(saved):
    source, model = (get_peft_model(base(), AttrSubspaceConfig(basis=saved["one"], init_weights=False)) for _ in "ab")
    state = get_peft_model_state_dict(source)
    bare = {key: value for key, value in state.items() if not key.endswith(".basis")}
    assert len(bare) < len(state)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        set_peft_model_state_dict(model, bare)
    assert ["cannot be checked" in str(one.message) for one in seen] == [True]
    assert all(torch.equal(value, deltas(source)[name]) for name, value in deltas(model).items())
    # What the model knew of its basis is not lost with it.
    assert torch.equal(get_peft_model_state_dict(model)["base_model.model.0.attrsub_M.basis"],
                       state["base_model.model.0.attrsub_M.basis"])  # fmt: skip


STARTED = """
import sys, torch
from peft import PeftConfig, get_peft_model
from tests.tuner.test_arrival import base
model = get_peft_model(base(), PeftConfig.from_pretrained(sys.argv[1]))
x = torch.ones(2, 12)
assert torch.equal(model(x), base()(x))
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.parametrize("basis", ["one", "random", "psv"])
@pytest.mark.parametrize("of", ["config", "adapter"])
@pytest.mark.parametrize("save_basis", ["auto", True])
def test_a_config_from_disk_starts_an_adapter(saved, tmp_path, basis, of, save_basis):
    config = AttrSubspaceConfig(
        basis=saved.get(basis, basis), dim=2, target_modules=list(SHAPES), save_basis=save_basis
    )
    fresh = get_peft_model(base(), copy.deepcopy(config))
    config.save_pretrained(tmp_path / "config")
    trained = get_peft_model(base(), copy.deepcopy(config))
    for layer in layers(trained).values():
        nn.init.normal_(layer.attrsub_M["default"].weight)
    trained.save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-W", "error::UserWarning", "-c", STARTED, tmp_path / of, tmp_path / "again"]
    subprocess.run(command, check=True, cwd=ROOT)
    # The same basis as ever, and a core of zeros in it.
    again = PeftModel.from_pretrained(base(), tmp_path / "again")
    for name, layer in layers(again).items():
        assert not layer.attrsub_M["default"].weight.any()
        for mine, its in zip(layer.bases("default"), layers(fresh)[name].bases("default"), strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize("basis", ["basis", "../basis", "./parts/basis", ["parts/texture", "parts/camera"]])
def test_a_relative_basis_is_found_next_to_the_adapter_then_in_the_working_directory(tmp_path, monkeypatch, basis):
    work, away, names = tmp_path / "work", tmp_path / "far" / "away", basis if isinstance(basis, list) else [basis]
    (work / "adapter").mkdir(parents=True), away.mkdir(parents=True)
    for at in (work, work / "adapter"):
        for name in names:
            part = mined(0).select([name.partition("/")[2]]) if isinstance(basis, list) else mined(0)
            if not (at / name).exists():
                part.save_pretrained(at / name)
    monkeypatch.chdir(work)
    source = get_peft_model(base(), AttrSubspaceConfig(basis=basis, init_weights=False))
    source.save_pretrained("adapter")
    assert PeftConfig.from_pretrained("adapter").basis == basis  # as the user gave it

    def check() -> None:
        found = deltas(PeftModel.from_pretrained(base(), work / "adapter"))
        assert all(torch.equal(value, found[name]) for name, value in deltas(source).items())

    check()  # both are there
    monkeypatch.chdir(away)
    check()  # next to the adapter alone
    for name in names:
        shutil.rmtree(work / "adapter" / name)
    with pytest.raises(BasisError, match=re.escape(str((work / "adapter" / names[0]).resolve()))):
        check()
    monkeypatch.chdir(work)
    check()  # in the working directory alone


def test_a_basis_that_was_in_the_file_alone_cannot_be_started_from(tmp_path):
    get_peft_model(base(), AttrSubspaceConfig(basis=mined(0))).save_pretrained(tmp_path)
    model = get_peft_model(base(), PeftConfig.from_pretrained(tmp_path))
    with pytest.raises(BasisError, match=r"'default' stores its basis in its own weights.*from_pretrained"):
        model(torch.ones(1, 12))


def test_a_damaged_list_of_widths_is_named(tmp_path):
    get_peft_model(base(), AttrSubspaceConfig(basis=mined(0))).save_pretrained(tmp_path)
    for widths in ("3x3", "3x3 3x", "3 3", "many"):
        config = PeftConfig.from_pretrained(tmp_path)
        config.basis_widths = {**config.basis_widths, "2": widths}
        with pytest.raises(BasisError, match=r"basis_widths.*'2'"):
            PeftModel.from_pretrained(base(), tmp_path, config=config)


def test_a_stored_basis_of_half_the_file_is_refused(tmp_path):
    get_peft_model(base(), AttrSubspaceConfig(basis="random", dim=2, target_modules=["0"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if not key.endswith("attrsub_B")}, file)
    with pytest.raises(BasisError, match="only one of attrsub_A and attrsub_B"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_stored_basis_keeps_its_precision_in_a_narrow_model(tmp_path, autocast):
    exact = get_peft_model(base(), AttrSubspaceConfig(basis="random", dim=4, target_modules=list(SHAPES)))
    exact.save_pretrained(tmp_path / "exact")
    model = PeftModel.from_pretrained(base().bfloat16(), tmp_path / "exact", autocast_adapter_dtype=autocast)
    made = get_peft_model(base().bfloat16(), exact.peft_config["default"], autocast_adapter_dtype=autocast)
    for one in (model, made):
        one(torch.ones(3, 12, dtype=torch.bfloat16))
        one.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "adapter_model.safetensors")
        for key, value in load_file(tmp_path / "exact" / "adapter_model.safetensors").items():
            if key.endswith(("attrsub_A", "attrsub_B")):
                assert torch.equal(again[key].float(), value if autocast else value.bfloat16().float())
