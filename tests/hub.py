"""A read-only Hub on loopback: repositories are folders, each with one commit.

Serves what `snapshot_download` and `hf_hub_download` ask for: the revision, the tree, and HEAD / GET of files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self._error("EntryNotFound")

    def _api(self, repo: str, rest: list[str], body: bool) -> None:
        folder = self.root / repo
        if not folder.is_dir():
            return self._error("RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._error("RevisionNotFound")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if rest[:1] == ["tree"]:
            answer: object = [
                {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": _etag(p)}
                for p in files
            ]
        else:
            siblings = [{"rfilename": str(p.relative_to(folder))} for p in files]
            answer = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return self._send(json.dumps(answer).encode(), "application/json", {}, body)

    def _file(self, repo: str, revision: str, name: str, body: bool) -> None:
        path = self.root / repo / name
        if revision not in ("main", COMMIT):
            return self._error("RevisionNotFound")
        if not path.is_file():
            return self._error("EntryNotFound" if path.parent.exists() else "RepoNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"', "X-Linked-Size": str(path.stat().st_size)}
        return self._send(path.read_bytes(), "application/octet-stream", headers, body)

    def _send(self, data: bytes, kind: str, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories below `root`; yields the address and the list of requests so far."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
