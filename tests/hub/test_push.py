"""push_to_hub: one commit that holds the whole basis, or none."""

import hashlib
import json
import shutil

import pytest

from peft_attrsub import Basis

TENSORS, RECORDS, CONFIG = "basis.safetensors", "basis_records.safetensors", "basis_config.json"


def digest(folder):
    return Basis.from_pretrained(folder).digest


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copied(folder, target, **changes):
    """A copy of a basis whose basis_config.json says something else."""
    shutil.copytree(folder, target)
    path = target / CONFIG
    record = {**json.loads(path.read_text()), **changes}
    del record["config_sha256"]
    path.write_text(json.dumps(record))
    return target


@pytest.mark.hub
def test_a_basis_goes_up_in_one_commit_and_comes_back(place, made):
    client, repo = place.client, place.repo("basis")
    pushed = client("push", folder=made / "basis", repo=repo).value
    assert client("commits", repo=repo).value[:-1] == [pushed["oid"]]  # the last one made the repository
    assert (pushed["source"], pushed["revision"]) == (repo, pushed["oid"])
    loaded = client("load", name=repo, home="empty").value
    local = client("load", name=made / "basis").value
    assert (loaded["source"], loaded["revision"]) == (repo, pushed["oid"])
    for key in ("digest", "attributes", "weights", "spectrum"):
        assert loaded[key] == local[key]
    files = client("files", repo=repo).value
    assert files[TENSORS][1] == sha256(made / "basis" / TENSORS)
    assert {TENSORS, RECORDS, CONFIG, "README.md"} <= set(files)


@pytest.mark.hub
def test_an_unchanged_basis_makes_no_commit_and_sends_nothing(place, made):
    client, repo = place.client, place.repo("basis")
    first = client("push", folder=made / "basis", repo=repo, matplotlib="there").value
    if place.hub:
        place.hub.log.clear()
    again = client("push", folder=made / "basis", repo=repo, matplotlib="there").value
    assert again == first
    assert client("commits", repo=repo, matplotlib="there").value[:-1] == [first["oid"]]
    if place.hub:
        assert not place.hub.asked("^PUT|/commit/")


@pytest.mark.hub
def test_a_changed_basis_is_one_more_commit(place, made):
    client, repo = place.client, place.repo("basis")
    first = client("push", folder=made / "basis", repo=repo).value["oid"]
    second = client("push", folder=made / "other", repo=repo, commit_message="fewer adapters").value["oid"]
    assert client("commits", repo=repo).value[:-1] == [second, first]
    assert client("load", name=repo, home="empty").value["digest"] == digest(made / "other")
    assert client("load", name=f"{repo}@{first}", home="empty").value["digest"] == digest(made / "basis")
    if place.hub:
        assert place.hub.repo(repo).at("main").title == "fewer adapters"


def test_only_changed_files_are_sent(hub, client, made, tmp_path):
    client("push", folder=made / "basis", repo="user/x", matplotlib="there").ok()
    before = hub.repo("user/x").at("main").files
    hub.log.clear()
    client(
        "push",
        folder=copied(made / "basis", tmp_path / "b", command="peft-attrsub x"),
        repo="user/x",
        matplotlib="there",
    ).ok()
    assert not hub.asked("^PUT")
    after = hub.repo("user/x").at("main").files
    assert {p for p in after if after[p] != before.get(p)} == {CONFIG, "README.md"}
    hub.log.clear()
    client("push", folder=made / "other", repo="user/x", matplotlib="there").ok()
    sent = [a.path.rpartition("/")[2] for a in hub.asked("^PUT")]
    changed = {f.sha256 for p, f in hub.repo("user/x").at("main").files.items() if f.sha256 and f != after[p]}
    assert sorted(sent) == sorted(changed) and sha256(made / "other" / TENSORS) in sent


def test_what_an_earlier_push_left_does_not_mix_into_a_later_one(hub, client, made, tmp_path):
    Basis.from_pretrained(made / "basis").save_pretrained(tmp_path / "shards", max_shard_size=500)
    assert len(list((tmp_path / "shards").glob("basis-*.safetensors"))) > 1
    hub.seed(tmp_path / "shards", "user/x")
    assert client("load", name="user/x", home="a").value["digest"] == digest(made / "basis")
    client("commit", repo="user/x", contents={"LICENSE": "by hand"}).ok()
    client("push", folder=made / "other", repo="user/x").ok()
    assert client("load", name="user/x", home="b").value["digest"] == digest(made / "other")
    files = hub.repo("user/x").at("main").files
    assert "LICENSE" in files and TENSORS in files
    assert not [path for path in files if "index" in path or path.startswith("basis-")]
    assert len(hub.repo("user/x").history()) == 4


def test_two_pushes_at_once_do_not_mix(hub, client, made, tmp_path):
    """The slower one has compared its files with a state that is no longer the newest."""
    hub.seed(made / "basis", "user/x")
    held = hub.hold("POST .*/commit/")
    same = copied(made / "basis", tmp_path / "same", command="peft-attrsub x")
    slow = client.start("push", folder=same, repo="user/x")
    assert held.reached.wait(30)
    client("push", folder=made / "other", repo="user/x", home="b").ok()
    hub.heal()
    ended = slow.finish()
    expected = made / "other"
    if "value" in ended.answer:
        expected = same  # it may as well have sent all of its files
    else:
        assert "user/x" in ended.sentence
    assert client("load", name="user/x", home="c").value["digest"] == digest(expected)


def test_a_part_of_a_basis_is_a_basis(hub, client, made):
    part = {"attributes": ["geometry"], "dim": 1}
    pushed = client("push", folder=made / "basis", repo="user/x", part=part).value
    loaded = client("load", name="user/x").value
    assert (loaded["attributes"], loaded["digest"]) == (["geometry"], pushed["digest"])
    assert pushed["digest"] == Basis.from_pretrained(made / "basis").select(**part).digest


@pytest.mark.hub
def test_a_name_without_a_user_is_the_own_one(place, made):
    client, repo = place.client, place.repo("basis")
    pushed = client("push", folder=made / "basis", repo=repo.partition("/")[2]).value
    assert pushed["source"] == repo
    assert f'"{repo}"' in client("card", repo=repo).value["text"]
    again = client("push", folder=made / "basis", repo=repo.partition("/")[2]).value
    assert again["oid"] == pushed["oid"]


@pytest.mark.hub
def test_a_branch_is_made_where_it_is_missing(place, made):
    client, repo = place.client, place.repo("basis")
    first = client("push", folder=made / "basis", repo=repo).value["oid"]
    second = client("push", folder=made / "other", repo=repo, revision="v2").value
    assert second["revision"] == second["oid"] != first
    assert client("branches", repo=repo).value == ["main", "v2"]
    assert client("commits", repo=repo).value[0] == first
    assert client("load", name=f"{repo}@v2", home="empty").value["revision"] == second["oid"]
    third = client("push", folder=made / "basis", repo=repo, revision="v2").value["oid"]
    assert client("commits", repo=repo, revision="v2").value[:2] == [third, second["oid"]]


@pytest.mark.hub
def test_the_first_push_may_go_to_a_branch(place, made):
    client, repo = place.client, place.repo("basis")
    pushed = client("push", folder=made / "basis", repo=repo, revision="v2").value["oid"]
    history = client("commits", repo=repo, revision="v2").value
    assert history[0] == pushed and client("commits", repo=repo).value == history[1:]


@pytest.mark.hub
def test_a_private_repository_needs_a_token(place, made):
    client, repo = place.client, place.repo("basis")
    client("push", folder=made / "basis", repo=repo, private=True).ok()
    assert client("is_private", repo=repo).value is True
    assert client("load", name=repo, home="mine").value["digest"] == digest(made / "basis")
    assert client("load", name=repo, home="b", as_token=None, token=client.token).value["source"] == repo
    said = client("load", name=repo, home="nobody", as_token=None).sentence
    assert repo in said and "token" in said.lower()


def test_a_basis_from_memory_is_pushed_and_tuned_in(hub, client, made, tmp_path):
    adapters = [made / f"texture-{i}" for i in range(3)]
    tuned = client("push_then_tune", adapters=adapters, repo="user/x", folder=tmp_path / "adapter").value
    head = hub.repo("user/x").at("main").sha
    assert tuned["revision"] == head
    pinned = tuned["config"]["basis"], tuned["config"]["basis_revision"], tuned["config"]["basis_in_adapter"]
    assert pinned == ("user/x", head, False)
    assert client("use", adapter=tmp_path / "adapter", home="empty").value == tuned["outputs"]


@pytest.mark.hub
def test_a_pull_request_leaves_the_branch_alone(place, made):
    client, repo = place.client, place.repo("basis")
    first = client("push", folder=made / "basis", repo=repo).value["oid"]
    asked = client("push", folder=made / "other", repo=repo, create_pr=True).value
    assert repo in asked["pr_url"] and client("commits", repo=repo).value[0] == first
    assert client("load", name=repo, revision=asked["oid"], home="e").value["digest"] == digest(made / "other")


@pytest.mark.parametrize(
    "name", ["/home/me/base", "./base", "../base", "base/", "C:\\models\\base", "a/b/c", "Base Model"]
)
def test_a_base_model_without_a_hub_id_does_not_stop_the_push(hub, client, made, tmp_path, name):
    client("push", folder=copied(made / "basis", tmp_path / "b", base_model=name), repo="user/x").ok()
    assert "base_model" not in client("card", repo="user/x").value["header"]


@pytest.mark.parametrize(
    ("token", "repo"), [(None, "user/x"), ("hf_unknown", "user/x"), ("hf_reader", "user/x"), ("hf_writer", "other/x")]
)
def test_who_may_not_push_is_told_in_a_sentence(hub, client, made, token, repo):
    said = client("push", folder=made / "basis", repo=repo, as_token=token).sentence
    assert repo in said and "token" in said.lower()
    assert not hub.store.repos
    assert client.cli("push", made / "basis", repo, as_token=token).sentence == said


@pytest.mark.parametrize("repo", ["user/a/b", "../x", "user/x y", ""])
def test_a_name_that_is_no_hub_id_is_refused_before_anything_is_sent(hub, client, made, repo):
    said = client("push", folder=made / "basis", repo=repo).sentence
    assert repr(repo) in said and "push again" not in said
    assert not hub.log


@pytest.mark.parametrize("options", [{"license": "nonsense"}, {"revision": "no branch"}])
def test_what_the_hub_refuses_is_named(hub, client, made, options):
    head = hub.seed(made / "basis", "user/x")
    said = client("push", folder=made / "other", repo="user/x", **options).sentence
    name, value = next(iter(options.items()))
    assert "user/x" in said and (name in said or value in said)
    assert hub.repo("user/x").branches == {"main": head}


@pytest.mark.parametrize("what", ["POST .*/preupload/", "^PUT", "POST .*/commit/"])
def test_a_hub_that_fails_on_the_way_is_a_sentence(hub, client, made, what):
    head = hub.seed(made / "basis", "user/x")
    hub.fail(what, 403)
    said = client("push", folder=made / "other", repo="user/x").sentence
    assert "user/x" in said
    assert hub.repo("user/x").at("main").sha == head


def test_a_hub_that_is_down_is_a_sentence(hub, client, made):
    with hub.down():
        said = client("push", folder=made / "basis", repo="user/x", impatient=True).sentence
    assert "user/x" in said


def test_a_hub_without_xet_is_named_as_such(hub, client, made):
    said = client("push", folder=made / "basis", repo="user/x", xet=True).sentence
    assert "HF_HUB_DISABLE_XET=1" in said and "user/x" in said
    assert len(hub.repo("user/x").history()) == 1
    client("push", folder=made / "basis", repo="user/x").ok()
    assert client("load", name="user/x", xet=True).value["digest"] == digest(made / "basis")


@pytest.mark.parametrize("where", ["/preupload/", "^PUT"])
def test_a_push_that_is_killed_leaves_no_commit(hub, client, made, where):
    head = hub.seed(made / "basis", "user/x")
    held = hub.hold(where)
    run = client.start("push", folder=made / "other", repo="user/x")
    assert held.reached.wait(30)
    run.kill()
    assert run.finish().code == -9
    hub.heal()
    assert hub.repo("user/x").at("main").sha == head
    client("push", folder=made / "other", repo="user/x").ok()
    assert hub.repo("user/x").at("main").parent == head
    assert client("load", name="user/x").value["digest"] == digest(made / "other")


@pytest.mark.hub
def test_the_command_pushes(place, made):
    client, repo = place.client, place.repo("basis")
    ran = client.cli("push", made / "basis", repo, "--private", "--message", "from the command", "--json").ok()
    record = json.loads(ran.out)
    assert client("commits", repo=repo).value[:-1] == [record["commit"]]
    assert client("is_private", repo=repo).value is True
    more = client.cli("push", made / "other", repo, "--revision", "v2")
    assert more.code == 0 and repo in more.out, more.err
    assert client("commits", repo=repo, revision="v2").value[0][:7] in more.out


def test_the_command_takes_a_token_and_asks_for_a_pull_request(hub, client, made):
    ran = client.cli("push", made / "basis", "user/x", "--token", hub.token, as_token=None).ok()
    head = hub.repo("user/x").at("main").sha
    ran = client.cli("push", made / "other", "user/x", "--create-pr", "--json").ok()
    assert hub.repo("user/x").at("main").sha == head and "user/x/discussions/1" in ran.out
    assert hub.token not in ran.out + ran.err


@pytest.mark.parametrize("folder", ["nothing", "texture-0"])
def test_what_is_no_basis_is_not_pushed(hub, client, made, folder):
    said = client.cli("push", made / folder, "user/x").sentence
    assert str(made / folder) in said
    assert not hub.log
