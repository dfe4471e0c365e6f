"""PEFT's mixed models: adapters of ours and of other methods active at once, in random orders, against dense sums."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftMixedModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_attrsub import AttrSubspaceConfig, psv_basis

from .checks import loss, run, same
from .models import MLP

STOCK = {"lora": LoraConfig, "loha": LoHaConfig, "lokr": LoKrConfig}


def _config(kind, targets, basis):
    if kind in STOCK:
        more = {"init_lora_weights": False} if kind == "lora" else {"init_weights": False}
        return STOCK[kind](r=2, target_modules=targets, **more)
    where = {"random": "random", "mined": basis, "stored": basis}[kind]
    more = {"save_basis": True} if kind == "stored" else {}
    return AttrSubspaceConfig(basis=where, dim=3, target_modules=targets, init_weights=False, **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> a folder with an adapter, and its update of every weight."""
    top = tmp_path_factory.mktemp("mixed")
    psv_basis(MLP.base(), dim=4).save_pretrained(top / "basis")
    found = {}
    ours = [("random", ["up"]), ("mined", ["up", "down"]), ("stored", ["down"])]
    stock = [("lora", ["up", "down"]), ("loha", ["up"]), ("lokr", ["up", "down"])]
    for seed, (kind, targets) in enumerate([*ours, *stock]):
        base = MLP.base()
        torch.manual_seed(seed)
        model = get_peft_model(base, _config(kind, targets, str(top / "basis")))
        model.save_pretrained(top / kind)
        merged = dict(model.merge_and_unload().named_parameters())
        found[kind] = top / kind, {n: merged[n].detach() - p.detach() for n, p in MLP.base().named_parameters()}
    return found


def _expected(saved, active):
    plain = MLP.base()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter += sum(saved[kind][1][name] for kind in active)
    return run(plain, MLP)


@pytest.mark.parametrize("seed", range(20))
def test_the_active_updates_add_up(seed, saved):
    draw = random.Random(seed)
    kinds = draw.sample(list(saved), draw.randint(2, len(saved)))
    if not {"random", "mined", "stored"} & set(kinds):
        kinds.insert(draw.randrange(len(kinds) + 1), "stored")
    model = PeftMixedModel.from_pretrained(MLP.base(), str(saved[kinds[0]][0]), kinds[0]).eval()
    for kind in kinds[1:]:
        model.load_adapter(str(saved[kind][0]), kind)
    for _ in range(3):
        active = draw.sample(kinds, draw.randint(1, len(kinds)))
        model.set_adapter(active)
        assert same(run(model, MLP), _expected(saved, active), 1e-4)
        with model.disable_adapter():
            assert same(run(model, MLP), run(MLP.base(), MLP))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {part for n in trained for part in n.split(".")} & set(kinds) == set(active)
    if len(kinds) > 2:
        gone = draw.choice([kind for kind in kinds if [kind] != active])
        model.delete_adapter(gone)
        left = [kind for kind in active if kind != gone]
        model.set_adapter(left)
        assert same(run(model, MLP), _expected(saved, left), 1e-4)
        active = left
    if draw.random() < 0.5:
        assert same(run(model.merge_and_unload(safe_merge=draw.random() < 0.5), MLP), _expected(saved, active), 1e-4)
    else:
        plain = model.unload()
        assert not any(isinstance(m, BaseTunerLayer) for m in plain.modules())
        assert same(run(plain, MLP), run(MLP.base(), MLP))


@pytest.mark.parametrize("first", ["ours", "lora"])
def test_both_train_at_once(first, saved):
    configs = {"ours": _config("mined", ["up", "down"], str(saved["mined"][0].parent / "basis"))}
    configs["lora"] = LoraConfig(r=2, target_modules=["up"])
    model = get_peft_model(MLP.base(), configs[first], adapter_name=first, mixed=True)
    second = "lora" if first == "ours" else "ours"
    model.add_adapter(second, configs[second])
    model.set_adapter(["ours", "lora"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        losses.append(loss(model(MLP.inputs())))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("attrsub_M.ours" in n for n in changed) and any("lora_B.lora" in n for n in changed)


def test_a_mixed_model_without_ours_stays_peft_s_own(saved):
    model = PeftMixedModel.from_pretrained(MLP.base(), str(saved["lora"][0]), "lora")
    model.load_adapter(str(saved["lokr"][0]), "lokr")
    assert type(model.base_model).__module__ == "peft.tuners.mixed.model"


def test_a_refused_adapter_leaves_a_mixed_model_as_it_was(saved):
    model = PeftMixedModel.from_pretrained(MLP.base(), str(saved["lora"][0]), "lora").eval()
    names, before = set(model.state_dict()), run(model, MLP)
    with pytest.raises(ValueError, match="act"):
        model.add_adapter("ours", AttrSubspaceConfig(basis="random", target_modules=["act"]))
    assert set(model.state_dict()) == names and list(model.peft_config) == ["lora"]
    assert same(run(model, MLP), before)
