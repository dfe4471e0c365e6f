"""What goes wrong is said in one sentence on stderr, with exit code 2; the traceback needs --debug."""

import json
from pathlib import Path

import pytest
import torch

from tests.basis.helpers import SHAPES, edit_config, random_factors, save_lora

COMMANDS = ["build-basis", "info", "combine", "select", "rename", "export-lora", "project"]


def sentence(result, *mentions, code=2):
    """Exit code 2, and stderr holds one line with every mention: no traceback, no progress bar."""
    assert result.code == code, (result.code, result.out, result.err)
    assert "Traceback" not in result.err + result.out
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1, f"not one line: {result.err}"
    for mention in mentions:
        assert str(mention) in lines[0], f"{mention} is missing from: {lines[0]}"
    return lines[0]


def test_missing_adapter(cli, adapters, tmp_path):
    result = cli("build-basis", adapters / "texture-0", tmp_path / "gone", "-o", tmp_path / "basis")
    sentence(result, "gone")
    assert not (tmp_path / "basis").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--dim", "0"), ("--alpha", "3"), ("--alpha", "0"), ("--allocation", "generous"), ("--missing", "shrug"),
     ("--dtype", "int8"), ("--max-iter", "0"), ("--eps", "0")],
)  # fmt: skip
def test_bad_values(cli, adapters, tmp_path, option, value):
    result = cli("build-basis", adapters / "texture-0", "-o", tmp_path / "basis", option, value)
    assert result.code == 2 and "Traceback" not in result.err
    assert value in result.err
    assert not (tmp_path / "basis").exists()


def test_different_base_models(cli, adapters, tmp_path):
    edit_config(adapters / "texture-1", base_model_name_or_path="org/other")
    result = cli("build-basis", adapters / "texture-0", adapters / "texture-1", "-o", tmp_path / "basis")
    sentence(result, "toy/base", "org/other")


def test_different_modules_and_the_way_out(cli, adapters, tmp_path):
    only = {"block.0.fc": SHAPES["block.0.fc"]}
    short = save_lora(tmp_path / "texture-9", random_factors(only, 3, torch.Generator().manual_seed(5)))
    args = ["build-basis", adapters / "texture-0", short, "-o", tmp_path / "basis"]
    sentence(cli(*args), "block.1.proj", "texture-9", "--missing intersect")
    assert cli(*args, "--missing", "intersect").code == 0


def test_nan(cli, tmp_path):
    bad = random_factors(SHAPES, 3, torch.Generator().manual_seed(0))
    bad["block.1.proj"][0][1, 1] = float("nan")
    folder = save_lora(tmp_path / "texture-0", bad)
    sentence(cli("build-basis", folder, "-o", tmp_path / "basis"), "texture-0", "block.1.proj")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texture-0"]


def test_no_adapters_at_all(cli, tmp_path):
    result = cli("build-basis", "-o", tmp_path / "basis")
    assert result.code == 2 and "Traceback" not in result.err


def test_nothing_but_json_on_stdout_even_when_it_fails(cli, adapters, tmp_path):
    result = cli("build-basis", adapters / "texture-0", tmp_path / "gone", "-o", tmp_path / "basis", "--json")
    assert sentence(result, "gone") and result.out == ""


def test_device_that_does_not_exist(cli, adapters, tmp_path):
    args = ["build-basis", adapters / "texture-0", "-o", tmp_path / "basis", "--device", "warp-drive"]
    sentence(cli(*args), "warp-drive")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_device_that_this_machine_lacks(cli, adapters, tmp_path):
    sentence(cli("build-basis", adapters / "texture-0", "-o", tmp_path / "basis", "--device", "cuda"), "cuda")


def test_the_same_adapter_twice(cli, adapters, tmp_path):
    """It would count double; a trailing slash or a detour does not make it another one."""
    one = adapters / "texture-0"
    sentence(cli("build-basis", one, one, "-o", tmp_path / "basis"), "texture-0", "twice")
    sentence(cli("build-basis", one, f"{one}/", "-o", tmp_path / "basis"), "texture-0", "twice")
    detour = f"{adapters}/../adapters/texture-0"
    sentence(cli("build-basis", one, detour, "-o", tmp_path / "basis"), "texture-0", "twice")


def test_a_name_that_fits_no_attribute_says_how_to_give_one(cli, adapters, tmp_path):
    (adapters / "texture-0").rename(tmp_path / "wood v1.x")
    assert "=" in sentence(cli("build-basis", tmp_path / "wood v1.x", "-o", tmp_path / "basis"), "wood v1.x")


def test_folder_without_adapters(cli, tmp_path):
    (tmp_path / "hollow").mkdir()
    sentence(cli("build-basis", tmp_path / "hollow", "-o", tmp_path / "basis"), "hollow")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "."])
def test_attribute_names_that_are_paths(cli, adapters, tmp_path, name):
    result = cli("build-basis", f"{name}={adapters / 'texture-0'}", "-o", tmp_path / "basis")
    assert result.code == 2 and "Traceback" not in result.err and result.err.strip()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapters"]


def test_output_below_a_file(cli, adapters, tmp_path):
    (tmp_path / "note").write_text("x")
    result = cli("build-basis", adapters / "texture-0", "-o", tmp_path / "note" / "basis")
    assert result.code == 2 and "note" in result.err and "Traceback" not in result.err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_output_that_cannot_be_written(cli, adapters):
    result = cli("build-basis", adapters / "texture-0", "-o", "/proc/basis")
    assert result.code == 2 and "/proc" in result.err and "Traceback" not in result.err


def test_truncated_adapter(cli, adapters, tmp_path):
    file = adapters / "texture-0" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    sentence(cli("build-basis", adapters / "texture-0", "-o", tmp_path / "basis"), "texture-0")


def test_debug_shows_the_traceback(cli, adapters, tmp_path):
    args = ["build-basis", tmp_path / "gone", "-o", tmp_path / "basis"]
    assert "Traceback" not in cli(*args).err
    shown = cli(*args, "--debug")
    assert shown.code != 0 and "Traceback" in shown.err and "gone" in shown.err


@pytest.mark.parametrize("command", ["info", "export-lora", "project", "combine"])
def test_inputs_that_are_not_there(cli, adapters, tmp_path, command):
    gone = tmp_path / "gone"
    args = {
        "info": [gone],
        "export-lora": [gone, "-o", tmp_path / "out"],
        "project": [adapters / "texture-0", "--basis", gone, "-o", tmp_path / "out"],
        "combine": [gone, gone, "-o", tmp_path / "out"],
    }[command]
    sentence(cli(command, *args), "gone")
    assert not (tmp_path / "out").exists()


def test_info_on_an_adapter_says_what_it_is(cli, adapters):
    assert "adapter" in sentence(cli("info", adapters / "texture-0"), "texture-0", "basis_config.json")


def test_export_of_a_lora_says_what_it_is(cli, adapters, tmp_path):
    sentence(cli("export-lora", adapters / "texture-0", "-o", tmp_path / "out"), "LORA")


def test_info_on_a_damaged_basis(cli, adapters, tmp_path):
    assert cli("build-basis", adapters / "texture-0", "-o", tmp_path / "basis").code == 0
    file = tmp_path / "basis" / "basis.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    sentence(cli("info", tmp_path / "basis"), "basis.safetensors")


# ---- help ----


def test_help_lists_the_commands(cli):
    result = cli("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert command in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(cli, command):
    result = cli(command, "--help")
    assert result.code == 0 and result.err == ""
    assert len(result.out.splitlines()) > 5
    wanted = {
        "build-basis": ["--dim", "--alpha", "--eps", "--max-iter", "--tol", "--allocation", "--base-model", "--device",
                        "--dtype", "--missing", "--overwrite", "--json", "--debug", "importance-literal"],
        "info": ["--json"],
        "combine": ["--overwrite"],
        "select": ["--attribute", "--dim", "--modules", "--exclude"],
        "rename": ["OLD=NEW", "--overwrite"],
        "export-lora": ["--rank", "--basis"],
        "project": ["--basis", "--json"],
    }  # fmt: skip
    for option in wanted[command]:
        assert option in "".join(result.out.split()), option  # however the lines are wrapped


@pytest.mark.parametrize("args", [["frobnicate"], ["info"], ["info", "--no-such-option"], ["build-basis", "x"]])
def test_usage_errors(cli, args):
    result = cli(*args)
    assert result.code == 2 and "Traceback" not in result.err and result.err.strip()


def test_typer_runner_agrees_with_the_real_process(cli, adapters, tmp_path):
    """The app object, without a process: same refusal, same success."""
    from typer.testing import CliRunner

    from peft_attrsub.cli import app

    runner = CliRunner()
    good = runner.invoke(app, ["build-basis", str(adapters / "texture-0"), "-o", str(tmp_path / "basis"), "--json"])
    assert good.exit_code == 0
    json.loads(good.stdout)
    assert runner.invoke(app, ["info", str(tmp_path / "basis")]).exit_code == 0
    assert runner.invoke(app, ["frobnicate"]).exit_code == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"lora_alpha": None}, "lora_alpha"), ({"lora_alpha": "16"}, "lora_alpha"), ({"lora_alpha": float("nan")}, "nan"),
     ({"r": 0}, "r is 0"), ({"rank_pattern": {"*.fc": 4}}, "'*.fc'"), ({"rank_pattern": ["fc"]}, "rank_pattern"),
     ({"base_model_name_or_path": ["a"]}, "expected a string"), ({"eva_config": [[]] * 2}, None)],
)  # fmt: skip
def test_values_of_another_type_in_an_adapter(cli, adapters, tmp_path, changes, word):
    edit_config(adapters / "texture-0", **changes)
    result = cli("build-basis", adapters, "-o", tmp_path / "basis", "--dim", "2")
    if word is None:  # a value that does not count
        assert result.code == 0
    else:
        sentence(result, word, "texture-0", "adapter_config.json")
        assert not (tmp_path / "basis").exists()


def test_a_config_of_an_adapter_nested_without_end(cli, adapters, tmp_path):
    path = adapters / "texture-0" / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"x": ' + "[" * 99999 + "]" * 99999 + ",", 1))
    sentence(cli("build-basis", adapters, "-o", tmp_path / "basis"), str(path), "nested deeper")


def test_damaged_records_and_configs_are_not_shown(cli, adapters, tmp_path):
    """info shows what was saved, or says what is damaged; without --verify too."""
    folder = tmp_path / "basis"
    assert cli("build-basis", adapters, "-o", folder, "--dim", "2").code == 0
    records, config = folder / "basis_records.safetensors", folder / "basis_config.json"
    whole = records.read_bytes()
    records.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    sentence(cli("info", folder), "does not match its sha256")
    records.write_bytes(whole)
    config.write_text(config.read_text().replace('"iterations": {', '"iterations": {"x": 1,'))
    sentence(cli("info", folder), str(config), "config_sha256")
