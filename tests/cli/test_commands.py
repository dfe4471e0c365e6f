"""info, combine, export-lora, project: the same answers as the functions behind them."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_attrsub import AttrSubspaceConfig, Basis, build_basis, project_lora
from tests.basis.helpers import SHAPES, random_factors, save_lora


def net():
    torch.manual_seed(0)
    shapes = {"0": (10, 12), "2": (8, 10)}
    return nn.Sequential(nn.Linear(*shapes["0"][::-1]), nn.ReLU(), nn.Linear(*shapes["2"][::-1]))


NET = {"0": (10, 12), "2": (8, 10)}


@pytest.fixture
def two(adapters, tmp_path):
    """Two saved bases, one attribute each."""
    for name in ("texture", "geometry"):
        build_basis({name: sorted(adapters.glob(f"{name}-*"))}, dim=2, progress=False).save_pretrained(tmp_path / name)
    return tmp_path / "texture", tmp_path / "geometry"


@pytest.fixture
def tuned(tmp_path):
    """A trained adapter of a small net, its basis beside it; returns (basis, adapter, outputs on `x`, x)."""
    generator = torch.Generator().manual_seed(0)
    paths = [save_lora(tmp_path / f"tone-{i}", random_factors(NET, 3, generator), base_model=None) for i in range(2)]
    build_basis({"tone": paths}, dim=2, progress=False).save_pretrained(tmp_path / "net-basis")
    model = get_peft_model(net(), AttrSubspaceConfig(basis=str(tmp_path / "net-basis")))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    model.save_pretrained(str(tmp_path / "tuned"))
    x = torch.randn(5, 12)
    return tmp_path / "net-basis", tmp_path / "tuned", model(x).detach(), x


def test_info(cli, two):
    result = cli("info", two[0])
    assert result.code == 0, result.err
    basis = Basis.from_pretrained(two[0])
    for word in ("texture", "toy/base", basis.digest[:12], "2"):
        assert word in result.out


def test_info_json(cli, two):
    result = cli("info", two[0], "--json")
    assert result.code == 0 and isinstance(result.json, dict)
    text = json.dumps(result.json)
    for word in ("texture", "toy/base", Basis.from_pretrained(two[0]).digest):
        assert word in text


def test_combine(cli, two, tmp_path):
    result = cli("combine", *two, "-o", tmp_path / "both")
    assert result.code == 0, result.err
    both = Basis.from_pretrained(tmp_path / "both")
    assert both.attributes == ["texture", "geometry"]
    assert both.digest == Basis.combine([Basis.from_pretrained(p) for p in two]).digest
    assert both.weights("block.0.fc", "geometry").shape == (3,), "what was known about the sources is kept"
    both.verify()
    again = cli("combine", *two, "-o", tmp_path / "both")
    assert again.code == 2 and "both" in again.err and "Traceback" not in again.err


def test_combine_clash(cli, two, tmp_path):
    result = cli("combine", two[0], two[0], "-o", tmp_path / "both")
    assert result.code == 2 and "texture" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "both").exists()


def test_an_output_that_is_an_input_is_refused(cli, two, adapters):
    before = {path: Basis.from_pretrained(path).digest for path in two}
    for output in (two[0], two[0] / "inside", two[0].parent):
        refused = cli("combine", *two, "-o", output, "--overwrite")
        assert refused.code == 2 and f"{str(two[0])!r}, which is read for it" in refused.err
    refused = cli("build-basis", adapters / "texture-0", "-o", adapters / "texture-0" / "basis")
    assert refused.code == 2 and "which is read for it" in refused.err
    assert {path: Basis.from_pretrained(path).digest for path in two} == before


def test_export_lora(cli, tuned, tmp_path):
    _, adapter, expected, x = tuned
    result = cli("export-lora", adapter, "-o", tmp_path / "lora")
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    torch.testing.assert_close(
        PeftModel.from_pretrained(net(), str(tmp_path / "lora"))(x), expected, atol=1e-5, rtol=1e-4
    )
    again = cli("export-lora", adapter, "-o", tmp_path / "lora")
    assert again.code == 2 and "lora" in again.err and "Traceback" not in again.err


def test_export_lora_of_a_smaller_rank(cli, tuned, tmp_path):
    _, adapter, _, _ = tuned
    assert cli("export-lora", adapter, "-o", tmp_path / "lora", "--rank", 1).code == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 1
    assert cli("export-lora", adapter, "-o", tmp_path / "other", "--rank", 0).code == 2


def test_project(cli, tuned, tmp_path):
    basis, adapter, expected, x = tuned
    assert cli("export-lora", adapter, "-o", tmp_path / "lora").code == 0
    result = cli("project", tmp_path / "lora", "--basis", basis, "-o", tmp_path / "back", "--json")
    assert result.code == 0, result.err
    reported = project_lora(str(tmp_path / "lora"), str(basis))
    assert reported.total_energy == pytest.approx(1, abs=1e-5)
    numbers = [v for v in result.json.values() if isinstance(v, float)]
    assert any(v == pytest.approx(1, abs=1e-5) for v in numbers), "the share that fits is the answer"
    torch.testing.assert_close(
        PeftModel.from_pretrained(net(), str(tmp_path / "back"))(x), expected, atol=1e-5, rtol=1e-4
    )


def test_project_says_what_does_not_fit(cli, tuned, tmp_path):
    basis, _, _, _ = tuned
    generator = torch.Generator().manual_seed(9)
    stranger = save_lora(tmp_path / "stranger", random_factors(NET, 3, generator), base_model=None)
    result = cli("project", stranger, "--basis", basis, "-o", tmp_path / "back")
    assert result.code == 0, result.err
    share = project_lora(str(stranger), str(basis)).total_energy
    assert (share < 0.9 and f"{share:.2f}"[:4] in result.out) or f"{100 * share:.0f}" in result.out + result.err
    other = save_lora(tmp_path / "other", random_factors(SHAPES, 3, generator), base_model=None)
    wrong = cli("project", other, "--basis", basis, "-o", tmp_path / "none")
    assert wrong.code == 2 and "Traceback" not in wrong.err and not (tmp_path / "none").exists()


def test_a_part_of_a_basis_is_the_same_bytes(cli, two, tmp_path):
    whole = Basis.combine([Basis.from_pretrained(folder) for folder in two])
    whole.save_pretrained(tmp_path / "whole")
    module = whole.modules[1]
    for words, names, dims, modules in [
        (["--attribute", "geometry"], ["geometry"], [2], whole.modules),
        (["--attribute", "geometry", "--attribute", "texture"], ["geometry", "texture"], [2, 2], whole.modules),
        (["--dim", 1], ["texture", "geometry"], [1, 1], whole.modules),
        (["--dim", "geometry=1"], ["texture", "geometry"], [2, 1], whole.modules),
        (["--modules", module], ["texture", "geometry"], [2, 2], [module]),
        (["--exclude", whole.modules[0]], ["texture", "geometry"], [2, 2], whole.modules[1:]),
    ]:
        done = cli("select", tmp_path / "whole", "-o", tmp_path / "part", "--overwrite", *words)
        assert done.code == 0, done.err
        part = Basis.from_pretrained(tmp_path / "part")
        part.verify()
        assert (part.attributes, part.modules) == (names, modules) and part.digest in (
            whole.select(names, dict(zip(names, dims, strict=True)), modules).digest,
        )
        for name, dim in zip(names, dims, strict=True):
            for mine, its in zip(part.factors(module, name), whole.factors(module, name), strict=True):
                assert torch.equal(mine, its[..., :dim])
    for words, sentence in [
        (["--attribute", "light"], "has no attribute 'light'"),
        (["--dim", "light=1"], "dim names the attribute 'light'"),
        (["--dim", "x"], "--dim x: give a number"),
        (["--dim", "2", "--dim", "texture=1"], "for all attributes and for single ones"),
        (["--modules", "nothing"], "is found in no module"),
    ]:
        refused = cli("select", tmp_path / "whole", "-o", tmp_path / "none", *words)
        assert refused.code == 2 and sentence in refused.err and not (tmp_path / "none").exists()


def test_attributes_are_renamed_and_then_combine(cli, two, tmp_path):
    texture, _ = two
    clash = cli("combine", texture, texture, "-o", tmp_path / "both")
    assert clash.code == 2 and "peft-attrsub rename" in clash.err
    assert cli("rename", texture, "texture=wood", "-o", tmp_path / "wood").code == 0
    done = cli("combine", texture, tmp_path / "wood", "-o", tmp_path / "both", "--json")
    assert done.code == 0, done.err
    both, first = Basis.from_pretrained(tmp_path / "both"), Basis.from_pretrained(texture)
    both.verify()
    assert both.attributes == ["texture", "wood"] and both.config.base_model == first.config.base_model == "toy/base"
    for module in both.modules:
        for mine, its in zip(both.factors(module, "wood"), first.factors(module, "texture"), strict=True):
            assert torch.equal(mine, its)
        assert torch.equal(both.weights(module, "wood"), first.weights(module, "texture"))
    for words, sentence in [
        (["light=x"], "has no attribute 'light'"),
        (["texture=wood"], "two attributes would be called 'wood'"),
        (["texture=a b"], "cannot name an attribute"),
        (["texture"], "give OLD=NEW"),
        (["texture=a", "texture=b"], "each once"),
    ]:
        refused = cli("rename", tmp_path / "both", *words, "-o", tmp_path / "none")
        assert refused.code == 2 and sentence in refused.err, refused.err
    swapped = both.rename({"texture": "wood", "wood": "texture"})
    assert swapped.attributes == ["wood", "texture"]


def test_export_finds_a_basis_that_has_moved(cli, tuned, tmp_path):
    basis, adapter, expected, x = tuned
    basis.rename(tmp_path / "moved")
    assert cli("export-lora", adapter, "-o", tmp_path / "lora").code == 2
    done = cli("export-lora", adapter, "-o", tmp_path / "lora", "--basis", tmp_path / "moved")
    assert done.code == 0, done.err
    model = PeftModel.from_pretrained(net(), tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    generator = torch.Generator().manual_seed(9)
    build_basis([save_lora(tmp_path / "o", random_factors(NET, 3, generator))], dim=2, progress=False).save_pretrained(
        tmp_path / "other"
    )
    wrong = cli("export-lora", adapter, "-o", tmp_path / "none", "--basis", tmp_path / "other")
    assert wrong.code == 2 and "digest" in wrong.err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["info", "combine", "select", "rename", "report", "export-lora", "project"])
def test_what_is_not_here_is_said_before_anything_about_the_hub(cli, tmp_path, command):
    more = {"rename": ["a=b"], "project": ["--basis", "gone"]}.get(command, [])
    output = [] if command == "info" else ["-o", tmp_path / "out"]
    done = cli(command, "gone", *more, *output, cwd=tmp_path)
    assert done.code == 2 and "there is no file or folder 'gone' here" in done.err
