"""The model card of a pushed basis: what the Hub reads, what a person reads, and a snippet that runs."""

import re

import pytest

from peft_attrsub import Basis


@pytest.fixture
def mined(hub, client, made):
    """user/basis, mined by the command from six adapters on the Hub; returns their commits by name."""
    names = [f"{attribute}-{i}" for attribute in ("texture", "geometry") for i in range(3)]
    commits = {f"user/{name}": hub.seed(made / name, f"user/{name}") for name in names}
    words = [f"{name.partition('-')[0]}=user/{name}" for name in names]
    options = ["--dim", "2", "--base-model", "toy/base", "-o", "mined"]
    client.cli("build-basis", *words, *options).ok()
    client.cli("push", "mined", "user/basis", matplotlib="there").ok()
    return commits


def test_the_header_says_what_the_hub_needs(client, mined):
    header = client("card", repo="user/basis").value["header"]
    assert header["library_name"] == "peft" and header["base_model"] == "toy/base"
    assert {"peft-attrsub", "attribute-subspace"} <= set(header["tags"])
    assert isinstance(header["license"], str)


def test_the_text_says_where_the_basis_comes_from(client, mined, tmp_path):
    text = client("card", repo="user/basis").value["text"]
    assert re.search("^# .*user/basis", text, re.MULTILINE)
    assert Basis.from_pretrained(tmp_path / "mined").digest in text
    for adapter, commit in mined.items():
        rows = [line for line in text.splitlines() if line.startswith("|") and adapter in line]
        assert len(rows) == 1 and commit[:7] in rows[0], adapter
    assert "peft-attrsub build-basis texture=user/texture-0" in text and "--dim 2" in text
    assert str(tmp_path) not in text


def test_the_tables_say_dims_energy_and_overlap(client, mined):
    text = client("card", repo="user/basis").value["text"]
    table = [line for line in text.splitlines() if line.startswith("|")]
    for attribute in ("texture", "geometry"):
        assert [line for line in table if attribute in line and re.search(r"\|\s*2\s*\|", line)], table
    for word in ("energy", "overlap"):
        assert word in text.lower()
    pair = [line for line in table if "texture" in line and "geometry" in line]
    assert pair and re.search(r"\d\.\d", pair[0])


def test_the_figures_are_in_the_repository(hub, client, mined):
    text = client("card", repo="user/basis").value["text"]
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert sorted(shown) == ["figures/overlap.png", "figures/spectra.png"]
    for path in shown:
        assert hub.repo("user/basis").at("main").files[path].data.startswith(b"\x89PNG\r\n")


def test_the_snippet_runs(client, mined):
    outputs, kind, code = client("run_snippet", repo="user/basis", home="empty", as_token=None).value
    assert "user/basis" in code and kind == "PeftModel"
    assert outputs == client("unadapted").value  # cores start at zero


def test_a_private_card_and_a_second_push_keep_the_card(hub, client, made):
    client("push", folder=made / "basis", repo="user/x", private=True).ok()
    first = client("card", repo="user/x").value
    client("push", folder=made / "other", repo="user/x").ok()
    second = client("card", repo="user/x").value
    assert second["header"] == first["header"] and second["text"] != first["text"]
    assert Basis.from_pretrained(made / "other").digest in second["text"]
    assert Basis.from_pretrained(made / "basis").digest not in second["text"]


def test_a_basis_of_other_kinds_has_a_card_too(hub, client):
    """Random directions have neither adapters nor energies."""
    client("push_random", repo="user/x").ok()
    card = client("card", repo="user/x").value
    assert "license" in card["header"] and "user/x" in card["text"] and "nan" not in card["text"].lower()
    assert client("load_digest", name="user/x", home="empty").value == client("push_random", repo="user/x").value


def test_without_matplotlib_the_card_goes_without_figures(hub, client, made):
    ran = client.cli("push", made / "basis", "user/x", matplotlib="missing").ok()
    assert 'pip install "peft-attrsub[report]"' in ran.err and "UserWarning" not in ran.err
    files = hub.repo("user/x").at("main").files
    assert not [path for path in files if path.endswith(".png")]
    text = files["README.md"].data.decode()
    assert "![" not in text and "energy" in text.lower() and "texture / geometry" in text
