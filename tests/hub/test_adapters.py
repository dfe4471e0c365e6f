"""Adapters and the bases they need, both on the Hub: pinned, whatever is pushed later."""

import json
import re

import pytest

from peft_attrsub import Basis

# jobs.base() and jobs.outputs(), for an interpreter that must not import jobs.
MODEL = """
import json, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
"""
OUTPUTS = """
print(json.dumps(model(torch.arange(32.0).reshape(2, 16) / 32).tolist()))
"""


def test_an_adapter_keeps_its_basis_when_another_is_pushed(hub, client, made, tmp_path):
    commit = hub.seed(made / "basis", "user/basis")
    tuned = client("tune", basis="user/basis", folder=tmp_path / "adapter").value
    assert (tuned["config"]["basis"], tuned["config"]["basis_revision"]) == ("user/basis", commit)
    assert tuned["config"]["basis_in_adapter"] is False
    hub.seed(made / "other", "user/basis")
    assert hub.repo("user/basis").at("main").sha != commit
    assert client("use", adapter=tmp_path / "adapter", home="empty").value == tuned["outputs"]
    later = client("tune", basis="user/basis", folder=tmp_path / "later").value
    assert later["config"]["basis_revision"] == hub.repo("user/basis").at("main").sha
    assert later["outputs"] != tuned["outputs"]


@pytest.mark.parametrize("how", ["in the name", "beside it"])
def test_a_branch_is_pinned_to_its_commit(hub, client, made, tmp_path, how):
    hub.seed(made / "other", "user/basis")
    commit = hub.seed(made / "basis", "user/basis", branch="v2")
    asked = {"basis": "user/basis@v2"} if how == "in the name" else {"basis": "user/basis", "basis_revision": "v2"}
    tuned = client("tune", folder=tmp_path / "adapter", **asked).value
    assert (tuned["config"]["basis"], tuned["config"]["basis_revision"]) == ("user/basis", commit)
    hub.seed(made / "other", "user/basis", branch="v2")
    assert client("use", adapter=tmp_path / "adapter", home="empty").value == tuned["outputs"]


def test_the_revision_of_an_adapter_is_not_that_of_its_basis(hub, client, made, tmp_path):
    hub.seed(made / "basis", "user/basis")
    tuned = client("tune", basis="user/basis", folder=tmp_path / "adapter").value
    hub.seed(made / "other", "user/basis", branch="v2")
    hub.seed(tmp_path / "adapter", "user/adapter", branch="v2")
    assert client("use", adapter="user/adapter", revision="v2", home="empty").value == tuned["outputs"]


def test_several_bases_are_pinned_one_by_one(hub, client, made, tmp_path):
    texture = hub.seed(made / "texture", "user/texture")
    hub.seed(made / "basis", "user/geometry")
    geometry = hub.seed(made / "geometry", "user/geometry", branch="v2")
    tuned = client("tune", basis=["user/texture", "user/geometry@v2"], folder=tmp_path / "adapter").value
    assert tuned["config"]["basis"] == [f"user/texture@{texture}", f"user/geometry@{geometry}"]
    together = client("tune", basis=made / "basis", folder=tmp_path / "together").value
    assert tuned["outputs"] == together["outputs"]
    hub.seed(made / "geometry", "user/texture")
    hub.seed(made / "texture", "user/geometry", branch="v2")
    assert client("use", adapter=tmp_path / "adapter", home="empty").value == tuned["outputs"]


def test_a_local_basis_beside_one_of_the_hub(hub, client, made, tmp_path):
    texture = hub.seed(made / "texture", "user/texture")
    folder = str(made / "geometry")
    tuned = client("tune", basis=["user/texture", folder], folder=tmp_path / "adapter").value
    assert tuned["config"]["basis"] == [f"user/texture@{texture}", folder]
    assert client("use", adapter=tmp_path / "adapter", home="empty").value == tuned["outputs"]


def test_an_adapter_is_saved_pinned_after_it_was_loaded_and_used_offline(hub, client, made, tmp_path):
    commit = hub.seed(made / "basis", "user/basis")
    tuned = client("tune", basis="user/basis", folder=tmp_path / "adapter").value
    hub.seed(made / "other", "user/basis")
    client("resave", adapter=tmp_path / "adapter", folder=tmp_path / "again", home="empty").ok()
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (again["basis"], again["basis_revision"]) == ("user/basis", commit)
    assert client("use", adapter=tmp_path / "again", home="empty", offline=True).value == tuned["outputs"]
    said = client("use", adapter=tmp_path / "again", home="nothing here", offline=True).sentence
    assert "user/basis" in said and tuned["config"]["basis_digest"] in said


@pytest.mark.parametrize("change", ["private", "deleted", "made anew"])
def test_an_adapter_whose_basis_cannot_be_read_names_it(hub, client, made, tmp_path, change):
    hub.seed(made / "basis", "user/basis")
    tuned = client("tune", basis="user/basis", folder=tmp_path / "adapter").value
    if change == "private":
        hub.repo("user/basis").private = True
    else:
        del hub.store.repos["user/basis"]
    if change == "made anew":
        hub.seed(made / "other", "user/basis")
    said = client("use", adapter=tmp_path / "adapter", home="empty", as_token=None).sentence
    assert "user/basis" in said and tuned["config"]["basis_digest"] in said


@pytest.mark.hub
def test_a_tuned_model_is_pushed_and_loaded(place, made):
    client, basis, adapter = place.client, place.repo("basis"), place.repo("adapter")
    commit = client("push", folder=made / "basis", repo=basis).value["oid"]
    tuned = client("push_adapter", basis=basis, repo=adapter).value
    assert client("use", adapter=adapter, home="empty").value == tuned["outputs"]
    assert tuned["outputs"] != client("unadapted").value
    card = client("card", repo=adapter).value
    assert card["header"]["library_name"] == "peft"
    digest = Basis.from_pretrained(made / "basis").digest
    for word in (basis, commit, digest, "import peft_attrsub"):
        assert word in card["text"], word


def test_the_card_of_an_adapter_follows_a_later_push(hub, client, made):
    commits = {name: hub.seed(made / name, f"user/{name}") for name in ("basis", "other")}
    client("push_adapter", basis="user/basis", repo="user/adapter").ok()
    tuned = client("push_adapter", basis="user/other", repo="user/adapter").value
    text = client("card", repo="user/adapter").value["text"]
    assert commits["other"] in text and commits["basis"] not in text and "user/basis" not in text
    assert client("use", adapter="user/adapter", home="empty").value == tuned["outputs"]


def test_the_snippet_of_an_adapter_runs_in_a_new_interpreter(hub, client, made):
    """Nothing but the snippet may have imported peft_attrsub: without it PEFT does not know such an adapter."""
    hub.seed(made / "basis", "user/basis")
    tuned = client("push_adapter", basis="user/basis", repo="user/adapter").value
    text = client("card", repo="user/adapter").value["text"]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1, text
    code = MODEL + blocks[0].replace("this/repository", "user/adapter") + OUTPUTS
    ran = client.python(code, home="empty")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == tuned["outputs"]


def test_the_card_of_an_adapter_on_several_bases_names_all_of_them(hub, client, made, tmp_path):
    commits = [hub.seed(made / a, f"user/{a}") for a in ("texture", "geometry")]
    client("tune", basis=["user/texture", "user/geometry"], folder=tmp_path / "adapter").ok()
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert all(word in text for word in ("user/texture", "user/geometry", *commits, "import peft_attrsub"))


def test_the_card_of_an_adapter_with_its_basis_inside_needs_no_other(client, made, tmp_path):
    tuned = client("tune", basis=made / "basis", folder=tmp_path / "adapter", save_basis=True).value
    assert tuned["config"]["basis_in_adapter"] is True
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "import peft_attrsub" in text and str(made) not in text


def test_the_adapter_card_stays_what_the_hub_accepts(hub, client, made, tmp_path):
    """Also for a basis that lies in a local folder, and when another adapter was saved there before."""
    client("tune", basis=made / "other", folder=tmp_path / "adapter").ok()
    client("tune", basis=made / "basis", folder=tmp_path / "adapter").ok()
    client("upload", folder=tmp_path / "adapter", repo="user/adapter").ok()
    text = client("card", repo="user/adapter").value["text"]
    assert text.count("import peft_attrsub") == 1
    assert Basis.from_pretrained(made / "basis").digest in text
    assert Basis.from_pretrained(made / "other").digest not in text
