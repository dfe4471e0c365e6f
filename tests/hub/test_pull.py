"""Bases from the Hub: loaded, pulled into a folder, looked at without being downloaded."""

import json
import shutil

import pytest

from peft_attrsub import Basis

TENSORS = "basis.safetensors"


def digest(folder):
    return Basis.from_pretrained(folder).digest


@pytest.mark.hub
def test_pull_writes_the_basis_that_was_pushed(place, made, tmp_path):
    client, repo = place.client, place.repo("basis")
    first = client("push", folder=made / "basis", repo=repo).value["oid"]
    client("push", folder=made / "other", repo=repo, revision="v2").ok()
    client.cli("pull", repo, "-o", tmp_path / "main", home="empty").ok()
    Basis.from_pretrained(tmp_path / "main").verify()
    assert digest(tmp_path / "main") == digest(made / "basis")
    client("push", folder=made / "texture", repo=repo).ok()
    for name, options, expected in (
        (f"{repo}@v2", (), "other"),
        (repo, ("--revision", "v2"), "other"),
        (f"{repo}@{first}", (), "basis"),
        (repo, (), "texture"),
    ):
        client.cli("pull", name, "-o", tmp_path / "again", "--overwrite", *options, home="empty").ok()
        assert digest(tmp_path / "again") == digest(made / expected)


def test_a_pulled_basis_is_a_folder_of_its_own(hub, client, made, tmp_path):
    hub.seed(made / "basis", "user/x")
    client("commit", repo="user/x", contents={"setup.py": "print('not this')"}).ok()
    client("snapshot", repo="user/x").ok()  # all of it, so that the cache holds more than a basis
    client.cli("pull", "user/x", "-o", tmp_path / "pulled").ok()
    assert not (tmp_path / "pulled" / "setup.py").exists()
    shutil.rmtree(tmp_path / "home")
    Basis.from_pretrained(tmp_path / "pulled").verify()
    assert not [p for p in (tmp_path / "pulled").rglob("*") if p.is_symlink()]
    client.cli("push", tmp_path / "pulled", "user/copy").ok()
    assert client("load", name="user/copy").value["digest"] == digest(made / "basis")


def test_pull_replaces_nothing_unasked(hub, client, made, tmp_path):
    hub.seed(made / "basis", "user/x")
    shutil.copytree(made / "other", tmp_path / "there")
    said = client.cli("pull", "user/x", "-o", tmp_path / "there").sentence
    assert "--overwrite" in said and digest(tmp_path / "there") == digest(made / "other")
    assert not hub.log
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    assert "foreign" in client.cli("pull", "user/x", "-o", tmp_path / "foreign", "--overwrite").sentence
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_info_reads_the_header_not_the_tensors(hub, client, large):
    hub.seed(large, "user/x")
    remote = client.cli("info", "user/x", home="empty").ok().out.splitlines()
    local = client.cli("info", large).ok().out.splitlines()
    assert remote[1:] == local[1:] and len(remote) > 5
    assert "user/x" in remote[0] and hub.repo("user/x").at("main").sha in remote[0]
    assert hub.fetched() <= {TENSORS, "basis_records.safetensors", "basis_config.json"}
    size = (large / TENSORS).stat().st_size
    assert hub.bytes_sent(TENSORS) <= 200_000 < size / 50
    assert all(a.range for a in hub.asked(f"^GET /cdn/.*{TENSORS}"))


def test_info_says_the_same_in_json(hub, client, made):
    hub.seed(made / "basis", "user/x")
    remote = json.loads(client.cli("info", "user/x", "--json").out)
    local = json.loads(client.cli("info", made / "basis", "--json").out)
    assert {k: v for k, v in remote.items() if v != local.get(k)}.keys() <= {"source", "revision"}


def test_info_of_a_revision(hub, client, made):
    first = hub.seed(made / "texture", "user/x")
    hub.seed(made / "geometry", "user/x")
    assert "texture" in client.cli("info", f"user/x@{first}").out
    assert "texture" not in client.cli("info", "user/x").out


def test_info_of_a_sharded_basis(hub, client, made, tmp_path):
    Basis.from_pretrained(made / "basis").save_pretrained(tmp_path / "shards", max_shard_size=500)
    hub.seed(tmp_path / "shards", "user/x")
    ran = client.cli("info", "user/x", "--json").ok()
    assert json.loads(ran.out)["digest"] == digest(made / "basis")
    assert client("load", name="user/x").value["digest"] == digest(made / "basis")


def test_info_verify_reads_all_of_it(hub, client, made):
    hub.seed(made / "basis", "user/x")
    client.cli("info", "user/x", "--verify").ok()
    assert hub.bytes_sent(TENSORS) >= (made / "basis" / TENSORS).stat().st_size


def test_only_changed_files_are_fetched_again(hub, client, made):
    hub.seed(made / "basis", "user/x")
    client("load", name="user/x").ok()
    hub.log.clear()
    client("load", name="user/x").ok()
    assert not hub.fetched()
    hub.seed(made / "other", "user/x")
    assert client("load", name="user/x").value["digest"] == digest(made / "other")
    assert TENSORS in hub.fetched()


def test_cache_dir_holds_what_is_downloaded(hub, client, made, tmp_path):
    hub.seed(made / "basis", "user/x")
    client("load", name="user/x", cache_dir=tmp_path / "mine").ok()
    assert list((tmp_path / "mine").rglob(TENSORS)) and not list((tmp_path / "home").rglob(TENSORS))
    loaded = client("load", name="user/x", cache_dir=tmp_path / "mine", local_files_only=True).value
    assert loaded["digest"] == digest(made / "basis")


@pytest.mark.parametrize("command", ["info", "pull"])
def test_what_cannot_be_read_is_one_sentence_of_the_command(hub, client, made, tmp_path, command):
    hub.seed(made / "basis", "user/x")
    hub.seed(made / "basis", "user/secret", private=True)
    rest = ["-o", tmp_path / "out"] if command == "pull" else []
    for name, token, words in (
        ("user/nothing", hub.token, ["user/nothing"]),
        ("user/x@v9", hub.token, ["user/x", "v9"]),
        ("user/secret", None, ["user/secret", "token"]),
        ("user/secret", "hf_stranger", ["user/secret", "token"]),
    ):
        said = client.cli(command, name, *rest, as_token=token).sentence
        assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()
    client.cli(command, "user/secret", *rest).ok()


def test_what_the_hub_holds_may_be_no_basis(hub, client, made):
    hub.seed(made / "texture-0", "user/adapter")
    for said in (client("load", name="user/adapter").sentence, client.cli("info", "user/adapter").sentence):
        assert "user/adapter" in said and "basis_config.json" in said


def test_a_gated_repository_is_named_as_such(hub, client, made):
    hub.seed(made / "basis", "user/x")
    hub.fail("/resolve/", 403, times=100, code="GatedRepo")
    for said in (client("load", name="user/x").sentence, client.cli("info", "user/x").sentence):
        assert "user/x" in said and "gated" in said


def test_a_token_that_nobody_knows_is_the_reason(hub, client, made):
    hub.seed(made / "basis", "user/x")
    said = client("load", name="user/x", as_token="hf_unknown").sentence
    assert "user/x" in said and "token" in said and "hf_unknown" not in said


def test_a_damaged_basis_on_the_hub_is_found_out(hub, client, made, tmp_path):
    shutil.copytree(made / "basis", tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged" / TENSORS).read_bytes())
    data[-1] ^= 1
    (tmp_path / "damaged" / TENSORS).write_bytes(data)
    hub.seed(tmp_path / "damaged", "user/x")
    assert "sha256" in client("load", name="user/x").sentence
    assert "sha256" in client.cli("pull", "user/x", "-o", tmp_path / "out").sentence
    assert not (tmp_path / "out").exists()


# Connections that end, processes that die


def test_a_cut_connection_goes_on_where_it_stopped(hub, client, large):
    hub.seed(large, "user/x")
    hub.cut(f"GET /cdn/.*{TENSORS}", after=12_000_000)
    assert client("load", name="user/x").value["digest"] == digest(large)
    ranges = [a.range for a in hub.asked(f"^GET /cdn/.*{TENSORS}")]
    assert ranges[0] is None and [r.startswith("bytes=") for r in ranges[1:]] == [True]


@pytest.mark.parametrize("file", ["basis_config.json", TENSORS, "basis_records.safetensors"])
def test_no_half_basis_is_ever_loaded(hub, client, made, tmp_path, file):
    hub.seed(made / "basis", "user/x")
    hub.cut(f"GET .*/{file}", after=100, times=1000)
    said = client("load", name="user/x", impatient=True).sentence
    assert "user/x" in said
    assert "user/x" in client.cli("pull", "user/x", "-o", tmp_path / "out", impatient=True).sentence
    assert not (tmp_path / "out").exists()
    for options in ({"offline": True}, {"local_files_only": True}):
        assert "user/x" in client("load", name="user/x", **options).sentence
    hub.heal()
    local = client("load", name=made / "basis").value
    loaded = client("load", name="user/x").value
    assert [loaded[k] for k in ("digest", "weights")] == [local[k] for k in ("digest", "weights")]


def test_a_pull_that_is_killed_leaves_no_folder(hub, client, made, tmp_path):
    hub.seed(made / "basis", "user/x")
    held = hub.hold(f"GET /cdn/.*{TENSORS}")
    run = client.start_cli("pull", "user/x", "-o", tmp_path / "out" / "basis")
    assert held.reached.wait(30)
    run.kill()
    assert run.finish().code == -9
    assert not (tmp_path / "out" / "basis").exists()
    hub.heal()
    client.cli("pull", "user/x", "-o", tmp_path / "out" / "basis").ok()
    assert digest(tmp_path / "out" / "basis") == digest(made / "basis")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["basis"]


# Without the Hub


@pytest.mark.parametrize("options", [{"offline": True}, {"local_files_only": True}])
def test_offline_needs_a_warm_cache(hub, client, made, options):
    commit = hub.seed(made / "basis", "user/x")
    said = client("load", name="user/x", **options).sentence
    assert "user/x" in said and ("offline" in said.lower() or "local_files_only" in said)
    client("load", name="user/x").ok()
    hub.log.clear()
    for name in ("user/x", "user/x@main", f"user/x@{commit}"):
        loaded = client("load", name=name, **options).value
        assert (loaded["digest"], loaded["revision"]) == (digest(made / "basis"), commit)
    assert "user/x" in client("load", name=f"user/x@{'0' * 40}", **options).sentence
    assert not hub.log


def test_the_command_works_offline(hub, client, made, tmp_path):
    hub.seed(made / "basis", "user/x")
    for command in (["info", "user/x"], ["pull", "user/x", "-o", tmp_path / "out"]):
        assert "user/x" in client.cli(*command, offline=True).sentence
    online = client.cli("info", "user/x").out
    client("load", name="user/x").ok()
    assert client.cli("info", "user/x", offline=True).out == online
    client.cli("pull", "user/x", "-o", tmp_path / "out", offline=True).ok()
    assert digest(tmp_path / "out") == digest(made / "basis")


def test_a_cache_that_only_info_has_filled_is_no_basis(hub, client, made):
    hub.seed(made / "basis", "user/x")
    client.cli("info", "user/x").ok()
    assert "user/x" in client("load", name="user/x", offline=True).sentence


def test_the_cache_stands_in_for_a_hub_that_is_down_or_broken(hub, client, made):
    hub.seed(made / "basis", "user/x")
    client("load", name="user/x").ok()
    with hub.down():
        assert client("load", name="user/x", impatient=True).value["digest"] == digest(made / "basis")
        assert "user/x" in client("load", name="user/x", home="empty", impatient=True).sentence
    hub.fail("GET /api/models/", 500, times=1000)
    assert client("load", name="user/x", impatient=True).value["digest"] == digest(made / "basis")
    assert "user/x" in client("load", name="user/x", home="empty", impatient=True).sentence


def test_a_folder_in_a_repository(hub, client, made, tmp_path):
    """user/repo/folder, also with a revision: loaded, looked at, pulled, tuned in, and pinned by an adapter."""
    root = tmp_path / "several"
    shutil.copytree(made / "basis", root / "bases" / "first")
    shutil.copytree(made / "other", root / "bases" / "second")
    commit = hub.seed(root, "user/many")
    for name, folder in (("first", "basis"), ("second", "other")):
        asked = f"user/many/bases/{name}"
        assert client("load", name=asked).value["digest"] == digest(made / folder)
        assert client("load", name=f"{asked}@{commit}").value["digest"] == digest(made / folder)
        shown = json.loads(client.cli("info", asked, "--json", home=f"info-{name}").ok().out)
        assert (shown["digest"], shown["source"], shown["revision"]) == (digest(made / folder), asked, commit)
        client.cli("pull", asked, "-o", tmp_path / name, home=f"pull-{name}").ok()
        assert digest(tmp_path / name) == digest(made / folder)
    said = client.cli("info", "user/many/bases/third", home="third").sentence
    assert "has no 'bases/third'" in said
    said = client.cli("info", "user/many/../x", home="third").sentence
    assert "expected an existing folder or a Hub id" in said
