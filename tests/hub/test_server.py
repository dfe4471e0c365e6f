"""The tests' Hub itself, held against the real huggingface_hub client."""

import hashlib

import pytest


@pytest.fixture
def folder(tmp_path):
    """A small repository's content: regular files, a large one, one in a subfolder."""
    root = tmp_path / "content"
    (root / "sub").mkdir(parents=True)
    (root / "a.json").write_text("{}")
    (root / "README.md").write_text("---\nlicense: mit\n---\n# a\n")
    (root / "sub" / "x.safetensors").write_bytes(bytes(range(256)) * 400)
    return root


def upload(client, folder, repo="user/x", **options):
    return client("upload", folder=folder, repo=repo, **options).value


def test_a_folder_goes_up_as_one_commit_and_comes_back(hub, client, folder):
    oid = upload(client, folder)
    repo = hub.repo("user/x")
    assert [c.title for c in repo.history()] == ["upload", "initial commit"]
    assert repo.at("main").sha == oid == client("commits", repo="user/x").value[0]
    assert [a.received for a in hub.asked("^PUT")] == [102400]
    back = client("snapshot", repo="user/x", home="other").value
    for path in ("a.json", "README.md", "sub/x.safetensors"):
        with open(f"{back}/{path}", "rb") as file:
            assert file.read() == (folder / path).read_bytes()
    digest = hashlib.sha256((folder / "sub/x.safetensors").read_bytes()).hexdigest()
    assert client("files", repo="user/x").value["sub/x.safetensors"] == [102400, digest]


def test_what_is_there_is_not_sent_again(hub, client, folder):
    first = upload(client, folder)
    hub.log.clear()
    assert upload(client, folder) == first
    assert not hub.asked("^PUT|/commit/")
    (folder / "a.json").write_text("[]")
    assert upload(client, folder) != first
    assert not hub.asked("^PUT") and len(hub.repo("user/x").history()) == 3


def test_branches_tags_and_pull_requests(hub, client, folder):
    first = upload(client, folder)
    assert client("api", method="create_branch", args=["user/x"], branch="v/2").value is None
    assert client("api", method="create_tag", args=["user/x"], tag="t1").value is None
    (folder / "a.json").write_text("[]")
    second = upload(client, folder, revision="v/2")
    assert client("branches", repo="user/x").value == ["main", "v/2"]
    assert client("commits", repo="user/x", revision="v/2").value[:2] == [second, first]
    for revision, text in {"main": "{}", "v/2": "[]", "t1": "{}", second: "[]"}.items():
        with open(client("download", repo="user/x", path="a.json", revision=revision).value) as file:
            assert file.read() == text
    (folder / "a.json").write_text("1")
    upload(client, folder, create_pr=True)
    assert hub.repo("user/x").at("main").sha == first
    assert hub.repo("user/x").at("refs/pr/1").files["a.json"].data == b"1"
    again = client("api", method="create_branch", args=["user/x"], branch="v/2").value
    assert "409" in again["text"]


def test_who_may_do_what(hub, client, folder):
    hub.seed(folder, "user/secret", private=True)
    look = {"method": "model_info", "args": ["user/secret"]}
    assert client("api", **look, as_token=None).value["raised"] == "RepositoryNotFoundError"
    assert client("api", **look, as_token="hf_stranger").value["raised"] == "RepositoryNotFoundError"
    assert "Invalid credentials" in client("api", **look, as_token="hf_unknown").value["text"]
    assert client("is_private", repo="user/secret", as_token="hf_reader").value is True
    for token, status in ((None, "401"), ("hf_stranger", "403"), ("hf_reader", "403")):
        made = client("api", method="create_repo", args=["user/new"], as_token=token).value
        assert status in made["text"], made
    assert "user/new" not in hub.store.repos
    exists = client("api", method="create_repo", args=["user/secret"]).value
    assert "409" in exists["text"]


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_missing_revisions_and_files_are_told_apart(hub, client, folder, revision):
    hub.seed(folder, "user/x")
    gone = client("api", method="model_info", args=["user/x"], revision=revision).value
    assert gone["raised"] == "RevisionNotFoundError"
    up = client("api", method="upload_file", path_in_repo="b", path_or_fileobj=str(folder / "a.json"),
                repo_id="user/x", revision=revision).value  # fmt: skip
    assert up["raised"] == "RevisionNotFoundError"
    exists = {"method": "file_exists", "args": ["user/x"]}
    assert client("api", **exists, filename="a.json").value is True
    assert client("api", **exists, filename="b.json").value is False


@pytest.mark.parametrize("header", ["base_model: /home/me/base", "license: none-of-these", "tags: [1, 2]", "a: [b"])
def test_a_card_that_the_hub_would_refuse(hub, client, folder, header):
    (folder / "README.md").write_text(f"---\n{header}\n---\n# a\n")
    refused = client("upload", folder=folder, repo="user/x")
    assert refused.answer is None and "Invalid metadata in README.md" in refused.err
    assert len(hub.repo("user/x").history()) == 1


def test_a_commit_may_name_only_what_was_uploaded(hub, client, folder):
    hub.seed(folder, "user/x")
    stale = client("commit", repo="user/x", contents={"a.json": "1"}, parent_commit="0" * 40)
    assert "412" in stale.err
    assert client("dangling_pointer", repo="user/x").value == 400
    assert len(hub.repo("user/x").history()) == 2


def test_a_cut_download_goes_on_where_it_stopped(hub, client, tmp_path):
    root = tmp_path / "big"
    root.mkdir()
    (root / "big.safetensors").write_bytes(bytes(range(250)) * 100_000)
    hub.seed(root, "user/big")
    hub.cut("GET /cdn/.*big", after=12_000_000)
    path = client("download", repo="user/big", path="big.safetensors").value
    with open(path, "rb") as file:
        assert file.read() == (root / "big.safetensors").read_bytes()
    ranges = [a.range for a in hub.asked("^GET /cdn/")]
    assert ranges[0] is None and ranges[1].startswith("bytes=") and len(ranges) == 2
    assert hub.bytes_sent("big.safetensors") < 25_000_000 + 12_000_000


def test_nobody_answers_while_the_hub_is_down(hub, client, folder):
    hub.seed(folder, "user/x")
    with hub.down():
        assert client("api", method="model_info", args=["user/x"]).value["raised"] == "ConnectError"
    assert client("is_private", repo="user/x").value is False


def test_there_is_no_xet(hub, client, folder):
    gone = client("api", method="create_repo", args=["user/x"], xet=True)
    assert gone.value
    refused = client("upload", folder=folder, repo="user/x", xet=True)
    assert refused.answer is None and len(hub.repo("user/x").history()) == 1
    assert hub.asked("xet-write-token") and all(a.status == 404 for a in hub.asked("xet-write-token"))
