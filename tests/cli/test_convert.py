"""convert: a file of the authors' release becomes a basis folder."""

import pytest
import torch
from safetensors.torch import save_file

from peft_attrsub import Basis
from peft_attrsub.basis.convert import convert_release
from tests.basis.test_convert import released


@pytest.fixture
def file(tmp_path):
    save_file(released(8), tmp_path / "light_camera_geometry_texture_2.safetensors")
    return tmp_path / "light_camera_geometry_texture_2.safetensors"


def test_convert(cli, file, tmp_path):
    result = cli("convert", file, "-o", tmp_path / "basis", "--attributes", "light,camera,geometry,texture")
    assert result.code == 0, result.err
    made = Basis.from_pretrained(tmp_path / "basis")
    made.verify()
    assert made.attributes == ["light", "camera", "geometry", "texture"]
    assert made.config.base_model == "facebook/VGGT-1B"
    expected = convert_release(file, attributes=made.attributes)
    for module in expected.modules:
        for one, other in zip(made.factors(module, "camera"), expected.factors(module, "camera"), strict=True):
            torch.testing.assert_close(one, other)
    assert made.digest[:16] in result.out and "texture" in result.out
    assert made.config.command.startswith("peft-attrsub convert light_camera"), "no folder of the machine in it"


def test_one_attribute_another_model_and_overwrite(cli, file, tmp_path):
    assert cli("convert", file, "-o", tmp_path / "basis").code == 0
    assert Basis.from_pretrained(tmp_path / "basis").attributes == ["shared"]
    again = cli("convert", file, "-o", tmp_path / "basis")
    assert again.code == 2 and "exists already" in again.err
    sizes = ["--attributes", "light=6,texture=2", "--base-model", "user/vggt"]
    result = cli("convert", file, "-o", tmp_path / "basis", "--overwrite", "--json", *sizes)
    assert result.code == 0, result.err
    made = Basis.from_pretrained(tmp_path / "basis")
    assert [made.dim(made.modules[0], a) for a in ("light", "texture")] == [6, 2]
    assert made.config.base_model == result.json["base_model"] == "user/vggt"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attributes", "a,b,c"], "evenly"),
        (["--attributes", "a=1,b"], "a=1,b"),
        (["--attributes", "a=x"], "a=x"),
        (["--attributes", "a=4,a=4"], "once"),
        (["--attributes", ""], "name an attribute"),
    ],
    ids=str,
)
def test_errors_are_sentences(cli, file, tmp_path, arguments, said):
    result = cli("convert", file, "-o", tmp_path / "basis", *arguments)
    assert result.code == 2 and said in result.err and "Traceback" not in result.err
    assert not (tmp_path / "basis").exists()


def test_a_file_that_is_none(cli, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    result = cli("convert", tmp_path / "x.safetensors", "-o", tmp_path / "basis")
    assert result.code == 2 and "no safetensors file" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "basis").exists()
