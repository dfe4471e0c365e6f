"""Cores out to a plain LoRA and back: exact in stock PEFT, for every layer type and every setting."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_attrsub import AttrSubspaceConfig, BasisError, export_lora, project_lora, psv_basis

from .models import MLP, TokenModel


class Every(nn.Module):
    """An embedding, a linear layer, 1-d and 2-d convolutions; two names with the same ending."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.head = nn.ModuleDict({"proj": nn.Linear(16, 24)})
        self.proj = nn.Linear(24, 24)
        self.line = nn.Conv1d(24, 12, 3, padding=1)
        self.plane = nn.Conv2d(1, 6, (3, 2), stride=2)

    def forward(self, ids):
        h = torch.tanh(self.proj(torch.tanh(self.head["proj"](self.tokens(ids)))))
        return self.plane(torch.tanh(self.line(h.transpose(1, 2)))[:, None]).flatten(1)


NAMES = ["tokens", "head.proj", "line", "plane"]


def base():
    torch.manual_seed(0)
    return Every().eval()


def adapted(**options):
    settings = {"basis": "psv", "dim": 4, "target_modules": NAMES, "init_weights": False, **options}
    return get_peft_model(base(), AttrSubspaceConfig(**settings)).eval()


IDS = torch.arange(24).reshape(3, 8)
SETTINGS = {
    "full": {},
    "scaled": {"scaling": 0.25},
    "spectral": {"columns": "spectral"},
    "blocks": {"core": "block_diagonal"},
    "diagonal": {"core": "diagonal"},
    "dials": {"core": "dials"},
    "beside-lora": {"target_modules": ["head.proj", "line"], "lora_modules": ["tokens", "plane"], "lora_rank": 2},
    "wider-than-some": {"dim": 10},
    "saved-module": {"modules_to_save": ["proj"], "target_modules": ["tokens", "line"]},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_exact_in_stock_peft(options, tmp_path):
    model = adapted(**options)
    y = model(IDS)
    assert not torch.allclose(y, base()(IDS))
    model.save_pretrained(tmp_path / "adapter")
    for source, name in ((model, "from-model"), (tmp_path / "adapter", "from-folder")):
        export_lora(source, tmp_path / name)
        loaded = PeftModel.from_pretrained(base(), tmp_path / name).eval()
        torch.testing.assert_close(loaded(IDS), y, rtol=1e-5, atol=1e-5)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"


def test_no_svd_without_a_rank(tmp_path, monkeypatch):
    model = adapted()

    def refused(*args, **kwargs):
        raise AssertionError("an exact export needs no SVD")

    monkeypatch.setattr(torch.linalg, "svd", refused)
    export_lora(model, tmp_path / "lora")


def test_a_module_whose_name_is_an_ending_of_another_is_left_alone(tmp_path):
    # head.proj is adapted, proj is not: PEFT's matching by endings must not tell them apart wrongly
    export_lora(adapted(target_modules=["proj"], exclude_modules=["head.proj"]), tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora")
    assert [n for n, m in loaded.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.proj"]


def test_truncation_is_the_best_of_its_rank(tmp_path):
    model = get_peft_model(MLP.base(), MLP.config("random", dim=6, target_modules=["up"], init_weights=False))
    layer = model.base_model.model.up
    with torch.no_grad():
        layer.attrsub_M["default"].weight.mul_(torch.logspace(0, -2, layer.attrsub_M["default"].weight.shape[1]))
    delta = layer.get_delta_weight("default")
    export_lora(model, tmp_path / "lora", rank=2)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    found = tensors["base_model.model.up.lora_B.weight"] @ tensors["base_model.model.up.lora_A.weight"]
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(found, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)
    with pytest.raises(BasisError, match="rank=0"):
        export_lora(model, tmp_path / "other", rank=0)


def test_ranks_that_differ_between_modules_stand_in_the_patterns(tmp_path):
    export_lora(adapted(dim=10), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    ranks = {tensors[k].shape[0] for k in tensors if k.endswith((".lora_A.weight", "lora_embedding_A"))}
    assert len(ranks) > 1 and set(config["rank_pattern"].values()) | {config["r"]} == ranks
    assert config["alpha_pattern"] == config["rank_pattern"] and config["lora_alpha"] == config["r"]


def test_grouped_convolutions_are_refused_by_name(tmp_path):
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    model = get_peft_model(grouped, AttrSubspaceConfig(basis="random", dim=2, target_modules=["0"]))
    with pytest.raises(BasisError, match=r"'0'.*2 groups"):
        export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_adapter_is_named_with_those_there_are(tmp_path):
    with pytest.raises(BasisError, match=r"'other'.*default"):
        export_lora(adapted(), tmp_path / "lora", adapter_name="other")


def test_out_and_in_again_gives_the_same_cores(tmp_path):
    basis = psv_basis(base(), dim=4, modules=NAMES)
    basis.save_pretrained(tmp_path / "basis")
    model = adapted(basis=str(tmp_path / "basis"), dim=None)
    y = model(IDS)
    export_lora(model, tmp_path / "lora")
    found = project_lora(tmp_path / "lora", tmp_path / "basis", tmp_path / "back")
    assert found.total_energy == pytest.approx(1, abs=1e-5)
    for name, core in found.cores.items():
        mine = model.base_model.model.get_submodule(name).core("default")
        torch.testing.assert_close(core, mine, rtol=1e-4, atol=1e-4)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "back").eval()
    torch.testing.assert_close(loaded(IDS), y, rtol=1e-4, atol=1e-4)


def test_projection_tells_what_is_lost_and_names_what_the_basis_lacks(tmp_path):
    export_lora(adapted(), tmp_path / "lora")
    whole = psv_basis(base(), dim=4, modules=NAMES)
    less = project_lora(tmp_path / "lora", whole, dim=2)
    assert all(0 < share < 1 for share in less.energy.values()) and 0 < less.total_energy < 1
    part = psv_basis(base(), dim=4, modules=["tokens"])
    with pytest.raises(BasisError, match=r"head\.proj"):
        project_lora(tmp_path / "lora", part)
    skipped = project_lora(tmp_path / "lora", part, tmp_path / "part", missing="intersect")
    assert skipped.energy["head.proj"] == 0 and set(skipped.cores) == {"tokens"}
    assert skipped.total_energy < 1
    with pytest.raises(BasisError, match="shape"):
        project_lora(tmp_path / "lora", psv_basis(TokenModel(), dim=2, modules=["tokens"]), missing="intersect")


def test_a_lora_that_was_never_trained_holds_no_energy(tmp_path):
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    basis = psv_basis(base, dim=3)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
    lora.save_pretrained(tmp_path / "never")
    with pytest.raises(BasisError, match="never trained"):
        project_lora(tmp_path / "never", basis, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    nn.init.normal_(lora.base_model.model[1].lora_B["default"].weight)
    lora.save_pretrained(tmp_path / "half")
    found = project_lora(tmp_path / "half", basis)
    assert set(found.energy) == {"1"} and set(found.cores) == {"0", "1"} and 0 < found.total_energy < 1
