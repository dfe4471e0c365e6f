"""Captured energy against dense matrices: dW and the projections are formed, and nothing is clever."""

import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_attrsub import Basis, BasisError, build_basis, project_lora
from peft_attrsub.analysis import captured_energy
from tests.basis.helpers import (
    SHAPES,
    ZOO,
    deltas,
    make_basis,
    orthonormal,
    random_factors,
    save_lora,
    save_many,
    train_zoo,
)
from tests.reference import span_projector

FC, PROJ = SHAPES


@pytest.fixture(scope="module")
def basis(tmp_path_factory):
    """Two attributes, three directions each, modules of 24 x 20 and 16 x 28."""
    return make_basis(tmp_path_factory.mktemp("adapters"))


def lora(folder, seed=5, rank=4, shapes=SHAPES, **config):
    factors = random_factors(shapes, rank, torch.Generator().manual_seed(seed))
    return save_lora(folder, factors, **config), factors


def dense(basis, updates, attributes=None, dim=None):
    """{"joint" | attribute: {module: [inside, ||dW||^2, expected share]}} with dense projectors, in float64."""
    attributes = attributes or basis.attributes
    found = {}
    for name, group in {"joint": attributes, **{a: [a] for a in attributes}}.items():
        found[name] = {}
        for module, delta in updates.items():
            if module not in basis.modules:
                continue
            d = dim if isinstance(dim, dict) else dict.fromkeys(attributes, dim)
            sides = [[basis.factors(module, a)[i][:, : d.get(a)] for a in group] for i in (0, 2)]
            left, right = (span_projector(*columns) for columns in sides)
            delta = delta.detach().double().numpy()
            inside = np.linalg.norm(left @ delta @ right) ** 2
            expected = round(left.trace()) * round(right.trace()) / delta.size
            found[name][module] = inside, np.linalg.norm(delta) ** 2, expected
    return found


def check(found, expected, missing=()):
    """Every share of `found` (Captured) is that of the dense form."""
    total = sum(norm for _, norm, _ in expected["joint"].values()) + sum(missing)
    assert {one.module for one in found.modules} == set(expected["joint"])
    for one in found.modules:
        assert one.norm == pytest.approx(expected["joint"][one.module][1], rel=1e-5)
        for name, share in {"joint": one.joint, **one.attributes}.items():
            inside, norm, chance = expected[name][one.module]
            assert share.share == pytest.approx(inside / norm, abs=1e-5)
            assert share.expected == pytest.approx(chance, rel=1e-9)
    for name, share in {"joint": found.joint, **found.attributes}.items():
        rows = expected[name].values()
        assert share.share == pytest.approx(sum(inside for inside, _, _ in rows) / total, abs=1e-5)
        assert share.expected == pytest.approx(sum(norm * chance for _, norm, chance in rows) / total, rel=1e-5)


def test_shares_are_those_of_dense_projections(tmp_path, basis):
    path, factors = lora(tmp_path / "task")
    found = captured_energy(path, basis)
    check(found, dense(basis, {m: b @ a for m, (b, a) in factors.items()}))
    assert found.adapter == "task" and found.missing == []
    assert list(found.attributes) == basis.attributes


@pytest.mark.parametrize(
    ("attributes", "dim"),
    [(["geometry"], None), (["geometry", "texture"], 2), (None, {"texture": 1, "geometry": 3}), (None, 1)],
    ids=str,
)
def test_a_part_of_the_basis(tmp_path, basis, attributes, dim):
    path, factors = lora(tmp_path / "task")
    found = captured_energy(path, basis, attributes=attributes, dim=dim)
    assert list(found.attributes) == (attributes or basis.attributes)
    check(found, dense(basis, {m: b @ a for m, (b, a) in factors.items()}, attributes, dim))


@pytest.mark.parametrize("config", [{"lora_alpha": 1}, {"lora_alpha": 20, "use_rslora": True}], ids=str)
def test_scaling_is_honoured(tmp_path, basis, config):
    """Shares do not see one common factor; the norms and the weight of each module do."""
    path, factors = lora(tmp_path / "task", **config)
    alpha, rank = config["lora_alpha"], 4
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    check(captured_energy(path, basis), dense(basis, {m: scale * b @ a for m, (b, a) in factors.items()}))


def test_patterns_weigh_the_modules(tmp_path, basis):
    """alpha 12 at rank 2 in one module, 1 at rank 5 in the other."""
    g = torch.Generator().manual_seed(0)
    factors = random_factors({FC: SHAPES[FC]}, 2, g) | random_factors({PROJ: SHAPES[PROJ]}, 5, g)
    path = save_lora(tmp_path / "task", factors, r=2, rank_pattern={PROJ: 5}, lora_alpha=12, alpha_pattern={PROJ: 1})
    (fc,), (proj,) = deltas([factors], FC), deltas([factors], PROJ)
    check(captured_energy(path, basis), dense(basis, {FC: 6 * fc, PROJ: proj / 5}))


def inside(basis, generator, attribute, outside=False):
    """A LoRA whose updates lie in the spans of one attribute, or in none of the basis' spans."""
    factors = {}
    for module in basis.modules:
        u, _, v = (t.double() for t in basis.factors(module, attribute))
        if outside:
            every = [torch.cat([basis.factors(module, a)[i].double() for a in basis.attributes], 1) for i in (0, 2)]
            u, v = (torch.from_numpy(scipy.linalg.null_space(x.T.numpy())) for x in every)
        mix = torch.randn(u.shape[1], v.shape[1], generator=generator, dtype=torch.float64)
        p, s, q = torch.linalg.svd(mix, full_matrices=False)
        factors[module] = (u @ p[:, :2] * s[:2], q[:2] @ v.T)
    return factors


def test_an_update_made_of_the_basis_has_share_one(tmp_path, basis):
    path = save_lora(tmp_path / "task", inside(basis, torch.Generator().manual_seed(0), "texture"))
    found = captured_energy(path, basis)
    assert found.attributes["texture"].share == pytest.approx(1, abs=1e-5)
    assert found.joint.share == pytest.approx(1, abs=1e-5) and found.joint.share <= 1
    assert found.attributes["geometry"].share < 0.9
    assert all(one.joint.share == pytest.approx(1, abs=1e-5) for one in found.modules)


def test_an_orthogonal_update_has_share_zero(tmp_path, basis):
    path = save_lora(tmp_path / "task", inside(basis, torch.Generator().manual_seed(0), "texture", outside=True))
    found = captured_energy(path, basis)
    shares = [found.joint, *found.attributes.values(), *(one.joint for one in found.modules)]
    assert all(0 <= share.share < 1e-10 for share in shares)


def test_half_in_and_half_out(tmp_path, basis):
    """Equal norms inside and outside, in every module: one half."""
    g = torch.Generator().manual_seed(0)
    one, other = inside(basis, g, "texture"), inside(basis, g, "texture", outside=True)
    factors = {}
    for module in basis.modules:
        parts = [(b / torch.linalg.matrix_norm(b @ a), a) for b, a in (one[module], other[module])]
        factors[module] = tuple(torch.cat([part[i] for part in parts], 1 - i) for i in (0, 1))
    found = captured_energy(save_lora(tmp_path / "task", factors), basis)
    assert found.joint.share == pytest.approx(0.5, abs=1e-5)
    assert found.attributes["texture"].share == pytest.approx(0.5, abs=1e-5)


def test_random_updates_have_the_expected_share_on_average(tmp_path, basis):
    found = [captured_energy(lora(tmp_path / f"task-{i}", seed=i)[0], basis) for i in range(60)]
    for pick in (lambda f: f.joint, lambda f: f.attributes["geometry"]):
        shares = np.array([pick(f).share for f in found])
        error = shares.std() / len(shares) ** 0.5
        expected = np.mean([pick(f).expected for f in found])
        assert abs(shares.mean() - expected) < 4 * error and error < 0.1 * expected


def test_modules_that_the_basis_lacks_count_and_are_named(tmp_path, basis):
    shapes = {**SHAPES, "block.10.fc": (6, 5), "block.2.fc": (6, 5)}
    path, factors = lora(tmp_path / "task", shapes=shapes)
    found = captured_energy(path, basis)
    assert found.missing == ["block.2.fc", "block.10.fc"]
    lost = [float((b @ a).square().sum()) for m, (b, a) in factors.items() if m not in SHAPES]
    check(found, dense(basis, {m: b @ a for m, (b, a) in factors.items()}), lost)


def test_modules_that_the_adapter_lacks_do_not_matter(tmp_path, basis):
    path, factors = lora(tmp_path / "task", shapes={FC: SHAPES[FC]})
    found = captured_energy(path, basis)
    assert [one.module for one in found.modules] == [FC] and found.missing == []
    check(found, dense(basis, {m: b @ a for m, (b, a) in factors.items()}))


def test_a_module_that_was_not_trained_is_left_out(tmp_path, basis):
    _, factors = lora(tmp_path / "whole")
    factors[FC] = (torch.zeros_like(factors[FC][0]), factors[FC][1])
    found = captured_energy(save_lora(tmp_path / "task", factors), basis)
    assert [one.module for one in found.modules] == [PROJ]
    check(found, dense(basis, {PROJ: factors[PROJ][0] @ factors[PROJ][1]}))


def test_every_kind_of_layer(tmp_path):
    """Embeddings, Conv1D and convolutions, as stock PEFT saves them, against its own get_delta_weight."""
    for i in range(3):
        train_zoo(tmp_path / f"zoo-{i}", seed=i)
    basis = build_basis([tmp_path / f"zoo-{i}" for i in range(3)], dim=3, progress=False)
    updates = train_zoo(tmp_path / "task", seed=9, lora_alpha=3)
    assert set(updates) == set(ZOO)
    check(captured_energy(tmp_path / "task", basis), dense(basis, updates))


def test_it_agrees_with_project_lora(tmp_path, basis):
    path, _ = lora(tmp_path / "task", lora_alpha=7)
    found, projected = captured_energy(path, basis), project_lora(path, basis)
    assert found.joint.share == pytest.approx(projected.total_energy, abs=1e-6)
    assert {one.module: one.joint.share for one in found.modules} == pytest.approx(projected.energy, abs=1e-6)
    part = captured_energy(path, basis, attributes=["geometry"], dim=2)
    projected = project_lora(path, basis, attributes=["geometry"], dim=2)
    assert part.joint.share == part.attributes["geometry"].share == pytest.approx(projected.total_energy, abs=1e-6)


def test_directions_that_two_attributes_share_count_once(tmp_path):
    """The same span twice: jointly nothing is added, and more is not expected."""
    g = torch.Generator().manual_seed(0)
    u, v = orthonormal(12, 3, g).float(), orthonormal(10, 3, g).float()
    spans = (u, torch.ones(3), v), (u[:, [1, 0, 2]], torch.ones(3), v[:, [2, 1, 0]])
    basis = Basis.from_factors({"a": {"fc": spans[0]}, "b": {"fc": spans[1]}})
    found = captured_energy(lora(tmp_path / "task", shapes={"fc": (12, 10)})[0], basis)
    assert found.joint.share == pytest.approx(found.attributes["a"].share, abs=1e-6)
    assert found.joint.share == pytest.approx(found.attributes["b"].share, abs=1e-6)
    assert found.joint.expected == found.attributes["a"].expected == 9 / 120


def test_a_module_without_directions_has_share_zero(tmp_path):
    g = torch.Generator().manual_seed(0)
    factors = random_factors(SHAPES, 3, g)
    strong = {FC: factors[FC], PROJ: (factors[PROJ][0][:, :1], factors[PROJ][1][:1])}
    basis = build_basis([save_lora(tmp_path / "a", strong)], dim=2, allocation="importance-literal", progress=False)
    empty = [m for m in basis.modules if basis.dim(m, "shared") == 0]
    assert empty, "the literal rule leaves out modules below the mean"
    path, factors = lora(tmp_path / "task")
    found = captured_energy(path, basis)
    assert [one.joint.share for one in found.modules if one.module in empty] == [0.0] * len(empty)
    assert [one.joint.expected for one in found.modules if one.module in empty] == [0.0] * len(empty)
    assert found.joint.share > 0


def test_folders_and_files_will_do(tmp_path, basis):
    path, _ = lora(tmp_path / "task")
    basis.save_pretrained(tmp_path / "basis")
    expected = captured_energy(path, basis)
    assert captured_energy(tmp_path / "task", tmp_path / "basis") == expected
    by_file = captured_energy(tmp_path / "task" / "adapter_model.safetensors", str(tmp_path / "basis"))
    assert by_file.joint == expected.joint
    assert str(tmp_path) not in str(asdict(expected)) + str(asdict(by_file))


def test_another_shape_is_a_sentence(tmp_path, basis):
    path, _ = lora(tmp_path / "task", shapes={FC: (24, 21), PROJ: SHAPES[PROJ]})
    with pytest.raises(BasisError, match=r"block\.0\.fc.*\(24, 21\).*\(24, 20\).*different models"):
        captured_energy(path, basis)


def test_no_common_module_is_a_sentence(tmp_path, basis):
    path, _ = lora(tmp_path / "task", shapes={"elsewhere": (24, 20)})
    with pytest.raises(BasisError, match="no module in common"):
        captured_energy(path, basis)


def test_an_untrained_adapter_is_a_sentence(tmp_path, basis):
    _, factors = lora(tmp_path / "whole")
    blank = {m: (torch.zeros_like(b), a) for m, (b, a) in factors.items()}
    with pytest.raises(BasisError, match="never trained"):
        captured_energy(save_lora(tmp_path / "task", blank), basis)


def test_unknown_attributes_and_dims_are_sentences(tmp_path, basis):
    path, _ = lora(tmp_path / "task")
    with pytest.raises(BasisError, match="lighting"):
        captured_energy(path, basis, attributes=["lighting"])
    with pytest.raises(BasisError, match="dim=0"):
        captured_energy(path, basis, dim=0)


def test_in_an_adapter_of_many_attributes_every_one_is_asked(tmp_path):
    """Each of three attributes explains the LoRA that it was mined from best."""
    g = torch.Generator().manual_seed(0)
    groups = {}
    for name in ("texture", "geometry", "camera"):
        common = random_factors(SHAPES, 3, g)
        rows = []
        for _ in range(3):
            own = random_factors(SHAPES, 3, g, scale=0.1)
            rows.append({m: (common[m][0] + own[m][0], common[m][1]) for m in SHAPES})
        groups[name] = save_many(tmp_path / name, rows)
    basis = build_basis(groups, dim=3, progress=False)
    for name, paths in groups.items():
        shares = captured_energy(paths[0], basis).attributes
        assert max(shares, key=lambda a: shares[a].share) == name and shares[name].share > 0.8


def test_a_module_that_cannot_be_read_is_not_passed_over(tmp_path):
    """A grouped convolution's LoRA is no low-rank matrix: its energy is unknown, so it must at least be named."""
    net = nn.ModuleDict({"conv": nn.Conv2d(8, 6, 3, groups=2), "fc": nn.Linear(9, 7)})
    config = LoraConfig(r=2, target_modules=["conv", "fc"], init_lora_weights=False)
    get_peft_model(net, config).save_pretrained(str(tmp_path / "grouped"))
    basis = build_basis([tmp_path / "grouped"], dim=2, modules=["fc"], progress=False)
    try:
        found = captured_energy(tmp_path / "grouped", basis)
    except BasisError as error:
        assert "conv" in str(error)
    else:
        assert found.missing == ["conv"]


def test_a_source_of_the_basis_is_marked(tmp_path):
    """By its tensors: a copy under another name is one too; its share leads no finding."""
    from peft_attrsub.analysis import analyse
    from peft_attrsub.analysis.findings import findings

    generator = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.fc": (20, 16), "blocks.1.fc": (20, 16)}
    folders = [save_lora(tmp_path / f"x-{i}", random_factors(shapes, 3, generator)) for i in range(3)]
    basis = build_basis({"texture": folders[:2]}, dim=2, progress=False)
    shutil.copytree(folders[0], tmp_path / "copy")
    found = analyse(basis, [tmp_path / "copy", folders[2]], draws=5).to_dict()
    assert [one["source_of"] for one in found["explained"]] == [["texture"], []]
    (explained,) = [one for one in findings(found) if one.topic == "Explained adapters"]
    assert explained.headline.endswith("of x-2") and [bar.label for bar in explained.bars] == [
        "copy (a source)",
        "x-2",
    ]
