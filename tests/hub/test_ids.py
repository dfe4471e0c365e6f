"""Hub ids stand wherever folders do: adapters to mine, a basis to tune in, an adapter to load."""

import pytest


@pytest.fixture
def seeded(hub, made):
    """user/basis and user/texture-{0,1} on the Hub; returns the commits by name."""
    return {name: hub.seed(made / name, f"user/{name}") for name in ("basis", "texture-0", "texture-1")}


def test_adapters_are_mined_by_hub_id(client, seeded, made):
    adapters = ["user/texture-0", "user/texture-1@main"]
    mined = client("build", adapters=adapters, as_token=None).value
    assert mined["revisions"] == [seeded["texture-0"], seeded["texture-1"]]
    local = client("build", adapters=[made / "texture-0", made / "texture-1"]).value
    assert mined["digest"] == local["digest"]


def test_a_basis_is_tuned_in_and_an_adapter_loaded_by_hub_id(hub, client, seeded, tmp_path):
    tuned = client("tune", basis="user/basis", folder=tmp_path / "adapter", basis_revision="main").value
    assert (tuned["config"]["basis"], tuned["config"]["basis_revision"]) == ("user/basis", seeded["basis"])
    hub.seed(tmp_path / "adapter", "user/adapter")
    assert client("use", adapter="user/adapter", home="another", as_token=None).value == tuned["outputs"]
    assert tuned["outputs"] != client("unadapted").value


def test_only_safetensors_json_and_markdown_are_fetched(hub, client, made, tmp_path):
    folder = tmp_path / "basis"
    folder.mkdir()
    for file in (made / "basis").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "setup.py").write_text("print('not this')")
    (folder / "basis.bin").write_bytes(b"nor this")
    hub.seed(folder, "user/basis")
    assert client("load", name="user/basis").value["revision"] == hub.repo("user/basis").at("main").sha
    assert {"basis.safetensors", "basis_config.json"} <= hub.fetched()
    assert {path.rpartition(".")[2] for path in hub.fetched()} <= {"safetensors", "json", "md"}


@pytest.mark.parametrize("name", ["user/nothing", "user/basis@no-such-branch", f"user/basis@{'0' * 40}"])
def test_what_the_hub_does_not_have_is_one_sentence(client, seeded, name):
    repo, _, revision = name.partition("@")
    said = client("load", name=name).sentence
    assert repo in said and revision in said
