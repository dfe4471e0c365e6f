"""The Hub's endpoints as huggingface_hub 1 and 2 call them: a request and the store in, an answer out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from .cards import validate
from .store import File, Refused, Repository, Store

PAGE = 1000  # entries of a tree per answer


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    address: str

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """`data` is the body, or for a file the whole file, of which a Range may ask for a part."""

    data: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    is_file: bool = False


Route = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """{repo} stands for user/name, {rev} for one quoted segment, {path} for the rest."""
    text = pattern.replace("{repo}", "([^/]+/[^/]+)").replace("{rev}", "([^/]+)").replace("{path}", "(.+)")

    def add(function: Route) -> Route:
        _ROUTES.append((method, re.compile(text), function))
        return function

    return add


def answer(store: Store, request: Request) -> Answer:
    method = "GET" if request.method == "HEAD" else request.method
    for allowed, pattern, function in _ROUTES:
        match = pattern.fullmatch(request.path)
        if match and allowed == method:
            return function(store, request, *(unquote(group) if group else group for group in match.groups()))
    return Answer(b'{"error": "Not found"}', 404)


def _json(record: object, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(record).encode(), status, {"Content-Type": "application/json", **headers})


@route("GET", "/api/whoami-v2")
def whoami(store: Store, request: Request) -> Answer:
    who = store.who(request.token)
    if who is None:
        raise Refused(401, None, "Invalid username or password.")
    access = {"displayName": "test", "role": who[1]}
    return _json({"type": "user", "name": who[0], "orgs": [], "auth": {"accessToken": access}})


@route("POST", "/api/repos/create")
def create(store: Store, request: Request) -> Answer:
    who, asked = store.who(request.token), request.json
    name = f"{asked.get('organization') or (who or ('',))[0]}/{asked['name']}"
    store.check_write(name, request.token)
    url = f"{request.address}/{name}"
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    try:
        store.create(name, private)
    except Refused as refused:
        return _json({"error": refused.message, "url": url}, refused.status)
    return _json({"url": url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete(store: Store, request: Request) -> Answer:
    asked = request.json
    name = f"{asked['organization']}/{asked['name']}"
    store.writable(name, request.token)
    del store.repos[name]
    return _json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(store: Store, request: Request) -> Answer:
    errors, warnings = validate(request.json["content"])
    record = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return _json(record, 400 if errors else 200)


@route("GET", "/api/models/{rev}")  # a name without a user: there is none here
@route("GET", "/api/models/{repo}")
@route("GET", "/api/models/{repo}/revision/{rev}")
def info(store: Store, request: Request, name: str, revision: str = "main") -> Answer:
    repo = store.readable(name, request.token)
    commit = repo.at(revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    record = {"_id": name, "id": name, "modelId": name, "sha": commit.sha, "private": repo.private}
    return _json({**record, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "gated": False})


@route("GET", "/api/models/{repo}/tree/{rev}")
@route("GET", "/api/models/{repo}/tree/{rev}/{path}")
def tree(store: Store, request: Request, name: str, revision: str, folder: str = "") -> Answer:
    files = store.readable(name, request.token).at(revision).files
    inside = {p: f for p, f in files.items() if not folder or p.startswith(f"{folder}/")}
    if folder and not inside:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    entries = [_entry(path, file) for path, file in inside.items()]
    if request.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
        direct = [e for e in entries if "/" not in e["path"][len(folder) :].strip("/")]
        below = {e["path"][len(folder) :].strip("/").partition("/")[0] for e in entries if e not in direct}
        entries = direct + [_folder(f"{folder}/{name}".strip("/")) for name in below]
    entries.sort(key=lambda e: e["path"])
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + PAGE < len(entries):
        again = "&".join(f"{k}={v[0]}" for k, v in request.query.items() if k != "cursor")
        headers["Link"] = f'<{request.address}{request.path}?{again}&cursor={start + PAGE}>; rel="next"'
    return _json(entries[start : start + PAGE], **headers)


@route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(store: Store, request: Request, name: str, revision: str) -> Answer:
    files = store.readable(name, request.token).at(revision).files
    wanted = parse_qs(request.body.decode())["paths"]
    found = [_entry(p, files[p]) for p in wanted if p in files]
    return _json(found + [_folder(p) for p in wanted if any(f.startswith(f"{p}/") for f in files)])


def _entry(path: str, file: File) -> dict[str, Any]:
    record: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
    if file.sha256:
        record["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
    return record


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


@route("GET", "/api/models/{repo}/commits/{rev}")
def commits(store: Store, request: Request, name: str, revision: str) -> Answer:
    history = store.readable(name, request.token).history(revision)
    dated = {"authors": [{"user": name.partition("/")[0]}], "date": "2026-01-01T00:00:00.000Z", "message": ""}
    return _json([{"id": c.sha, "title": c.title, **dated} for c in history])


@route("GET", "/api/models/{repo}/refs")
def refs(store: Store, request: Request, name: str) -> Answer:
    repo = store.readable(name, request.token)

    def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": n if "/" in n else f"refs/{kind}/{n}", "targetCommit": s} for n, s in names.items()]

    pulls = {n: s for n, s in repo.branches.items() if n.startswith("refs/pr/")}
    heads = {n: s for n, s in repo.branches.items() if n not in pulls}
    record = {"branches": listed(heads, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}
    return _json({**record, "pullRequests": listed(pulls, "pr")})


@route("POST", "/api/models/{repo}/branch/{rev}")
def create_branch(store: Store, request: Request, name: str, branch: str) -> Answer:
    repo = store.writable(name, request.token)
    if not re.fullmatch(r"(?!.*\.\.)\w[\w./-]*", branch):
        raise Refused(400, None, f"Invalid reference name: {branch}")
    if branch in repo.branches:
        raise Refused(409, None, f"Reference already exists: refs/heads/{branch}")
    repo.branches[branch] = repo.at(request.json.get("startingPoint", "main")).sha
    return _json({})


@route("DELETE", "/api/models/{repo}/branch/{rev}")
def delete_branch(store: Store, request: Request, name: str, branch: str) -> Answer:
    repo = store.writable(name, request.token)
    repo.at(branch)
    del repo.branches[branch]
    return _json({})


@route("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(store: Store, request: Request, name: str, revision: str) -> Answer:
    repo, tag = store.writable(name, request.token), request.json["tag"]
    if tag in repo.tags:
        raise Refused(409, None, f"Tag {tag} already exists")
    repo.tags[tag] = repo.at(revision).sha
    return _json({})


@route("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(store: Store, request: Request, name: str, revision: str) -> Answer:
    repo, asked = store.writable(name, request.token), request.json
    known = repo.at(revision).files
    ignored = asked.get("gitIgnore") or (known[".gitignore"].data.decode() if ".gitignore" in known else "")
    files = []
    for file in asked["files"]:
        path = file["path"]
        large = repo.is_large(path, file["size"], base64.b64decode(file["sample"]))
        record = {"path": path, "uploadMode": "lfs" if large else "regular"}
        record["shouldIgnore"] = repo.ignores(path, ignored)
        if path in known:
            # What the client compares with its own file, so as not to send or commit it again.
            record["oid"] = known[path].etag
        files.append(record)
    return _json({"files": files})


@route("POST", r"/{repo}\.git/info/lfs/objects/batch")
def lfs_batch(store: Store, request: Request, name: str) -> Answer:
    repo = store.writable(name, request.token)
    objects = []
    for asked in request.json["objects"]:
        record = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in repo.lfs:
            upload = f"{request.address}/lfs/{name}/{asked['oid']}?size={asked['size']}&signature={store.secret}"
            verify = f"{request.address}/{name}.git/info/lfs/objects/verify"
            record["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(record)
    return _json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{repo}/{rev}")
def lfs_put(store: Store, request: Request, name: str, oid: str) -> Answer:
    size = int(request.query["size"][0])
    if request.query["signature"] != [store.secret]:
        raise Refused(403, None, "SignatureDoesNotMatch")
    if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, None, "BadDigest")
    store.repos[name].lfs[oid] = request.body
    return Answer()


@route("POST", r"/{repo}\.git/info/lfs/objects/verify")
def lfs_verify(store: Store, request: Request, name: str) -> Answer:
    repo, asked = store.writable(name, request.token), request.json
    if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, None, "Object does not exist")
    return _json({})


@route("POST", "/api/models/{repo}/commit/{rev}")
def commit(store: Store, request: Request, name: str, revision: str) -> Answer:
    repo = store.writable(name, request.token)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = lines[0]["value"]
    if revision not in repo.branches:
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    head = repo.at(revision)
    if header.get("parentCommit") not in (None, head.sha):
        raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        _apply(repo, files, line["key"], line["value"])
    branch, pull = revision, None
    if request.query.get("create_pr") == ["1"]:
        repo.pulls += 1
        branch, pull = f"refs/pr/{repo.pulls}", f"{request.address}/{name}/discussions/{repo.pulls}"
    made = repo.commit(branch, header["summary"], files, parent=head.sha)
    url = f"{request.address}/{name}/commit/{made.sha}"
    return _json({"success": True, "commitOid": made.sha, "commitUrl": url, "pullRequestUrl": pull, "hookOutput": ""})


def _apply(repo: Repository, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        data = base64.b64decode(value["content"])
        errors = validate(data.decode())[0] if path == "README.md" else []
        if errors:
            raise Refused(400, None, errors[0])
        files[path] = File.regular(data)
    elif key == "lfsFile":
        if value["oid"] not in repo.lfs:
            raise Refused(
                400, None, f"Your push was rejected: LFS pointer {path} points to a file that does not exist"
            )
        files[path] = File.large(repo.lfs[value["oid"]])
    elif key in ("deletedFile", "deletedFolder"):
        gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
        if not gone:
            raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
        for p in gone:
            del files[p]
    else:
        raise Refused(400, None, f"unknown operation {key}")


@route("GET", "/{repo}/resolve/{rev}/{path}")
def resolve(store: Store, request: Request, name: str, revision: str, path: str) -> Answer:
    repo = store.readable(name, request.token)
    try:
        found, file = repo.file(revision, path)
    except Refused as refused:
        # A missing file is cached as missing, under the commit that this header tells.
        extra = {"X-Repo-Commit": repo.at(revision).sha} if refused.code == "EntryNotFound" else {}
        return _refusal(refused, extra)
    headers = {"X-Repo-Commit": found.sha, "X-Linked-Size": str(len(file.data)), "X-Linked-ETag": f'"{file.etag}"'}
    if file.sha256 is None:
        return Answer(file.data, 200, {**headers, "ETag": f'"{file.etag}"'}, is_file=True)
    # Large files lie at another host, as on the Hub: the client takes no token there.
    elsewhere = request.address.replace("127.0.0.1", "localhost")
    place = f"{elsewhere}/cdn/{name}/{file.sha256}/{quote(path)}?signature={store.secret}"
    return Answer(b"Found. Redirecting", 302, {**headers, "Location": place})


@route("GET", "/cdn/{repo}/{rev}/{path}")
def cdn(store: Store, request: Request, name: str, oid: str, path: str) -> Answer:
    if request.query.get("signature") != [store.secret]:
        raise Refused(403, None, "AccessDenied")
    return Answer(store.repos[name].lfs[oid], 200, {"ETag": f'"{oid}"'}, is_file=True)


def _refusal(refused: Refused, extra: dict[str, str] | None = None) -> Answer:
    headers = {"X-Error-Message": refused.message, **(extra or {})}
    if refused.code:
        headers["X-Error-Code"] = refused.code
    return _json({"error": refused.message}, refused.status, **headers)


def safely(store: Store, request: Request) -> Answer:
    """`answer`, with a refusal turned into its answer."""
    try:
        return answer(store, request)
    except Refused as refused:
        return _refusal(refused)
